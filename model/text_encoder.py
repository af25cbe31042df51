"""The text encoder: a prompt in Krea's template -> hidden states of several layers, stacked for every token.

The same class runs Qwen3-VL-4B for the open weights and the small bundled encoder. It holds only the language tower,
and only up to the last tapped layer. For text, Qwen3-VL's three rotary axes count the same position: plain RoPE.

B batch, T tokens, P tokens before them, N taps, E width, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention import attention
from model.checkpoint import Checkpoint, open_checkpoint, refuse_unreadable
from model.comfy_formats import is_auxiliary
from model.errors import K2Error, listed, pluralise
from model.headers import read_json
from model.library import text_weights
from model.stream import stream

SYSTEM = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:"
)
PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_TOKENS, SUFFIX_TOKENS = 34, 5  # the prefix's rows are dropped, the suffix's kept
MAX_PROMPT_TOKENS = 507  # longer prompts are truncated
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KREA_TAPS = tuple(range(2, 36, 3))  # of Qwen3-VL-4B's 36 layers
PREFIXES = ("", "model.language_model.", "language_model.", "model.")  # of the tower's names, depending on the writer

USE_OWN_ENCODER = "Use the text encoder that came with the model, in bf16 or fp8_scaled."
MAX_SIZE, MAX_LAYERS = 1 << 20, 256  # the largest that a config may state

Cache = list[tuple[Tensor, Tensor]]  # per layer: keys, values [B, G, P, D]


@dataclass(frozen=True)
class TextConfig:
    """The dimensions of a tower, under transformers' names; tap n is the state after n layers, 0 the embedding."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    taps: tuple[int, ...]
    mrope_section: tuple[int, ...] = (24, 20, 20)  # pairs of a head that rotate with a picture's time, row and column

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], taps: Sequence[int] | None = None) -> TextConfig:
        """Read our metadata or transformers' config.json, whose text part may be nested and RoPE's base in two places.

        Raises K2Error, also for sizes that no encoder has: they would be allocated before any tensor is compared.
        """
        try:
            config = cls._read(raw, taps)
            sizes = [getattr(config, f.name) for f in fields(cls) if f.type == "int"]
            plausible = all(type(size) is int and 0 < size <= MAX_SIZE for size in sizes)
            plausible &= config.num_hidden_layers <= MAX_LAYERS
            plausible &= all(type(number) is int for number in (*config.taps, *config.mrope_section))
            plausible &= min(config.rope_theta, config.rms_norm_eps) > 0
            if not plausible or not 0 <= min(config.taps) <= max(config.taps):
                raise ValueError
        except (TypeError, ValueError, AttributeError):
            raise K2Error("The text encoder's config cannot be used.", hint="Use a Qwen3-VL text encoder.") from None
        if max(config.taps) > config.num_hidden_layers:
            raise K2Error(
                f"The text encoder has {config.num_hidden_layers} layers, but layer {max(config.taps)} is needed.",
                hint="The open weights need Qwen3-VL-4B.",
            )
        return config

    @classmethod
    def _read(cls, raw: Mapping[str, Any], taps: Sequence[int] | None) -> TextConfig:
        raw = raw.get("text_config", raw)
        theta = (raw.get("rope_parameters") or raw).get("rope_theta", 5e6)
        values = {**raw, "rope_theta": theta, "taps": tuple(taps or raw.get("taps", KREA_TAPS))}
        axes = raw.get("rope_parameters") or raw.get("rope_scaling") or raw
        values["mrope_section"] = tuple(axes.get("mrope_section") or cls.mrope_section)
        missing = [f.name for f in fields(cls) if f.name not in values]
        if missing:
            raise K2Error(f"The text encoder's config lacks {', '.join(missing)}.", hint="Use a Qwen3-VL text encoder.")
        return cls(**{f.name: values[f.name] for f in fields(cls)})


QWEN3_VL_4B = TextConfig(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    rope_theta=5e6,
    rms_norm_eps=1e-6,
    taps=KREA_TAPS,
)


class VisionInputs(NamedTuple):
    """What a vision tower puts into a sequence of T tokens, and the positions of all of them."""

    mask: Tensor  # [T] True = a picture's
    rows: Tensor  # [V, E] replace their embeddings
    deepstack: list[Tensor]  # [V, E] each, added after the first layers
    positions: Tensor  # [3, T]: time, row, column


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate dimension i together with i + D/2: x [B, H, T, D], cos and sin [T, D]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, E], mask [T, P + T] True = attend -> [B, T, E] and this layer's keys and values [B, G, P + T, D]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x.transpose(1, 2) for x in (self.q_norm(q), self.k_norm(k), v))
        q, k = rotate(q, *rope), rotate(k, *rope)
        if past is not None:
            k, v = (torch.cat((old.expand(len(x), -1, -1, -1), new), 2) for old, new in zip(past, (k, v), strict=True))
        out = attention(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).flatten(2)), (k, v)


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, E], mask [T, P + T] True = attend -> [B, T, E] and this layer's keys and values [B, G, P + T, D]."""
        attended, keys_values = self.self_attn(self.input_layernorm(x), rope, mask, past)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), keys_values


