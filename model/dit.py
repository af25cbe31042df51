"""The complete Krea 2 diffusion transformer: text and image tokens in one stream, through one kind of block.

Shape legend
    B  pictures            T  prompt tokens        L  image tokens = h · w of the token grid, row by row
    N  tapped text layers  E  text width           S  T + L, the stream [text | image]
    D  width               H  query heads          K  key-value heads (H is a multiple of K)
    d  head dim = D / H    C  latent channels      p  patch: a token holds C · p · p numbers

Modules are named as in the published native checkpoints, so their state dicts load as is, strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention
from model.latents import centre_on_square, position_ids

FUSION_BLOCKS = 2  # of each kind: across the tapped layers, then across the prompt

# Replaces a block's attention: q [B, H, S, d], k and v [B, K, S, d], normed and rotated -> [B, H, S, d].
# It may record (this is how a reference's keys and values are collected) or replace attention (how they are injected;
# `model/splice.py`). One may wrap another (`model/cohesion.py`), which then gets more keys than queries, extra ones
# first.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """The dimensions of a DiT; everything else follows from them."""

    width: int
    heads: int
    kv_heads: int
    blocks: int
    text_width: int  # hidden size of the text encoder
    text_taps: int  # number of its layers that are tapped
    text_heads: int
    channels: int = 16  # of the latents
    patch: int = 2
    multiplier: int = 4  # of the feed-forward's hidden width, before SwiGLU's two thirds
    time_dim: int = 256
    rope_base: float = 1000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        whole = [value for key, value in asdict(self).items() if key not in ("rope_base", "eps")]
        if not all(type(value) is int for value in whole):
            raise ValueError("all DiT dimensions must be integers")
        if min(asdict(self).values()) <= 0:
            raise ValueError("all DiT dimensions must be positive")
        if self.width % self.heads or self.text_width % self.text_heads:
            raise ValueError("width and text_width must be multiples of their head counts")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key-value heads evenly")
        if self.head_dim % 16:
            raise ValueError(f"head dim {self.head_dim} must be a multiple of 16 to split over the three rotary axes")
        if self.time_dim % 2:
            raise ValueError("time_dim must be even: half cosines, half sines")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def token_dim(self) -> int:
        """Numbers in an image token."""
        return self.channels * self.patch**2

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """How many dimensions of a head rotate with the frame, the row and the column: 32, 48, 48 of 128."""
        side = 6 * (self.head_dim // 16)
        return self.head_dim - 2 * side, side, side


def hidden_width(width: int, multiplier: int) -> int:
    """SwiGLU's hidden width: two thirds of `multiplier · width`, rounded up to a multiple of 128."""
    return math.ceil(int(2 * width / 3) * multiplier / 128) * 128


PRESETS = {
    "mini": DiTConfig(width=384, heads=6, kv_heads=2, blocks=8, text_width=256, text_taps=4, text_heads=4),
    # the open 12.9B release
    "medium": DiTConfig(width=6144, heads=48, kv_heads=12, blocks=28, text_width=2560, text_taps=12, text_heads=20),
    # Krea has published no more of Large than "more than twice Medium"; this shape, for FLUX.2's latents, is ours
    "large": DiTConfig(
        width=8192, heads=64, kv_heads=16, blocks=36, text_width=2560, text_taps=12, text_heads=20, channels=32
    ),
}


def runs_unfused(x: Tensor) -> bool:
    """Whether every small operation on x is its own pass over memory: on a CPU, where nothing is compiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] scaled to a mean square of 1 over D, times weight [D], in fp32."""
    x32 = x.float()
    if runs_unfused(x):  # three passes instead of PyTorch's five
        length = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)
        return (x32 * (length.square() / x.shape[-1] + eps).rsqrt()).mul_(weight).to(x.dtype)
    return F.rms_norm(x32, x.shape[-1:], weight, eps).to(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a zero-centred scale, in fp32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, 1 + self.scale.float(), self.eps)


