"""Transformers saved as one file in few bits: what loading would have made of them, done once."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_blockwise import stored
from test_dit import random_model
from test_layouts import TINY, comfy_fp8, native, velocity
from tiny import tiny, tiny_box  # noqa: F401

from model import library
from model.checkpoint import open_checkpoint, save
from model.comfy_formats import is_auxiliary
from model.compact import write_compact
from model.errors import K2Error
from model.layouts import load_dit, stored_precision, to_diffusers
from model.pipeline import Pipeline
from model.spec import RenderSpec

PRECISIONS = pytest.mark.parametrize("precision", ["native", "int8", "fp8", "int4"])


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return random_model(TINY).state_dict()


def compact(folder: Path, source: Path, precision: str, variant: str | None = None) -> Path:
    write_compact(source, folder / f"{precision}.safetensors", precision, variant)
    return folder / f"{precision}.safetensors"


@PRECISIONS
@pytest.mark.parametrize("source", ["native", "diffusers", "fp8", "nvfp4"])
def test_file_holds_what_loading_makes_of_its_source(tmp_path, state, source, precision):
    """Bit for bit, however the source is stored."""
    if source == "fp8":
        path = comfy_fp8(tmp_path, state, "weight_scale")
    else:
        kinds = {"native": lambda: state, "diffusers": lambda: to_diffusers(state, TINY)}
        path = native(tmp_path, kinds[source]() if source in kinds else stored("nvfp4", state)[0])
    made = compact(tmp_path, path, precision)

    before, _ = load_dit(path, precision=precision, dtype=torch.bfloat16)
    after, checkpoint = load_dit(made, precision=precision, dtype=torch.bfloat16)

    assert after.config == before.config
    assert stored_precision(checkpoint) == (None if precision == "native" else precision)
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name].float(), tensor.float()), name


@PRECISIONS
def test_file_layout_is_readable_by_other_programs(tmp_path, state, precision):
    made = compact(tmp_path, native(tmp_path, state), precision)
    tensors = load_file(made)

    assert set(state) == {name for name in tensors if not is_auxiliary(name)}
    kinds = {tensors[name].dtype for name in state if name.startswith("blocks.") and state[name].ndim == 2}
    held = {"native": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.int8}
    assert kinds == {held[precision]}
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(".scale")} == {torch.float32}
    length = int.from_bytes(made.read_bytes()[:8], "little")
    assert (8 + length) % 64 == 0
    with safe_open(made, "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_progress_is_reported_per_tensor(tmp_path, state):
    told: list[tuple[int, int]] = []
    write_compact(native(tmp_path, state), tmp_path / "x.safetensors", "int8", None, lambda *far: told.append(far))

    count = len(load_file(tmp_path / "x.safetensors"))
    assert told == [(done, count) for done in range(1, count + 1)]


def test_compacting_twice_changes_nothing(tmp_path, state):
    """Weights already in 8 bits stay as they are; streamed, they answer as they do in memory."""
    made = compact(tmp_path, native(tmp_path, state), "int8")
    (tmp_path / "again").mkdir()
    again = compact(tmp_path / "again", made, "int8")

    assert again.read_bytes() == made.read_bytes()
    whole, streamed = (velocity(load_dit(made, precision="int8", streamed=each)[0]) for each in (False, True))
    assert torch.equal(whole, streamed)


def test_metadata_of_the_weights_is_kept(tmp_path, state):
    about = {"kind": "dit", "variant": "turbo", "native": 64, "recommended": {"steps": 4}, "shapes": ["64x96"]}
    save(tmp_path / "a.safetensors", state, about)
    made = compact(tmp_path, tmp_path / "a.safetensors", "int8", "raw")  # the weights know better

    told = open_checkpoint(made).metadata
    assert {key: told[key] for key in about} == about and told["config"]["width"] == TINY.width
    (tmp_path / "b").mkdir()
    plain = compact(tmp_path / "b", native(tmp_path, state), "int8", "turbo")
    assert library.detect_variant(plain) == "turbo"


def test_compact_files_render_the_same_pictures(tiny, tmp_path, monkeypatch):  # noqa: F811
    helpers, spec = library.bundled_parts("tiny"), RenderSpec("a red fox", seed=3)
    monkeypatch.setattr(library, "bundled_parts", lambda name: helpers)
    for precision in ("int8", "fp8", "int4"):
        made = compact(tmp_path, library.BUNDLED / "tiny-turbo.safetensors", precision)
        kept = Pipeline.load("tiny", "turbo", "cpu", "bfloat16", precision=precision).render([spec])[0]
        pipeline = Pipeline.load(str(made), device="cpu", dtype="bfloat16", precision=precision)
        (ours,) = pipeline.render([spec])
        assert pipeline.variant == "turbo" and ours.record["steps"] == kept.record["steps"]
        assert ours.image.tobytes() == kept.image.tobytes()


def test_file_is_written_whole_or_not_at_all(tmp_path, state, monkeypatch):
    source, target = native(tmp_path, state), tmp_path / "out" / "x.safetensors"
    with pytest.raises(K2Error, match="exists already"):
        write_compact(source, source, "int8", None)

    less = {name: tensor for name, tensor in state.items() if name != "blocks.1.mlp.up.weight"}
    (tmp_path / "less").mkdir()
    with pytest.raises(K2Error, match="1 missing"):
        write_compact(native(tmp_path / "less", less), target, "int8", None)
    assert not target.parent.exists()

    def half(*_):
        yield torch.ones(4)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("model.compact.iter_tensors", half)
    with pytest.raises(K2Error, match=r"x.safetensors cannot be written: No space left on device\."):
        write_compact(source, target, "int8", None)
    assert list(target.parent.iterdir()) == []


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "lies"),
    [("int8", torch.bfloat16), ("fp8", torch.bfloat16), ("int4", torch.bfloat16), ("fp8", torch.float8_e4m3fn)],
)
def test_weights_with_nan_are_not_rounded(tmp_path, state, precision, lies):
    broken = state["blocks.0.attn.wq.weight"].clone()
    broken[3, 5] = float("nan")
    source = native(tmp_path, state | {"blocks.0.attn.wq.weight": broken.to(lies)})

    with pytest.raises(K2Error, match=r"blocks\.0\.attn\.wq\.weight holds NaN or infinite numbers"):
        compact(tmp_path, source, precision)
    assert not (tmp_path / f"{precision}.safetensors").exists()


def test_models_export_command(tiny, k2, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    asked = ("models", "export", "tiny", "--turbo", "x.safetensors", "--precision", "int8")

    def refused(*words: str, code: int) -> str:
        return k2("models", "export", *words, code=code).stderr

    assert k2(*asked).stdout == "x.safetensors\n"
    told = k2("models", "info", "x.safetensors").stdout
    assert "variant      turbo\n" in told and re.search(r"^  I8 +[\d,]+$", told, re.MULTILINE)
    assert "exists already" in refused(*asked[2:], code=1)
    for name in ("x.gguf", "x.GGUF", "x.safetensor", "x.pt"):
        assert f"not write models as {Path(name).suffix}" in refused("tiny", name, code=1) and not Path(name).exists()
    assert "a folder for diffusers holds bf16" in refused("tiny", "out", "--precision", "int8", code=2)
    assert 'cannot be "int7"' in refused("tiny", "y.safetensors", "--precision", "int7", code=2)
    k2("models", "export", "tiny", "raw.safetensors")
    assert "has no turbo checkpoint" in refused("raw.safetensors", "y.safetensors", "--turbo", code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw.safetensors", "x.safetensors"]
