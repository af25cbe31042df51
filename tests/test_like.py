"""`--like`: what is taken from a finished picture, and what takes precedence."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import write_weights
from PIL import Image
from test_style_app import write_lora

from k2cli import moodboard
from k2cli.styles import BOARD_STYLE
from model import library
from model.spec import Style

LOOK = 'keywords = ["film grain"]\navoids = ["gloss"]\n'


@pytest.fixture
def dusky(moody):
    """A project with two styles, one of them on."""
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text(LOOK)
    (moody / "styles" / "ink.toml").write_text('keywords = ["ink"]\n')
    (moody / "k2.toml").write_text((moody / "k2.toml").read_text() + "\n[style]\nink = 1\n")
    return moody


def plan(k2, *options: object) -> list[dict]:
    return [json.loads(line) for line in k2("render", "--dry-run", "--json", *options).stdout.splitlines()]


def rendered(k2, *options: object) -> str:
    return k2("render", *options, "--batch", "1").stdout.split()[0]


def test_like_changes_only_the_seed(dusky, k2):
    """The prompt is taken as given, so that styles and what they avoid join once; seeds follow the picture's own."""
    asked = ("-p", r"a \{red|wet\} fox", "--style", "dusk=0.6", "--style", "ink=0", "--steps", "9", "--guidance", "3")
    made = rendered(k2, *asked, "--guidance-until", "0.5", "--sampler", "ab2", "--size", "64x96", "--seed", "40")
    (before,) = plan(k2, *asked, "--guidance-until", "0.5", "--sampler", "ab2", "--size", "64x96", "--batch", "1")
    first, second = plan(k2, "--like", made, "--batch", "2")
    assert (first["settings"]["seed"], second["settings"]["seed"]) == (41, 42)
    for key in ("prompt", "style", "leader", "init_image"):
        assert first[key] == before[key]
    assert first["settings"] | {"seed": 7, "mu": None} == before["settings"] | {"seed": 7, "mu": None}
    assert first["settings"]["mu"] == 0.5  # the resolved value


def test_precision_is_part_of_the_look(dusky, k2, fake):
    """It changes the picture, even with the same seed; another checkpoint or a given precision overrides it."""
    made = rendered(k2, "-p", "tea", "--precision", "int8")
    (dusky / "k2.toml").write_text((dusky / "k2.toml").read_text().replace("[render]", '[render]\nprecision = "int4"'))

    for said in ((), ("--precision", "fp8"), ("--raw",)):
        k2("render", "--like", made, "--batch", "1", *said)
    plain = rendered(k2, "-p", "tea", "--precision", "native")
    k2("render", "--like", plain, "--batch", "1")

    assert [precision for precision, _ in fake.held] == ["int8", "int8", "fp8", "int4", "native", None]


def test_options_override_the_picture_and_what_depends_on_it(dusky, k2):
    asked = ("-p", "tea", "--steps", "9", "--guidance-until", "0.5", "--size", "64x96", "--seed", "40")
    made = rendered(k2, *asked)
    (other,) = plan(k2, "--like", made, "--batch", "1", "--raw", "--aspect", "1:1", "--seed", "3", "--style", "ink=0.5")
    said = other["settings"]
    assert (said["seed"], said["width"], said["height"], other["variant"]) == (3, 128, 128, "raw")
    assert said["steps"] != 9 and said["guidance_until"] is said["mu"] is None  # the checkpoint's own, and the size's
    assert [(style["name"], style["strength"]) for style in other["style"]] == [("ink", 0.5)]
    (larger,) = plan(k2, "--like", made, "--batch", "1", "--size", "96x96")
    assert (larger["settings"]["mu"], larger["settings"]["steps"]) == (None, 9)
    steps = plan(k2, "--like", made, "--matrix", "steps=4,16")
    assert [each["settings"]["steps"] for each in steps] == [4, 16]
    assert {each["settings"]["seed"] for each in steps} == {41}
    assert [each["settings"]["seed"] for each in plan(k2, "--like", made, "--matrix", "seed=1,2")] == [1, 2]


