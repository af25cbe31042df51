"""Styles on the command line: made from pictures, listed, shown, mixed and previewed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT, tree, write_weights
from PIL import Image

from k2cli import mix, new_style, runs, sheet
from k2cli.completion import complete_style
from k2cli.fast_toml import dump
from k2cli.moodboard import gather_pictures
from k2cli.project import Project
from k2cli.style_app import list_styles
from k2cli.toml_tables import Toml
from model import library
from model.picture_file import describe_skipped


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder outside the project: three pictures, two of them identical, and files that cannot be used."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (32, 32), "red").save(folder / "a.png")
    Image.new("RGB", (32, 32), "blue").save(folder / "more" / "a.jpg")
    (folder / "more" / "copy of a.png").write_bytes((folder / "a.png").read_bytes())
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    Image.new("RGB", (32, 32)).save(folder / "moving.gif")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def looks(moody: Path) -> Path:
    """moody with four styles of keywords only."""
    (moody / "styles").mkdir()
    for name in ("dusk", "ink", "neon", "riso"):
        (moody / "styles" / f"{name}.toml").write_text(f'keywords = ["{name} look"]\n')
    return moody


def table(path: Path) -> dict:
    return Toml.read(path, path.name).table


def spec_of(folder: Path, **weights: float):
    project = Project.open(folder)
    return project.shots(project.resolve_settings(), None, weights)[0].spec


# ---- add --------------------------------------------------------------------------------------------------------


def test_add_copies_pictures_and_writes_a_style_that_renders(moody, photos, k2):
    printed = k2("style", "add", "dusk", photos / "a.png", photos / "more", "-k", "low key", "--avoid", "glossy")

    assert printed.stdout == "styles/dusk.toml\n"
    assert table(moody / "styles" / "dusk.toml") == {
        "keywords": ["low key"],
        "avoids": ["glossy"],
        "reference": [{"image": "refs/dusk/*", "weight": 1.0}],
    }
    assert sorted(path.name for path in (moody / "refs" / "dusk").iterdir()) == ["a.jpg", "a.png"]
    (style,) = spec_of(moody, dusk=0.6).styles
    assert len(style.references) == 2 and style.keywords == ("low key",)


def test_add_does_not_overwrite_and_force_loses_no_picture(moody, photos, k2):
    k2("style", "add", "dusk", photos / "a.png")
    before = tree(moody)

    refused = k2("style", "add", "dusk", photos / "more" / "a.jpg", code=1)
    assert "The style dusk already exists." in refused.stderr and "--force" in refused.stderr
    assert tree(moody) == before

    k2("style", "add", "dusk", photos / "more" / "a.jpg", "--force", "--method", "splice")
    assert table(moody / "styles" / "dusk.toml")["reference"] == [{"image": "refs/dusk/a.jpg", "weight": 1.0}]
    assert (moody / "refs" / "dusk" / "a.png").exists()
    assert spec_of(moody, dusk=1).styles[0].method == "splice"


@pytest.mark.parametrize("command", ["style add dusk {}/a.png", "mix-styles ink=1 --save-as dusk"])
def test_concurrently_created_style_stays(looks, photos, k2, monkeypatch, command):
    """As with two commands at once: the style did not exist when one of them looked."""
    file = looks / "styles" / "dusk.toml"
    file.unlink()

    def slowly(table):
        file.write_text('keywords = ["mine"]\n')
        return dump(table)

    monkeypatch.setattr(new_style, "dump", slowly)

    said = k2(*command.format(photos).split(), code=1).stderr

    assert "The style dusk already exists." in said and "--force" in said
    assert file.read_text() == 'keywords = ["mine"]\n'


def test_add_reuses_pictures_already_in_the_project(moody, photos, k2):
    folder = moody / "refs" / "dusk"
    folder.mkdir(parents=True)
    for index, source in enumerate((photos / "a.png", photos / "more" / "a.jpg")):
        (folder / f"[{index}]{source.suffix}").write_bytes(source.read_bytes())
    before = tree(moody / "refs")

    k2("style", "add", "dusk", folder)
    k2("style", "add", "half", folder / "[0].png")
    k2("style", "add", "dusk", folder / "[0].png", "--force")

    assert tree(folder) == {name.removeprefix("dusk/"): data for name, data in before.items() if name != "dusk"}
    assert (moody / "refs" / "half" / "0.png").exists()
    assert [reference.image.name for reference in spec_of(moody, dusk=1).styles[0].references] == ["[0].png"]


def test_contact_sheets_of_a_run_are_skipped(moody, k2, monkeypatch):
    """Whether its folder is named, or the files that a shell's * finds in it."""
    monkeypatch.setattr(sheet, "PER_SHEET", 2)
    k2("render", "--batch", "2")
    run = next((moody / "outputs").iterdir())
    assert {path.name for path in run.glob("sheet*.png")} == {"sheet.png", "sheet.2.png"}

    k2("style", "add", "made", run)
    added = k2("style", "add", "found", *run.glob("*.png"))
    refused = k2("style", "add", "shown", *run.glob("sheet*"), code=1)
    (moody / "styles" / "there.toml").write_text(f'[[reference]]\nimage = "outputs/{run.name}"\n')
    board, _ = gather_pictures([f"outputs/{run.name}", "outputs/*/*"], moody, Project.open(moody).path_inside, "here")

    assert len(list((moody / "refs" / "made").iterdir())) == len(list((moody / "refs" / "found").iterdir())) == 4
    assert added.stderr == "Passed over: 2 contact sheets.\n4 pictures. Next: k2 render --style found=0.6\n"
    assert "Passed over" not in k2("style", "add", "found", *run.glob("*.png"), "--force", "--quiet").stderr
    assert "is a contact sheet.\nHint:  Name the pictures" in refused.stderr and not (moody / "refs" / "shown").exists()
    assert [reference.image for reference in spec_of(moody, there=1).styles[0].references] == board
    assert len(board) == 4 and not any("sheet" in path.name for path in board)


