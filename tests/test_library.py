"""Models by name, and what their headers say without a tensor being read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path

import pytest

from k2cli import models
from model import library
from model.errors import K2Error
from model.spec import resolve_mu

COMMIT = "c" * 40


def write(path: Path, shapes: Mapping[str, tuple[int, ...]], about: dict | None = None, dtype: str = "BF16") -> Path:
    """A safetensors file of these shapes; its numbers are a hole that takes no space on the disk."""
    header: dict = {"__metadata__": {"k2": json.dumps(about)}} if about else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    return path


def transformer(width: int = 256, blocks: int = 2, prefix: str = "") -> dict[str, tuple[int, ...]]:
    names = {}
    for i in range(blocks):
        attention = f"{prefix}blocks.{i}.attn"
        names |= {f"{attention}.wq.weight": (width, width), f"{attention}.wk.weight": (width // 4, width)}
        names[f"{attention}.qknorm.qnorm.scale"] = (64,)
    return names | {f"{prefix}txtfusion.refiner_blocks.0.attn.wq.weight": (32, 32)}


def diffusers(width: int = 256, blocks: int = 2) -> dict[str, tuple[int, ...]]:
    table = (("blocks", "transformer_blocks"), ("wq", "to_q"), ("wk", "to_k"), ("qknorm.qnorm.scale", "norm_q.weight"))
    renamed = {}
    for name, shape in transformer(width, blocks).items():
        for ours, theirs in table:
            name = name.replace(ours, theirs, 1)
        renamed[name.replace("txtfusion.refiner_transformer_blocks", "text_fusion.refiner_blocks")] = shape
    return renamed


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of bundled models and a cache, both for one test."""
    monkeypatch.setattr(library, "BUNDLED", tmp_path / "box")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def pulled(home: Path) -> Path:
    """The snapshot of a pipeline that another tool pulled."""
    snapshot = home / f"hf/hub/models--krea--Krea-2-Turbo/snapshots/{COMMIT}"
    write(snapshot / "transformer/diffusion_pytorch_model.safetensors", diffusers())
    (snapshot / "model_index.json").write_text('{"is_distilled": true}')
    ref = snapshot.parents[1] / "refs/main"
    ref.parent.mkdir()
    ref.write_text(COMMIT)
    return snapshot


def test_the_library_needs_neither_torch_nor_the_hub():
    code = "import sys, model.library; sys.exit(bool({'torch', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bundled_models(home: Path):
    for name in ("mini-raw", "mini-turbo", "mini-vae"):
        write(home / f"box/{name}.safetensors", transformer(), {"variant": name.removeprefix("mini-")})

    assert library.find("mini").variant == "raw"
    assert library.locate("mini", "turbo").name == "mini-turbo.safetensors"
    assert library.locate("mini", "large") is None
    assert [(each.name, each.variant) for each in library.list_models()] == [("mini", "raw"), ("mini", "turbo")]
    assert library.find("mini").licence is None


def test_a_bundled_name_is_not_taken_for_a_path(home: Path):
    write(home / "box/mini-raw.safetensors", transformer())
    (home / "mini").mkdir()

    assert library.find("mini").source == "box"


def test_models_by_path(home: Path):
    file = write(home / "my/tuned.safetensors", transformer(), {"variant": "turbo"})

    model = library.find("my/tuned.safetensors")
    assert (model.path, model.source, model.variant, model.root) == (file, "path", "turbo", file.parent)
    assert library.find("my").path == file.parent
    assert library.find("my/other.safetensors") is None


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("krea2_turbo_fp8_scaled", "turbo"),
        ("krea2Turbo_v10", "turbo"),
        ("krea2TurboOfficial_krea2TurboNvfp4", "turbo"),
        ("Krea2Turbo-Q4_K_M", "turbo"),
        ("KREA2_TURBO", "turbo"),
        ("krea2turbo", "turbo"),
        ("krea2Raw_bf16", "raw"),
        ("strawberry_v2", None),
    ],
)
def test_file_names_tell_the_variant(home: Path, name: str, variant: str | None):
    """Turbo with Raw's steps and guidance gives a burnt picture, and takes six times as long."""
    assert library.find(str(write(home / f"{name}.safetensors", transformer()))).variant == variant


def test_an_endlessly_nested_pipeline_states_no_variant(home: Path):
    file = write(home / "mine/transformer/diffusion_pytorch_model.safetensors", diffusers())
    (home / "mine" / "model_index.json").write_text("[" * 200_000)

    assert library.stated_variant(file) is None


