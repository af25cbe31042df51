"""LoRA training learns the pictures it is given, on a base in any precision, and its files are read everywhere."""

from __future__ import annotations

import json
import shlex
import shutil
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_dit import inputs, random_model, reference, relative_error
from test_lora import LAYOUTS, TINY, linears, velocity
from test_lora import write as write_state
from tiny import tiny, tiny_box  # noqa: F401
from torch import Tensor

from model import library
from model.adapter_path import LowRank
from model.checkpoint import open_checkpoint, read, save
from model.dit import Krea2
from model.errors import K2Error
from model.hashes import sha256
from model.headers import read_header
from model.latents import position_ids
from model.layouts import load_dit
from model.lora_match import read_lora
from model.low_bit import FewBitLinear, dequantised_state
from model.pipeline import Pipeline
from model.spec import Lora, RenderSpec, raw_mu
from model.train import adapter, loop, states
from model.train.adapter import AdapterStage, Recipe, TrainablePairs, TrainingMaterial, main, write
from model.train.pictures import (
    CaptionedPicture,
    add_trigger,
    describe_captions,
    encode,
    read_folder,
    shorten_caption,
    words_from_stem,
)
from model.train.pretrain import checkpoint_blocks

RECIPE = Recipe(name="dusk", pictures="pictures", model="tiny", steps=8, rank=4, batch=4, every=4, lr=1e-2)


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Ten flat pictures of one palette, most of them square, with captions of every kind."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    (folder / "below").mkdir(parents=True)
    for index in range(10):
        size = (96, 64) if index > 6 else (64, 64)
        picture = Image.new("RGB", size, (220, 120 + 5 * index, 40))
        picture.paste((30, 40, 90), (16, 16, 16 + int(rng.integers(8, 32)), 40))
        picture.save(folder / ("below" if index == 9 else ".") / f"red-fox_{index}.png")
    (folder / "red-fox_3.txt").write_text("an owl,\n  at night\n")
    return folder


# ---- pictures and captions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "words"),
    [
        ("red-fox_03 (2)", "red fox"),
        ("a cup of coffee", "a cup of coffee"),
        ("7_dwarfs", "7 dwarfs"),
        ("Übergang.final", "Übergang final"),
        ("picture of a fox", "picture of a fox"),
        ("IMG_2041", ""),
        ("DSCF0012", ""),
        ("Screenshot from 2026-01-02 11-12-13", ""),
        ("0007", ""),
        ("3f2504e0-4f89-11d3-9a0c-0305e82c3301", ""),
    ],
)
def test_captions_from_file_names(stem, words):
    assert words_from_stem(stem) == words


def test_captions_come_from_text_files_or_file_names(pictures):
    found = read_folder(pictures, trigger="dusk style")

    assert len(found) == 10 and found == sorted(found, key=lambda picture: picture.path)
    captions = {picture.path.name: picture.caption for picture in found}
    assert captions["red-fox_0.png"] == captions["red-fox_9.png"] == "red fox, dusk style"
    assert captions["red-fox_3.png"] == "an owl, at night, dusk style"
    (pictures / "red-fox_3.txt").write_text("Dusk style of an owl")
    assert read_folder(pictures, trigger="dusk style")[4].caption == "Dusk style of an owl"  # it is there already
    assert describe_captions(pictures, found) == "1 caption from text files, 9 captions from file names"
    (pictures / "red-fox_3.txt").rename(pictures / "red-fox_3.TXT")  # as on an old camera's memory card
    assert read_folder(pictures)[4].caption == "Dusk style of an owl"
    assert describe_captions(pictures, found) == "1 caption from text files, 9 captions from file names"
    (pictures / "red-fox_3.TXT").unlink()
    (pictures / "red-fox_3.txt").write_text("")
    assert read_folder(pictures)[4].caption == ""
    (pictures / "red-fox_3.txt").write_text("an owl", "utf-8-sig")  # as Windows' own editor writes it
    assert read_folder(pictures)[4].caption == "an owl"