def test_contact_sheet_is_recognised_without_its_run(moody, k2):
    """Under whatever name it is copied; and a picture that only has such a name is a picture."""
    k2("render")
    run = next((moody / "outputs").iterdir())
    (run / "run.toml").unlink()
    Image.new("RGB", (64, 64), "teal").save(moody / "sheet.png")

    copied = shutil.copytree(run, moody / "copied")

    (copied / "sheet.png").rename(copied / "sheet (1).png")
    assert "Passed over: 1 contact sheet.\n" in k2("style", "add", "found", *copied.glob("*.png")).stderr
    assert "identical" in k2("rerun", "--check", *run.glob("*.png")).stderr and k2("log").stderr == ""
    k2("style", "add", "own", moody / "sheet.png")


def test_picture_may_have_any_name(moody, photos, k2):
    """Even one that is not valid text, or that a terminal would obey: the copy gets another."""
    accent_apart = "cu\u0308r.png"  # as Macs write ü
    for name in (b"a\xe9.png", b"b\n\x1b[2J.png", accent_apart.encode(), "लोमड़ी.png".encode()):
        Image.new("RGB", (32, 32), (len(name), 0, 0)).save(photos / os.fsdecode(name))

    k2("style", "add", "dusk", *photos.glob("[abcल]*.png"))

    names = {path.name for path in (moody / "refs" / "dusk").iterdir()}
    assert names == {"a.png", "a-2.png", "b-2J.png", "cür.png", "लोमड़ी.png"}
    assert "There is no c?[2J.png." in k2("style", "add", "night", "c\x1b[2J.png", code=1).stderr


def test_hidden_files_in_folders_are_skipped(moody, photos, k2):
    """Macs put a ._a.jpg, which is no picture, beside each picture that they copy to a stick or a share."""
    (photos / "more" / "._a.jpg").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")

    k2("style", "add", "dusk", photos / "more")

    assert sorted(path.name for path in (moody / "refs" / "dusk").iterdir()) == ["a.jpg", "copy-of-a.png"]


def test_unsupported_pictures_in_folders_are_reported(moody, photos, k2):
    """A phone's HEIC beside its JPEGs; files that are no pictures are not mentioned."""
    (photos / "more" / "IMG_1.HEIC").write_bytes(b"")
    (photos / "more" / "a.txt").write_bytes(b"")
    (photos / "raw").mkdir()
    for name in ("a.tif", "b.tiff", "._b.tif"):
        (photos / "raw" / name).write_bytes(b"")
    said = "Passed over: {}; k2 reads png, jpg and webp."

    added = k2("style", "add", "dusk", photos / "more")
    assert said.format("1 picture (heic)") in added.stderr
    assert "Passed over" not in k2("style", "add", "dusk", photos / "more", "--force", "--quiet").stderr

    none = k2("style", "add", "night", photos / "raw", code=1)
    assert said.format("2 pictures (tif, tiff)") in none.stderr


def test_picture_is_found_with_any_accent_form(moody, photos, k2):
    (photos / "a.png").rename(photos / "cu\u0308r.png")
    k2("style", "add", "dusk", photos / "c\u00fcr.png")
    assert spec_of(moody, dusk=1).styles[0].references


def test_unreadable_pictures_in_folders_are_skipped_and_reported(moody, photos, k2):
    """All in one message; a picture that is named itself must be readable, and at least one must remain."""
    more = photos / "more"
    for name in ("broken.png", "cut.jpg"):
        (more / name).write_bytes((more / "a.jpg").read_bytes()[:100])
    Image.new("RGB", (4, 4)).save(more / "dot.png")
    told = "Left out as unusable: broken.png, cut.jpg, dot.png.\n"

    assert told in k2("style", "add", "dusk", more).stderr
    assert spec_of(moody, dusk=1).styles[0].references
    typed = k2("style", "add", "night", more, more / "cut.jpg", code=1).stderr
    assert "cut.jpg is not a readable picture." in typed
    for good in {*more.iterdir()} - {more / name for name in ("broken.png", "cut.jpg", "dot.png")}:
        good.unlink()
    none = k2("style", "add", "night", more, code=1).stderr
    assert "dot.png has 4 x 4 pixels." in none and not (moody / "styles" / "night.toml").exists()


def test_pictures_in_subfolders_are_reported(moody, photos, k2):
    within = photos / "more" / "at night"
    within.mkdir()
    Image.new("RGB", (32, 32), "navy").save(within / "c.png")
    said = "Passed over: pictures in subfolders (at night); name those folders too."

    assert said in k2("style", "add", "dusk", photos / "more").stderr
    assert said not in k2("style", "add", "dusk", photos / "more", within, "--force").stderr
    above = photos / "above"
    shutil.copytree(within, above / "at night")
    assert said in k2("style", "add", "night", above, code=1).stderr
    assert said in k2("new", "another", "--from", above, code=1).stderr
    shutil.copytree(photos / "more", moody / "refs" / "deep")
    for patterns, told in ((["refs/deep"], said), (["refs/deep", "refs/deep/at night"], "")):
        _, others = gather_pictures(patterns, moody, lambda path, where: moody / path, "board")
        assert describe_skipped(others) == told
    for pattern, told in (("refs/deep", True), ("refs/deep/**/*", False)):
        (moody / "styles" / "dusk.toml").write_text(f'[[reference]]\nimage = "{pattern}"\n')
        (moody / "k2.toml").write_text(PROJECT + "[style]\ndusk = 1.0\n")
        assert (said in k2("render", "--dry-run").stderr) is told