def test_prompts_avoids_count_once(dusky, k2):
    """Even if the project adds it to every prompt, and whatever the project avoids by now."""
    toml = (dusky / "k2.toml").read_text()
    (dusky / "k2.toml").write_text(toml.replace("seed = 7", 'seed = 7\navoid = "snow"'))
    made = rendered(k2, "-p", "tea", "--style", "dusk=1")
    (dusky / "k2.toml").write_text(toml.replace("seed = 7", 'seed = 7\navoid = "fog"'))

    (again,), (more,) = plan(k2, "--like", made), plan(k2, "--like", made, "--avoid", "rain")
    (other,) = plan(k2, "--like", made, "-p", "a cup")

    assert (again["prompt"]["avoid"], more["prompt"]["avoid"]) == ("snow, gloss", "snow, rain, gloss")
    assert other["prompt"]["avoid"] == "fog, gloss"


def test_mixed_styles_count_once(dusky, k2):
    """A record lists them beside the style that mixes them, at the strengths they came to."""
    (dusky / "styles" / "pale.toml").write_text('keywords = ["pale"]\n[mix]\ndusk = 0.5\n')
    (dusky / "styles" / "both.toml").write_text('keywords = ["both"]\n[mix]\npale = 0.5\ndusk = 0.25\n')
    asked = ("-p", "tea", "--style", "both=1", "--style", "dusk=0.3", "--batch", "1")
    made = rendered(k2, *asked)

    (before,), (again,) = plan(k2, *asked), plan(k2, "--like", made, "--batch", "1")
    (without,) = plan(k2, "--like", made, "--batch", "1", "--style", "both=0", "--style", "pale=0")

    assert again["style"] == before["style"] and len(again["style"]) == 4
    assert {style["name"]: style["strength"] for style in without["style"]} == {"dusk": 0.3, "ink": 1.0}


def test_other_prompts_follow_the_pictures_lead(dusky, k2):
    """As those of its own batch do: a picture that followed another passes on its lead picture."""
    made = rendered(k2, "-p", "tea", "--seed", "40", "--style", "dusk=1")
    owl, tea = plan(k2, "--like", made, "-p", "an owl", "-p", "tea", "--cohesion", "0.8", "--batch", "1")
    assert owl["leader"] == tea["leader"] == {"prompt": "tea, film grain, ink", "seed": 40, "avoid": "gloss"}
    assert owl["settings"]["seed"] == 7 and owl["style"] == tea["style"]
    whole = ("--scope", "run", "--cohesion", "0.5")
    _, led = k2("render", "-p", "a cup", "-p", "a pot", *whole, "--batch", "1").stdout.split()
    (third,) = plan(k2, "--like", led, "-p", "a jug", "--batch", "1")
    assert third["settings"]["cohesion"] == 0.5 and third["leader"]["prompt"].startswith("a cup")
    own = '"a red fox"\nsteps = 4\nstyle = { ink = 0.4, dusk = -1 }'
    (dusky / "k2.toml").write_text((dusky / "k2.toml").read_text().replace('"a red fox"', own))
    like = ("--like", made, "--only", "fox", "--batch", "1")
    named = plan(k2, *like)
    assert [each["prompt"]["text"] for each in named] == ["a red fox"] and named[0]["style"] == owl["style"]
    assert [style["strength"] for style in plan(k2, *like, "--style", "ink=0.5")[0]["style"]] == [1.0, 0.5]
    line = k2("render", "-", "--like", made, "--dry-run", "--json", input='{"prompt": "tea", "styles": {"ink": 0.5}}')
    assert [style["strength"] for style in json.loads(line.stdout)["style"]] == [1.0, 0.5]