class TextTower(nn.Module):
    """Qwen3-VL's text model up to its last tap, under transformers' parameter names."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        empty = torch.empty(config.vocab_size, config.hidden_size)  # random init on meta would import the compiler
        self.embed_tokens = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleList(Layer(config) for _ in range(max(config.taps)))
        if max(config.taps) == config.num_hidden_layers:  # as in transformers, the very last state is normed
            self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, ids: Tensor, past: Cache | None = None, vision: VisionInputs | None = None, saved_positions: int = 0
    ) -> tuple[Tensor, Cache]:
        """ids [B, T], past of the P tokens before (B or 1 rows) -> taps [B, T, N, E] and the cache of all P + T tokens.

        Attention is causal, so padding after a row's end changes nothing before it. saved: how many fewer positions
        than tokens the past takes up, because of pictures.
        """
        before = past[0][0].shape[2] if past else 0
        length = ids.shape[1]
        x = self.embed_tokens(ids)
        mask = torch.ones(length, before + length, dtype=torch.bool, device=ids.device).tril(before)
        if vision is None:
            positions = torch.arange(
                before - saved_positions, before - saved_positions + length, device=ids.device
            ).expand(3, -1)
        else:
            x[:, vision.mask], positions = vision.rows, vision.positions
        rope = self.rope(positions, x)
        states, cache = [x], []
        for index, layer in enumerate(self.layers):
            x, keys_values = layer(x, rope, mask, past[index] if past else None)
            states.append(x)
            cache.append(keys_values)
            if vision is not None and index < len(vision.deepstack):
                x = x.clone()  # a tap is the layer's output, before anything is added
                x[:, vision.mask] += vision.deepstack[index]
        if hasattr(self, "norm"):
            states[-1] = self.norm(x)
        return torch.stack([states[tap] for tap in self.config.taps], 2), cache

    def rope(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [T, D] of positions [3, T]; angles in fp32. Of every three pairs one rotates with the row and
        one with the column, for as many as `mrope_section` says; the others with time. In text all three are equal."""
        c = self.config
        frequencies = c.rope_theta ** -(torch.arange(0, c.head_dim, 2, device=like.device).float() / c.head_dim)
        angles = positions[..., None].float() * frequencies
        mixed = angles[0].clone()
        for axis in (1, 2):
            pairs = slice(axis, 3 * c.mrope_section[axis], 3)
            mixed[:, pairs] = angles[axis][:, pairs]
        mixed = mixed.repeat(1, 2)
        return mixed.cos().to(like.dtype), mixed.sin().to(like.dtype)