def test_render_reports_unread_references_once(looks, photos, k2):
    (looks / "refs" / "board").mkdir(parents=True)
    for name in ("a.png", "b.HEIC", "c.avif", "notes.txt"):
        Image.new("RGB", (32, 32), "teal").save(looks / "refs" / "board" / name, "PNG")
    for name in ("dusk", "ink"):
        (looks / "styles" / f"{name}.toml").write_text('[[reference]]\nimage = "refs/board/*"\n')
    (looks / "k2.toml").write_text(PROJECT + "[style]\ndusk = 1.0\nink = 0.5\n")
    over = "Passed over: 2 pictures (avif, heic); k2 reads png, jpg and webp.\n"

    assert k2("render").stderr.count(over) == 1
    assert k2("render", "--dry-run").stderr.count(over) == 1
    assert k2("mix-styles", "dusk=1", "ink=1").stderr.count(over) == 1
    assert "Passed over" not in k2("render", "--quiet").stderr

    (looks / "refs" / "board" / "a.png").unlink()
    assert f"matches no picture.\nHint:  {over}" in k2("render", code=1).stderr


def test_copies_keep_their_names_or_are_numbered(moody, photos, k2):
    """And get no name that a shell or a file list would take for something else."""
    (photos / "b").mkdir()
    for name, colour in (("a.png", "navy"), ("-a-.png", "teal"), ("!!!.png", "black")):
        Image.new("RGB", (32, 32), colour).save(photos / "b" / name)

    k2("style", "add", "dusk", photos / "a.png", *sorted((photos / "b").iterdir()))

    assert sorted(path.name for path in (moody / "refs" / "dusk").iterdir()) == [
        "a-2.png",
        "a-3.png",
        "a.png",
        "picture.png",
    ]


def test_jpeg_suffixes_of_browsers_are_accepted(moody, photos, k2):
    """To Windows, image/jpeg is .jfif."""
    (photos / "more" / "a.jpg").rename(photos / "more" / "a.JFIF")
    (moody / "refs" / "sea").mkdir(parents=True)
    for name in ("b.jfif", "c.jpg"):
        Image.new("RGB", (32, 32), "teal").save(moody / "refs" / "sea" / name, "JPEG")

    k2("style", "add", "dusk", photos / "more")

    assert {path.name for path in (moody / "refs" / "dusk").iterdir()} == {"a.jpg", "copy-of-a.png"}
    pictures, _ = gather_pictures(["refs/sea/*"], moody, Project.open(moody).path_inside, "")
    assert [path.name for path in pictures] == ["b.jfif", "c.jpg"]


def test_add_with_json(moody, photos, k2):
    found = json.loads(k2("style", "add", "dusk", photos / "a.png", "--json", "--quiet").stdout)

    assert found == {"name": "dusk", "file": "styles/dusk.toml", "references": ["refs/dusk/a.png"], "lora": None}


def write_lora(path: Path, layer: str = "blocks.0.attn.wq", about: dict[str, str] | None = None) -> Path:
    """The smallest LoRA file by its tensors' names, which are all that is looked at before rendering."""
    halves: dict[str, Any] = {"__metadata__": about} if about else {}
    halves |= {
        f"{layer}.lora_{half}.weight": {"dtype": "F32", "shape": [1, 1], "data_offsets": [4 * place, 4 * place + 4]}
        for place, half in enumerate("AB")
    }
    header = json.dumps(halves).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return path


def test_lora_is_found_with_any_accent_form(moody, photos, k2):
    write_lora(photos / "gru\u0308n.safetensors")
    k2("style", "add", "ink", photos / "gr\u00fcn.safetensors")
    assert spec_of(moody, ink=1).adapters


def test_lora_in_a_folder_or_another_format_is_reported(moody, photos, k2):
    """Beside its preview, as collectors keep them, it does not become part of the style unless it is named."""
    lora = write_lora(photos / "more" / "ink.safetensors")
    said = "Passed over: weights (ink.safetensors); to use a LoRA, name its file."

    assert said in k2("style", "add", "ink", photos / "more").stderr
    assert "Passed over" not in k2("style", "add", "both", photos / "more", lora).stderr
    spelt = photos / "more" / ".." / "more" / lora.name
    assert "Passed over" not in k2("style", "add", "spelt", photos / "more", spelt).stderr
    (photos / "peft").mkdir()
    renamed = lora.rename(photos / "peft" / "ink.sft")
    assert "name its file" in k2("style", "add", "night", photos / "peft", code=1).stderr
    assert "a LoRA is a .safetensors file.\nHint:  Rename it." in k2("style", "add", "night", renamed, code=1).stderr


