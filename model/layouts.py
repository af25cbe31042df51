"""The layouts in which Krea 2 transformers are published, and how each is mapped to our network.

Native names (this code's module names), ComfyUI's (native under a prefix) and diffusers' (a folder, often in shards),
each possibly under the prefix of the module that held the network when it was saved; any of them as safetensors, also
in 8 bits, or as GGUF. The key map is a table, used in both directions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from model.checkpoint import (
    WIDE_DTYPES,
    Checkpoint,
    StoredTensor,
    load,
    open_checkpoint,
    refuse_unreadable,
    tensor_reader,
)
from model.comfy_formats import (
    ALL_SCALE_SUFFIXES,
    BLOCK_SIZES,
    CODE_FORMATS,
    OTHER_PARTS,
    PREFIXES,
    rotation,
    special_format,
)
from model.dit import FUSION_BLOCKS, DiTConfig, Krea2, hidden_width
from model.errors import K2Error, listed
from model.foreign_weights import DIFFUSERS_KEYS, GIVE_TRANSFORMER, NATIVE_KEYS, refuse_other_weights
from model.headers import FETCH_AGAIN
from model.library import dit_path
from model.low_bit import FORMATS, Format, default_format, use_few_bits
from model.plan import USABLE_SHARE, free_memory
from model.safetensors_file import TORCH_DTYPES as NUMBER_FORMATS
from model.stream import cached_bytes, stream

ATTENTION_NAMES = {
    "wq.weight": "to_q.weight",
    "wk.weight": "to_k.weight",
    "wv.weight": "to_v.weight",
    "gate.weight": "to_gate.weight",
    "wo.weight": "to_out.0.weight",
    "qknorm.qnorm.scale": "norm_q.weight",
    "qknorm.knorm.scale": "norm_k.weight",
}
BLOCK_NAMES = {
    "prenorm.scale": "norm1.weight",
    "postnorm.scale": "norm2.weight",
    **{f"attn.{native}": f"attn.{other}" for native, other in ATTENTION_NAMES.items()},
    **{f"mlp.{name}.weight": f"ff.{name}.weight" for name in ("gate", "up", "down")},
}
OUTSIDE_NAMES = {
    **{f"first.{x}": f"img_in.{x}" for x in ("weight", "bias")},
    **{f"tmlp.0.{x}": f"time_embed.linear_1.{x}" for x in ("weight", "bias")},
    **{f"tmlp.2.{x}": f"time_embed.linear_2.{x}" for x in ("weight", "bias")},
    **{f"tproj.1.{x}": f"time_mod_proj.{x}" for x in ("weight", "bias")},
    "txtmlp.0.scale": "txt_in.norm.weight",
    **{f"txtmlp.1.{x}": f"txt_in.linear_1.{x}" for x in ("weight", "bias")},
    **{f"txtmlp.3.{x}": f"txt_in.linear_2.{x}" for x in ("weight", "bias")},
    "txtfusion.projector.weight": "text_fusion.projector.weight",
    "last.norm.scale": "final_layer.norm.weight",
    **{f"last.linear.{x}": f"final_layer.linear.{x}" for x in ("weight", "bias")},
    "last.modulation.lin": "final_layer.scale_shift_table",
}


def diffusers_names(blocks: int) -> dict[str, str]:
    """Native name -> diffusers' name, for a network of this many blocks."""
    table = dict(OUTSIDE_NAMES)
    for kind in ("layerwise_blocks", "refiner_blocks"):
        for i in range(FUSION_BLOCKS):
            table |= {
                f"txtfusion.{kind}.{i}.{ours}": f"text_fusion.{kind}.{i}.{other}" for ours, other in BLOCK_NAMES.items()
            }
    for i in range(blocks):
        table |= {f"blocks.{i}.{ours}": f"transformer_blocks.{i}.{other}" for ours, other in BLOCK_NAMES.items()}
        table[f"blocks.{i}.mod.lin"] = f"transformer_blocks.{i}.scale_shift_table"  # flat there, 6 × width here
    return table