class TextEncoder:
    """Tokenizer and tower behind Krea's template."""

    def __init__(self, tower: TextTower, tokenizer: Any):
        self.tower, self.tokenizer = tower, tokenizer
        device = tower.embed_tokens.weight.device
        tokenizer.encode_special_tokens = False
        prefix, suffix = (tokenizer.encode(text, add_special_tokens=False).ids for text in (PREFIX, SUFFIX))
        counts, expected = (len(prefix), len(suffix)), (PREFIX_TOKENS, SUFFIX_TOKENS)
        if counts != expected:
            raise K2Error(
                f"This tokenizer splits the template into {counts} tokens instead of {expected}.",
                hint="Use the tokenizer that came with the text encoder.",
            )
        tokenizer.encode_special_tokens = True  # from here on "<|im_end|>" in a prompt is text, not an end
        self.suffix, self.prefix_ids = suffix, torch.tensor([prefix], device=device)

    @cached_property
    @torch.no_grad()
    def prefix_cache(self) -> Cache:
        """The template's keys and values: the same for all prompts, since attention is causal."""
        return self.tower(self.prefix_ids)[1]

    @classmethod
    def load(
        cls,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        taps: tuple[int, ...] | None = None,
        streamed: bool = False,
    ) -> TextEncoder:
        """Load NAME-text.safetensors (with NAME-tokenizer.json beside it), a transformers folder, or a diffusers one.

        From a folder only the tensors needed are read: no vision tower, no head, no layer past the last tap. If
        streamed, the layers stay on disk, and each is read while the one before it runs.
        """
        return cls(*read_tower(Path(path), device, dtype, taps=taps, streamed=streamed))

    def token_ids(self, prompt: str) -> list[int]:
        """The prompt's tokens and the suffix; space around the prompt means nothing and is stripped."""
        return self._prompt_ids(prompt)[:MAX_PROMPT_TOKENS] + self.suffix

    def truncated(self, prompt: str) -> int:
        """How many tokens are truncated from the end of a prompt."""
        return max(0, len(self._prompt_ids(prompt)) - MAX_PROMPT_TOKENS)

    def _prompt_ids(self, prompt: str) -> list[int]:
        text = prompt.encode("utf-8", "replace").decode().strip()  # lone surrogates become question marks
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @torch.no_grad()
    def encode(self, prompts: list[str], *, batch_size: int = 1, pad_to_multiple_of: int = 1) -> tuple[Tensor, Tensor]:
        """Prompts -> embeds [B, T, N, E], mask [B, T] True = real; T is the longest prompt's tokens + 5.

        With `batch_size` = 1 a prompt's rows are bit for bit the same whatever else is in the list; larger is faster.
        `pad_to_multiple_of` rounds T up.
        """
        rows = [self.token_ids(prompt) for prompt in prompts]
        longest, device = -(-max(map(len, rows)) // pad_to_multiple_of) * pad_to_multiple_of, self.prefix_ids.device
        mask = torch.arange(longest, device=device) < torch.tensor([len(r) for r in rows], device=device)[:, None]
        embeds = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            width = -(-max(map(len, part)) // pad_to_multiple_of) * pad_to_multiple_of
            ids = torch.tensor([row + [0] * (width - len(row)) for row in part], device=device)
            embeds.append(F.pad(self.tower(ids, self.prefix_cache)[0], (0, 0, 0, 0, 0, longest - width)))
        return torch.cat(embeds) * mask[..., None, None], mask


def read_tower(
    path: Path, device: torch.device | str, dtype: torch.dtype, *, taps: tuple[int, ...] | None, streamed: bool
) -> tuple[TextTower, Any]:
    """A tower with its weights, and its tokenizer; arguments as for `TextEncoder.load`."""
    from tokenizers import Tokenizer

    tower, checkpoint = open_tower(path, taps)
    outside = {n: t for n, t in tower.state_dict().items() if not (streamed and n.startswith("layers."))}
    state = dict(checkpoint.read(outside, device=device, dtype=dtype))
    tower.load_state_dict(tower.state_dict() | state, assign=True)
    tower.requires_grad_(False).eval()
    if streamed:
        stream(tower, "layers", lambda names: dict(checkpoint.read(names, dtype=dtype)), torch.device(device))
    file = tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise K2Error(f"{file} is not a tokenizer: {error}.", hint="Download it again.") from None
    tokenizer.no_truncation()  # transformers saves its last call's settings in the file: prompts would be cut silently
    tokenizer.no_padding()
    return tower, tokenizer


def open_tower(path: Path, taps: tuple[int, ...] | None = None) -> tuple[TextTower, Checkpoint]:
    """A tower on the meta device, and the checkpoint to load its weights from, under the tower's own names.

    path: as for `TextEncoder.load`. Raises K2Error if the tensors do not match the config, or, before that, if another
    tool packed them, as their shapes and names then differ.
    """
    checkpoint = open_checkpoint(text_weights(path))
    if any(file.suffix == ".gguf" for file in checkpoint.files):  # llama.cpp's, which uses other names
        raise K2Error(f"{path} is a GGUF file, but text encoders are read from safetensors only.", hint=USE_OWN_ENCODER)
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in checkpoint.tensors), "")
    tensors = {name.removeprefix(prefix): s for name, s in checkpoint.tensors.items() if name.startswith(prefix)}
    refuse_unreadable(replace(checkpoint, tensors=tensors))
    config = TextConfig.from_dict(checkpoint.metadata.get("config") or checkpoint.config, taps or stated_taps(path))
    with torch.device("meta"):
        tower = TextTower(config)
    known = tower.state_dict()
    missing = [prefix + name for name in known if name not in tensors]
    if missing:
        raise K2Error(f"{path} lacks {len(missing)} tensors, beginning with {missing[0]}.", hint="Download it again.")
    for name, tensor in known.items():
        if (shape := tensors[name].shape) != tuple(tensor.shape):
            raise K2Error(f"{name} of {path} is {list(shape)}, but its config asks for {list(tensor.shape)}.")
    used = re.compile(rf"(embed_tokens|layers\.({'|'.join(map(str, range(len(tower.layers))))}))\.")
    extra = [name for name in tensors if used.match(name) and name not in known and not is_auxiliary(name)]
    if extra:  # scales of some number format, or biases: without them it would be another encoder
        raise K2Error(
            f"{path} holds {pluralise(len(extra), 'tensor')} that Qwen3-VL does not have ({listed(sorted(extra), 3)}).",
            hint=USE_OWN_ENCODER,
        )
    return tower, replace(checkpoint, tensors=tensors)


def stated_taps(path: Path) -> Any:
    """The taps stated in a diffusers pipeline folder, unchecked; None if it states none."""
    index = path / "model_index.json"
    return read_json(index).get("text_encoder_select_layers") or None if index.exists() else None


def tokenizer_file(path: Path) -> Path:
    """The tokenizer.json that belongs to a text encoder's file or folder."""
    places = [
        path / "tokenizer.json",
        path / "tokenizer" / "tokenizer.json",
        path.parent / "tokenizer" / "tokenizer.json",
    ]
    if path.is_file():
        places = [path.with_name(path.stem.replace("text", "tokenizer") + ".json"), path.with_name("tokenizer.json")]
    for place in places:
        if place.is_file():
            return place
    raise K2Error(f"There is no tokenizer for {path}.", hint=f"Put it at {places[0]}.")