def test_lora_is_copied_and_becomes_a_style(moody, photos, k2):
    """With its trigger words, and with pictures if some are named."""
    lora = write_lora(photos / "Ink v2.safetensors")
    added = k2("style", "add", "ink", lora, "--trigger", "in the inkk style", "-k", "bold")

    assert (moody / "loras" / "Ink-v2.safetensors").read_bytes() == lora.read_bytes()
    assert table(moody / "styles" / "ink.toml") == {
        **{"keywords": ["bold"], "avoids": []},
        **{"lora": "loras/Ink-v2.safetensors", "triggers": ["in the inkk style"]},
    }
    assert added.stderr == "1 LoRA. Next: k2 render --style ink=0.6\n" and not (moody / "refs").exists()
    spec = spec_of(moody, ink=0.6)
    assert spec.prompt == "a red fox, in the inkk style, bold" and spec.adapters

    both = k2("style", "add", "both", lora, photos / "a.png", "--json").stdout
    assert json.loads(both)["lora"] == "loras/Ink-v2.safetensors"  # which is there already, so it is not copied again
    (style,) = spec_of(moody, both=1).styles
    assert style.lora and len(style.references) == 1
    (moody / "loras" / "A.safetensors").symlink_to(photos / "Ink v2.safetensors")  # which no project would follow
    again = k2("style", "add", "again", lora, "--json").stdout
    assert json.loads(again)["lora"] == "loras/Ink-v2.safetensors"
    write_lora(photos / "other" / "Ink v2.safetensors", "blocks.1.attn.wq")
    k2("style", "add", "second", photos / "other" / "Ink v2.safetensors")
    assert table(moody / "styles" / "second.toml")["lora"] == "loras/Ink-v2-2.safetensors"


@pytest.mark.parametrize(
    ("about", "triggers"),
    [
        ({"modelspec.trigger_phrase": "ink wash,\nohwx"}, ["ink wash, ohwx"]),
        ({"k2": '{"triggers": ["in the ink style"]}'}, ["in the ink style"]),
        ({"ss_tag_frequency": '{"8_ink": {"fox": 9}}'}, []),
        ({"modelspec.trigger_phrase": " "}, []),
        ({"k2": '{"triggers": [7, ["a"]]}', "modelspec.trigger_phrase": "a\x1b[31m"}, ["a?[31m"]),
    ],
)
def test_stated_triggers_join_the_prompt(moody, photos, k2, about, triggers):
    """And are reported; a typed trigger takes precedence."""
    lora = write_lora(photos / "ink.safetensors", about=about)

    told = k2("style", "add", "ink", lora).stderr
    k2("style", "add", "own", lora, "--trigger", "mine")

    assert table(moody / "styles" / "ink.toml")["triggers"] == triggers
    assert table(moody / "styles" / "own.toml")["triggers"] == ["mine"]
    assert ("Trigger words stated" in told) == bool(triggers) and all(each in told for each in triggers)
    if triggers:
        assert spec_of(moody, ink=0.6).prompt == f"a red fox, {triggers[0]}"


@pytest.mark.parametrize(
    ("own", "phrase", "taken", "over"),
    [
        (["ohwx"], "ink " * 350_000, 1, 1),
        ([], "x" * 30_000, 0, 1),
        ([], "x" * 201, 0, 1),
        ([], f"{'x' * 100}    {'x' * 99}", 1, 0),
        ([f"word {number}" for number in range(99_999)], "", 16, 99_983),
    ],
)
def test_overlong_stated_triggers_are_ignored(moody, photos, k2, own, phrase, taken, over):
    """The style file that they would be written to could not be read."""
    about = {"k2": json.dumps({"triggers": own}), "modelspec.trigger_phrase": phrase}

    told = k2("style", "add", "ink", write_lora(photos / "ink.safetensors", about=about)).stderr

    assert (
        len(table(moody / "styles" / "ink.toml")["triggers"])
        == len(spec_of(moody, ink=0.6).styles[0].triggers)
        == taken
    )
    assert (f"Passed over: {over} trigger" in told) == bool(over) and len(told) < 1000


def test_peft_settings_are_copied_with_the_lora(moody, photos, k2):
    """PEFT's say how strong the weights are, and are found by the file name of the weights."""
    lora = write_lora(photos / "adapter_model.safetensors")
    (photos / "adapter_config.json").write_text('{"lora_alpha": 8}')

    k2("style", "add", "ink", lora)
    k2("style", "add", "ink", lora, "--force")

    assert table(moody / "styles" / "ink.toml")["lora"] == "loras/ink/adapter_model.safetensors"
    assert (moody / "loras" / "ink" / "adapter_config.json").read_text() == '{"lora_alpha": 8}'
    (photos / "adapter_config.json").write_text('{"lora_alpha": 16}')
    assert "loras/ink holds a different LoRA." in k2("style", "add", "ink", lora, "--force", code=1).stderr


def test_non_lora_makes_no_style(moody, photos, k2, tmp_path):
    lora = write_lora(photos / "ink.safetensors")
    write_weights(photos / "model.safetensors", {"kind": "dit"})
    write_lora(photos / "sdxl.safetensors", "lora_unet_down_blocks_0_attentions_0_proj_in")
    write_lora(photos / "words.safetensors", "lora_te1_text_model_encoder_layers_0_mlp_fc1")
    (photos / "page.safetensors").write_text("<!DOCTYPE html>")
    before = tree(moody)
    for files, said in (
        (["model.safetensors"], "is not a LoRA: it holds w."),
        (["sdxl.safetensors"], "is made for SDXL or Stable Diffusion 1: it has layers like lora_unet_down_blocks_0"),
        (["words.safetensors"], "is made for a text encoder"),
        (["page.safetensors"], "is a web page."),
        (["none.safetensors"], "There is no"),
        (["ink.safetensors", "model.safetensors"], "would have 2 LoRAs"),
        (["ink.safetensors", "notes.txt"], "is not a readable picture"),
        (["a.png", "--trigger", "inkk"], "none was named.\nHint:  Use keywords instead"),
        (["ink.safetensors", "--method", "splice"], "--method needs pictures"),
    ):
        typed = [str(photos / each) if "." in each else each for each in files]
        assert said in k2("style", "add", "ink", *typed, code=1).stderr
    (tmp_path / "elsewhere").mkdir()
    (moody / "loras").symlink_to(tmp_path / "elsewhere")
    assert "lies outside the project" in k2("style", "add", "ink", lora, code=1).stderr
    (moody / "loras").unlink()
    assert tree(moody) == before


