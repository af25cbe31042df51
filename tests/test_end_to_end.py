"""The command line with the real pipeline: with random weights always, with the bundled ones if they are there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tree
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file
from tiny import tiny, tiny_box  # noqa: F401

from k2cli import workers
from k2cli.models import grid
from k2cli.toml_tables import Toml
from model import library
from model.headers import read_header
from model.text_encoder import MAX_PROMPT_TOKENS

ROOT = Path(__file__).parents[1]
PROJECT = """\
[render]
model = "tiny"
batch = 2

[[prompt]]
name = "fox"
text = "a red fox curled up asleep"

[[prompt]]
name = "owl"
text = "an owl"
"""


@pytest.fixture
def den(tiny, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """A project that renders with the tiny model, and is the current folder."""
    workers.load_pipeline.cache_clear()
    (tmp_path / "den").mkdir()
    (tmp_path / "den" / "k2.toml").write_text(PROJECT)
    monkeypatch.chdir(tmp_path / "den")
    return tmp_path / "den"


def test_runs_are_reproducible_bit_for_bit(den, k2):
    first, second = (k2("render", "--quiet").stdout.splitlines() for _ in range(2))

    for one, other in zip(first, second, strict=True):
        assert Image.open(one).tobytes() == Image.open(other).tobytes()
        assert record(one)["pixels"] == record(other)["pixels"]
    assert len({record(path)["pixels"] for path in first}) == 4


def test_rerun_uses_the_same_precision_and_offload(den, k2):
    """With weights rounded to int8 and streamed, a picture is a different one; its record reproduces it."""
    options = ["--quiet", "--only", "fox", "--batch", "1"]
    (plain,) = k2("render", *options).stdout.splitlines()
    (held,) = k2("render", *options, "--precision", "int8", "--offload", "all").stdout.splitlines()
    workers.load_pipeline.cache_clear()

    again = k2("rerun", held)

    assert "Identical, pixel for pixel." in again.stderr
    assert record(held)["settings"]["precision"] == "int8" and record(held)["settings"]["offload"] == "all"
    assert record(plain)["settings"]["precision"] == "native" and record(plain)["settings"]["offload"] == "none"
    assert record(plain)["pixels"] != record(held)["pixels"]


def test_a_picture_is_the_same_alone_and_in_a_batch(den, k2):
    in_company = k2("render", "--quiet").stdout.splitlines()[-1]
    (alone,) = k2("render", "--quiet", "--only", "owl", "--seed", "1", "--batch", "1").stdout.splitlines()

    difference = ImageChops.difference(Image.open(in_company), Image.open(alone))
    assert max(high for _, high in difference.getextrema()) <= 1


def test_rerun_makes_the_same_pixels(den, k2):
    made = Path(k2("render", "--quiet", "--only", "fox", "--size", "96x64", "--steps", "3").stdout.splitlines()[1])
    bare = Path(shutil.copy(made, den / "bare.png"))

    for file in (made.with_suffix(".toml"), bare):
        assert "Identical, pixel for pixel." in k2("rerun", file).stderr


def test_rerun_uses_the_same_guidance_and_sampler(den, k2):
    """Guided for as many steps, with the same sampler; to the end and with Euler if a record is older than both."""
    options = ("--quiet", "--only", "owl", "--batch", "1", "--steps", "4")
    half, whole = (Path(k2("render", *options, "--guidance-until", until).stdout.split()[0]) for until in ("0.5", "1"))
    assert (record(half)["settings"]["guidance_until"], record(whole)["settings"]["guidance_until"]) == (0.5, 1.0)
    assert record(half)["pixels"] != record(whole)["pixels"]
    assert "2 until 0.5" in k2("show", half).stdout and "until" not in k2("show", whole).stdout
    assert "Identical, pixel for pixel." in k2("rerun", half).stderr
    second = Path(k2("render", *options, "--sampler", "ab2").stdout.split()[0])
    assert record(second)["settings"]["sampler"] == "ab2" and record(second)["pixels"] != record(whole)["pixels"]
    assert "Identical, pixel for pixel." in k2("rerun", second).stderr
    with Image.open(second) as image:
        assert "Sampler: AB2" in image.text["parameters"]

    text = (den / "k2.toml").read_text()
    (den / "k2.toml").write_text(text.replace("[render]", '[render]\nguidance_until = 0.5\nsampler = "ab2"'))
    table = whole.with_suffix(".toml")
    table.write_text(table.read_text().replace("guidance_until = 1.0\n", "").replace('sampler = "euler"\n', ""))
    assert not {"guidance_until", "sampler"} & set(record(whole)["settings"])
    assert "Identical, pixel for pixel." in k2("rerun", table).stderr


@pytest.mark.skipif("mini" not in library.bundled_models(), reason="the box holds no weights yet")
def test_more_denoise_keeps_less_of_the_init_image(tmp_path, monkeypatch, k2):
    """With the bundled weights; repainted entirely, it is the picture without an init image."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "k2.toml").touch()
    options = ("--quiet", "--turbo", "--size", "128x128", "--seed", "3")
    (first,) = k2("render", *options, "-p", "a red apple on a white background").stdout.split()
    asked = (*options, "-p", "a pumpkin on a white background")
    (alone,) = k2("render", *asked).stdout.split()
    ladder = k2("render", *asked, "--init-image", first, "--matrix", "denoise=0.25,0.5,0.75,1").stdout.split()

    begun = np.asarray(Image.open(first), float)
    apart = [np.abs(np.asarray(Image.open(each), float) - begun).mean() for each in ladder]
    assert apart == sorted(apart) and apart[0] < 0.5 * apart[-1]
    assert record(ladder[-1])["pixels"] == record(alone)["pixels"]
    assert "Identical, pixel for pixel." in k2("rerun", ladder[1]).stderr


