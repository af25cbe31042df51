"""What the recipes would need at medium's true size: parameters, operations, memory, days.

`python -m model.train.cost_model` prints the tables of the model card. Parameters are counted from the network itself;
the rest is arithmetic, and every assumption is a constant below. A multiplication and an addition are two operations; a
step costs three forward passes, as the backward pass has two products for each one in the forward pass (Kaplan et al.,
arXiv 2001.08361).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.dit import FUSION_BLOCKS, PRESETS, DiTConfig, Krea2, hidden_width
from model.train import recipe as recipes
from model.train.optim import uses_muon
from model.train.pretrain import Recipe
from model.train.products import WIDE

GPUS = 64
PEAK = 989.5e12  # operations per second of an H200, bf16 without sparsity (NVIDIA's data sheet)
UTILISATION = 0.40  # share of the peak that a step's own operations reach; Llama 3 reports 38 to 43 % on H100s
SPEEDUP_8_BIT = 1.17  # a step with 8-bit products: Krea's report says 15 to 20 %
TEXT_TOKENS = 128  # tokens of a caption: "mostly long"
STAGES = ("medium-256", "medium-512", "medium-1024")
NETWORKS = {"mini": PRESETS["mini"], "medium": PRESETS["medium"]}


# ---- parameters -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """How many numbers a network has."""

    block: int  # one of the stream's blocks
    in_blocks: int  # all of them
    outside_blocks: int  # text fusion, ends, time
    muon: int  # trained by Muon; AdamW trains the others
    modulation: int  # of the total, what turns time into scales, shifts and gates: `tproj` and each block's own vector

    @property
    def total(self) -> int:
        return self.in_blocks + self.outside_blocks


def parameters(config: DiTConfig) -> Parameters:
    """Counted on the meta device."""
    with torch.device("meta"):
        network = Krea2(config)
    inside = sum(p.numel() for p in network.blocks.parameters())
    shared = sum(p.numel() for p in network.tproj.parameters())
    own = sum(p.numel() for name, p in network.blocks.named_parameters() if name.endswith("mod.lin"))
    return Parameters(
        block=inside // config.blocks,
        in_blocks=inside,
        outside_blocks=sum(p.numel() for p in network.parameters()) - inside,
        muon=sum(p.numel() for name, p in network.named_parameters() if uses_muon(name, p)),
        modulation=shared + own,
    )


def unshared_parameters(config: DiTConfig) -> int:
    """The same network if every block projected time with its own matrix, 6D × D and a bias, as in DiT."""
    own = 6 * config.width**2 + 6 * config.width
    return parameters(config).total - parameters(config).modulation + config.blocks * own


# ---- operations -------------------------------------------------------------------------------------------------


def forward_operations(c: DiTConfig, text: int, image: int) -> float:
    """Of one evaluation for one picture and its prompt: `text` and `image` tokens; products only."""
    tokens, hidden, kv = text + image, hidden_width(c.width, c.multiplier), c.kv_heads * c.head_dim
    block = c.width * (3 * c.width + 2 * kv + 3 * hidden) + 2 * tokens * c.width  # per token, with its attention
    stream = c.blocks * tokens * block + 2 * image * c.token_dim * c.width
    matrices = c.text_width * (5 * c.text_width + 3 * hidden_width(c.text_width, c.multiplier))
    across_layers = FUSION_BLOCKS * text * c.text_taps * (matrices + 2 * c.text_taps * c.text_width)
    across_prompt = FUSION_BLOCKS * text * (matrices + 2 * text * c.text_width) + text * c.text_taps * c.text_width
    text_projection = text * c.width * (c.text_width + c.width)
    time = c.time_dim * c.width + 7 * c.width**2
    return 2.0 * (stream + across_layers + across_prompt + text_projection + time)


# ---- memory -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of a step."""

    state: float  # its share of weights, gradients, averages and moments
    gathered: float  # two complete blocks, everything outside the blocks, and one block's gradient
    activations: float

    @property
    def total(self) -> float:
        return self.state + self.gathered + self.activations


def activation_bytes(c: DiTConfig, tokens: int) -> float:
    """Bytes, in bf16, that one block's backward pass needs for one picture: inputs of products, norms and gates.

    Counted by hand from the block, norms and rotations in fp32: 22 rows of the width, six of the keys and values, four
    of the feed-forward's hidden width.
    """
    hidden, kv = hidden_width(c.width, c.multiplier), c.kv_heads * c.head_dim
    return 2.0 * tokens * (22 * c.width + 6 * kv + 4 * hidden)