@pytest.mark.parametrize(
    ("name", "pictures", "message"),
    [
        ("dusk", ["notes.txt"], "is not a readable picture"),
        ("dusk", ["moving.gif"], "is not a readable picture"),
        ("dusk", ["dot.png"], "has 1 x 1 pixels"),
        ("dusk", ["a.png", "cut.png"], "cut.png is not a readable picture.\nHint:  The file is truncated"),
        ("dusk", ["a.png", "cut.jpg"], "cut.jpg is not a readable picture.\nHint:  The file is truncated"),
        ("dusk", ["a.png", "missing.png"], "There is no "),
        ("../dusk", ["a.png"], "cannot be a file name"),
        ("AUX", ["a.png"], "cannot be a file name on Windows"),
        ("dusk", ["empty"], "empty holds no picture.\nHint:  Name pictures, or a folder of them."),
        ("dusk", ["a.png", "empty"], "empty holds no picture."),
        ("dusk", ["many"], "would have 65 reference pictures"),
    ],
)
def test_add_refuses_in_one_sentence_and_writes_nothing(moody, photos, k2, name, pictures, message):
    (photos / "empty").mkdir()
    (photos / "many").mkdir()
    for index in range(65):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(photos / "many" / f"{index}.png")
    for suffix in ("png", "jpg"):
        Image.effect_noise((64, 64), 50).save(whole := photos / f"whole.{suffix}")
        (photos / f"cut.{suffix}").write_bytes(whole.read_bytes()[:800])
    before = tree(moody)

    result = k2("style", "add", name, *(photos / picture for picture in pictures), code=1)

    assert message in result.stderr and "Hint:" in result.stderr and result.stdout == ""
    assert tree(moody) == before


@pytest.mark.parametrize("file", ["styles", "refs"])
def test_add_names_the_file_in_its_way(moody, photos, k2, file):
    (moody / file).write_text("a file")

    result = k2("style", "add", "dusk", photos / "a.png", code=1)

    assert f"moody/{file}" in result.stderr.split(" cannot be written: ")[0]
    assert result.stderr.endswith("Hint:  A file is where a folder belongs: move it away.\n")


@pytest.mark.parametrize("option", ["--keyword", "--avoid"])
def test_add_writes_no_empty_word(moody, photos, k2, option):
    before = tree(moody)

    assert " is empty." in k2("style", "add", "dusk", photos / "a.png", option, " ", code=1).stderr
    assert tree(moody) == before


@pytest.mark.parametrize("method", ["splice", "vision"])
def test_too_many_pictures_for_a_method_are_refused_at_once(moody, photos, k2, method):
    many = [photos / f"{index}.png" for index in range(17)]
    for index, path in enumerate(many):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(path)
    before = tree(moody)

    said = k2("style", "add", "dusk", *many, "--method", method, code=1).stderr

    assert f"would have 17 reference pictures by {method}.\nHint:  Give at most 16" in said and tree(moody) == before
    k2("style", "add", "dusk", *many[:16], "--method", method)


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_too_many_references_over_all_styles_are_reported_early(moody, photos, k2, fake, dry):
    """Nine plus eight are spliced if the model has no style encoder; the same pictures in two styles count once."""
    for index in range(17):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(photos / f"{index}.png")
    k2("style", "add", "first", *(photos / f"{index}.png" for index in range(9)))
    k2("style", "add", "then", *(photos / f"{index}.png" for index in range(9, 17)))
    k2("style", "add", "again", *(photos / f"{index}.png" for index in range(9)), "--method", "splice")

    said = k2("render", "--style", "first=0.5", "--style", "then=0.5", *dry, code=1).stderr

    assert "17 reference pictures are spliced, but at most 16 can be." in said and not fake.loaded
    k2("render", "--style", "first=0.5", "--style", "again=0.5", *dry)
    write_weights(library.BUNDLED / "mini-style.safetensors", {"kind": "style"})
    k2("render", "--style", "first=0.5", "--style", "then=0.5", *dry)


def test_add_stays_in_the_project(moody, photos, k2):
    (moody / "refs").symlink_to(photos)

    said = k2("style", "add", "dusk", photos / "a.png", code=1).stderr

    assert "outside the project" in said and "Replace the link" in said and "--allow-outside" not in said


# ---- list, show -------------------------------------------------------------------------------------------------