def test_init_image_is_kept(dusky, k2):
    (dusky / "refs").mkdir()
    Image.new("RGB", (64, 64), "teal").save(dusky / "refs" / "a.png")
    made = rendered(k2, "-p", "tea", "--init-image", "refs/a.png", "--denoise", "0.4")
    (again,) = plan(k2, "--like", made, "--batch", "1")
    assert (again["init_image"]["image"], again["settings"]["denoise"]) == ("refs/a.png", 0.4)
    masked = rendered(k2, "-p", "tea", "--init-image", "refs/a.png", "--mask", "8x8+0+0")
    Image.new("RGB", (64, 64), "navy").save(dusky / "refs" / "b.png")
    (other,) = plan(k2, "--like", masked, "--batch", "1", "--init-image", "refs/b.png")
    assert (other["init_image"]["image"], other["mask"]) == ("refs/b.png", None)  # it belonged to the previous one
    noise = rendered(k2, "-p", "tea")
    text = (dusky / "k2.toml").read_text()
    (dusky / "k2.toml").write_text(text.replace("[render]", '[render]\ninit_image = "refs/a.png"\nmask = "8x8+0+0"'))
    (without,) = plan(k2, "--like", noise, "--batch", "1")
    assert (without["init_image"], without["mask"]) == (None, None)


def test_another_init_image_brings_its_shape_and_no_mask(dusky, k2):
    """Within the mask everything was repainted; of the other picture nothing would remain."""
    (dusky / "refs").mkdir()
    Image.new("RGB", (64, 64), "teal").save(dusky / "refs" / "a.png")
    Image.new("RGB", (200, 100), "teal").save(dusky / "refs" / "wide.png")
    masked = rendered(k2, "-p", "tea", "--init-image", "refs/a.png", "--mask", "64x64+0+0")
    plain = rendered(k2, "-p", "tea", "--init-image", "refs/a.png", "--denoise", "0.4")
    record = Path(masked).with_suffix(".toml")
    record.write_text(record.read_text().replace("[settings]\n", "[settings]\ndenoise = 1.0\n"))  # as models record it
    for made, denoise in ((record, 0.75), (plain, 0.4)):
        (other,) = plan(k2, "--like", made, "--init-image", "refs/wide.png", "--batch", "1")
        assert (other["mask"], other["settings"]["denoise"]) == (None, denoise)
        assert (other["settings"]["width"], other["settings"]["height"]) == (176, 96)


def test_piped_line_overrides_the_pictures_settings(dusky, k2):
    """A size has its own mu; another init image its own shape and denoise, and no mask; the project's size counts."""
    (dusky / "refs").mkdir()
    Image.new("RGB", (64, 64), "teal").save(dusky / "refs" / "a.png")
    Image.new("RGB", (480, 320), "teal").save(dusky / "refs" / "wide.png")
    begun = ("--init-image", "refs/a.png", "--mask", "64x64+0+0", "--denoise", "0.9", "--size", "64x96")
    made = rendered(k2, "-p", "tea", *begun)
    text = (dusky / "k2.toml").read_text()
    for frame in ('size = "96x96"\n', 'aspect = "2:1"\nresolution = 192\n'):
        (dusky / "k2.toml").write_text(text.replace("[render]\n", f"[render]\n{frame}"))
        for said, more in (
            ({"init_image": "refs/wide.png"}, ("--size", "128x128")),
            ({"init_image": "refs/wide.png"}, ("--matrix", "denoise=0.3,0.6")),
            ({"init_image": "refs/wide.png", "aspect": "1:1", "denoise": 0.5}, ()),
            ({"init_image": "none"}, ()),
            ({"size": "96x64"}, ("--steps", "4")),
            ({"resolution": 128}, ()),
        ):
            options = [word for key, value in said.items() for word in (f"--{key.replace('_', '-')}", value)]
            typed = plan(k2, "--like", made, "-p", "a cat", *options, *more)
            line = json.dumps({"prompt": "a cat"} | said)
            piped = k2("render", "-", "--like", made, *more, "--dry-run", "--json", input=line).stdout
            assert [json.loads(each) for each in piped.splitlines()] == typed


