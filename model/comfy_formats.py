"""How ComfyUI's files state the storage format of their weights: JSON marks, one per layer. Needs no torch.

A mark is a tensor `LAYER.comfy_quant` beside the weight, or an entry in the file's metadata; some files have both. Most
name a number format, whose numbers times a scale are the weight. int8 may also be *rotated* ("ConvRot", as defined by
comfy-kitchen): see `model/quantize.py`. Other formats scale blocks of a row (`model/blockwise.py`), or are codes for
int8 (`model/four_bit.py`). Formats that k2 does not read are recognised by their tensors' names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

COMFYUI_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
WRAPPERS = ("transformer.", "model.", "dit.", "net.", "module.", "_orig_mod.")  # trainers' wrapping modules
PREFIXES = ("", *COMFYUI_PREFIXES, *WRAPPERS)  # of the transformer's names
OTHER_PARTS = ("vae.", "first_stage_model.", "text_encoders.", "cond_stage_model.")  # other parts in all-in-one files
MARK_SUFFIX = ".comfy_quant"

SCALED_FORMATS = {"float8_e4m3fn", "float8_e5m2", "int8_tensorwise"}  # a number times its scale
BLOCK_SIZES = {"nvfp4": 16, "mxfp8": 32}  # formats with one scale per this many numbers of a row
SCALE_DTYPES = {"nvfp4": ("F8_E4M3",), "mxfp8": ("U8", "F8_E8M0")}  # the file's word for those scales
SECOND_SCALE = "_scale_2"  # suffix of a weight's name: NVFP4's other scale, of the whole matrix
W4A8, W4A4 = "asym_w4a8_int8", "convrot_w4a4"
CODE_FORMATS = (W4A8, W4A4)  # formats with two numbers in every int8, always rotated
STORED_AS = {"nvfp4": "U8", "mxfp8": "F8_E4M3", W4A8: "I8", W4A4: "I8"}  # the file's word for their numbers
GROUP_SIZES = {"group_size": 16, "quant_group_size": 64}  # that they are defined for, by the marks' keys
W4A8_SUFFIXES = ("_s_rel", "_codebook")  # suffixes of a weight's name: W4A8's scales of neighbours, and its levels
SCALE_SUFFIXES = (".weight_scale", ".scale_weight", ".weight_s_channel")  # ours and most others'; ComfyUI's
ALL_SCALE_SUFFIXES = (*SCALE_SUFFIXES, *(f".weight{end}" for end in (SECOND_SCALE, *W4A8_SUFFIXES)))
NOT_WEIGHTS = re.compile(r"(^|\.)(scaled_fp8|comfy_quant|input_scale|scale_input)$")  # for other tools' own kernels
UNSUPPORTED_SCALES = re.compile(  # of formats that k2 does not read
    r"\.(weight_scale_inv|weight_zero_point|weight_correction|weight_scale_(?!2$)\d+)$"
)
OTHER_TOOLS = {  # other tools' formats, by names that only their files have
    "SVDQuant": r"\.(wscales|wtscale|wcscales|(weight_)?smooth_factor)$",
    "GPTQ or AWQ": r"\.(qzeros|weight_zeros)$",
    "DFloat11": r"\.(encoded_exponent|sign_mantissa)$",
    "quanto": r"\.weight\._data(\._data)?$",  # 8 bits, and fewer
    "torchao": r"\._weight_qdata$",
    "bitsandbytes": r"\.(SCB|weight\.(absmax|quant_map|nested_\w+|quant_state\.\w+))$",
    "SDNQ": r"\.zero_point$",
}
IGNORED_TERMS = {  # terms implied by scales and shapes, about the original, or about tokens
    "format", "full_precision_matrix_mult", "per_row", "orig_dtype", "orig_shape", "linear_dtype",
}  # fmt: skip
ROTATION_TERMS = {"convrot", "convrot_groupsize"}
DEFAULT_GROUP = 256  # if a mark only says that the weight was rotated

Mark = str | bytes


def marks_table(text: str | None) -> dict[str, Mark]:
    """The marks in a file's metadata, {"layers": {layer: mark, …}}; an unreadable one if that is not a table."""
    try:
        return {layer: json.dumps(mark) for layer, mark in json.loads(text)["layers"].items()} if text else {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {"": ""}


def make_mark(bits: int, group: int) -> dict[str, Any]:
    """The mark for a matrix, given `few_bits.Format`'s fields; empty if scales and shapes say it all."""
    rotated = {"convrot": True, "convrot_groupsize": group} if group else {}
    if bits == 4:
        return {"format": W4A8, "group_size": GROUP_SIZES["group_size"], **rotated}
    return {"format": "int8_tensorwise", **rotated} if group else {}


def weight_name(layer: str, names: Iterable[str]) -> str:
    """The weight that a layer's mark is about: some writers omit the transformer's prefix."""
    return next((name for prefix in PREFIXES if (name := f"{prefix}{layer}.weight") in names), f"{layer}.weight")


def rotation(marks: Sequence[Mark]) -> int:
    """The group size in which a weight's rows were rotated before rounding; 0 if they were not.

    marks: of one weight, all equal in meaning. Unreadable ones count as none here: they are refused elsewhere.
    """
    try:
        return int(group_size(parse_mark(marks[0]))) if marks else 0
    except (ValueError, TypeError, AttributeError, RecursionError):
        return 0


def special_format(marks: Sequence[Mark], kinds: Iterable[str]) -> str:
    """The format of a weight if it is one of these kinds (`BLOCK_SIZES`, `CODE_FORMATS`); empty for any other.

    marks: as for `rotation`.
    """
    try:
        return next((kind for kind in kinds if marks and parse_mark(marks[0])["format"] == kind), "")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""


def network_shape(name: str, header: Mapping[str, Any], marks: Sequence[Mark] = ()) -> tuple[int, ...]:
    """A tensor's shape in the network: 4-bit numbers are stored two to a byte."""
    shape, dtype = tuple(header[name]["shape"]), header[name]["dtype"]
    packed = (dtype == "U8" and name + SECOND_SCALE in header) or (
        dtype == "I8" and special_format(marks, CODE_FORMATS)
    )
    return (shape[0], 2 * shape[1]) if packed and len(shape) == 2 else shape


def find_problem(marks: Sequence[Mark], dtype: str, shape: Sequence[int]) -> str:
    """What k2 cannot read in a weight's marks; empty if `model/quantize.py` can restore it.

    Unreadable formats scale other blocks, or rotate differently.
    """
    try:
        found = [parse_mark(mark) for mark in marks]
        for how in found:
            extra = sorted(name for name in how if how[name] and not is_harmless(name, how))
            if how["format"] not in {*SCALED_FORMATS, *BLOCK_SIZES, *CODE_FORMATS} or extra:
                return " with ".join([str(how["format"]), *extra[:1]])
        formats = {how["format"] for how in found}
        others = formats & STORED_AS.keys()
        if others and (len(formats) > 1 or dtype != STORED_AS[min(others)]):
            return f"{dtype} with marks of {' and '.join(sorted(formats))}"
        groups = {group_size(how) for how in found}
        if len(groups) > 1:
            return f"{found[0]['format']} with contradictory marks"
        rotated = any(map(is_rotated, found))
        if rotated and not can_be_rotated(group := groups.pop(), found[0]["format"], dtype, shape):
            return f"{dtype} rows of {shape[-1]} rotated in groups of {group} (convrot)"
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return "an unknown format"
    return ""


def parse_mark(mark: Mark) -> dict[str, Any]:
    """A mark's terms. Older writers nest some in a table; the first ComfyUI-INT8-Fast files name no format."""
    how = dict(json.loads(mark))
    how = dict(how.pop("params", None) or {}) | how
    return {"format": "int8_tensorwise"} | how if "convrot" in how else how


def is_harmless(name: str, how: Mapping[str, Any]) -> bool:
    """Whether a term of a mark changes nothing, or is understood."""
    return name in IGNORED_TERMS | ROTATION_TERMS or (
        how["format"] in CODE_FORMATS and how[name] == GROUP_SIZES.get(name)
    )


def group_size(how: Mapping[str, Any]) -> Any:
    return how.get("convrot_groupsize", DEFAULT_GROUP) if is_rotated(how) else 0


def is_rotated(how: Mapping[str, Any]) -> bool:
    return bool(how.get("convrot")) or how["format"] in CODE_FORMATS


def can_be_rotated(group: Any, format: str, dtype: str, shape: Sequence[int]) -> bool:
    """Whether the rotation is defined: for int8 matrices whose rows divide into groups of a power of 4."""
    power_of_4 = type(group) is int and group >= 4 and group.bit_count() == 1 and group.bit_length() % 2 == 1
    whole = format in ("int8_tensorwise", *CODE_FORMATS) and dtype == "I8"
    return power_of_4 and whole and len(shape) == 2 and shape[1] % group == 0


def is_auxiliary(name: str) -> bool:
    """Whether a stored tensor is not one of the network's weights but was added by storage in few bits."""
    return name.endswith((*SCALE_SUFFIXES, SECOND_SCALE, *W4A8_SUFFIXES)) or NOT_WEIGHTS.search(name) is not None