def test_a_transformer_takes_variant_and_parts_from_its_pipeline(home: Path):
    """Not from whatever release is here."""
    pipeline = home / "mine"
    file = write(pipeline / "transformer/diffusion_pytorch_model.safetensors", diffusers())
    for name in ("text_encoder", "vae"):
        (pipeline / name).mkdir()
    (pipeline / "model_index.json").write_text('{"is_distilled": true}')

    for path in (pipeline, file.parent, file):
        model = library.find(str(path))
        parts = library.find_parts(model)
        assert (model.variant, parts.text, parts.vae) == ("turbo", pipeline, pipeline / "vae")
        assert parts.dit == (file if path == file else file.parent)
        assert library.find(str(path), "raw") is None
    beside = write(pipeline / "other.safetensors", transformer())
    assert library.find(str(beside)).variant is None


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"max_image_seq_len": 6400},
        {"max_image_seq_len": 6400, "base_shift": 3.0, "max_shift": 3.0},
        {"base_image_seq_len": 100, "max_image_seq_len": 9000, "base_shift": 0.7, "max_shift": 2.5},
        {"base_shift": 1.15, "max_shift": 0.5},
    ],
)
def test_a_pipelines_scheduler_states_raws_mu(home: Path, stated: dict):
    """By diffusers' own line; what the weights recommend takes precedence, and Turbo's is the same for all."""
    krea2 = pytest.importorskip("diffusers.pipelines.krea2.pipeline_krea2")
    scheduler = krea2.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **stated)
    file = write(home / "mine/transformer/diffusion_pytorch_model.safetensors", diffusers())
    (home / "mine/model_index.json").write_text("{}")
    (home / "mine/scheduler").mkdir()
    (home / "mine/scheduler/scheduler_config.json").write_text(json.dumps({"use_dynamic_shifting": True} | stated))

    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    for path in (home / "mine", file):
        mu = library.recommended("raw", {}, path)["mu"]
        for tokens in (16, 1024, 4096, 16384):
            theirs = krea2.calculate_shift(tokens, *(scheduler.config[name] for name in names))
            assert resolve_mu(mu, tokens) == pytest.approx(theirs)
    assert library.recommended("raw", {"recommended": {"mu": 0.25}}, file)["mu"] == 0.25
    assert library.recommended("turbo", {}, file)["mu"] == 1.15
    own = models.default_mu(str(home / "mine"), "raw", 1024, 1024)
    assert own == pytest.approx(krea2.calculate_shift(4096, *(scheduler.config[name] for name in names)))


@pytest.mark.parametrize(
    "stated",
    [
        {"max_image_seq_len": 256},
        {"base_shift": "much"},
        {"max_shift": None},
        {"base_shift": float("nan")},
        {"base_shift": 40, "max_shift": 90},
    ],
)
def test_unusable_time_shifts_are_refused(home: Path, stated: dict):
    (home / "scheduler").mkdir()
    (home / "model_index.json").write_text("{}")
    (home / "scheduler/scheduler_config.json").write_text(json.dumps({"use_dynamic_shifting": True} | stated))
    with pytest.raises(K2Error, match=r"scheduler_config\.json states an unusable time shift"):
        library.recommended("raw", {}, home)


def test_repository_names_tell_the_variant_of_their_files(home: Path):
    snapshot = home / f"hf/hub/models--some--Krea-2-Turbo-GGUF/snapshots/{COMMIT}"
    for name in ("Q8_0", "raw-Q8_0", "RAW/Q8_0"):
        write(snapshot / f"{name}.safetensors", transformer())
    ref = snapshot.parents[1] / "refs/main"
    ref.parent.mkdir()
    ref.write_text(COMMIT)

    for name, variant in (("Q8_0", "turbo"), ("raw-Q8_0", "raw"), ("RAW/Q8_0", "raw")):
        assert library.find(f"some/Krea-2-Turbo-GGUF/{name}.safetensors").variant == variant


@pytest.mark.parametrize(
    "name", ["krea-2", "krea-2-turbo", "krea/Krea-2-Turbo", f"krea-2@{COMMIT[:6]}", "krea-2-turbo@main"]
)
def test_official_models_by_all_their_names(pulled: Path, name: str):
    model = library.find(name)

    assert (model.path, model.variant, model.licence, model.revision) == (
        pulled,
        "turbo",
        library.KREA_2_LICENCE,
        COMMIT,
    )
    assert model.root == pulled


def test_missing_official_models_are_not_found(pulled: Path):
    assert library.find("krea-2", "raw") is None
    assert library.find("krea-2-raw") is None
    assert library.find("krea-2-turbo@v2") is None


def test_everything_a_manifest_lists_must_be_there(pulled: Path):
    weights = pulled / "transformer/diffusion_pytorch_model.safetensors"
    size = weights.stat().st_size
    listed = {"transformer/diffusion_pytorch_model.safetensors": {"bytes": size}}

    (pulled / library.MANIFEST).write_text(json.dumps({"files": listed}))
    assert library.locate("krea-2-turbo") == pulled

    (pulled / library.MANIFEST).write_text(json.dumps({"files": listed | {"vae/config.json": {"bytes": 2}}}))
    assert library.locate("krea-2-turbo") is None

    for damaged in ("{", '{"files": []}', '{"files": {"a": {}}}', '{"files": {"a": {"bytes": "2"}}}', "[" * 20_000):
        (pulled / library.MANIFEST).write_text(damaged)  # as if another tool had pulled it
        assert library.locate("krea-2-turbo") == pulled