def test_rerun_reproduces_styles_by_tokens_and_by_splice(den, k2, monkeypatch):
    """The record says how each reference reached the network, whatever `auto` may come to mean."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(den / "cache"))
    (den / "refs").mkdir()
    (den / "styles").mkdir()
    for name, method in (("red", "auto"), ("navy", "splice")):
        Image.new("RGB", (64, 64), name).save(den / "refs" / f"{name}.png")
        text = f'method = "{method}"\n[[reference]]\nimage = "refs/{name}.png"\n'
        (den / "styles" / f"{name}.toml").write_text(text)
    options = ("--style", "red=0.8", "--style", "navy=-0.5", "--style-guidance", "1.5", "--quiet", "--only", "owl")

    made = Path(k2("render", *options).stdout.splitlines()[1])

    found = record(made)
    assert [(s["name"], s["strength"], s["method"]) for s in found["style"]] == [
        ("red", 0.8, "tokens"),
        ("navy", -0.5, "splice"),
    ]
    assert (found["settings"]["style_guidance"], found["settings"]["leak_guard"]) == (1.5, "damping")
    assert "Identical, pixel for pixel." in k2("rerun", made).stderr
    assert "red 0.8, tokens" in k2("show", made).stdout


def test_record_states_what_was_left_to_the_model(den, k2):
    (path,) = k2("render", "--quiet", "--only", "owl", "--turbo", "--batch", "1").stdout.splitlines()

    found = record(path)
    assert found["settings"] == {
        "seed": 0, "width": 64, "height": 64, "steps": 2, "guidance": 0.0, "mu": 1.15,
        "sampler": "euler", "cohesion": 0.0, "device": "cpu", "dtype": "float32",
        "precision": "native",
        "offload": "none",
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    assert found["model"]["variant"] == "turbo"
    assert "tiny-turbo.safetensors" in found["model"]["files"] and "tiny-vae.safetensors" in found["model"]["files"]


def test_references_change_pictures_unless_at_strength_zero(den, k2):
    (den / "styles").mkdir()
    (den / "refs").mkdir()
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(den / "refs" / "a.png")
    (den / "styles" / "dusk.toml").write_text('[[reference]]\nimage = "refs/a.png"\n')

    def pixels(*options: str) -> str:
        return record(k2("render", "--quiet", "--only", "fox", "--batch", "1", *options).stdout.strip())["pixels"]

    assert pixels("--style", "dusk=0") == pixels()
    assert pixels("--style", "dusk=1") != pixels()


def test_loras_are_reported_recorded_and_reproduced(den, k2):
    width = read_header(library.BUNDLED / "tiny-raw.safetensors")["blocks.0.attn.wq.weight"]["shape"][0]
    pair = {"lora_A.weight": torch.full((2, width), 0.1), "lora_B.weight": torch.full((width, 2), 0.1)}
    for name, module in (("ink", "transformer.transformer_blocks.0.attn.to_q"), ("foreign", "unet.mid.to_q")):
        save_file({f"{module}.{part}": tensor for part, tensor in pair.items()}, den / f"{name}.safetensors")
        (den / "styles").mkdir(exist_ok=True)
        (den / "styles" / f"{name}.toml").write_text(f'lora = "{name}.safetensors"\ntriggers = ["inkk"]\n')

    plain, inked = (k2("render", "--only", "fox", "--batch", "1", "--style", f"ink={w}") for w in (0, 1))

    assert "ink.safetensors: 1 of 1 modules matched" in inked.stderr
    made = record(inked.stdout.strip())
    assert made["prompt"]["expanded"].endswith(", inkk") and made["lora"][0]["matched"] == 1
    assert made["pixels"] != record(plain.stdout.strip())["pixels"]
    assert "Identical, pixel for pixel." in k2("rerun", inked.stdout.strip()).stderr
    inks = den / "ink.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(inks).items()}, inks)
    idle = k2("render", "--only", "fox", "--batch", "1", "--style", "ink=1")
    assert "1 of 1 modules matched, but it changes nothing: it is all zeros" in idle.stderr
    assert record(idle.stdout.strip())["lora"][0]["idle"] is True
    modules = ("blocks.0.attn.wq", "mystery.0", "mystery.1")
    save_file({f"{module}.{part}": tensor + 0 for module in modules for part, tensor in pair.items()}, inks)
    mostly_foreign = k2("render", "--only", "fox", "--batch", "1", "--style", "ink=1", "--json")
    assert json.loads(mostly_foreign.stdout)["warnings"] == ["ink.safetensors: 1 of 3 modules matched."]
    (den / "styles" / "wash.toml").write_text('lora = "ink.safetensors"\n')
    shared = k2("render", "--only", "fox", "--batch", "1", "--style", "ink=1", "--style", "wash=0.5")
    assert shared.stderr.count("1 of 3 modules matched") == 1
    before = tree(den)
    assert "foreign.safetensors" in k2("render", "--style", "foreign=1", code=1).stderr
    assert tree(den) == before
    inks.write_bytes(b"changed")
    assert "ink.safetensors has changed since" in k2("rerun", inked.stdout.strip(), code=1).stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda good, bad: bad.write_bytes(good.read_bytes()[:-1000]), "is damaged"),
        (lambda good, bad: bad.write_bytes(good.read_bytes()[:100]), "is truncated: its header is incomplete"),
        (lambda good, bad: bad.write_bytes(b"PK\x03\x04 and so on, and so on"), "is a PyTorch pickle"),
        (lambda good, bad: bad.write_bytes(b"hello"), "is not a safetensors file"),
        (lambda good, bad: shutil.copyfile(good.with_name("tiny-vae.safetensors"), bad), "weights.safetensors"),
        (lambda good, bad: shutil.copyfile(good.with_name("tiny-text.safetensors"), bad), "weights.safetensors"),
    ],
    ids=["truncated", "header-only", "pickle", "text", "an-autoencoder", "a-text-encoder"],
)
def test_unusable_weights_give_one_error_message(den, k2, make, message):
    for part in ("text.safetensors", "vae.safetensors", "tokenizer.json"):  # a lone transformer borrows these
        shutil.copyfile(library.BUNDLED / f"tiny-{part}", library.BUNDLED / f"mini-{part}")
    make(library.BUNDLED / "tiny-raw.safetensors", den / "weights.safetensors")
    before = tree(den)

    result = k2("render", "--model", "weights.safetensors", code=1)

    assert message in result.stderr and len(result.stderr.splitlines()) <= 2
    assert "Hint:" in result.stderr and result.stdout == ""
    assert tree(den) == before


def test_unknown_device_gives_one_error_message(den, k2):
    before = tree(den)

    result = k2("render", "--device", "cuda:99", code=1)

    assert 'There is no device "cuda:99".' in result.stderr and "cpu" in result.stderr.splitlines()[1]
    assert tree(den) == before


def record(path: str) -> dict:
    return Toml.read(Path(path).with_suffix(".toml"), path).table


@pytest.mark.skipif("mini" not in library.bundled_models(), reason="the box holds no weights yet")
@pytest.mark.parametrize("name", ["stickers", "cast"])
def test_example_projects_render_as_they_are(name, tmp_path, k2):
    workers.load_pipeline.cache_clear()
    project = tmp_path / name
    shutil.copytree(ROOT / "projects_example" / name, project, ignore=shutil.ignore_patterns("outputs"))

    paths = k2("render", project, "--quiet", "--steps", "8").stdout.splitlines()

    assert len(paths) == 8
    for path in paths:
        with Image.open(path) as image:
            assert image.size == (grid("mini").native,) * 2
            assert len(image.getcolors(1 << 16) or range(1 << 16)) > 100  # a drawing, not a flat field
    assert (Path(paths[0]).parent / "sheet.png").exists()


def test_unusual_spaces_in_file_names_are_kept(den, k2):
    """As in the names of screenshots, which contain a narrow one."""
    (den / "refs").mkdir()
    (den / "styles").mkdir()
    for name in ("a\u202fb.png", "two  spaces.png"):
        Image.effect_noise((64, 64), 60).convert("RGB").save(den / "refs" / name)
        (den / "styles" / "dusk.toml").write_text(f'[[reference]]\nimage = "refs/{name}"\n')
        (made,) = k2("render", "--quiet", "--only", "fox", "--batch", "1", "--style", "dusk=0.5").stdout.splitlines()
        assert "Identical, pixel for pixel." in k2("rerun", made).stderr


def test_unread_prompt_tokens_are_reported_once_and_recorded(den, k2):
    long = "fox " * (MAX_PROMPT_TOKENS + 3)
    made = k2("render", "-p", long, "--batch", "2", "--steps", "1")

    assert made.stderr.count(" is too long: ") == 1 and "its last 3 tokens go unread." in made.stderr
    assert [record(line)["prompt"]["unread"] for line in made.stdout.split()] == [3, 3]
    assert k2("render", "-p", long, "--batch", "1", "--steps", "1", "--quiet").stderr == ""
    (answer,) = k2("render", "-p", long, "--batch", "1", "--steps", "1", "--quiet", "--json").stdout.splitlines()
    assert json.loads(answer)["warnings"][0].startswith('Prompt "fox')
    assert "unread" not in made_of("a red fox", k2)["prompt"]


def made_of(prompt: str, k2) -> dict:
    return record(k2("render", "-p", prompt, "--batch", "1", "--quiet").stdout.strip())