def test_overridden_settings_fall_back_to_the_project(dusky, k2):
    """Settings for its own init image cause no warnings, as on the command line; its errors are attributed to it."""
    (dusky / "refs").mkdir()
    Image.new("RGB", (64, 64), "teal").save(dusky / "refs" / "a.png")
    toml = (dusky / "k2.toml").read_text()
    for own in ('mask = "64x64+0+0"\ndenoise = 0.4\n', "denoise = 0.4\n"):
        text = toml.replace("[render]\n", f'[render]\ninit_image = "refs/a.png"\n{own}')
        (dusky / "k2.toml").write_text(text)
        made = rendered(k2, "-p", "a red fox")
        like, line = ("render", "--like", made, "--dry-run"), '{"prompt": "a red fox", "init_image": "none"}'
        assert k2(*like, "-p", "a red fox", "--init-image", "none").stderr == k2(*like, "-", input=line).stderr == ""
    (dusky / "k2.toml").write_text(text.replace("[render]\n", '[render]\nsize = "96x97"\n'))
    wrong = k2(*like, "-", input=line.replace("none", "refs/a.png"), code=1).stderr
    assert wrong == k2(*like, "-p", "a red fox", "--init-image", "refs/a.png", code=1).stderr
    assert "k2.toml, line 5: the sides of 96x97" in wrong


def test_unset_settings_are_not_taken_from_the_project(dusky, k2):
    made = rendered(k2, "-p", "tea", "--guidance", "0")
    (dusky / "refs").mkdir()
    Image.new("RGB", (64, 64), "teal").save(dusky / "refs" / "a.png")
    since = 'init_image = "refs/a.png"\ndenoise = 0.3\nstyle_guidance = 2\nguidance_until = 0.5\ncreativity = "low"\n'
    text = (dusky / "k2.toml").read_text()
    (dusky / "k2.toml").write_text(text.replace("[render]\n", f"[render]\n{since}"))
    (again,) = plan(k2, "--like", made, "--batch", "1")
    assert again["init_image"] is None
    assert {again["settings"][key] for key in ("denoise", "style_guidance", "guidance_until")} == {None}
    assert again["prompt"]["creativity"] == "raw"
    (begun,) = plan(k2, "--like", made, "--batch", "1", "--init-image", "refs/a.png")
    assert begun["settings"]["denoise"] == 0.3  # about which the picture says nothing


def test_project_is_found_from_anywhere(dusky, k2, tmp_path, monkeypatch):
    made = dusky / rendered(k2, "-p", "tea").removeprefix(f"{dusky}/")
    monkeypatch.chdir(tmp_path)
    assert rendered(k2, "--like", made).endswith("tea-8.png")
    assert len(list((dusky / "outputs").iterdir())) == 2


def test_project_elsewhere_is_named(dusky, k2, tmp_path, monkeypatch):
    """Of two projects, either one may be meant."""
    made = dusky / rendered(k2, "-p", "tea", "--style", "dusk=1").removeprefix(f"{dusky}/")
    assert "another project" not in k2("render", "--like", made, "--dry-run").stderr
    other = tmp_path / "other"
    other.mkdir()
    (other / "k2.toml").write_text("[project]\n")
    monkeypatch.chdir(other)

    told = k2("render", "--like", made, "--dry-run").stderr
    (tmp_path / "own.png").write_bytes(made.read_bytes())
    missing = k2("render", "--like", tmp_path / "own.png", code=2).stderr

    assert f"tea-7.png belongs to another project; pictures like it go there: {dusky}" in told
    assert "another project" not in k2("render", "--like", made, "--dry-run", "--quiet").stderr
    assert "another project" not in k2("render", dusky, "--like", made, "--dry-run").stderr
    assert 'other has no style "dusk".' in missing