@pytest.mark.parametrize(
    ("caption", "joined"),
    [
        ("pink flower", "pink flower, ink"),  # does not contain the word "ink"
        ("Ink, on paper", "Ink, on paper"),
        ("a flower,", "a flower, ink"),
        (", ", "ink"),
        ("", "ink"),
    ],
)
def test_trigger_is_added_to_captions_that_lack_it(caption, joined):
    assert add_trigger(caption, "ink") == joined
    assert add_trigger(caption, "") == caption


@pytest.mark.parametrize(("there", "asked"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_trigger_is_recognised_in_any_unicode_form(there, asked):
    """macOS decomposes accents in file names, which become captions."""
    caption = unicodedata.normalize(there, "fox, café look")

    assert add_trigger(caption, unicodedata.normalize(asked, "café look")) == caption
    assert add_trigger(caption, "cafe") == f"{caption}, cafe"  # a different word


@pytest.mark.parametrize(
    ("caption", "read"),
    [
        ("a b c, night look", "a b c, night look"),
        ("a b c d e f g, night look", "a b c d, night look"),
        ("one night look over the far away sea", "one night look over the far"),
        ("over the far away sea in a night look", "over the far away, night look"),
    ],
)
def test_long_captions_are_cut_but_keep_their_trigger(caption, read):
    assert shorten_caption(caption, "night look", lambda text: max(0, len(text.split()) - 6)) == read


def test_jfif_files_are_training_pictures(pictures):
    Image.new("RGB", (64, 64), "teal").save(pictures / "a teal square.JFIF", "JPEG")

    assert len(read_folder(pictures)) == 11


def test_unused_caption_files_are_reported(pictures):
    for name in ("metadata.jsonl", "red-fox_1.caption", "red-fox_33.txt"):
        (pictures / name).write_text("a fox")
    (pictures / "red-fox_1.png").rename(pictures / "IMG_0001.png")

    told = describe_captions(pictures, read_folder(pictures))

    others = "metadata.jsonl, red-fox_1.caption, red-fox_33.txt"
    counts = "1 caption from text files, 8 captions from file names, 1 caption empty"
    assert told == f"{counts}; not read as captions: {others}"


def test_contact_sheets_are_not_training_pictures(pictures):
    before = read_folder(pictures)
    (pictures / "run.toml").write_text("")
    for name in ("sheet.png", "sheet.2.png"):
        (pictures / name).write_bytes(before[0].path.read_bytes())

    assert read_folder(pictures.parent) == before


def test_hidden_files_and_folders_are_skipped(pictures):
    """macOS puts ._a.png, which is not a picture, beside each one that it copies to a USB stick or a network share."""
    before = read_folder(pictures)
    (pictures / ".thumbnails").mkdir()
    for name in ("._red-fox_0.png", ".thumbnails/a.png"):
        (pictures / name).write_bytes(before[0].path.read_bytes())

    assert read_folder(pictures) == before


def test_a_projects_own_output_is_skipped(pictures):
    before = read_folder(pictures)
    for name in ("outputs/0001-fox", "gallery/pictures", ".runs/pictures"):
        (pictures / name).mkdir(parents=True)
        (pictures / name / "fox-7.png").write_bytes(before[0].path.read_bytes())
    assert len(read_folder(pictures)) == len(before) + 2

    (pictures / "k2.toml").write_text("")
    assert read_folder(pictures) == before
    assert len(read_folder(pictures / "outputs")) == 1  # asked for explicitly


def test_unusable_training_folders_are_refused(tmp_path, pictures):
    (tmp_path / "empty").mkdir()
    with pytest.raises(K2Error, match="holds no pictures"):
        read_folder(tmp_path / "empty")
    (tmp_path / "empty" / "linked").symlink_to(tmp_path)  # its pictures lie further down
    with pytest.raises(K2Error, match="holds no pictures") as error:
        read_folder(tmp_path / "empty")
    assert error.value.hint == "Passed over: links to folders, which are not followed (linked)."
    with pytest.raises(K2Error, match="no folder"):
        read_folder(tmp_path / "missing")
    (pictures / "red-fox_3.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(K2Error, match=r"red-fox_3\.txt cannot be read"):
        read_folder(pictures)
    (pictures / "red-fox_3.txt").write_bytes(bytes(1 << 17))
    with pytest.raises(K2Error, match="too long for a caption"):
        read_folder(pictures)


def test_pictures_keep_their_proportions(pictures, tiny, monkeypatch):  # noqa: F811
    vae = Pipeline.load("tiny", device="cpu").vae
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("model.train.pictures.REPORT_EVERY", -1.0)
        encode(read_folder(pictures), vae, 64, 16, report=said.append)
    assert len(said) == 10 and said[4] == "4 of 10 pictures encoded"
    found = encode(read_folder(pictures), vae, 64, 16)
    assert {shape: len(group[1]) for shape, group in found.items()} == {(8, 8): 7, (6, 8): 3}
    both = encode(read_folder(pictures), vae, 64, 16, mirrored=True)
    latents, index = both[8, 8]
    assert index == sorted(index) and index[::2] == index[1::2] and len(latents) == 14
    assert torch.equal(latents[::2], found[8, 8][0]) and not torch.equal(latents[1], latents[0])
    (pictures / "red-fox_1.png").write_bytes(b"no picture")
    with pytest.raises(K2Error, match="red-fox_1"):
        encode(read_folder(pictures), vae, 64, 16)


# ---- learning ---------------------------------------------------------------------------------------------------


def material(count: int, seed: int = 0) -> TrainingMaterial:
    """Latents of `count` pictures in two shapes, and text features of two lengths."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {(8, 8): list(range(count - 2)), (4, 8): [count - 2, count - 1]}
    latents = {s: (torch.randn(len(i), TINY.channels, *s, generator=generator), i) for s, i in shapes.items()}
    embeds = [
        torch.randn(5 + index % 2, TINY.text_taps, TINY.text_width, generator=generator) for index in range(count)
    ]
    return TrainingMaterial(latents, embeds, torch.zeros(2, TINY.text_taps, TINY.text_width), [{"sha256": "0"}])


def stage(network: Krea2, **changes: object) -> AdapterStage:
    return AdapterStage(replace(RECIPE, **changes), network, material(10))


def test_ten_pictures_are_learned(tmp_path):
    """On a network of random weights, training only layers inside its blocks: the loss falls to less than half."""
    made = stage(random_model(TINY), steps=150, rank=16, batch=8, repeats=2, lr=1e-2)
    probe = [made.batch(step) for step in range(1000, 1016)]

    def loss() -> float:
        for batch in probe:
            batch["generator"].manual_seed(0)
        with torch.no_grad():
            return sum(float(made.loss(batch)[0]) for batch in probe) / len(probe)

    before = loss()
    loop.train(loop.Run(made, tmp_path), lambda line: None)

    assert loss() < 0.5 * before


def test_lora_changes_nothing_before_its_first_step(tmp_path):
    model = random_model(TINY)
    given = inputs(TINY)
    with torch.no_grad():
        before = model(*given)
        made = stage(model)
        assert torch.equal(model(*given), before)
    loop.Run(made, tmp_path).advance(made.batch(0))
    with torch.no_grad():
        assert not torch.equal(model(*given), before)


def test_shapes_are_drawn_in_proportion_to_their_pictures():
    made = stage(random_model(TINY))
    wide = sum(made.batch(step)["latents"].shape[2:] == (4, 8) for step in range(300))
    assert 0.14 < wide / 300 < 0.26  # two pictures of ten


def test_loss_does_not_depend_on_other_captions_lengths(monkeypatch):
    made, rows = stage(random_model(TINY), mu=0.0, drop=0.0), iter([slice(0, 2), slice(0, 1), slice(1, 2)])
    model = made.network.config
    tokens, noise = torch.randn(2, 2, 16, model.token_dim)
    monkeypatch.setattr(
        "model.train.adapter.add_noise", lambda image, mu, at: (tokens[at], noise[at], torch.ones(1) / 2)
    )
    latents, embeds = made.material.latents[8, 8][0], made.material.embeds[:2]
    assert len(embeds[0]) != len(embeds[1])

    with torch.no_grad():
        both, *alone = (made.loss({"latents": latents[at], "embeds": embeds[at], "generator": at})[0] for at in rows)

    torch.testing.assert_close(both, sum(alone) / 2)


def test_about_a_tenth_of_captions_is_dropped():
    made = stage(random_model(TINY), batch=8)
    rows = [row for step in range(50) for row in made.batch(step)["embeds"]]
    assert 0.05 < sum(row is made.material.empty for row in rows) / len(rows) < 0.15


def test_mu_defaults_to_raws_for_the_image_token_count():
    model, tokens = random_model(TINY), 8 * 8 // TINY.patch**2
    losses = []
    for mu in (None, raw_mu(tokens), 0.0):
        made = stage(model, mu=mu)
        batch = next(each for each in map(made.batch, range(9)) if each["latents"].shape[2:] == (8, 8))
        losses.append(made.loss(batch)[0].item())

    assert losses[0] == losses[1] != losses[2]


def gradients(made: AdapterStage, batch: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(1)
    for up in made.model.up.values():
        torch.nn.init.normal_(up, std=0.1)  # at zero `down` would have no gradient
    made.model.zero_grad()
    made.loss(made.batch(batch))[0].backward()
    return {name: param.grad.clone() for name, param in made.model.named_parameters()}


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_8_bit_base_gives_the_dequantised_bases_gradients(tmp_path, precision):
    save(tmp_path / "wide.safetensors", random_model(TINY).state_dict(), {})
    small, _ = load_dit(tmp_path / "wide.safetensors", precision=precision)
    plain = Krea2(TINY)
    plain.load_state_dict(dequantised_state(small, torch.float32))

    ours, theirs = gradients(stage(small)), gradients(stage(plain))

    assert any(isinstance(layer, FewBitLinear) for layer in small.modules())
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert gradient.norm() > 0, name
        assert relative_error(gradient, theirs[name]) < 1e-5, name


def test_recomputing_gives_the_same_gradients():
    kept, again = stage(random_model(TINY)), stage(random_model(TINY), recompute=True)
    first, second = gradients(kept), gradients(again)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_recomputing_saves_memory():
    """Bytes that autograd keeps between forward and backward pass, for a network of eight blocks."""

    def kept(network: Krea2) -> int:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        made = stage(network)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            made.loss(made.batch(0))
        return total

    deep = replace(TINY, blocks=8)
    whole, lean = random_model(deep), random_model(deep)
    checkpoint_blocks(lean)
    assert kept(lean) < kept(whole) / 4


def test_8_bit_base_keeps_no_wide_copies(tmp_path):
    """Autograd keeps a frozen 8-bit layer's weights in 8 bits."""
    save(tmp_path / "wide.safetensors", random_model(TINY).state_dict(), {})
    small, _ = load_dit(tmp_path / "wide.safetensors", precision="int8")
    kept: list[Tensor] = []
    made = stage(small)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        made.loss(made.batch(0))
    matrices = {(256, 64), (64, 256)}  # of the feed-forwards; no other tensor has these shapes
    assert {t.dtype for t in kept if tuple(t.shape) in matrices} == {torch.int8}


def test_invalid_recipes_name_the_wrong_key():
    for wrong in (
        {"layers": "head"},
        {"rank": 0},
        {"size": -64},
        {"size": 2049},
        {"pictures": ""},
        {"drop": 1.5},
        {"precision": "int3"},
        {"variant": "lightning"},
        {"init": "box"},
    ):
        with pytest.raises(K2Error, match=next(iter(wrong))):
            replace(RECIPE, **wrong)


# ---- the written file -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Krea2:
    return random_model(TINY)


@pytest.fixture
def halves(model) -> TrainablePairs:
    torch.manual_seed(3)
    made = TrainablePairs(random_model(TINY), "all", 4)
    for up in made.up.values():
        torch.nn.init.normal_(up, std=0.5)
    return made


@pytest.fixture
def written(tmp_path, halves) -> Path:
    write(tmp_path / "dusk.safetensors", halves.pairs(), TINY.blocks, {"kind": "lora", "triggers": ["dusk style"]})
    return tmp_path / "dusk.safetensors"


def test_lora_reads_back_unchanged(written, halves, model):
    adapter = read_lora(written, model)
    assert not adapter.unmatched and set(adapter.layers) == set(halves.names)
    for name, pair in halves.pairs().items():
        read = adapter.layers[name]
        assert torch.equal(read.down, pair.down) and torch.equal(read.up, pair.up) and read.scale == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_survives_every_layout(tmp_path, written, halves, model, layout):
    """Our file, read, written in a trainer's layout, read again and written in ours: exactly the same numbers."""
    first = read_lora(written, model)
    pairs = {name: (pair.down, pair.up) for name, pair in first.layers.items()}
    between = read_lora(write_state(tmp_path, LAYOUTS[layout](pairs), "between.safetensors"), model)
    write(tmp_path / "again.safetensors", between.layers, TINY.blocks, {"kind": "lora"})

    assert torch.equal(velocity(model, (between, 0.7)), velocity(model, (first, 0.7)))
    ours, again = load_file(written), load_file(tmp_path / "again.safetensors")
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)


def test_scales_are_folded_into_the_weights(tmp_path, halves, model):
    doubled = {name: LowRank(pair.down, pair.up, scale=2.0) for name, pair in halves.pairs().items()}
    write(tmp_path / "doubled.safetensors", doubled, TINY.blocks, {})
    read = read_lora(tmp_path / "doubled.safetensors", model)
    assert all(torch.equal(read.layers[n].up, 2 * p.up) and read.layers[n].scale == 1 for n, p in doubled.items())


@torch.no_grad()
def test_diffusers_gives_the_same_output(tmp_path, written, model):
    pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    diffusers = pytest.importorskip("diffusers")
    other = reference(model)
    state, metadata = diffusers.Krea2Pipeline.lora_state_dict(written, return_lora_metadata=True)
    diffusers.Krea2Pipeline.load_lora_into_transformer(state, other, adapter_name="dusk", metadata=metadata)
    other.set_adapters(["dusk"], weights=[0.6])

    tokens, sigma, embeds, grid = inputs(TINY)
    everything = torch.ones(embeds.shape[:2], dtype=torch.bool)
    theirs = other(
        tokens, embeds, sigma, position_ids(embeds.shape[1], *grid), everything, return_dict=False
    )[0]  # fmt: skip
    ours = velocity(model, (read_lora(written, model), 0.6))
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(ours, velocity(model)) > 0.1


# ---- from a folder to pictures ----------------------------------------------------------------------------------


def test_lora_from_a_folder_works_on_raw_and_turbo(tmp_path, pictures, tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(states, "RUNS", tmp_path / "runs")
    lines: list[str] = []
    recipe = replace(RECIPE, pictures=str(pictures), trigger="dusk style", size=64, mirror=True)

    (pictures / "red-fox_4.txt").write_text("a fox " * 600)
    (pictures / "more").mkdir()
    (pictures / "red-fox_5.png").rename(pictures / "more" / "red-fox_5.png")
    shutil.copytree(pictures, tmp_path / "others")
    (pictures / "linked").symlink_to(tmp_path / "others")

    done = main(recipe, "cpu", lines.append)

    path = done.result
    assert sum(len(of) for _, of in done.stage.material.latents.values()) == 20  # mirrored
    assert "dusk: 2 captions from text files, 8 captions from file names" in lines
    told = [line for line in lines if "Passed over" in line]
    assert told == ["Passed over: links to folders, which are not followed (linked)."]  # "more" is read
    assert "dusk: 1 caption too long, cut to 507 tokens" in lines
    assert path == tmp_path / "runs" / "dusk" / "dusk.safetensors" and any("10 pictures" in line for line in lines)
    about = open_checkpoint(path).metadata
    assert about["kind"] == "lora" and about["triggers"] == ["dusk style"]
    assert about["base"]["sha256"] == {"tiny-raw.safetensors": sha256(tiny / "tiny-raw.safetensors")}
    assert str(tmp_path) not in json.dumps(about) and str(tmp_path) not in json.dumps(read_header(path)["__metadata__"])
    assert about["training"]["steps"] == 8 and about["training"]["recipe"]["rank"] == 4
    assert len(about["pictures"]) == 10 and "red-fox" not in json.dumps(about["pictures"])
    stated = json.loads(read_header(path)["__metadata__"]["lora_adapter_metadata"])
    assert stated["transformer.r"] == stated["transformer.lora_alpha"] == 4
    for variant in ("raw", "turbo"):
        pipeline = Pipeline.load("tiny", variant=variant, device="cpu")
        spec = RenderSpec("a red fox, dusk style", seed=3)
        plain, styled = pipeline.render([spec, replace(spec, loras=(Lora(path),))])
        assert plain.record["pixels"] != styled.record["pixels"]
        (report,) = styled.record["loras"]
        assert (
            report["matched"]
            == report["modules"]
            == len([name for name in linears(pipeline.dit) if name.startswith("blocks.")])
        )


def test_training_resumes_where_it_was_interrupted(tmp_path, pictures, tiny, monkeypatch):  # noqa: F811
    """An interrupted run, once resumed, ends with the same weights as an uninterrupted one."""
    recipe = replace(RECIPE, pictures=str(pictures), size=64)
    monkeypatch.setattr(states, "RUNS", tmp_path / "straight")
    straight = load_file(main(recipe, "cpu", lambda line: None).result)

    monkeypatch.setattr(states, "RUNS", tmp_path / "broken")
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    batch = AdapterStage.batch

    def stop(self: AdapterStage, step: int, part: int = 0):
        if step == 6:
            raise KeyboardInterrupt
        return batch(self, step, part)

    monkeypatch.setattr(AdapterStage, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        main(recipe, "cpu", lambda line: None)
    monkeypatch.setattr(AdapterStage, "batch", batch)
    again = load_file(main(recipe, "cpu", lambda line: None).result)
    assert all(torch.equal(straight[name], again[name]) for name in straight)


def test_a_finished_run_is_left_alone(tmp_path, pictures, tiny, monkeypatch):  # noqa: F811
    """Records know its file by its hash. A missing file is written again, from the saved state."""
    monkeypatch.setattr(states, "RUNS", tmp_path / "runs")
    recipe = replace(RECIPE, pictures=str(pictures), size=64)
    path = main(recipe, "cpu", lambda line: None).result
    before = {each.name: (each.read_bytes(), each.stat().st_ino) for each in path.parent.iterdir()}

    said: list[str] = []
    main(replace(recipe, steps=4, every=1), "cpu", said.append)
    assert {each.name: (each.read_bytes(), each.stat().st_ino) for each in path.parent.iterdir()} == before
    assert any("already done at step 8" in line for line in said)

    path.unlink()
    main(recipe, "cpu", lambda line: None)
    assert path.read_bytes()[-1000:] == before[path.name][0][-1000:]


def test_resume_uses_the_same_precision_as_before(tmp_path, pictures, tiny, monkeypatch):  # noqa: F811
    """However much memory is free by then, unless the recipe names another precision."""
    monkeypatch.setattr(states, "RUNS", tmp_path / "runs")
    recipe, plan, said = replace(RECIPE, pictures=str(pictures), size=64, steps=1), adapter.plan_on, []

    def short_of_memory(*args, precision, **more):
        return plan(*args, precision=precision or "int8", **more)

    with monkeypatch.context() as patch:
        patch.setattr(adapter, "plan_on", short_of_memory)
        main(recipe, "cpu", said.append)
    main(replace(recipe, steps=2), "cpu", said.append)
    main(replace(recipe, steps=3, precision="native"), "cpu", said.append)

    assert [line.rpartition(" ")[2] for line in said if "weights" in line] == ["int8", "int8", "native"]
    changes = [line.partition("resumed with changes: ")[2] for line in said if "resumed" in line]
    assert changes == ["steps 1 → 2", "steps 2 → 3, precision int8 → native"]


def test_forbidden_recipe_changes_fail_before_encoding(tmp_path, pictures, tiny, monkeypatch):  # noqa: F811
    monkeypatch.setattr(states, "RUNS", tmp_path / "runs")
    recipe = replace(RECIPE, pictures=str(pictures), size=64, steps=1)
    main(recipe, "cpu", lambda line: None)

    monkeypatch.setattr(adapter, "load_vae", None)
    for change in ({"rank": 2}, {"layers": "all"}, {"trigger": "dusk"}):
        with pytest.raises(K2Error, match=f"differs now: (the )?{next(iter(change))}"):
            main(replace(recipe, **change), "cpu", lambda line: None)


def test_k2_train_on_the_command_line(tmp_path, pictures, tiny, k2, monkeypatch):  # noqa: F811
    """A folder can stand in for a recipe; the LoRA becomes a style by the command that is printed."""
    monkeypatch.chdir(tmp_path)
    done = k2("train", "pictures", "--model", "tiny", "--trigger", "dusk style", "--steps", "2")

    path = Path(".runs/pictures/pictures.safetensors")
    assert done.stdout == f"{path}\n" and open_checkpoint(path).metadata["triggers"] == ["dusk style"]
    assert "pictures: 10 pictures in 2 shapes; tiny" in done.stderr
    next_one = "k2 style add pictures .runs/pictures/pictures.safetensors --trigger 'dusk style' --project DIR"
    assert f"Make it a style: {next_one}\n" in done.stderr
    (tmp_path / "moody").mkdir()
    (tmp_path / "moody" / "k2.toml").touch()
    k2(*shlex.split(next_one.replace("DIR", "moody"))[1:])
    assert (tmp_path / "moody" / "loras" / "pictures.safetensors").read_bytes() == path.read_bytes()
    for other in [], ["--trigger", "night look"]:
        again = k2("train", "pictures", "--model", "tiny", "--steps", "2", *other, code=1)
        assert 'differs now: the trigger ("dusk style" then).' in again.stderr and ".runs/pictures" in again.stderr
    (pictures / "red-fox_3.txt").write_text("another fox")
    again = k2("train", "pictures", "--model", "tiny", "--trigger", "dusk style", "--steps", "2", code=1)
    assert "what differs now: the pictures or their captions." in again.stderr
    recipe = 'stage = "lora"\nname = "dusk"\npictures = "pictures"\nmodel = "tiny"\nsteps = 2\nmu = 1\n'
    (tmp_path / "dusk.toml").write_text(recipe)
    done = k2("train", "dusk.toml", "--quiet")
    assert done.stdout == ".runs/dusk/dusk.safetensors\n" and done.stderr == ""
    assert "the trigger (none then)" in k2("train", "dusk.toml", "--trigger", "night look", code=1).stderr
    (tmp_path / "dusk.toml").write_text(recipe + "rank = 2\n")
    assert "what differs now: rank." in k2("train", "dusk.toml", code=1).stderr
    (tmp_path / "dusk.toml").write_text(recipe)
    state, about = read(tiny / "tiny-raw.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(library, "BUNDLED", shutil.copytree(tiny, tmp_path / "box"))
        save(library.BUNDLED / "tiny-raw.safetensors", {name: -tensor for name, tensor in state.items()}, about)
        assert "differs now: the base's weights." in k2("train", "dusk.toml", code=1).stderr
    merged = {"step": 2, "seconds": 1.0, "recipe": {"name": "dusk", "stage": "pretrain"}}  # as a merge leaves it
    states.write_state(Path(".runs/dusk"), {"ema.w": torch.zeros(2)}, merged, {})
    assert "started differently" in k2("train", "dusk.toml", code=1).stderr
    assert "There is no raw checkpoint" in k2("train", "pictures", "--model", "giant", code=1).stderr
    assert "--trigger" in k2("train", "pretrain-128", "--trigger", "dusk", code=2).stderr
    (tmp_path / "none").mkdir()
    assert "holds no pictures" in k2("train", "none", code=1).stderr


def test_missing_model_names_the_pull_command(tmp_path, pictures, tiny):  # noqa: F811
    with pytest.raises(K2Error, match="no raw checkpoint") as error:
        main(replace(RECIPE, pictures=str(pictures), model="krea-2"), "cpu", lambda line: None)
    assert "k2 models pull krea-2-raw" in error.value.hint


def test_a_rank_too_large_to_read_back_is_refused(pictures, tiny):  # noqa: F811
    width = Pipeline.load("tiny", device="cpu").dit.config.width
    with pytest.raises(K2Error, match="too large to be read back") as error:
        main(replace(RECIPE, pictures=str(pictures), rank=width + 1), "cpu", lambda line: None)
    assert f"At most {width}" in error.value.hint


def test_manifest_lists_caption_and_hash(pictures):
    (entry, *_) = adapter.manifest([CaptionedPicture(pictures / "red-fox_0.png", "a fox")])
    assert entry["caption"] == "a fox" and entry["sha256"] == sha256(pictures / "red-fox_0.png")