def test_list_and_show(looks, photos, k2):
    added = json.loads(k2("style", "add", "photo", photos / "a.png", "--method", "tokens", "--json").stdout)
    k2("mix-styles", "photo=0.5", "dusk=-0.25", "--save-as", "blend", "--no-preview")

    assert k2("style", "list").stdout.splitlines() == [
        "styles/blend.toml\ta mix of photo, dusk",
        "styles/dusk.toml\twords\tdusk look",
        "styles/ink.toml\twords\tink look",
        "styles/neon.toml\twords\tneon look",
        "styles/photo.toml\t1 picture",
        "styles/riso.toml\twords\triso look",
    ]
    listed = [json.loads(line) for line in k2("style", "list", "--json").stdout.splitlines()]
    assert [each["name"] for each in listed] == ["blend", "dusk", "ink", "neon", "photo", "riso"]
    assert listed[4]["references"] == added["references"] == ["refs/photo/a.png"] and listed[0]["references"] == []
    assert listed[0]["mix"] == {"photo": 0.5, "dusk": -0.25} and listed[4]["method"] == "tokens"
    assert {each["weight"] for each in listed} == {0.0}

    heading, *lines = k2("style", "show", "blend").stdout.splitlines()
    assert heading == "blend at weight 1 (in the project: off)"
    assert [line.split() for line in lines] == [
        ["photo", "0.5"],
        ["method", "tokens"],
        ["pictures", "1", "refs/photo/a.png"],
        ["dusk", "-0.25"],
        ["keywords", "dusk", "look"],
    ]
    shown = json.loads(k2("style", "show", "blend", "--json").stdout)
    assert shown["parts"][0]["reference"][0]["sha256"] and shown["parts"][1]["strength"] == -0.25
    (looks / "k2.toml").write_text(PROJECT + "[style]\ndusk = 0.8\n")
    assert k2("style", "show", "dusk").stdout.startswith("dusk at weight 1 (in the project: 0.8)\ndusk 1\n")
    assert json.loads(k2("style", "show", "dusk", "--json").stdout)["weight"] == 0.8
    assert 'Did you mean "dusk"?' in k2("style", "show", "disk", code=1).stderr


def test_list_on_a_terminal_shows_which_styles_are_on(looks, k2, monkeypatch, capsys):
    """Widths are in cells, of which a Chinese character takes two."""
    (looks / "styles" / "夜の色.toml").write_text('keywords = ["night blue", "a sky of very many stars"]\n')
    (looks / "styles" / "riso.toml").write_text("[mix]\nink = 1\n")
    toml = (looks / "k2.toml").read_text()
    (looks / "k2.toml").write_text(toml + "style.neon = 1\n\n[style]\ndusk = 0.6\n")
    weights = {
        each["name"]: each["weight"] for each in map(json.loads, k2("style", "list", "--json").stdout.splitlines())
    }
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "64")

    list_styles()

    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "styles/dusk.toml    weight 0.6    words         dusk look",
        "styles/ink.toml     off           words         ink look",
        "styles/neon.toml    some prompts  words         neon look",
        "styles/riso.toml    off           a mix of ink",
        "styles/夜の色.toml  off           words         night blue, a",
        "                                                sky of very many",
        "                                                stars",
    ]
    assert weights == {"dusk": 0.6, "ink": 0.0, "neon": 0.0, "riso": 0.0, "夜の色": 0.0}


# ---- mix-styles -------------------------------------------------------------------------------------------------


def test_mix_is_saved_and_previewed(looks, fake, k2):
    lines = k2("mix-styles", "dusk=0.7", "riso=0.3", "--save-as", "blend", "--quiet").stdout.splitlines()

    assert lines == [
        "styles/blend.toml",
        *(f"outputs/0001-mix-dusk-riso/fox-0{index}-7.png" for index in range(1, 5)),
        "outputs/0001-mix-dusk-riso/sheet.png",
    ]
    assert table(looks / "styles" / "blend.toml") == {"mix": {"dusk": 0.7, "riso": 0.3}}
    assert [{style.name: style.strength for style in spec.styles} for spec in fake.seen] == [
        {},
        {"dusk": 0.7},
        {"riso": 0.3},
        {"dusk": 0.7, "riso": 0.3},
    ]
    assert {spec.seed for spec in fake.seen} == {7}
    record = table(looks / "outputs" / "0001-mix-dusk-riso" / "fox-04-7.toml")
    assert record["prompt"]["caption"] == "mix"


def test_project_styles_stay_out_of_a_mix(looks, fake, k2):
    with (looks / "k2.toml").open("a") as file:
        file.write('\n[style]\nneon = 1.0\ndusk = 1.0\n[moodboard]\nimages = ["refs/not-even-there.png"]\n')

    k2("mix-styles", "dusk=0.5", "-p", "a lighthouse", "--size", "96x64", "--seed", "3", "--steps", "2")

    assert [{style.name: style.strength for style in spec.styles} for spec in fake.seen] == [{}, {"dusk": 0.5}]
    assert {(s.width, s.height, s.seed, s.steps) for s in fake.seen} == {(96, 64, 3, 2)}
    assert fake.seen[0].prompt == "a lighthouse"


def test_sweep_is_a_labelled_path(looks, fake, k2):
    lines = k2("mix-styles", "dusk=1", "riso=0.8", "--sweep", "5", "--json").stdout.splitlines()

    assert json.loads(lines[-1]) == {"kind": "sheet", "file": "outputs/0001-mix-dusk-riso/sheet.png"}
    strengths = [{style.name: style.strength for style in spec.styles} for spec in fake.seen]
    assert [s.get("dusk", 0) for s in strengths] == [1, 0.75, 0.5, 0.25, 0]
    assert [s.get("riso", 0) for s in strengths] == [0, 0.2, 0.4, 0.6, 0.8]
    captions = [json.loads(line)["prompt"]["caption"] for line in lines[:-1]]
    assert captions[0] == "dusk 1" and captions[2] == "dusk 0.5 · riso 0.4"