def to_diffusers(state: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """A native state dict under diffusers' names, in diffusers' shapes."""
    table = diffusers_names(config.blocks)
    return {table[name]: tensor.view(6, -1) if name.endswith(".mod.lin") else tensor for name, tensor in state.items()}


IGNORED = {"last.down.weight", "last.up.weight"}  # in repacked files; neither the release nor diffusers has them


def native_names(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint under native names, whatever its layout. Raises K2Error if it is not a Krea 2 one."""
    tensors = checkpoint.tensors
    refuse_other_weights(checkpoint.path, checkpoint.metadata, tensors)
    for prefix in PREFIXES:
        if any(prefix + name in tensors for name in (*NATIVE_KEYS, *DIFFUSERS_KEYS)):
            ignored_prefixes = OTHER_PARTS if prefix else ()
            unused = {n for n in tensors if n.removeprefix(prefix) in IGNORED or n.startswith(ignored_prefixes)}
            bare = {n.removeprefix(prefix): stored for n, stored in tensors.items() if n not in unused}
            if len(bare) + len(unused) < len(tensors):
                raise K2Error(
                    f'{checkpoint.path} holds the network with and without prefix "{prefix}".', hint=GIVE_TRANSFORMER
                )
            tensors = bare
            break
    if any(name in tensors for name in NATIVE_KEYS):
        return replace(checkpoint, tensors=in_native_shape(tensors))
    if any(name in tensors for name in DIFFUSERS_KEYS):
        back = {other: ours for ours, other in diffusers_names(count_blocks(tensors, "transformer_blocks")).items()}
        stems = {other.removesuffix(".weight"): ours.removesuffix(".weight") for other, ours in back.items()}
        back |= {other + end: ours + end for end in ALL_SCALE_SUFFIXES for other, ours in stems.items()}
        native = {back.get(name, name): stored for name, stored in tensors.items()}
        return replace(checkpoint, tensors=in_native_shape(native))
    if any("txtfusion" in name or "text_fusion" in name for name in tensors):
        refuse_unreadable(checkpoint)  # if every matrix is packed, no plain name shows the layout
    raise K2Error(f"{checkpoint.path} is not a Krea 2 transformer.", hint=GIVE_TRANSFORMER)


def in_native_shape(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors under native names, in native shapes. Others store modulation as 6 × width, and the projector's single
    row as a vector, since writers of 4-bit GGUF drop dimensions of 1."""
    shapes: dict[str, tuple[int, ...]] = {
        name: (prod(s.shape),) for name, s in tensors.items() if name.endswith(".mod.lin")
    }
    if (row := tensors.get("txtfusion.projector.weight")) and len(row.shape) == 1:
        shapes["txtfusion.projector.weight"] = (1, *row.shape)
    return {name: replace(s, shape=shapes.get(name, s.shape)) for name, s in tensors.items()}


def count_blocks(names: Iterable[str], stem: str) -> int:
    """The number of distinct blocks; a file that names only the billionth has one."""
    found = (re.match(rf"{stem}\.(\d+)\.", name) for name in names)
    return len({match[1] for match in found if match})


def dit_config(checkpoint: Checkpoint) -> DiTConfig:
    """The network's dimensions: from our metadata, else from its tensors' shapes (native names). Raises K2Error.

    Packings that k2 does not read change shapes and names, so they are reported first.
    """
    refuse_unreadable(checkpoint)
    try:
        config = stated_config(checkpoint) or inferred_config(checkpoint)
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise K2Error(f"{checkpoint.path} has a shape no Krea 2 transformer has: {error}.", hint=FETCH_AGAIN) from None
    if config.blocks != (blocks := count_blocks(checkpoint.tensors, "blocks")):
        raise K2Error(f"{checkpoint.path} holds {blocks} of {config.blocks} blocks.", hint=FETCH_AGAIN)
    return config


def stated_config(checkpoint: Checkpoint) -> DiTConfig | None:
    values = checkpoint.metadata.get("config")
    if values is not None and (unknown := sorted(set(values) - {f.name for f in fields(DiTConfig)})):
        raise K2Error(f"{checkpoint.path} is of a newer kind: its config has {listed(unknown, 3)}.", hint="Update k2.")
    return None if values is None else DiTConfig(**values)


def inferred_config(checkpoint: Checkpoint) -> DiTConfig:
    def shape(name: str) -> tuple[int, ...]:
        if name not in checkpoint.tensors:
            raise K2Error(
                f"{checkpoint.path} lacks {name}, so it is not a complete Krea 2 transformer.", hint=FETCH_AGAIN
            )
        return checkpoint.tensors[name].shape

    width, token_dim = shape("first.weight")
    (head_dim,), (text_head_dim,) = (
        shape(f"{block}.attn.qknorm.qnorm.scale") for block in ("blocks.0", "txtfusion.refiner_blocks.0")
    )
    (text_width,) = shape("txtmlp.0.scale")
    hidden = shape("blocks.0.mlp.up.weight")[0]
    return DiTConfig(
        width=width,
        heads=width // head_dim,
        kv_heads=shape("blocks.0.attn.wk.weight")[0] // head_dim,
        blocks=count_blocks(checkpoint.tensors, "blocks"),
        text_width=text_width,
        text_taps=shape("txtfusion.projector.weight")[1],
        text_heads=text_width // text_head_dim,
        channels=token_dim // 4,  # in patches of 2 × 2, as in every Krea 2
        multiplier=next((m for m in (4, *range(1, 17)) if hidden_width(width, m) == hidden), 4),
        time_dim=shape("tmlp.0.weight")[1],
        rope_base=float(checkpoint.config.get("rope_theta", 1000.0)),
        eps=float(checkpoint.config.get("norm_eps", 1e-5)),
    )


def open_dit(path: Path | str) -> tuple[Krea2, Checkpoint]:
    """A transformer of any layout on the meta device, and the checkpoint to load its weights from.

    path: a file, the transformer's folder, or the folder of a complete diffusers pipeline. Raises K2Error.
    """
    checkpoint = native_names(open_checkpoint(dit_path(Path(path))))
    with torch.device("meta"):
        return Krea2(dit_config(checkpoint)), checkpoint


def load_dit(
    path: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    precision: str = "native",
    streamed: bool = False,
    cell_size: int | None = None,
) -> tuple[Krea2, Checkpoint]:
    """A transformer ready for inference, and the checkpoint it came from. Raises K2Error.

    path       as for `open_dit`
    precision  of the blocks' matrices: "native" is `dtype`; others as for `prepare_blocks`. Everything outside them
               stays in `dtype`: few numbers, and every step's error passes through them
    streamed   the blocks stay on disk, and each is read while the one before it runs
    cell_size  pixels along the side of the autoencoder's latent cell; needed as `trained_side` says
    """
    model, checkpoint = open_dit(path)
    model.side = trained_side(checkpoint, model.config.patch, cell_size)
    prepare_blocks(model, checkpoint, precision)
    load(model, checkpoint, device=device, dtype=dtype, skip=lambda name: streamed and name.startswith("blocks."))
    if streamed:
        repacks = precision not in ("native", stored_precision(checkpoint))
        there, blocks = torch.device(device), model.blocks.state_dict().values()
        fits = sum(cached_bytes(tensor, there) for tensor in blocks) < USABLE_SHARE * free_memory("cpu")
        read = tensor_reader(model, checkpoint, device="cpu", dtype=dtype)
        stream(model, "blocks", read, there, keep=repacks and fits)
    return model, checkpoint


def trained_side(checkpoint: Checkpoint, patch: int, cell_size: int | None) -> int | None:
    """The side, in tokens, of the square a transformer was trained on, which other shapes are centred on; None if its
    file names none, like the open weights.

    patch, cell  latent cells along a token's side, pixels along a cell's. Raises ValueError if cell is None but there
                 is such a square: tokens would get positions that the transformer never saw
    """
    native = checkpoint.metadata.get("native")
    if not native:
        return None
    if cell_size is None:
        raise ValueError(f"{checkpoint.path} was trained on pictures of {native} pixels: pass its latents' cell size")
    return int(native) // (patch * cell_size)


def prepare_blocks(model: Krea2, checkpoint: Checkpoint, precision: str) -> None:
    """Set up the matrices of a network's blocks, still on the meta device, to be held in this precision.

    "int8" and "fp8" have a scale per row, "int4" has codes for int8. Matrices already in this precision in the file are
    held as stored, rotated or not. In such a file, those kept in more bits stay so: its writer had their reasons.
    """
    if precision == "native":
        return
    file_precision = stored_precision(checkpoint)

    def choose_format(name: str, layer: nn.Linear) -> Format | None:
        stored = checkpoint.tensors.get(f"blocks.{name}.weight")
        if stored and stored.dtype in WIDE_DTYPES and precision == file_precision:
            return None
        if stored is None or precision == "fp8" or (precision == "int4" != file_precision):
            return default_format(precision, layer.in_features)
        if stored.dtype == "I8":
            four = precision == "int4" and special_format(stored.marks, CODE_FORMATS)
            return Format(torch.int8, 4 if four else 8, rotation(stored.marks))
        return None if precision == "int4" else FORMATS["int8"]

    use_few_bits(model.blocks, choose_format)


def stored_precision(checkpoint: Checkpoint) -> str | None:
    """The precision in which the file stores the blocks' matrices, if it is a few-bit one that k2 can hold."""
    blocks = [stored for name, stored in checkpoint.tensors.items() if name.startswith("blocks.")]
    if any(special_format(stored.marks, CODE_FORMATS) for stored in blocks):
        return "int4"
    dtype, in_blocks = main_format(checkpoint)
    return None if in_blocks else {"I8": "int8", "F8_E4M3": "fp8"}.get(dtype)


def is_packed(checkpoint: Checkpoint) -> bool:
    """Whether the blocks' matrices are not numbers times a scale, but have to be unpacked when read."""
    dtype, in_blocks = main_format(checkpoint)
    return bool(in_blocks) or dtype not in NUMBER_FORMATS


def main_format(checkpoint: Checkpoint) -> tuple[str, str]:
    """How most numbers of the blocks' matrices are stored: the file's word for the format, and which of `BLOCK_SIZES`
    it is.

    Writers keep some matrices in more bits, often the entire first and last blocks.
    """
    numbers: Counter[tuple[str, str]] = Counter()
    for name, stored in checkpoint.tensors.items():
        if name.startswith("blocks.") and name.endswith(".weight"):
            numbers[stored.dtype, special_format(stored.marks, BLOCK_SIZES)] += prod(stored.shape)
    return max(numbers, key=lambda kind: numbers[kind], default=("F32", ""))
