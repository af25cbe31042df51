"""Read and check the headers of .safetensors and .gguf files and folders, not their weights. Needs no torch."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from model.comfy_formats import MARK_SUFFIX, OTHER_PARTS, Mark, marks_table, network_shape, weight_name
from model.errors import K2Error, brief, listed
from model.gguf_file import read_gguf_header
from model.spec import in_limits

FETCH_AGAIN = "The download may be incomplete: fetch it again."
DIFFUSERS_SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
KREA_SHIFT = (256, 6400, 0.5, 1.15)
SUPPORTED_FILES = "k2 reads weights from .safetensors and .gguf files only."
OTHER_FORMATS = {  # other files mistaken for safetensors, by their first bytes
    b"PK\x03\x04": "a PyTorch pickle",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself",
    b"<!DOCTYPE": "a web page",
    b"<html": "a web page",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
DTYPE_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
DTYPE_BITS |= {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}  # sizes are checked, though k2 reads none of these
DTYPE_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
DTYPE_BITS |= {"I64": 64, "U64": 64, "F64": 64}
MAX_DIMENSIONS = 8
MAX_MARK = 1 << 16  # bytes
MAX_HEADER = 16 << 20  # a network's is some 100 KB; the format allows 100 MB, which would take gigabytes in memory


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored: file, name, number format (the file's word for it), and the shape of its numbers,
    however many of them share a byte."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    marks: tuple[Mark, ...] = ()  # how it is stored, in ComfyUI's files


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file opened for reading. Raises OSError for anything but a regular file: a named pipe would block forever."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a file", str(path))
        yield file


def read_header(path: Path) -> dict[str, Any]:
    """A weights file's header: {tensor name: {dtype, shape, data_offsets}, …}, every claim checked against the file.

    Raises K2Error for a missing, truncated or foreign file.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(32)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            raw = file.read(length) if size >= 8 and length <= min(size - 8, MAX_HEADER) else b""
    except FileNotFoundError:
        raise K2Error(f"There is no file {path}.", hint="List the available models: k2 models list") from None
    except OSError as error:
        raise K2Error(f"{path} cannot be read: {error.strerror}.") from None

    if start.startswith(b"GGUF"):
        return read_gguf_header(path)
    for magic, what in OTHER_FORMATS.items():
        if start.startswith(magic) and not raw.startswith(b"{"):  # a header's length can look like any of these
            raise K2Error(f"{path} is {what}.", hint=SUPPORTED_FILES)
    if not raw.startswith(b"{"):
        if start[8:9] == b"{" and length <= MAX_HEADER:
            raise K2Error(f"{path} is truncated: its header is incomplete.", hint=FETCH_AGAIN)
        kind = "GGUF" if path.suffix.lower() == ".gguf" else "safetensors"
        raise K2Error(f"{path} is not a {kind} file.", hint=FETCH_AGAIN if size < 8 else SUPPORTED_FILES)
    try:
        header = json.loads(raw)
        check_header(header, size - 8 - length)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise K2Error(f"{path} is damaged: {brief(error)}.", hint=FETCH_AGAIN) from None
    return header


def stored_tensors(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str], tuple[Mark, ...]]:
    """A weights file's tensors by name, its metadata, and marks for weights that it lacks. Raises K2Error."""
    header = read_header(path)
    about = header.pop("__metadata__", {})
    marks: dict[str, list[Mark]] = {}
    for layer, mark in marks_table(about.get("_quantization_metadata")).items():
        marks.setdefault(weight_name(layer, header), []).append(mark)
    for name, raw in read_marks(path, header):
        marks.setdefault(name.removesuffix(MARK_SUFFIX) + ".weight", []).append(raw)
    tensors = {
        name: StoredTensor(path, name, network_shape(name, header, own), entry["dtype"], own)
        for name, entry in header.items()
        for own in [tuple(marks.pop(name, ()))]
    }
    stray = tuple(mark for name, those in marks.items() if not name.startswith(OTHER_PARTS) for mark in those)
    return tensors, about, stray