def test_changed_look_is_reported(dusky, k2):
    """Once, and with what differs: with cohesion the lead picture is rendered again, with today's styles."""
    (dusky / "refs").mkdir()
    Image.new("RGB", (64, 64), "teal").save(dusky / "refs" / "a.png")
    (dusky / "styles" / "dusk.toml").write_text(LOOK + '[[reference]]\nimage = "refs/*"\n')
    for name in ("mask.png", "line.png"):
        Image.new("RGB", (64, 64), "white").save(dusky / name)
    lora = write_lora(dusky / "lino.safetensors")
    lino = dusky / "styles" / "lino.toml"
    lino.write_text(f'lora = "{lora.name}"\ntriggers = ["lno"]\n[[reference]]\nimage = "line.png"\nweight = 0.5\n')
    begun = ("--init-image", "refs/a.png", "--mask", "mask.png")
    made = rendered(k2, "-p", "tea", "--style", "dusk=1", "--style", "lino=1", *begun)
    like = ("render", "--like", made, "--dry-run", "-p", "a cup", "--cohesion", "0.5")
    assert "The look has changed" not in k2(*like, "--style", "dusk=0.5").stderr

    (dusky / "refs" / "a.png").rename(dusky / "refs" / "b.png")
    assert "The look has changed" not in k2(*like, "--init-image", "none").stderr
    Image.new("RGB", (64, 64), "navy").save(dusky / "refs" / "a.png")
    (dusky / "styles" / "ink.toml").write_text('keywords = ["ink", "wash"]\navoids = ["gloss"]\n')
    lino.write_text(lino.read_text().replace("lno", "linocut").replace("0.5", "0.6"))
    write_lora(lora, "blocks.1.attn.wq")
    Image.new("RGB", (64, 64), "gray").save(dusky / "mask.png")

    told = k2(*like).stderr
    was = "The look has changed since tea-7.png was made:"
    styles = "ink has different keywords and avoids, lino has different pictures and triggers and weights"
    pictures = "mask.png is a different picture, a.png is a different picture"
    assert f"{was} dusk has different pictures, {styles}, {pictures}." in told
    without = ("--style", "ink=0", "--style", "lino=0", "--init-image", "none")
    assert f"{was} dusk has different pictures.\n" in k2(*like, *without).stderr
    lines = k2("render", "--like", made, "--stream", "--dry-run", input="a cup\na pot\n").stderr
    assert lines.count("The look has changed") == 1


def test_style_newly_brought_by_a_mix_is_reported(dusky, k2):
    """Of a mix in a mix, too, or if it had cancelled out, which no record says; but not if it is asked for."""
    blend = dusky / "styles" / "blend.toml"
    blend.write_text('keywords = ["soft"]\n[mix]\ndusk = 0.5\n')
    (dusky / "styles" / "riso.toml").write_text('keywords = ["riso"]\n')
    (dusky / "styles" / "print.toml").write_text("[mix]\nriso = 1\n")
    made = rendered(k2, "-p", "tea", "--style", "blend=1")
    like = ("render", "--like", made, "--dry-run")
    blend.write_text(blend.read_text().replace("0.5", "0.7"))  # the picture's own weights make up for this
    assert "The look has changed" not in k2(*like, "--style", "riso=0.5").stderr

    blend.write_text(blend.read_text() + "print = 1\n")

    told = "The look has changed since tea-7.png was made: riso is now mixed in.\n"
    assert told in k2(*like).stderr
    assert "The look has changed" not in k2(*like, "--style", "blend=0").stderr
    off = rendered(k2, "-p", "tea", "--style", "blend=1", "--style", "riso=-1")
    assert told in k2("render", "--like", off, "--dry-run").stderr
    assert "riso" not in k2("render", "--like", off, "--dry-run", "--style", "riso=-1").stderr


def test_changed_method_is_reported(dusky, k2):
    """`auto` stands for the model's own method."""
    night = dusky / "styles" / "night.toml"
    Image.new("RGB", (64, 64), "teal").save(dusky / "a.png")
    plain = '[[reference]]\nimage = "a.png"\n'
    night.write_text(plain)
    write_weights(library.BUNDLED / "mini-style.safetensors", {"kind": "style"})
    made = rendered(k2, "-p", "tea", "--style", "night=1")
    for before, now, told in (
        ("tokens", "auto", ""),
        ("tokens", "tokens", ""),
        ("tokens", "splice", "night is now read by splice."),
        ("auto", "splice", "night is now read by splice."),
        ("splice", "auto", "night is now read by tokens."),
    ):
        record = Path(made).with_suffix(".toml")
        record.write_text(re.sub('method = ".*"', f'method = "{before}"', record.read_text()))
        night.write_text(f'method = "{now}"\n{plain}')
        said = k2("render", "--like", record, "--dry-run").stderr
        assert ("The look has changed" in said) == bool(told) and told in said
    night.write_text('keywords = ["night"]\n')
    assert "night has different pictures and keywords.\n" in k2("render", "--like", record, "--dry-run").stderr