def memory(c: DiTConfig, tokens: int, pictures: int, devices: int, *, recompute: bool) -> Memory:
    """Under FSDP2 (`fully_shard`): fp32 masters, gathered in bf16, gradients summed in fp32.

    Each parameter costs its share of 4 bytes for weight, gradient and average each, and 4 or 8 for the moments of Muon
    or AdamW. Recomputing keeps each block's input, and the inside of one block at a time.
    """
    count = parameters(c)
    moments = 4 * count.muon + 8 * (count.total - count.muon)
    state = (12 * count.total + moments) / devices
    gathered = 2 * (2 * count.block + count.outside_blocks) + 4 * count.block
    inside = activation_bytes(c, tokens)
    kept = c.blocks * 2.0 * tokens * c.width + inside if recompute else c.blocks * inside
    return Memory(state, float(gathered), pictures * kept)


def adapter_memory(c: DiTConfig, tokens: int, pictures: int, rank: int) -> tuple[float, float]:
    """Bytes of weights and activations for a LoRA on one device: blocks in 8 bits, the rest in bf16, recomputed."""
    count = parameters(c)
    hidden, kv = hidden_width(c.width, c.multiplier), c.kv_heads * c.head_dim
    sides = 3 * 2 * c.width + 2 * (c.width + kv) + 3 * (c.width + hidden)
    halves = 20 * rank * c.blocks * sides  # fp32: weight, gradient, average, two moments
    kept = c.blocks * 2.0 * tokens * c.width + activation_bytes(c, tokens)
    return count.in_blocks + 2.0 * count.outside_blocks + halves, pictures * kept


# ---- stages -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """What one stage's recipe costs."""

    recipe: Recipe

    @property
    def tokens(self) -> int:
        """Of the image: 16 × 16 pixels each."""
        return (self.recipe.size // 16) ** 2

    @property
    def batch(self) -> int:
        """Pictures per step."""
        return self.recipe.accumulate * self.recipe.batch * self.recipe.repeats

    @property
    def pictures(self) -> int:
        return self.recipe.steps * self.batch

    @property
    def operations(self) -> float:
        return self.pictures * 3 * forward_operations(self.recipe.config, TEXT_TOKENS, self.tokens)

    @property
    def days(self) -> float:
        speedup = SPEEDUP_8_BIT if self.recipe.products != WIDE else 1.0
        return self.operations / (GPUS * PEAK * UTILISATION * speedup) / 86400

    @property
    def memory(self) -> Memory:
        pictures = self.recipe.batch * self.recipe.repeats
        return memory(self.recipe.config, self.tokens + TEXT_TOKENS, pictures, GPUS, recompute=self.recipe.recompute)


def stages() -> list[Cost]:
    return [Cost(Recipe.read(recipes.find(name))) for name in STAGES]


# ---- tables -----------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def modulation_table() -> str:
    rows = []
    for name, config in NETWORKS.items():
        light, heavy = parameters(config), unshared_parameters(config)
        unit, digits = (1e9, 2) if heavy > 1e9 else (1e6, 1)
        suffix = "B" if unit == 1e9 else "M"
        rows.append(
            [
                name,
                f"{light.total / unit:.{digits}f} {suffix}",
                f"{heavy / unit:.{digits}f} {suffix}",
                f"{1 - light.total / heavy:.0%}",
            ]
        )
    return table(["shape", "shared modulation", "one per block", "saved"], rows)


def stage_table() -> str:
    rows = []
    for cost in stages():
        recipe, need = cost.recipe, cost.memory
        parts = " + ".join(f"{each / 1e9:.0f}" for each in (need.state, need.gathered, need.activations))
        rows.append(
            [
                f"`{recipe.name}`",
                recipe.products,
                f"{cost.pictures / 1e6:,.0f} M",
                f"{cost.batch:,}",
                f"{3 * forward_operations(recipe.config, TEXT_TOKENS, cost.tokens) / 1e12:.0f} T",
                f"{cost.operations:.1e}".replace("e+", " · 10^"),
                f"{parts} = {need.total / 1e9:.0f} GB",
                f"{cost.days:.1f}",
            ]
        )
    every = stages()
    total = sum(cost.operations for cost in every), sum(cost.days for cost in every)
    rows.append(["total", "", "", "", "", f"{total[0]:.1e}".replace("e+", " · 10^"), "", f"{total[1]:.1f}"])
    head = ["recipe", "products", "pictures", "per step", "operations/picture", "operations", "memory/GPU", "days"]
    return table(head, rows)


def adapter_line() -> str:
    size, rank = 1024, 16
    weights, kept = adapter_memory(PRESETS["medium"], (size // 16) ** 2 + TEXT_TOKENS, 1, rank)
    return (
        f"A LoRA of rank {rank} on Raw, blocks in int8, one picture of {size} px at a time:\n"
        f"{weights / 1e9:.1f} GB of weights and {kept / 1e9:.1f} GB of activations kept for the backward pass."
    )


if __name__ == "__main__":
    print(modulation_table(), stage_table(), adapter_line(), sep="\n\n")
