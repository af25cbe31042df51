"""A pipeline that paints flat colours, so that everything around the model is tested in milliseconds."""

from __future__ import annotations

import functools
import gc
import hashlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import hypothesis
import pytest
import typer.testing
from PIL import Image
from typer.testing import CliRunner

from k2cli import workers
from k2cli.app import app
from model import library
from model.errors import K2Error
from model.hashes import sha256
from model.spec import Picture, RenderSpec

SIDE = 64

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: there is one process per core

hypothesis.settings.register_profile("k2", deadline=None)  # a busy machine is not a failure
hypothesis.settings.register_profile("long", hypothesis.settings.get_profile("k2"), max_examples=20_000)
hypothesis.settings.load_profile("k2")

# Typer's runner rebuilds all commands for each call, which takes most of a test's time although they never change.
typer.testing._get_command = functools.cache(typer.testing._get_command)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A full run uses all cores, up to four; named files run in this process, which starts sooner."""
    return min(4, os.cpu_count() or 1) if config.args_source is pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_collection_finish() -> None:
    """Objects from before the first test stay: no garbage collection needs to scan all of torch, half a second each."""
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """Shells make background jobs ignore Ctrl-C, and children inherit that; tests need it to work all the same."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def able_terminal(monkeypatch: pytest.MonkeyPatch):
    """Terminal output does not depend on the terminal that runs the tests, such as an editor's."""
    monkeypatch.setenv("TERM", "xterm")


class FakePipeline:
    """Pictures depend only on the spec. `stop` is called before each picture, to raise what a test wants raised."""

    loaded: ClassVar[list[tuple[Any, ...]]] = []
    held: ClassVar[list[tuple[Any, ...]]] = []
    seen: ClassVar[list[RenderSpec]] = []
    stop: Callable[[int], None] = staticmethod(lambda index: None)

    @classmethod
    def load(
        cls,
        name: str = "mini",
        variant: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        precision: str | None = None,
        offload: str | None = None,
    ):
        if device not in (None, "cpu"):
            raise K2Error(f'There is no device "{device}".', hint="Here is: cpu.")
        cls.loaded.append((name, variant, device, dtype))
        cls.held.append((precision, offload))
        pipeline = cls()
        pipeline.precision, pipeline.offload = precision or "native", offload or "none"
        pipeline.name, pipeline.variant = name, variant or "raw"
        pipeline.device = device or "cpu"
        pipeline.plan = SimpleNamespace(dtype="float32", precision=pipeline.precision, offload=pipeline.offload)
        return pipeline

    def batches(self, specs: Sequence[RenderSpec]) -> list[int]:
        return [len(specs)]

    def stream(
        self, specs: Sequence[RenderSpec], on_step: Callable[[int, int], None] | None = None
    ) -> Iterator[Picture]:
        for index, spec in enumerate(specs):
            type(self).stop(index)
            type(self).seen.append(spec)
            for step in range(2):
                if on_step:
                    on_step(step + 1, 2)
            colour = hashlib.sha256(repr((spec.prompt, spec.seed, spec.negative)).encode()).digest()[:3]
            size = (spec.width or SIDE, spec.height or SIDE)
            lone = [path for path in [Path(self.name)] if path.is_file()]
            record = {
                "seed": spec.seed,
                "width": size[0],
                "height": size[1],
                "steps": spec.steps or 28,
                "guidance": 2.5 if spec.guidance is None else spec.guidance,
                "mu": 0.5 if spec.mu is None else spec.mu,
                "device": "cpu",
                "dtype": "float32",
                "precision": self.precision,
                "offload": self.offload,
                "seconds": 0.25,
                "model": {
                    "name": self.name,
                    "variant": self.variant,
                    "files": {path.name: sha256(path) for path in library.bundled_models().get(self.name, lone)},
                },
            }
            yield Picture(Image.new("RGB", size, tuple(colour)), record)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakePipeline]]:
    """The command line with bundled weights of its own and the fake pipeline, without torch."""
    box = tmp_path / "box"
    box.mkdir()
    write_weights(box / "mini-raw.safetensors", {"kind": "dit", "variant": "raw", "native": 128})
    write_weights(box / "mini-vae.safetensors", {"kind": "vae"})
    monkeypatch.setattr(library, "BUNDLED", box)
    module = ModuleType("model.pipeline")
    module.Pipeline = type("Pipeline", (FakePipeline,), {"loaded": [], "held": [], "seen": []})
    monkeypatch.setitem(sys.modules, "model.pipeline", module)
    workers.load_pipeline.cache_clear()
    yield module.Pipeline
    workers.load_pipeline.cache_clear()


def write_weights(path: Path, about: dict[str, Any]) -> None:
    """The smallest safetensors file with metadata that says what it is."""
    import json

    header = {
        "__metadata__": {"format": "pt", "k2": json.dumps(about)},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    }
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(8))


PROJECT = """\
[project]
name = "moody"

[render]
seed = 7

[[prompt]]
name = "fox"
text = "a red fox"

[[prompt]]
text = "an owl at night"
"""


@pytest.fixture
def moody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: type[FakePipeline]) -> Path:
    """A project with two prompts, in the current folder."""
    folder = tmp_path / "moody"
    folder.mkdir()
    (folder / "k2.toml").write_text(PROJECT)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def k2() -> Callable[..., Any]:
    """Run a command in this process; exceptions that no user should see are raised."""

    def run(*arguments: str, input: str | None = None, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=input)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return run


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file in a folder with its bytes, every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def many_pictures(outputs: Path, count: int, *, per_run: int = 40, text: str = "", png: bytes = b"") -> None:
    """A history of any length: runs of one prompt each, records as a render writes them, one small picture for all."""
    from datetime import UTC, datetime, timedelta

    from k2cli.fast_toml import dump

    subjects = ("fox", "owl", "teapot", "lighthouse", "cactus")
    if not png:
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), "teal").save(buffer, "PNG")
        png = buffer.getvalue()
    for start in range(0, count, per_run):
        run = start // per_run
        name = subjects[run % len(subjects)]
        folder = outputs / f"{run + 1:04d}-{name}"
        folder.mkdir(parents=True)
        style = {"name": "dusk", "strength": 0.6, "keywords": ["film grain"], "avoids": []}
        for seed in range(start, min(start + per_run, count)):
            record = {
                "schema": 1,
                "created": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=run, seconds=seed - start),
                "seconds": 1.25 + seed / 1000,
                "pixels": f"{seed:064x}",
                "prompt": {
                    "name": name,
                    "text": text or f"a red {name}",
                    "expanded": f"{text or f'a red {name}'}, film grain",
                    "avoid": "",
                    "creativity": "raw",
                },
                "settings": {
                    **{"seed": seed, "width": 64, "height": 64, "steps": 28, "guidance": 2.5, "mu": 0.5},
                    **{"device": "cpu", "dtype": "float32", "precision": "native", "offload": "none"},
                },
                "model": {"name": "mini", "variant": "raw", "files": {"mini-raw.safetensors": "ab" * 32}},
                "style": [style] if run % 2 else None,
                "versions": {"python": "3.11.7", "k2": "0.1.0", "torch": "2.13.0"},
            }
            (folder / f"{name}-{seed}.toml").write_bytes(dump(record))
            (folder / f"{name}-{seed}.png").write_bytes(png)