def test_three_styles_are_a_triangle_and_four_are_pairs(looks):
    three = mix.sweep({"dusk": 1.0, "ink": 1.0, "riso": 1.0}, 4)
    assert three.centred and len(three.points) == 10
    assert [len([p for p in three.points if p.row == row]) for row in dict.fromkeys(p.row for p in three.points)] == [
        1, 2, 3, 4,
    ]  # fmt: skip
    assert list(dict.fromkeys(point.row for point in three.points)) == ["dusk 1", "dusk 0.67", "dusk 0.33", "dusk 0"]
    corners = [{k: v for k, v in three.points[i].weights.items() if v} for i in (0, 6, 9)]
    assert corners == [{"dusk": 1.0}, {"ink": 1.0}, {"riso": 1.0}]
    assert all(abs(sum(point.weights.values()) - 1) < 1e-5 for point in three.points)

    four = mix.sweep(dict.fromkeys(("dusk", "ink", "neon", "riso"), 1.0), 3)
    assert not four.centred and len(four.points) == 18
    assert list(dict.fromkeys(point.row for point in four.points))[:2] == ["dusk to ink", "dusk to neon"]

    assert len(mix.sweep({"dusk": 1.0, "riso": 1.0}, sheet.PER_GRID).points) == sheet.PER_GRID


def test_sweep_weights_have_two_decimals():
    captions = [point.caption for point in mix.sweep({"dusk": 1.25, "riso": 1.5}, 3).points]
    assert captions == ["dusk 1.25", "dusk 0.62 · riso 0.75", "riso 1.5"]


def test_sweep_files_sort_in_order(looks):
    project, layout = Project.open(looks), mix.sweep({"dusk": 1.0, "riso": 1.0}, 100)
    made = mix.plan_job(project, project.resolve_settings(), project.prompts[0], layout).shots

    assert [shot.stem.split("-")[-2] for shot in made] == [f"{i:03}" for i in range(1, 101)]


def test_sweep_strips_are_labelled_with_weights_and_prompt(looks, k2, monkeypatch):
    """The weights come first, as a long prompt is cut at its end."""
    told = []
    monkeypatch.setattr(runs, "contact_sheets", lambda entries, *_, **form: told.extend(entries) or iter(()))

    k2("mix-styles", "dusk=1", "riso=1", "ink=0", "--sweep", "2", "-p", "a teapot")
    k2("mix-styles", "dusk=1", "riso=1", "-p", "a {red|blue} pot")

    rows = ["dusk 1 · a teapot", "dusk 0 · a teapot", "dusk 0 · a teapot"]
    assert [entry.label for entry in told] == [*rows, *["a red pot"] * 4]


def test_the_triangle_is_drawn(looks, k2):
    line = k2("mix-styles", "dusk=1", "ink=1", "riso=1", "--sweep", "3", "--quiet").stdout.splitlines()[-1]

    with Image.open(line) as sheet:
        paper = sheet.getpixel((0, 0))
        top = [x for x in range(sheet.width) if sheet.getpixel((x, 200)) != paper]
    assert sheet.height > sheet.width * 0.8
    assert abs((top[0] + top[-1]) / 2 - sheet.width / 2) < 2  # the first style's corner is centred


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["dusk"], 2, "not NAME=WEIGHT"),
        (["dusk=3"], 2, "not NAME=WEIGHT"),
        (["dusk=1", "dusk=0.5"], 2, "is given twice"),
        (["dusk=0"], 2, "all weights are 0"),
        (["dusk=1", "--no-preview"], 2, "nothing left to do"),
        (["disk=1"], 1, 'Did you mean "dusk"?'),
        (["dusk=1", "--sweep", "4"], 1, "from one style to another"),
        (["dusk=1", "riso=1", "--sweep", "1"], 1, "needs at least 2 pictures"),
        (["dusk=1", "riso=1", "--sweep", "500"], 1, "500 pictures; a sheet holds 120"),
        (["dusk=1", "--save-as", "riso"], 1, "The style riso already exists."),
        (["dusk=1", "--save-as", "dusk", "--force"], 1, "dusk is itself part of the mix."),
        (["dusk=1", "--save-as", "a/b"], 1, "cannot be a file name"),
        (["dusk=1", "-p", " "], 1, "A prompt is empty."),
    ],
)
def test_unmixable_styles_are_refused(looks, k2, arguments, code, message):
    before = tree(looks)

    result = k2("mix-styles", *arguments, code=code)

    assert message in result.stderr and result.stdout == ""
    assert tree(looks) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Dusk", '"Dusk" would be the same file as the style dusk.'),
        ("GRÖSSE", '"GRÖSSE" would be the same file as the style größe.'),
        ("moodboard", "the name moodboard is reserved for [moodboard]."),
    ],
)
def test_conflicting_style_names_are_refused(looks, photos, k2, name, message):
    """A clone on a Mac or Windows would lose one of two files; a style named moodboard would stop every render."""
    (looks / "styles" / "größe.toml").write_text('keywords = ["large"]\n')
    before = tree(looks)

    for more in ((), ("--force",)):
        assert message in k2("style", "add", name, photos / "a.png", *more, code=1).stderr
        assert message in k2("mix-styles", "riso=1", "--save-as", name, *more, code=1).stderr
        assert message in k2("moodboard", "analyze", photos, "--name", name, *more, code=2).stderr
    assert tree(looks) == before