def test_a_ref_that_is_not_text_points_nowhere(pulled: Path):
    (pulled.parents[1] / "refs/main").write_bytes(b"\xff\xfe")

    assert library.locate("krea-2-turbo") is None and library.list_models() == []


def test_a_snapshot_without_a_ref_is_not_used(pulled: Path):
    (pulled.parents[1] / "refs/main").unlink()

    assert library.locate("krea-2-turbo") is None and library.list_models() == []


@pytest.mark.parametrize("name", ["a/../../etc", "../a/b", "a--b/c", "/a/b", "a/b@../c", "", "a", "a/b\n"])
def test_invalid_hub_names(name: str):
    assert library.parse_hub_name(name) is None and library.find(name) is None


def test_the_cache_is_where_the_hubs_client_has_it(home: Path, monkeypatch):
    code = "import sys, huggingface_hub.constants as c; from model.library import hub_cache; "
    code += "sys.exit(c.HF_HUB_CACHE != str(hub_cache()))"
    for name, value in {"HF_HOME": "~/one", "XDG_CACHE_HOME": "/two", "HF_HUB_CACHE": "$HOME/three"}.items():
        monkeypatch.delenv("HF_HOME", raising=False)
        monkeypatch.setenv(name, value)
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        ("native", transformer()),
        ("comfyui", transformer(prefix="model.diffusion_model.")),
        ("comfyui", transformer(prefix="diffusion_model.")),
        ("native", transformer(prefix="_orig_mod.")),
        ("diffusers", diffusers()),
    ],
)
def test_layouts_and_shapes(home: Path, layout: str, shapes: dict):
    about = library.describe(write(home / "x.safetensors", shapes))

    assert about["layout"] == layout
    assert about["shape"] == {"width": 256, "blocks": 2, "heads": 4, "kv_heads": 1}
    assert about["precision"] == {"BF16": about["parameters"]} and about["parameters"] == sum(
        map(prod, shapes.values())
    )


def test_scales_of_8_bit_weights_are_not_parameters(home: Path):
    beside = {f"blocks.0.attn.wq.{end}": (1,) for end in ("scale_weight", "scale_input", "comfy_quant", "input_scale")}
    fp8 = library.describe(write(home / "fp8.safetensors", transformer() | beside | {"scaled_fp8": (2,)}))

    assert fp8 == library.describe(write(home / "bf16.safetensors", transformer()))


def test_only_transformers_have_a_layout(home: Path):
    about = library.describe(write(home / "x.safetensors", {"encoder.conv_in.weight": (8, 3, 3, 3)}, {"kind": "vae"}))

    assert about == {"precision": {"BF16": 216}, "parameters": 216, "kind": "vae"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blocks.0.attn.qknorm.qnorm.scale", (1, 64)),
        ("blocks.0.attn.qknorm.qnorm.scale", (0,)),
        ("blocks.0.attn.wk.weight", ()),
        ("blocks.0.attn.wq.weight", (256,)),
    ],
)
def test_odd_shapes_are_described_as_far_as_possible(home: Path, name: str, shape: tuple[int, ...]):
    """Whether the network is complete is for loading to say."""
    main = library.describe(write(home / "x.safetensors", transformer(blocks=1) | {name: shape})).get("shape", {})

    assert main == ({} if "wq" in name else {"width": 256, "blocks": 1})


@pytest.mark.parametrize(("shape", "listens"), [((32,), True), ((16,), False), ((), False)])
def test_which_transformers_listen_to_a_text_encoder(home: Path, shape: tuple[int, ...], listens: bool):
    heard = {"txtmlp.0.scale": shape, "txtfusion.projector.weight": (1, 4)}
    dit = write(home / "x.safetensors", transformer() | heard)
    text = write(home / "text.safetensors", {}, {"config": {"hidden_size": 32, "taps": [1, 2, 3, 4]}})

    assert library.fits_text_encoder(dit, text) is listens


@pytest.mark.parametrize("shapes", [transformer(6144, 28), transformer(6144, 28, "net."), diffusers(6144, 28)])
def test_the_release_is_recognised_by_its_shape(home: Path, shapes: dict):
    """Whatever a file of the 12.9B network is called, Krea's licence came with it."""
    names = list(shapes)
    write(home / "shards/a.safetensors", {name: shapes[name] for name in names[:40]})
    write(home / "shards/b.safetensors", {name: shapes[name] for name in names[40:]})
    write(home / "pipe/transformer/model.safetensors", shapes)

    assert library.find("shards").licence == library.find("pipe").licence == library.KREA_2_LICENCE
    assert library.find("pipe/transformer/model.safetensors").licence == library.KREA_2_LICENCE
    assert library.find("shards/a.safetensors").licence is None  # a lone shard renders nothing


def test_weights_are_at_most_two_subfolders_deep(tmp_path):
    for depth, name in ((2, "near"), (3, "deep")):
        folder = tmp_path.joinpath(*"abc"[:depth])
        folder.mkdir(exist_ok=True, parents=True)
        (folder / f"{name}.safetensors").write_bytes(b"")
    assert [path.name for path in library.find_weights(tmp_path)] == ["near.safetensors"]