def read_marks(path: Path, header: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The marks beside the weights of a .safetensors file; an overlong one is returned empty."""
    names = [name for name in header if name.endswith(MARK_SUFFIX)]
    if not names:
        return
    with open_file(path) as file:
        start = os.fstat(file.fileno()).st_size - max(entry["data_offsets"][1] for entry in header.values())
        for name in names:
            begin, end = header[name]["data_offsets"]
            file.seek(start + begin)
            yield name, file.read(end - begin) if end - begin <= MAX_MARK else b""


def check_header(header: dict[str, Any], data: int) -> None:
    """Check that tensors tile the `data` bytes after the header, each as long as its shape says. Raises ValueError."""
    spans = []
    check_metadata(own_metadata(header.get("__metadata__", {})))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if len(entry["shape"]) > MAX_DIMENSIONS:
            raise ValueError(f"{name} has {len(entry['shape'])} dimensions")
        if not all(type(number) is int and number >= 0 for number in (begin, end, *entry["shape"])):
            raise ValueError(f"{name} has a shape of {entry['shape']}")
        if entry["dtype"] not in DTYPE_BITS or prod(entry["shape"]) * DTYPE_BITS[entry["dtype"]] != 8 * (end - begin):
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']} in {end - begin} bytes")
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise ValueError(f"a tensor begins at byte {begin}, but the one before ends at {position}")
        position = end
    if position != data:
        raise ValueError(f"it should hold {position:,} bytes of tensors, but holds {data:,}")


VARIANTS = ("raw", "turbo")  # the first is the default
SHAPE_PATTERN = re.compile(r"[1-9]\d{0,4}x[1-9]\d{0,4}")  # width and height in pixels
RECOMMENDABLE = ("steps", "guidance", "mu")  # that may be recommended


def own_metadata(about: Mapping[str, str]) -> dict[str, Any]:
    """The `k2` metadata of our own files; {} for others. `read_header` has checked it."""
    return json.loads(about.get("k2", "{}"))


def check_metadata(about: Any) -> None:
    """Check the `k2` metadata of our own files. Raises ValueError."""
    if not isinstance(about, dict):
        raise ValueError("its k2 metadata is not a table")
    variant, native, settings = (about.get(key) for key in ("variant", "native", "recommended"))
    if variant not in (None, *VARIANTS):
        raise ValueError(f"its variant is {variant!r}, not {' or '.join(VARIANTS)}")
    if native is not None and not (type(native) is int and 0 < native <= 1 << 16):
        raise ValueError(f"its native size is {native!r}")
    shapes = about.get("shapes", [])
    if not (
        isinstance(shapes, list) and all(isinstance(each, str) and SHAPE_PATTERN.fullmatch(each) for each in shapes)
    ):
        raise ValueError(f"the shapes it was trained for are {shapes!r}")
    if settings is not None and not (isinstance(settings, dict) and all(map(is_recommendable, settings.items()))):
        raise ValueError(f"its recommended settings are {settings!r}")


def is_recommendable(setting: tuple[str, Any]) -> bool:
    name, value = setting
    if name not in RECOMMENDABLE or (name == "mu" and value == "auto"):
        return True
    kinds: tuple[type, ...] = (int,) if name == "steps" else (int, float)
    return type(value) in kinds and in_limits(name, value)


def read_json(path: Path) -> dict[str, Any]:
    try:
        with open_file(path) as file:
            raw = file.read(MAX_HEADER + 1)
        if len(raw) > MAX_HEADER:
            raise ValueError(f"it is larger than {MAX_HEADER >> 20} MB")
        value = json.loads(raw.decode())
    except (OSError, ValueError, RecursionError) as error:
        raise K2Error(f"{path} cannot be read: {brief(error)}.", hint=FETCH_AGAIN) from None
    if not isinstance(value, dict):
        raise K2Error(f"{path} is not a table.", hint=FETCH_AGAIN)
    return value


def read_shift(pipeline: Path) -> dict[str, Any]:
    """The mu of a pipeline's scheduler, as in diffusers' `calculate_shift`: "auto" if it is Krea's, a number if it is
    constant, else its values at 256 and at 6400 tokens; {} if none is stated. Raises K2Error."""
    file = pipeline / "scheduler" / "scheduler_config.json"
    stated = read_json(file) if file.is_file() else {}
    if not stated.get("use_dynamic_shifting"):
        return {}
    stated_shift = [stated.get(key, usual) for key, usual in DIFFUSERS_SHIFT.items()]
    try:
        few, many, low, high = map(float, stated_shift)
        ends = tuple(low + (high - low) * (tokens - few) / (many - few) for tokens in (256, 6400))
    except (TypeError, ValueError, ArithmeticError):
        ends = ()
    if not (ends and all(in_limits("mu", end) for end in ends)):
        raise K2Error(f"{file} states an unusable time shift: {brief(stated_shift)}.", hint=FETCH_AGAIN)
    if (few, many, low, high) == KREA_SHIFT:
        return {"mu": "auto"}
    return {"mu": low if low == high else ends}


def shards(folder: Path) -> list[Path]:
    """The weight files of a folder: those in its index, else the only one.

    diffusers names the same weights in another number format NAME.fp16.safetensors; NAME, if present, takes precedence.
    """
    indices = (sorted(folder.glob(f"*.safetensors.index{variant}.json")) for variant in ("", ".*"))
    index = next((index for found in indices for index in found), None)
    if index is not None:
        table = read_json(index).get("weight_map")
        names = set(map(str, table.values())) if isinstance(table, dict) else set()
        if not names or any(Path(name).name != name for name in names):
            raise K2Error(f"{index} does not list files of its own folder.", hint=FETCH_AGAIN)
        missing = sorted(name for name in names if not (folder / name).is_file())
        if missing:
            raise K2Error(
                f"{folder} lacks {listed(missing, 3)} of the {len(names)} files its index lists.", hint=FETCH_AGAIN
            )
        return [folder / name for name in sorted(names)]
    files = sorted(folder.glob("*.safetensors"), key=lambda file: len(file.name)) or sorted(folder.glob("*.gguf"))
    if files and all(file.name.startswith(f"{files[0].stem}.") for file in files):
        files = files[:1]
    if len(files) != 1:
        found = f"{len(files)} {files[0].suffix} files and no index" if files else "no .safetensors or .gguf file"
        raise K2Error(f"{folder} holds {found}.", hint="Name the file itself.")
    return files