def test_invalid_like_targets_are_refused(dusky, k2, tmp_path):
    made = rendered(k2, "-p", "tea", "--style", "dusk=1")
    Image.new("RGB", (8, 8)).save(dusky / "bare.png")
    assert "has no record" in k2("render", "--like", "bare.png", code=1).stderr
    sheet = k2("render", "-p", "an owl", "--batch", "2").stdout.split()[0].replace("an-owl-7", "sheet")
    assert f"{sheet} is a contact sheet.\nHint:  Name one of" in k2("render", "--like", sheet, code=1).stderr
    assert "no none.png" in k2("render", "--like", "none.png", code=1).stderr
    (dusky / "styles" / "dusk.toml").unlink()
    gone = k2("render", "--like", made, code=2).stderr
    assert 'moody has no style "dusk" any more' in gone and "omit it: --style dusk=0" in gone
    (without,) = plan(k2, "--like", made, "--batch", "1", "--style", "dusk=0", "--style", "ink=0.5")
    assert [(style["name"], style["strength"]) for style in without["style"]] == [("ink", 0.5)]
    assert 'no style "dsk"' in k2("render", "--like", made, "--style", "dusk=0", "--style", "dsk=0", code=2).stderr
    assert "no other setting can be given" in k2("render", "--resume", "--like", made, code=2).stderr
    shutil.copytree(dusky, tmp_path / "other")
    assert "one project at a time" in k2("render", dusky, tmp_path / "other", "--like", made, code=2).stderr


def test_unknown_creativity_is_blamed_on_the_record(dusky, k2):
    record = Path(rendered(k2, "-p", "tea")).with_suffix(".toml")
    record.write_text(record.read_text().replace('creativity = "raw"', 'creativity = "hihg"'))

    said = k2("render", "--like", record, "--dry-run", code=1).stderr
    assert '"creativity" cannot be "hihg"' in said and "high" in said


def test_missing_model_is_not_blamed_on_the_project(dusky, k2):
    record = Path(rendered(k2, "-p", "tea")).with_suffix(".toml")
    record.write_text(re.sub(r'(\[model\]\nname = )"\w+"', r'\1"gone"', record.read_text()))

    assert k2("render", "--like", record, code=2).stderr.startswith('Error: --like: There is no model "gone"')


def test_missing_moodboard_may_be_left_out(dusky, k2, monkeypatch):
    """As a missing style may."""

    def seen(board, *_):
        return ((Style(BOARD_STYLE, board.strength, keywords=("fog",)),) if board.strength else ()), set()

    monkeypatch.setattr(moodboard, "as_style", seen)
    Image.new("RGB", (64, 64)).save(dusky / "a.png")
    bare = (dusky / "k2.toml").read_text()
    (dusky / "k2.toml").write_text(bare + '\n[moodboard]\nimages = ["a.png"]\n')
    made = rendered(k2, "-p", "tea")
    for strength, keywords in (("0", []), ("0.5", ["fog"])):
        (other,) = plan(k2, "--like", made, "--batch", "1", "--moodboard", strength)
        assert [word for style in other["style"] for word in style["keywords"]] == ["ink", *keywords]
    (dusky / "k2.toml").write_text(bare)

    gone = k2("render", "--like", made, code=2).stderr
    (without,) = plan(k2, "--like", made, "--batch", "1", "--moodboard", "0")

    assert "moody has no moodboard any more" in gone and "omit it: --moodboard 0" in gone
    assert [style["name"] for style in without["style"]] == ["ink"]
    assert "moody has no moodboard." in k2("render", "--like", made, "--moodboard", "0.5", code=1).stderr


def test_record_without_a_side_uses_the_projects_size(dusky, k2):
    made = dusky / rendered(k2, "-p", "tea", "--size", "64x96")
    record = made.with_suffix(".toml")
    record.write_text(record.read_text().replace("width = 64\n", ""))
    (dusky / "k2.toml").write_text((dusky / "k2.toml").read_text().replace("[render]", '[render]\nsize = "96x96"'))

    (other,) = plan(k2, "--like", record, "--batch", "1")
    assert (other["settings"]["width"], other["settings"]["height"]) == (96, 96)
    assert other["settings"]["mu"] is None  # the size's own, too