class QKNorm(nn.Module):
    """Norms for queries and keys, per head, so that attention logits stay bounded at any width."""

    def __init__(self, head_dim: int, eps: float):
        super().__init__()
        self.qnorm = RMSNorm(head_dim, eps)
        self.knorm = RMSNorm(head_dim, eps)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent pairs of x [B, S, heads, d] by rope [S, 1, d/2, 2], cosines and sines."""
    pairs = x.float().unflatten(-1, (-1, 2))
    if runs_unfused(x):  # one pass instead of seven; compilers need real numbers
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    else:
        (even, odd), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
    return rotated.flatten(-2).to(x.dtype)


def attend_by_group(attends: Sequence[Attend], shapes: Sequence[Sequence[int]]) -> Attend:
    """Attention over a packed stream of groups of [n, S] tokens: each group has its own `attend`, each row sees only
    itself."""

    def each(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = (x[0].split([count * length for count, length in shapes], 1) for x in (q, k, v))  # [H, n*S, d]
        rows = (
            (part.unflatten(1, shape).transpose(0, 1) for part in group)
            for shape, group in zip(shapes, zip(*split, strict=True), strict=True)
        )
        answers = (attend(*group) for attend, group in zip(attends, rows, strict=True))
        return torch.cat([answer.transpose(1, 2).flatten(0, 1) for answer in answers])[None].transpose(1, 2)

    return each


class Attention(nn.Module):
    """Grouped-query attention; a sigmoid gate computed from the input scales each head's output."""

    def __init__(self, width: int, heads: int, kv_heads: int, eps: float):
        super().__init__()
        self.head_dim = width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.qknorm = QKNorm(self.head_dim, eps)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, mask: Tensor | None = None, attend: Attend | None = None
    ) -> Tensor:
        """x [B, S, D], rope [S, 1, d/2, 2] or none, mask [B, 1, 1, S] True = attend -> [B, S, D]."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.wq, self.wk, self.wv))
        q, k = self.qknorm.qnorm(q), self.qknorm.knorm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        heads = attention(q, k, v, mask) if attend is None else attend(q, k, v)
        return self.wo(heads.transpose(1, 2).flatten(2) * torch.sigmoid(self.gate(x)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x))"""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TextBlock(nn.Module):
    """A plain pre-norm block, without time or position."""

    def __init__(self, width: int, heads: int, multiplier: int, eps: float):
        super().__init__()
        self.prenorm = RMSNorm(width, eps)
        self.attn = Attention(width, heads, heads, eps)
        self.postnorm = RMSNorm(width, eps)
        self.mlp = SwiGLU(width, hidden_width(width, multiplier))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, E], mask [B, 1, 1, T] True = attend -> [B, T, E]."""
        x = x + self.attn(self.prenorm(x), mask=mask)
        return x + self.mlp(self.postnorm(x))


class TextFusion(nn.Module):
    """Fuse the tapped layers of each prompt token into one: attend across layers, weigh them, attend across tokens."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        c = config
        self.layerwise_blocks = nn.ModuleList(
            TextBlock(c.text_width, c.text_heads, c.multiplier, c.eps) for _ in range(FUSION_BLOCKS)
        )
        self.projector = nn.Linear(c.text_taps, 1, bias=False)
        self.refiner_blocks = nn.ModuleList(
            TextBlock(c.text_width, c.text_heads, c.multiplier, c.eps) for _ in range(FUSION_BLOCKS)
        )

    def forward(self, prompt_embeds: Tensor, mask: Tensor | None) -> Tensor:
        """prompt_embeds [B, T, N, E], mask [B, 1, 1, T] True = attend -> [B, T, E]."""
        x = prompt_embeds.flatten(0, 1)
        for block in self.layerwise_blocks:
            x = block(x)
        x = self.projector(x.transpose(1, 2)).squeeze(-1).unflatten(0, prompt_embeds.shape[:2])
        for block in self.refiner_blocks:
            x = block(x, mask)
        return x


class Modulation(nn.Module):
    """What one layer adds to the modulation that all layers share."""

    def __init__(self, *shape: int):
        super().__init__()
        self.lin = nn.Parameter(torch.zeros(*shape))