def test_force_may_replace_either_case_variant(looks, photos, k2):
    (looks / "styles" / "Dusk.toml").write_text('keywords = ["large"]\n')
    for name in ("dusk", "Dusk"):
        k2("style", "add", name, photos / "a.png", "--force")


def test_style_file_is_editable_by_hand(moody, photos, k2):
    k2("style", "add", "dusk", photos / "a.png")
    file = moody / "styles" / "dusk.toml"
    file.write_text(file.read_text() + '\n[[reference]]\nimage = "refs/dusk/*"\nweight = 0.5\n')
    assert [each["weight"] for each in table(file)["reference"]] == [1.0, 0.5]
    k2("style", "show", "dusk")


def test_list_continues_past_a_broken_style(looks, k2):
    (looks / "styles" / "ink.toml").write_text("keywords = 1\n")
    listed = k2("style", "list", code=1)
    assert [line.split("\t")[0] for line in listed.stdout.splitlines()] == [
        f"styles/{name}.toml" for name in ("dusk", "neon", "riso")
    ]
    assert "ink.toml" in listed.stderr


def test_list_marks_mixes_that_cannot_work(looks, k2):
    for name, of in (("lost", "nope = 1"), ("self", "self = 1"), ("good", "dusk = 1"), ("much", "dusk = 2\ngood = 1")):
        (looks / "styles" / f"{name}.toml").write_text(f"[mix]\n{of}\n")

    listed = k2("style", "list", code=1)

    assert [line.split("\t")[0] for line in listed.stdout.splitlines()] == [
        f"styles/{name}.toml" for name in ("dusk", "good", "ink", "much", "neon", "riso")
    ]
    assert 'styles/lost.toml, line 2: there is no style "nope".' in listed.stderr
    assert "styles/self.toml, line 2: the mixes form a loop, self → self." in listed.stderr


def test_broken_style_is_reported_once_with_its_mixes(looks, k2):
    (looks / "styles" / "ink.toml").write_text("keywords = 1\n")
    for name, of in (("bold", "ink"), ("pale", "bold"), ("good", "dusk")):
        (looks / "styles" / f"{name}.toml").write_text(f"[mix]\n{of} = 1\n")

    listed = k2("style", "list", code=1)

    assert listed.stderr.count("styles/ink.toml, line 1: ") == 1
    for name in ("bold", "pale"):
        assert f"styles/{name}.toml mixes a style that cannot be used.\n" in listed.stderr
    assert [line.split("\t")[0] for line in listed.stdout.splitlines()] == [
        f"styles/{name}.toml" for name in ("dusk", "good", "neon", "riso")
    ]


def test_unreadable_styles_folder_is_not_taken_for_empty(looks, k2, monkeypatch):
    listdir = os.listdir

    def forbidden(folder="."):
        if Path(folder).name == "styles":
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", forbidden)

    for command in (["style", "list"], ["render", "--style", "dusk=1"]):
        assert "styles cannot be read: Permission denied." in k2(*command, code=1).stderr
    assert complete_style(None, "") == []


def test_mix_is_kept_if_its_preview_fails(looks, k2):
    asked = ["mix-styles", "dusk=1", "riso=1", "--save-as", "blend"]
    k2(*asked, "--device", "cuda:99", code=1)
    k2(*asked, "--no-preview")
    assert "The style blend already exists." in k2("mix-styles", "dusk=2", "--save-as", "blend", code=1).stderr


def test_cyclic_mix_is_not_saved(looks, k2):
    k2("mix-styles", "dusk=1", "riso=1", "--save-as", "blend", "--no-preview")

    assert "riso is itself part" in k2("mix-styles", "blend=1", "--save-as", "riso", "--force", code=1).stderr
    k2("mix-styles", "dusk=0.5", "--save-as", "blend", "--force", "--no-preview")
    assert table(looks / "styles" / "blend.toml") == {"mix": {"dusk": 0.5}}


def test_interrupted_preview_is_resumed_with_its_captions(looks, fake, k2):
    def stop(index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt

    fake.stop = staticmethod(stop)
    k2("mix-styles", "dusk=0.7", "riso=0.3", code=130)
    fake.stop = staticmethod(lambda index: None)

    assert len(k2("render", "--resume", "--quiet").stdout.splitlines()) == 2
    record = table(looks / "outputs" / "0001-mix-dusk-riso" / "fox-04-7.toml")
    assert record["prompt"]["caption"] == "mix"


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_unsupported_method_is_reported_before_loading(moody, photos, k2, fake, dry):
    """Just as rendering would refuse it; styles at weight 0 are not checked."""
    for method in ("splice", "tokens", "vision"):
        k2("style", "add", method, photos / "a.png", "--method", method)

    def said(*words: str, code: int = 1) -> str:
        return k2("render", *words, *dry, code=code).stderr

    few = "A spliced style needs two steps: the first is pure noise."
    assert f"Error: {few}" in said("--style", "splice=1", "--steps", "1")
    assert f'Error: "fox-01": {few}' in said("--style", "splice=1", "--only", "fox", "--matrix", "steps=1,2")
    assert "mini has no style encoder." in said("--style", "tokens=0.5")
    assert 'The text encoder of mini cannot read pictures.\nHint:  Give "vision" the method' in said(
        "--style", "vision=0.5"
    )
    assert not fake.loaded
    said("--style", "splice=1", "--steps", "2", code=0)
    said("--style", "vision=0", "--style", "tokens=0", "--style", "splice=0", "--steps", "1", code=0)
