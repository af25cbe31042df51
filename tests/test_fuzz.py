"""Whatever bytes k2 reads, it returns a value or raises a K2Error, within five seconds and one gigabyte.

`pytest --hypothesis-profile=long tests/test_fuzz.py` tries 20,000 cases of each.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_records import MADE, shot

from k2cli import facts, metadata, moodboard, records
from k2cli.fast_toml import dump
from k2cli.pictures import check_picture
from k2cli.project import Project
from k2cli.runs import resume
from k2cli.toml_tables import Toml
from model.errors import K2Error
from model.headers import read_header
from model.library import describe
from model.references import fit_size, to_pixels
from model.spec import Picture, RenderSpec

PATIENCE = 5.0  # seconds of CPU time
ROOM = 1 << 30  # bytes beyond what the process holds when a case starts
PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 here resets the peak resident size
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Exceeded(BaseException):
    """Not an Exception: picture readers turn those into K2Errors, even AssertionError and MemoryError."""


@contextmanager
def nothing_but_k2_errors() -> Iterator[None]:
    """Within the limits of time and memory, too."""

    def alarm(number: int, frame: object) -> None:
        raise Exceeded(f"{PATIENCE:g} seconds")

    before = signal.signal(signal.SIGPROF, alarm)
    started = time.process_time()
    held = peak(anew=True)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)  # counts CPU time, as other processes may be busy too
    try:
        yield
    except K2Error as error:
        assert str(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        taken = peak() - held
    if time.process_time() - started > PATIENCE:  # during a call into C code, no signal is handled before its end
        raise Exceeded(f"{PATIENCE:g} seconds")
    if taken > ROOM:
        raise Exceeded(f"{taken >> 20} MiB")


def peak(anew: bool = False) -> int:
    """The peak resident bytes as counted by the kernel; if anew, the peak is reset first."""
    if not os.access(PEAK, os.W_OK):
        return 0
    if anew:
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept would be reused unnoticed
        PEAK.write_text("5")
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))


class TestTheBoundsThemselves:
    @pytest.mark.skipif(not os.access(PEAK, os.W_OK), reason="this system cannot reset its memory peak")
    def test_memory_limit(self):
        """Memory that is freed before the end counts, and so does a case that ends in an error."""
        with nothing_but_k2_errors():
            assert bytearray(b"x") * (ROOM // 2)
        with pytest.raises(Exceeded, match="MiB"), nothing_but_k2_errors():
            assert bytearray(b"x") * (ROOM + (64 << 20))
            raise K2Error("too late")
        with nothing_but_k2_errors():  # the earlier peak is reset
            pass

    def test_time_limit(self, monkeypatch):
        monkeypatch.setitem(globals(), "PATIENCE", 0.2)
        with pytest.raises(Exceeded, match="seconds"), nothing_but_k2_errors():
            while True:
                with suppress(Exception):
                    time.monotonic()
        with pytest.raises(Exceeded, match="seconds"), nothing_but_k2_errors():
            sum(bytes(200_000_000))
            raise K2Error("too late")

    def test_only_k2_errors_pass(self):
        with nothing_but_k2_errors():
            raise K2Error("so be it")
        with pytest.raises(ValueError), nothing_but_k2_errors():
            raise ValueError


# ---- texts ------------------------------------------------------------------------------------------------------

NAMES = ("project", "render", "prompt", "style", "moodboard", "name", "model", "size", "aspect", "resolution", "batch")
NAMES += ("seed", "steps", "guidance", "mu", "cohesion", "scope", "creativity", "text", "avoid", "images", "strength")
NAMES += ("keywords", "avoids", "reference", "image", "weight", "mix", "lora", "triggers", "method", "dusk", "riso")
NAMES += ("schema", "created", "pixels", "settings", "expanded", "versions", "files", "sha256", "width", "height")
NAMES += ("device", "precision", "offload", "leader", "picture", "sheet", "columns", "embed", "row", "caption")

keys = st.sampled_from(NAMES) | st.text(max_size=8)
words = st.sampled_from(
    ["mini", "a red fox", "dusk", "64x64", "1K", "3:2", "auto", "raw", "refs/*.png", "../x", "/etc"]
)
leaves = (
    words
    | st.text(max_size=12)
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.booleans()
    | st.dates()
    | st.integers(0, 9)
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=20
)


PIECES = [
    b"[",
    b"]]",
    b'"',
    b"=",
    b"\n",
    b"-",
    b"1e999",
    b"{}",
    b"9" * 400,
    b"0x" + b"f" * 5000,
    b"{a|b}" * 9,
    b"{" * 99,
]
PIECES += [b"0001-01-01T00:00:00+23:59", b"9999-12-31T23:59:59-23:59", b"nan", b"\\ud800", b"\\u001b[2J", b"a." * 20]


def mangled(text: str) -> st.SearchStrategy[bytes]:
    """A valid file with up to three changes: pieces removed, inserted, or doubled."""
    raw = text.encode()

    @st.composite
    def change(draw: st.DrawFn) -> bytes:
        data = raw
        for _ in range(draw(st.integers(1, 3))):
            begin = draw(st.integers(0, len(data)))
            end = min(len(data), begin + draw(st.integers(0, 40)))
            new = draw(st.binary(max_size=8) | st.sampled_from(PIECES))
            data = data[:begin] + new + draw(st.sampled_from([b"", data[begin:end]])) + data[end:]
        return data

    return change()


def written(table: dict) -> bytes:
    """Any table as TOML; what TOML cannot express becomes a text."""
    try:
        return dump(table)
    except (TypeError, ValueError, AttributeError):
        return dump({"prompt": [{"text": repr(table)}]})


tables = st.dictionaries(keys, values, max_size=5).map(written)

EVERYTHING = """\
[project]
name = "moody"
[render]
model = "mini"
size = "64x64"
batch = 2
seed = 7
steps = 4
guidance = 2.5
cohesion = 0.5
scope = "run"
creativity = "low"
[[prompt]]
name = "fox"
text = "a red fox"
avoid = "snow"
batch = 3
[[prompt]]
text = '''an owl
at night'''
[style]
dusk = 0.6
riso = -0.3
[moodboard]
images = ["refs/*"]
strength = 0.0
"""
STYLE = """\
keywords = ["film grain"]
avoids = ["glossy"]
method = "splice"
[[reference]]
image = "refs/*.png"
weight = 0.5
[mix]
riso = 0.5
"""


@pytest.fixture
def studio(moody, monkeypatch) -> Path:
    """A project that uses everything, without a model to load."""

    def look(*what: object) -> None:
        raise K2Error("Nobody looks at boards here.")

    monkeypatch.setattr(moodboard, "analyse_board", look)
    for folder in ("refs", "styles"):
        (moody / folder).mkdir()
    Image.new("RGB", (16, 16)).save(moody / "refs" / "a.png")
    (moody / "styles" / "dusk.toml").write_text(STYLE)
    (moody / "styles" / "riso.toml").write_text('keywords = ["riso"]\n')
    (moody / "k2.toml").write_text(EVERYTHING)
    return moody


def planned(folder: Path) -> None:
    project = Project.open(folder)
    for each in project.shots(project.resolve_settings())[:50]:
        records.planned_record(each, project.root)


@fuzz
@given(mangled(EVERYTHING) | tables | st.binary(max_size=200))
def test_project_files(studio, content):
    (studio / "k2.toml").write_bytes(content)
    with nothing_but_k2_errors():
        planned(studio)


@fuzz
@given(mangled(STYLE) | tables | st.binary(max_size=200))
def test_style_files(studio, content):
    (studio / "styles" / "dusk.toml").write_bytes(content)
    with nothing_but_k2_errors():
        planned(studio)


def a_record(folder: Path) -> str:
    return dump(records.finished_record(shot(), Picture(Image.new("RGB", (32, 48)), MADE), folder)).decode()


RECORD = a_record(Path("/nowhere"))


@fuzz
@given(mangled(RECORD) | tables)
def test_records(studio, content):
    (studio / "fox.toml").write_bytes(content)
    inside = Project.open(studio).path_inside
    with nothing_but_k2_errors():
        record = records.parse(records.read(studio / "fox.toml"), inside)
        facts.describe(record)
        records.locate_model(record, inside)


PLAN = dump({"schema": 1, "embed": True, "sheet": {"centred": False}, "model": {"name": "mini"}}).decode()
PLAN += "\n[[picture]]\n" + "".join(
    line.replace("[", "[picture.") if line.startswith("[") else line
    for line in dump({k: v for k, v in Toml(RECORD, "record").table.items() if k in ("prompt", "settings")})
    .decode()
    .splitlines(keepends=True)
)


@fuzz
@given(mangled(PLAN) | tables)
def test_run_plans(studio, content):
    folder = studio / "outputs" / "0001-fox"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.toml").write_bytes(content)
    with nothing_but_k2_errors():
        resume(Project.open(studio))


# ---- pictures ---------------------------------------------------------------------------------------------------


def encoded(kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = Image.linear_gradient("L").resize((24, 16)).convert(str(options.pop("mode", "RGB")))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


SEEDS = [
    *(
        metadata.encode(Image.new("RGB", (24, 16)), Toml(RECORD, "record").table, format=kind)
        for kind in ("png", "webp", "jpeg")
    ),
    encoded("PNG", mode="RGBA"),
    encoded("PNG", mode="P"),
    encoded("JPEG"),
    encoded("JPEG", progressive=True, mode="CMYK"),
    encoded("WEBP"),
    encoded("WEBP", lossless=True, mode="RGBA"),
]


@st.composite
def spoilt(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A valid file with bytes changed, numbers made absurd, or the end cut off."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        place = draw(st.integers(0, len(data) - 1))
        new = draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"\xff" * 4, b"\x00" * 4, b"\x7f\xff\xff\xff"]))
        data[place : place + len(new)] = new
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@fuzz
@given(spoilt(SEEDS) | st.binary(max_size=100))
def test_pictures(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in (
        lambda: check_picture(path, "here", "a.png"),
        lambda: to_pixels(path, 32, 32),
        lambda: fit_size(path, 4096, 16),
        lambda: records.parse(records.read(path), Path),
    ):
        with nothing_but_k2_errors():
            read()


# ---- weights ----------------------------------------------------------------------------------------------------

numbers = st.integers(-2, 2**64) | st.integers(0, 16) | st.floats() | st.none() | st.text(max_size=3)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F4", "X9", "", None, 7]),
        "shape": st.lists(numbers, max_size=4) | numbers,
        "data_offsets": st.lists(numbers, max_size=3) | st.sampled_from([[0, 8], [8, 16], [0, 0]]),
    }
)
right = st.sampled_from([(8, [2]), (16, [2, 2]), (0, [0]), (4, [])])


@st.composite
def safetensors(draw: st.DrawFn) -> bytes:
    header: dict = {}
    data = 0
    for name in draw(st.lists(st.sampled_from(["a", "blocks.0.attn.wq.weight", "x.lora_A.weight"]), max_size=3)):
        size, shape = draw(right)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [data, data + size]}
        data += size
    if draw(st.booleans()):
        header[draw(st.text(max_size=4))] = draw(entries | values.filter(json_says))
    if draw(st.booleans()):
        about = st.dictionaries(st.sampled_from(["k2", "format", "lora_adapter_metadata"]), values.filter(json_says))
        header["__metadata__"] = draw(about | st.text(max_size=5).map(lambda text: {"k2": text}) | st.integers())
    raw = json.dumps(header).encode()
    length = draw(st.just(len(raw)) | st.integers(0, 2**64 - 1))
    return length.to_bytes(8, "little") + raw + bytes(data + draw(st.sampled_from([0, 0, 1])))


def json_says(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def gguf() -> bytes:
    """A file of one tensor and three fields."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    fields = text("general.alignment") + struct.pack("<II", 4, 32)
    fields += text("general.name") + struct.pack("<I", 8) + text("tiny")
    fields += text("a.list") + struct.pack("<IIQ3f", 9, 6, 3, 1, 2, 3)
    tensor = text("w") + struct.pack("<IQQIQ", 2, 32, 2, 8, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + fields + tensor
    return head + bytes(-len(head) % 32) + bytes(68)


def test_seeds_are_valid(tmp_path):
    """Otherwise nothing beyond the first check would be exercised."""
    (tmp_path / "a").write_bytes(gguf())
    assert read_header(tmp_path / "a")["w"]["shape"] == [2, 32]
    for content in SEEDS:
        (tmp_path / "a").write_bytes(content)
        assert to_pixels(tmp_path / "a", 32, 32).shape == (1, 3, 32, 32)
    usual = {"sampler": "euler", "guidance_until": 1.0}  # defaults for a record that does not have them
    assert records.parse(Toml(RECORD, "record"), Path).shot.spec == RenderSpec(**(vars(shot().spec) | usual))
    assert len(Toml(PLAN, "plan").table["picture"]) == 1


@fuzz
@given(safetensors() | spoilt([gguf()]) | st.binary(max_size=100))
def test_weight_headers(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for read in (read_header, describe):
        with nothing_but_k2_errors():
            read(path)