class SingleStreamBlock(nn.Module):
    """Attention and SwiGLU, each scaled, shifted and gated by the time embedding."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        c = config
        self.mod = Modulation(6 * c.width)
        self.prenorm = RMSNorm(c.width, c.eps)
        self.attn = Attention(c.width, c.heads, c.kv_heads, c.eps)
        self.postnorm = RMSNorm(c.width, c.eps)
        self.mlp = SwiGLU(c.width, hidden_width(c.width, c.multiplier))

    def forward(
        self, x: Tensor, time_mod: Tensor, rope: Tensor, mask: Tensor | None, attend: Attend | None = None
    ) -> Tensor:
        """x [B, S, D], time_mod [B or 1, 1, 6D], rope [S, 1, d/2, 2], mask [B, 1, 1, S] True = attend -> [B, S, D]."""
        a_scale, a_shift, a_gate, m_scale, m_shift, m_gate = (time_mod + self.mod.lin).chunk(6, -1)
        # addcmul(c, a, b) is c + a · b, in one pass over memory instead of two
        attended = self.attn(torch.addcmul(a_shift, 1 + a_scale, self.prenorm(x)), rope, mask, attend)
        x = torch.addcmul(x, a_gate, attended)
        fed = self.mlp(torch.addcmul(m_shift, 1 + m_scale, self.postnorm(x)))
        return torch.addcmul(x, m_gate, fed)


class LastLayer(nn.Module):
    """Norm, modulation by the time embedding itself, and projection to token size."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm = RMSNorm(config.width, config.eps)
        self.linear = nn.Linear(config.width, config.token_dim)
        self.modulation = Modulation(2, config.width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, D], time [B or 1, 1, D] -> [B, L, C·p·p]."""
        scale, shift = (time + self.modulation.lin).chunk(2, 1)
        return self.linear((1 + scale) * self.norm(x) + shift)


class Krea2(nn.Module):
    """Predicts the velocity (noise − image) of image tokens, given the prompt and the noise level.

    `forward` does it in one call, for training. A sampler calls the parts, since only `velocity` changes from step to
    step: `encode_text` runs once per prompt, `modulate` and `rope` once for all steps.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        c = self.config = config
        self.first = nn.Linear(c.token_dim, c.width)
        self.tmlp = nn.Sequential(nn.Linear(c.time_dim, c.width), nn.GELU("tanh"), nn.Linear(c.width, c.width))
        self.tproj = nn.Sequential(nn.GELU("tanh"), nn.Linear(c.width, 6 * c.width))
        self.txtfusion = TextFusion(c)
        self.txtmlp = nn.Sequential(
            RMSNorm(c.text_width, c.eps),
            nn.Linear(c.text_width, c.width),
            nn.GELU("tanh"),
            nn.Linear(c.width, c.width),
        )
        self.blocks = nn.ModuleList(SingleStreamBlock(c) for _ in range(c.blocks))
        self.last = LastLayer(c)
        self.side: int | None = None  # side, in tokens, of the square that other grids are centred on; None: not so

    def encode_text(self, prompt_embeds: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """The prompt as the stream sees it; the same at every step.

        prompt_embeds [B, T, N, E] tapped hidden states, prompt_mask [B, T] True = a real token -> context [B, T, D]
        """
        mask = None if prompt_mask is None else prompt_mask[:, None, None]
        return self.txtmlp(self.txtfusion(prompt_embeds, mask))

    def modulate(self, sigmas: Tensor) -> Tensor:
        """The noise levels as the blocks and the last layer see them: all steps in one product.

        sigmas [B] in 0 … 1 -> [B, 1, 7D]: the six parts of the blocks' shared modulation, then the time embedding
        """
        half = self.config.time_dim // 2
        steps = torch.arange(half, dtype=torch.float32, device=sigmas.device)
        angles = 1000 * sigmas.float()[:, None, None] * torch.exp(-math.log(1e4) / half * steps)
        time = self.tmlp(torch.cat((angles.cos(), angles.sin()), -1).to(self.first.weight.dtype))
        return torch.cat((self.tproj(time), time), -1)

    def grid_positions(self, grid: tuple[int, int]) -> Tensor:
        """Row and column of every token in an h × w grid, as positions for RoPE -> [h · w, 2], fp64.

        A network trained on one square puts its subject in the square's middle, and has seen no positions beyond it.
        Any other grid is therefore centred on that middle (`centre_on_square`), in training too.
        """
        positions = position_ids(0, *grid)[:, 1:].double()
        return positions if self.side is None else centre_on_square(positions, grid, self.side)

    def column_offset(self, grid: tuple[int, int]) -> float:
        """How far to shift columns so that a picture of this grid lies right beside another: its full width."""
        columns = self.grid_positions(grid)[: grid[1], 1]
        return float(columns[-1] - columns[0]) * grid[1] / (grid[1] - 1) if grid[1] > 1 else 1.0

    def rope(self, text_tokens: int, grid: tuple[int, int]) -> Tensor:
        """Cosines and sines of the stream's rotary angles, for `text_tokens` and an h × w grid -> [S, 1, d/2, 2]."""
        positions = position_ids(text_tokens, *grid).double()
        positions[text_tokens:, 1:] = self.grid_positions(grid)
        angles = [
            positions[:, axis, None] * self.config.rope_base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
            for axis, dim in enumerate(self.config.rope_axes)
        ]
        angle = torch.cat(angles, -1)[:, None]
        return torch.stack((angle.cos(), angle.sin()), -1).to(self.first.weight.device, torch.float32)

    def velocity(
        self,
        tokens: Tensor,
        context: Tensor,
        step_mod: Tensor,
        rope: Tensor,
        prompt_mask: Tensor | None = None,
        attend: Sequence[Attend | None] | None = None,
    ) -> Tensor:
        """One evaluation of the stream.

        tokens       [B, L, C·p·p]    noisy image tokens
        context      [B, T, D]        from `encode_text`
        step_mod     [B or 1, 1, 7D]  from `modulate`
        rope         [S, 1, d/2, 2]   from `rope`
        prompt_mask  [B, T]           True = a real token; None if all prompts have one length
        attend       one per block    replaces its attention; excludes prompt_mask
        returns      [B, L, C·p·p]    noise − image
        """
        if attend is not None and prompt_mask is not None:
            raise ValueError("custom attention needs prompts of equal length and no mask")
        text, width = context.shape[1], self.config.width
        time_mod, time = step_mod.split((6 * width, width), -1)
        mask = None if prompt_mask is None else F.pad(prompt_mask, (0, tokens.shape[1]), value=True)[:, None, None]
        x = torch.cat((context, self.first(tokens)), 1)
        for block, block_attend in zip(self.blocks, attend or [None] * len(self.blocks), strict=True):
            x = block(x, time_mod, rope, mask, block_attend)
        return self.last(x[:, text:], time)

    def velocities(
        self,
        groups: Sequence[tuple[Tensor, Tensor, Tensor]],
        step_mod: Tensor,
        attend: Sequence[Sequence[Attend | None] | None] | None = None,
    ) -> list[Tensor]:
        """`velocity` for groups of rows, each (tokens, context, rope) with its own prompt length, as one stream.

        step_mod [1, 1, 7D], the same for all; each weight is read once for all groups, and nothing is padded
        attend   one list per group; within a block they run in the order of the groups
        """
        width = self.config.width
        time_mod, time = step_mod.split((6 * width, width), -1)
        parts = [torch.cat((context, self.first(tokens)), 1) for tokens, context, _ in groups]
        shapes = [part.shape[:2] for part in parts]
        x = torch.cat([part.flatten(0, 1) for part in parts])[None]
        rope = torch.cat([rope.repeat(count, 1, 1, 1) for (count, _), (*_, rope) in zip(shapes, groups, strict=True)])
        each = [own or [None] * len(self.blocks) for own in attend or [None] * len(groups)]
        for block, *own in zip(self.blocks, *each, strict=True):
            x = block(x, time_mod, rope, None, attend_by_group([one or attention for one in own], shapes))
        outputs = self.last(x, time)[0].split([count * length for count, length in shapes])
        return [
            output.unflatten(0, shape)[:, context.shape[1] :]
            for output, shape, (_, context, _) in zip(outputs, shapes, groups, strict=True)
        ]

    def forward(
        self,
        tokens: Tensor,
        sigma: Tensor,
        prompt_embeds: Tensor,
        grid: tuple[int, int],
        prompt_mask: Tensor | None = None,
    ) -> Tensor:
        """tokens [B, L, C·p·p], sigma [B], prompt_embeds [B, T, N, E], grid (h, w) -> velocity [B, L, C·p·p]."""
        context = self.encode_text(prompt_embeds, prompt_mask)
        rope = self.rope(context.shape[1], grid)
        return self.velocity(tokens, context, self.modulate(sigma), rope, prompt_mask)

    def initialise(self) -> None:
        """Initial weights for training: variance-preserving products, quiet residual branches, a velocity of zero.

        Gates start open at one and `wo`, `down` small, not the other way round, so that every matrix learns from the
        second step on.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith((".wo", ".down")):
                    depth = self.config.blocks if name.startswith("blocks.") else 2 * FUSION_BLOCKS
                    module.weight.data.mul_((2 * depth) ** -0.5)
            elif isinstance(module, RMSNorm):
                nn.init.zeros_(module.scale)
            elif isinstance(module, SingleStreamBlock):
                nn.init.zeros_(module.mod.lin)
                module.mod.lin.data.view(6, -1)[2::3] = 1  # the two gates
            elif isinstance(module, LastLayer):
                nn.init.zeros_(module.modulation.lin)
        nn.init.normal_(self.get_parameter("tproj.1.weight"), std=0.1 * self.config.width**-0.5)
        nn.init.constant_(self.txtfusion.projector.weight, 1 / self.config.text_taps)
        nn.init.zeros_(self.last.linear.weight)
