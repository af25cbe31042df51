"""k2.toml: what it may say, what it resolves to, and the error messages when it is wrong."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path

import pytest
from conftest import PROJECT, write_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from k2cli import models, project
from k2cli.folder import Folder
from k2cli.matrix import read_axes
from k2cli.project import Project, Shot
from k2cli.prompts import Prompt, name_files, slug
from k2cli.sizes import ASPECTS, fit_aspect, parse_resolution, parse_size
from k2cli.texts import check_name
from model import library
from model.errors import K2Error


def shots(project: Project, prompts: list[Prompt] | None = None, styles: dict[str, float] | None = None, **options):
    return project.shots(project.resolve_settings(**options), prompts, styles)


def test_a_new_project_resolves_as_it_is(fake, tmp_path):
    made = Folder.create(tmp_path / "moody")

    planned = shots(Project.open(made))

    assert [shot.stem for shot in planned] == ["fox-7", "fox-8", "owl-7", "owl-8", "sailboat-7", "sailboat-8"]
    assert planned[0].given == "a red fox"
    assert planned[0].spec.prompt == "a red fox, sticker style"
    assert (planned[0].spec.width, planned[0].spec.steps) == (None, None)  # the checkpoint's own


def test_the_nearest_project_above_is_found(moody):
    deep = moody / "refs" / "board"
    deep.mkdir(parents=True)

    assert Project.find(deep).root == moody


def test_options_override_settings(moody):
    (spec,) = [
        shot.spec for shot in shots(Project.open(moody), [Prompt("tea")], seed=3, steps=8, guidance=0, size="96x128")
    ]

    assert (spec.prompt, spec.seed, spec.steps, spec.guidance, spec.width, spec.height) == ("tea", 3, 8, 0.0, 96, 128)


@pytest.mark.parametrize(
    ("options", "seeds", "size"),
    [
        ({}, [40, 41], (64, 96)),
        ({"seed": 7}, [7, 8], (64, 96)),
        ({"batch": 1}, [40], (64, 96)),
        ({"size": "128x128"}, [40, 41], (128, 128)),
        ({"aspect": "2:1"}, [40, 41], (176, 96)),
        ({"resolution": 256}, [40, 41], (256, 256)),
    ],
)
def test_options_override_a_prompts_settings(moody, options, seeds, size):
    (moody / "k2.toml").write_text(PROJECT + 'seed = 40\nbatch = 2\nsize = "64x96"\n')

    specs = [shot.spec for shot in shots(Project.open(moody), **options) if shot.name != "fox"]

    assert [spec.seed for spec in specs] == seeds
    assert {(spec.width, spec.height) for spec in specs} == {size}


@pytest.mark.parametrize(
    ("text", "options", "place"),
    [
        ('size = "112x64"', {}, "k2.toml, line 6: the sides"),
        ('size = "112x64"', {"size": "112x64"}, "--size: the sides"),
        ("seed = 8", {"size": "112x64"}, "--size: the sides"),
    ],
)
def test_unsupported_sizes_are_blamed_on_where_they_come_from(moody, text, options, place):
    write_weights(library.BUNDLED / "mini-vae.safetensors", {"kind": "vae", "config": {"dim_mult": [1, 2, 4, 4, 4]}})
    (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", f"seed = 7\n{text}" if "size" in text else text))

    with pytest.raises(K2Error, match=re.escape(place)):
        shots(Project.open(moody), **options)
    (moody / "k2.toml").write_text(PROJECT + 'size = "112x64"\n')
    with pytest.raises(K2Error, match=f"k2.toml, line {len(PROJECT.splitlines()) + 1}: the sides"):
        shots(Project.open(moody))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('aspect = "wide"', '"wide" is not an aspect ratio from 1:8 to 8:1.'),
        ('resolution = "9K"', "9216x9216 is out of range."),
        ('init_image = "refs/none.png"', "there is no picture refs/none.png."),
        ('mask = "8x8+0+0"', "there is no init_image to mask."),
        ('[[matrix]]\nsize = ["64x64", "80x80"]', "the sides of 80x80 are not multiples of 32."),
    ],
)
def test_errors_in_prompts_and_matrices_name_their_line(moody, monkeypatch, line, problem):
    monkeypatch.setattr(models, "grid", lambda model, variant: models.Grid(256, 32))
    (moody / "k2.toml").write_text(f"{PROJECT}{line}\n")
    project = Project.open(moody)

    with pytest.raises(K2Error) as caught:
        project.shots(project.resolve_settings(), matrices=project.matrices)
    assert str(caught.value) == f"k2.toml, line {len(PROJECT.splitlines()) + 1}: {problem}"


def test_hints_list_at_most_ten_names(moody):
    (moody / "k2.toml").write_text("".join(f'[[prompt]]\nname = "p{i}"\ntext = "tea"\n' for i in range(500)))

    with pytest.raises(K2Error) as caught:
        Project.open(moody).choose_prompts(["typo"])
    assert caught.value.hint.endswith("p8, p9 and 490 more.")


def test_a_prompt_may_differ_from_the_rest(moody):
    (moody / "k2.toml").write_text(PROJECT + 'seed = 40\nbatch = 2\nsize = "64x96"\navoid = "snow"\n')

    planned = shots(Project.open(moody))

    assert [shot.stem for shot in planned] == ["fox-7", "an-owl-at-night-40", "an-owl-at-night-41"]
    assert (planned[1].spec.width, planned[1].spec.height, planned[1].spec.negative) == (64, 96, "snow")


def test_negative_prompts_add_up(moody, k2):
    """A prompt's own, that of [render] or --avoid, and the styles' avoids; each phrase once."""
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["matt"]\navoids = ["gloss"]\n')
    said = PROJECT.replace("seed = 7", 'seed = 7\navoid = "snow"') + 'avoid = "fog"\n\n[style]\ndusk = 1\n'
    (moody / "k2.toml").write_text(said)

    def avoided(*options):
        return [
            json.loads(line)["prompt"]["avoid"]
            for line in k2("render", "--dry-run", "--json", *options).stdout.split("\n")[:-1]
        ]

    assert avoided() == ["snow, gloss", "fog, snow, gloss"]
    assert avoided("--avoid", "rain", "--avoid", "text, ink") == [
        "rain, text, ink, gloss",
        "fog, rain, text, ink, gloss",
    ]
    assert avoided("--avoid", "") == ["gloss", "fog, gloss"]
    assert avoided("--avoid", "fog") == ["fog, gloss", "fog, gloss"]
    assert avoided("--avoid", "rain", "-p", "tea") == ["rain, gloss"]


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("--negative", "It is called --avoid."),
        ("--negative-prompt", "It is called --avoid."),
        ("--cfg-scale", "It is called --guidance, and is 1 less than a CFG scale."),
        ("--width", 'It is called --size, for both sides: "320x192".'),
        ("--strength", "It is called --denoise, and 1 repaints all."),
        ("--lora", "It belongs in a style: styles/NAME.toml."),
        ("--mu", "It belongs under [render]."),
        ("--ar", "It is called --aspect."),
        ("--img2img", "It is called --init-image."),
        ("--sref", "Make the picture a style: k2 style add NAME PICTURE"),
        ("--version", "Choose weights with --model; to list them: k2 models list"),
        ("-o", "Pictures go to outputs/; their paths are printed."),
    ],
)
def test_options_of_other_tools_get_a_hint(moody, k2, option, hint):
    refused = k2("render", option, "0.5", "--dry-run", code=2)

    assert refused.stderr == f"Error: There is no option {option}.\nHint:  {hint}\n"


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        (["vary", "a.png"], "For more like a picture: k2 render --like PICTURE"),
        (["upscale"], "k2 has no upscaler; to repaint larger: k2 render --init-image PICTURE"),
        (["style", "rm", "dusk"], "Delete its file, styles/NAME.toml."),
    ],
)
def test_commands_of_other_tools_get_a_hint(moody, k2, command, hint):
    called = command[command[0] == "style"]
    assert f"Error: No such command '{called}'. {hint}" in k2(*command, code=2).stderr
    assert k2("rm", code=2).stderr.endswith("No such command 'rm'.\n")


def test_other_unknown_options_get_no_hint(moody, k2):
    for command in (["render", "--foo"], ["mix-styles", "dusk=1", "--batch", "2"], ["log", "--steps", "2"]):
        assert "No such option" in k2(*command, code=2).stderr
    assert "No such option" in k2("models", "info", "--checkpoint", "x", code=2).stderr  # there it is an argument
    assert "called --guidance" in k2("mix-styles", "dusk=1", "--cfg", "7", code=2).stderr


@pytest.mark.parametrize(
    ("line", "options"),
    [("seed = 7", ("--seed", "random")), ('seed = "random"', ()), ('seed = "random"', ("--only", "fox"))],
)
def test_a_random_seed_is_drawn_once_per_run(moody, k2, monkeypatch, line, options):
    """All prompts share it, as they would any other seed, and records contain the number."""
    draws = iter(range(40, 99, 10))
    monkeypatch.setattr(project, "draw_seed", lambda: next(draws))
    (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", line))

    first, again = (k2("render", "--batch", "2", "--json", *options).stdout.splitlines() for _ in range(2))

    seeds = [[json.loads(each)["settings"]["seed"] for each in made] for made in (first, again)]
    assert seeds[0] == [40, 41] * (len(first) // 2) and seeds[1] == [50, 51] * (len(first) // 2)
    assert k2("rerun", json.loads(first[0])["file"]).exit_code == 0


def test_a_prompts_own_seed_may_be_random(moody, k2):
    (moody / "k2.toml").write_text(PROJECT + 'seed = "random"\n')

    fox, owl = (
        json.loads(line)["settings"]["seed"] for line in k2("render", "--dry-run", "--json").stdout.splitlines()
    )

    assert fox == 7 and 0 <= owl < 2**32


@pytest.mark.parametrize("seed", ["-1", "anything"])
def test_invalid_seeds_get_a_hint_at_random(moody, k2, seed):
    refused = k2("render", "--seed", seed, code=2)

    assert refused.stderr.startswith("Error: --seed must") and 'Or "random"' in refused.stderr


OWN = """aspect = "2:1"
steps = 8
guidance = 1.5
creativity = "low"
style.dusk = 0.8

[[prompt]]
name = "tea"
text = "tea"
resolution = 256

[prompt.style]
dusk = 0
"""


@pytest.fixture
def dusky(moody):
    """The owl has settings and a weight of its own, and so has tea."""
    (moody / "styles").mkdir()
    for name in ("dusk", "riso"):
        (moody / "styles" / f"{name}.toml").write_text(f'keywords = ["{name}"]\n')
    (moody / "k2.toml").write_text(
        PROJECT.replace("seed = 7", 'seed = 7\naspect = "1:2"') + OWN + "[style]\ndusk = 0.5\n"
    )
    return Project.open(moody)


def strength(shot: Shot) -> float:
    return sum(style.strength for style in shot.spec.styles)


def test_a_prompt_may_have_settings_and_styles_of_its_own(dusky):
    fox, owl, tea = shots(dusky)

    assert [(shot.spec.width, shot.spec.height) for shot in (fox, owl, tea)] == [(96, 176), (176, 96), (176, 368)]
    assert [(shot.spec.steps, shot.spec.guidance, shot.creativity) for shot in (fox, owl, tea)] == [
        (None, None, "raw"),
        (8, 1.5, "low"),
        (None, None, "raw"),
    ]
    assert [strength(shot) for shot in (fox, owl, tea)] == [0.5, 0.8, 0]


@pytest.mark.parametrize(
    ("options", "styles", "sizes", "steps", "strengths"),
    [
        ({"aspect": "1:1"}, {}, [(128, 128), (128, 128), (256, 256)], [None, 8, None], [0.5, 0.8, 0]),
        ({"resolution": 192}, {}, [(128, 272), (272, 128), (128, 272)], [None, 8, None], [0.5, 0.8, 0]),
        ({"size": "64x64"}, {}, [(64, 64)] * 3, [None, 8, None], [0.5, 0.8, 0]),
        ({"steps": 4}, {"dusk": 1}, [(96, 176), (176, 96), (176, 368)], [4, 4, 4], [1, 1, 1]),
    ],
)
def test_options_override_prompts_own_settings_and_styles(dusky, options, styles, sizes, steps, strengths):
    planned = shots(dusky, None, styles, **options)

    assert [(shot.spec.width, shot.spec.height) for shot in planned] == sizes
    assert [shot.spec.steps for shot in planned] == steps
    assert [strength(shot) for shot in planned] == strengths


def test_a_matrix_overrides_a_prompts_own_settings(dusky):
    cells = read_axes(["size=64x64,96x64", "style.dusk=0,1", "steps=2"])

    made = dusky.shots(dusky.resolve_settings(), dusky.choose_prompts(["an-owl-at-night"]), matrices=[cells])
    assert [(shot.spec.width, shot.spec.steps, strength(shot)) for shot in made] == [
        (64, 2, 0),
        (64, 2, 1),
        (96, 2, 0),
        (96, 2, 1),
    ]
    assert {shot.spec.guidance for shot in made} == {1.5}


def test_a_prompts_missing_style_is_blamed_on_its_line(moody):
    text = PROJECT + "style.dsuk = 1\n"
    (moody / "k2.toml").write_text(text)
    with pytest.raises(K2Error, match=r'k2\.toml, line 13: there is no style "dsuk"\.'):
        shots(Project.open(moody))
    (moody / "k2.toml").write_text(text.replace("style.dsuk = 1", "[prompt.style]\ndsuk = 1"))
    with pytest.raises(K2Error, match=r"k2\.toml, line 14: "):
        shots(Project.open(moody))


def test_a_mix_uses_no_styles_but_its_own(dusky, k2):
    text = (dusky.root / "k2.toml").read_text()
    (dusky.root / "k2.toml").write_text(text.replace('"a red fox"', '"a red fox"\nstyle.dusk = 1\nbatch = 3'))

    k2("mix-styles", "riso=1")

    made = [json.loads(line) for line in k2("log", "--json").stdout.splitlines()]
    assert {each["settings"]["seed"] for each in made} == {7}
    assert {style["name"] for each in made for style in each["style"] or []} == {"riso"}


def test_an_aspect_keeps_the_models_native_pixel_count(moody):
    (spec,) = [shot.spec for shot in shots(Project.open(moody), [Prompt("tea")], aspect="16:9")]

    assert (spec.width, spec.height) == (176, 96)  # 128 x 128 in 16:9, in steps of 16


@pytest.mark.parametrize(
    ("only", "chosen"),
    [
        (["ban-*"], ["ban-red", "Ban-blue"]),
        (["BAN-B*"], ["Ban-blue"]),
        (["car-*"], ["car-green", "car-grey"]),
        (["car*", "ban-red"], ["ban-red", "car-green", "car-grey"]),
        (["car", "car-green"], ["car-green", "car-grey"]),
        (["car-gre[!y]*, ban-?ed"], ["ban-red", "car-green"]),
        (["*"], ["ban-red", "Ban-blue", "car-green", "car-grey"]),
        (["ban-red, car,"], ["ban-red", "car-green", "car-grey"]),
        ([", ban-red,,car"], ["ban-red", "car-green", "car-grey"]),
    ],
)
def test_prompts_are_chosen_by_patterns_and_lists(moody, only, chosen):
    names = {"ban-red": "a flag", "Ban-blue": "a flag", "car": "a {green|grey} car"}
    tables = (f'[[prompt]]\nname = "{name}"\ntext = "{text}"\n' for name, text in names.items())
    (moody / "k2.toml").write_text("".join(tables))

    assert [prompt.name for prompt in Project.open(moody).choose_prompts(only)] == chosen


def test_chosen_readings_keep_their_prompts_place(moody):
    (moody / "k2.toml").write_text('[[prompt]]\ntext = "a {red|blue} fox"\n[[prompt]]\nname = "Fox"\ntext = "a fox"\n')

    chosen = Project.open(moody).choose_prompts(["fox,a-blue-fox"])

    assert [prompt.name for prompt in chosen] == ["a-blue-fox", "Fox"]


def test_chosen_prompts_have_the_file_names_of_a_whole_run(moody):
    (moody / "k2.toml").write_text('[[prompt]]\ntext = "a {red|blue} fox"\n[[prompt]]\ntext = "an owl"\n')
    project = Project.open(moody)

    whole, some = (shots(project, prompts) for prompts in (None, project.choose_prompts(["a-red-blue-fox"])))

    assert [shot.stem for shot in some] == [shot.stem for shot in whole[:2]]
    assert [shot.given for shot in some] == ["a red fox", "a blue fox"]


def test_prompts_are_chosen_by_name(moody):
    project = Project.open(moody)

    assert [prompt.text for prompt in project.choose_prompts(["an-owl-at-night"])] == ["an owl at night"]
    with pytest.raises(K2Error, match='no prompt named "fix"') as error:
        project.choose_prompts(["fix"])
    assert error.value.hint == 'Did you mean "fox"?'
    with pytest.raises(K2Error, match=r'no prompt named "cat\*"'):
        project.choose_prompts(["fox,cat*"])
    for nothing in ("", " ,"):
        with pytest.raises(K2Error, match='no prompt named ""'):
            project.choose_prompts(["fox", nothing])


TWO = """[[prompt]]
name = "tea"
text = "tea"

[[prompt]]
text = "a bun"
"""


@pytest.mark.parametrize(
    ("toml", "message", "hint"),
    [
        (
            '[[prompt]]\nprompt = "a"\n',
            'line 2: unknown key "prompt" in [[prompt]].',
            "It is called text, under [[prompt]].",
        ),
        ('[render]\nprompts = ["a"]\n', 'line 2: unknown key "prompts"', "Write each as text, under a [[prompt]]"),
        ("[render]\nsed = 3\n", 'line 2: unknown key "sed" in [render].', 'Did you mean "seed"?'),
        ('[render]\nprecision = "fp16"\n', 'line 2: "precision" cannot be "fp16".', "Known: native, int8, fp8, int4."),
        ("[render]\noffload = true\n", 'line 2: "offload" must be a string in quotes, not true.', ""),
        ("[rendr]\nseed = 3\n", 'line 1: unknown key "rendr".', 'Did you mean "render"?'),
        ('[[prompt]]\ntext = "a"\nnmae = "b"\n', 'line 3: unknown key "nmae" in [[prompt]].', 'Did you mean "name"?'),
        ('[render]\nbatch = "four"\n', 'line 2: "batch" must be a whole number, not "four".', ""),
        ("[render]\nseed = 2026-01-01\n", 'line 2: "seed" must be a whole number, not 2026-01-01.', ""),
        ("[render]\nsteps = 07:30:00\n", 'line 2: "steps" must be a whole number, not 07:30:00.', ""),
        ("[render]\nmu = 2026-01-01T07:30:00\n", "must be a number, not 2026-01-01T07:30:00.", ""),
        ("[render]\nbatch = true\n", 'line 2: "batch" must be a whole number, not true.', ""),
        ("[render]\nseed = 1.5\n", 'line 2: "seed" must be a whole number, not 1.5.', ""),
        ("[render]\nguidance = nan\n", 'line 2: "guidance" must be between 0 and 100, not nan.', ""),
        ("[render]\nbatch = 0\n", 'line 2: "batch" must be between 1 and 1,000, not 0.', ""),
        ("[style]\ndusk = 3\n", 'line 2: "dusk" must be between −2 and 2, not 3.0.', ""),
        ("[style]\nnight.v2 = 1\n", 'line 2: "night" must be a number, not a table.', 'needs quotes: "night.v2".'),
        ("[style]\nnight = {weight = 1}\n", 'line 2: "night" must be a number, not a table.', "Like night = 0.6. "),
        ("style.night.v2.x = 1\n", 'line 1: "night" must be a number, not a table.', 'needs quotes: "night.v2.x".'),
        ("[[matrix]]\nstyle.a.b = [1]\n", 'line 2: "style.a" must be a list of values', 'needs quotes: "a.b".'),
        ("render = 3\n", "line 1: expected a table in [render].", "Write [name] on a line, and its keys below it."),
        ('[prompt]\ntext = "a"\n', "line 1: prompts are a list of tables.", "Write [[prompt]], with two brackets."),
        ('prompt = ["a", "b"]\n', "line 1: prompts are a list of tables.", "Write [[prompt]], with two brackets."),
        ('[moodboard]\nimages = "refs/*"\n', 'line 2: "images" must be a list', 'Like images = ["refs/*"].'),
        ("[render]\n[render]\n", "Cannot declare [render] twice (at line 2", "It is already defined"),
        ("[prompt.style]\n[prompt.style]\n", "Cannot declare [prompt.style] twice (at line 2", "It is already defined"),
        ("[[prompt]\n", "Expected ']]' at the end", "the same brackets on both sides"),
        ('[[prompt]]\nname = "a"\n', 'line 1: "text" is missing in [[prompt]].', ""),
        ('[[prompt]]\ntext = " "\n', "line 2: the prompt is empty.", "Say what the picture should show."),
        ('[[prompt]]\ntext = "a"\nname = "../a"\n', 'line 3: "../a" cannot be a file name.', "Use letters, digits"),
        (
            f'[[prompt]]\ntext = "a"\nname = "{"x" * 61}"\n',
            "line 3: a name of 61 characters cannot be a file name.",
            "at most 60.",
        ),
        (
            '[[prompt]]\ntext = "a"\nname = "Fox"\n[[prompt]]\ntext = "b"\nname = "fox"\n',
            'line 6: another prompt is named "Fox".',
            "Give each its own name.",
        ),
        ('[[prompt]]\ntext = "a"\nsize = "9x9"\n', "line 3: 9x9 is out of range.", "Sides are from 64"),
        ('[render]\nsize = "64x64"\naspect = "1:1"\n', 'line 2: "size" excludes "aspect" and "resolution".', "Keep"),
        ("[render]\ncohesion = 1.5\n", 'line 2: "cohesion" must be between 0 and 1, not 1.5.', ""),
        ('[render]\nscope = "prompts"\n', 'line 2: "scope" cannot be "prompts".', 'Did you mean "prompt"?'),
        ('[render]\ncreativity = "hgih"\n', 'line 2: "creativity" cannot be "hgih".', 'Did you mean "high"?'),
        ('[[prompts]]\ntext = "tea"\n', 'line 1: unknown key "prompts".', 'Did you mean "prompt"?'),
        ("\n[[style]]\ndusk = 1\n", "line 2: expected a table in [style].", 'Like [style] and below it "dusk = 0.6".'),
        ("[mix]\ndusk = 1\n", 'line 1: unknown key "mix".', "It belongs in a style: styles/NAME.toml."),
        ("steps = 4\n[render]\n", 'line 1: unknown key "steps".', "It belongs under [render]."),
        ("[project]\nbatch = 4\n", 'line 2: unknown key "batch" in [project].', "It belongs under [render]."),
        ("[render]\nstyle.dusk = 1\n", 'line 2: unknown key "style" in [render].', "belong under [style]."),
        ("[render]\nturbo = true\n", 'line 2: unknown key "turbo" in [render].', 'Write variant = "turbo"'),
        ('[project]\nversion = "1.0"\n', 'line 2: unknown key "version" in [project].', "Known: name."),
        (TWO + 'aspect = "1:1"\nsize = "64x64"\n', 'line 8: "size" excludes "aspect"', "Keep size"),
        (TWO + "steps = 0\n", 'line 7: "steps" must be between 1 and 1,000, not 0.', ""),
        (
            TWO + 'negative = "snow"\n',
            'line 7: unknown key "negative" in [[prompt]].',
            "It is called avoid.",
        ),
        ("[render]\ncfg_scale = 4\n", 'line 2: unknown key "cfg_scale" in [render].', "called guidance, and is 1 less"),
        ("[[matrix]]\ncfg_scale = [4]\n", 'line 2: unknown key "cfg_scale" in [[matrix]].', "called guidance, and is"),
        ("[render]\nwidth = 256\n", 'line 2: unknown key "width" in [render].', 'for both sides: "320x192".'),
        (TWO + "cohesion = 1\n", 'line 7: unknown key "cohesion" in [[prompt]].', "It belongs under [render]."),
        (TWO + "[prompt.style]\ndusk = 3\n", 'line 8: "dusk" must be between −2 and 2, not 3.0.', ""),
        ("[moodboard]\n", 'line 1: "images" is missing in [moodboard].', ""),
        ("[render\n", "k2.toml is not valid TOML: Expected ']'", ""),
        ("[project]\nname = moody\n", "k2.toml is not valid TOML: Invalid value", "straight quotes"),
        ("[project]\nname = “moody”\n", "k2.toml is not valid TOML: Invalid value", "straight quotes"),
        ('[render]\nmodel = "C:\\models"\n', "k2.toml is not valid TOML: Unescaped '\\'", r"\\ for a \,"),
        ("[project]\nname = 'moody\n", "k2.toml is not valid TOML: Expected", "with the quote it started with."),
        ('[project]\nname = "moody\n', "k2.toml is not valid TOML: Illegal character", "with the quote it started"),
        ('[project]\nname = "a\x00b"\n', r"Illegal character '\x00'", "It is a control character"),
        ("[render]\nseed = 18446744073709551616\n", 'line 2: "seed" has more than 64', "9,223,372,036,854,775,"),
        ("[[matrix]]\nseed = [1]\n[[matrix]]\nseed = [1, 0x" + "f" * 500 + "]\n", 'line 4: "seed" has more', "go up"),
        ("[render]\nseed = 1\n[render]\n", "k2.toml is not valid TOML: Cannot declare", "It is already defined"),
        ("[render]\nseed: 1\n", "k2.toml is not valid TOML: Expected '='", "A line is key = value"),
        ("[render]\nseed = 1;\n", "k2.toml is not valid TOML: Expected newline", "A line is key = value"),
        ("[render]\nsize = 256x256\n", "k2.toml is not valid TOML: Expected newline", 'size = "256x192"'),
        ("[render]\nseed = 07\n", "k2.toml is not valid TOML: Expected newline", "7, not 07"),
        ("[render]\ncohesion = .5\n", "k2.toml is not valid TOML: Invalid value", "numbers a leading digit (0.5)"),
        ("embed = True\n", "k2.toml is not valid TOML: Invalid value", "true and false are lower-case"),
        ('[moodboard]\nimages = ["a"\n\n[style]\n', "k2.toml is not valid TOML: Unclosed array", "with commas"),
        ('[[prompt]]\ntext = "a \\u001b[2J"\n', 'line 2: "text" contains a control character.', "without escapes"),
        ("a = " + "[" * 5000, "k2.toml is nested too deeply.", ""),
        (TWO.replace("a bun", "a\u2028bun\x85") + "steps = 0\n", 'line 7: "steps" must be', ""),
        ("[render]\nseed = 1\nstyle.dusk = 1\n", 'line 3: unknown key "style" in [render].', ""),
        ("#" * (1 << 20) + "\n", "k2.toml is larger than 1 MB.", "Is it the right file?"),
    ],
)
def test_mistakes_are_named_by_line(tmp_path, monkeypatch, toml, message, hint):
    (tmp_path / "k2.toml").write_text(toml)
    monkeypatch.chdir(tmp_path)

    with pytest.raises(K2Error) as error:
        Project.open(tmp_path)

    assert message in str(error.value) and str(error.value).startswith("k2.toml")
    assert hint in error.value.hint


def test_size_hints_use_the_models_steps_everywhere(tmp_path, k2, monkeypatch):
    """Mini's are 32: the nearest size that a hint names must not be refused in turn."""
    k2("new", tmp_path / "den", "--quiet")
    monkeypatch.chdir(tmp_path / "den")
    text = Path("k2.toml").read_text()
    asked = {
        '[[prompt]]\ntext = "a hen"\nsize = "300x200"\n': (),
        '[[matrix]]\nsize = ["300x200"]\n': (),
        "": ("--matrix", "size=300x200"),
    }
    for more, options in asked.items():
        Path("k2.toml").write_text(f"{text}\n{more}")
        said = k2("render", "--dry-run", *options, code=2 if options else 1).stderr
        assert "multiples of 32." in said and "The nearest size is 288x192." in said


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"size": "100x128"}, "--size: the sides of 100x128 are not multiples of 16.", "The nearest size is 96x128."),
        ({"size": "999999x16"}, "--size: 999999x16 is out of range.", "Sides are from 64 to 4096 pixels."),
        ({"size": "99999968x32"}, "--size: 99999968x32 is out of range.", "Sides are from 64 to 4096 pixels."),
        ({"size": "big"}, '--size: "big" is not a size.', 'Write width x height, like "256x384".'),
        ({"aspect": "wide"}, '--aspect: "wide" is not an aspect ratio from 1:8 to 8:1.', None),
        ({"aspect": "100:1"}, '--aspect: "100:1" is not an aspect ratio from 1:8 to 8:1.', None),
        ({"aspect": "1:1", "resolution": "9K"}, "--aspect: 9216x9216 is out of range.", None),
        ({"resolution": "9K"}, "--resolution: 9216x9216 is out of range.", None),
        ({"aspect": "1:1", "resolution": "lots"}, '--resolution: "lots" is not a resolution.', None),
        ({"batch": 0}, "--batch must be between 1 and 1,000, not 0.", ""),
        ({"seed": 2**63 - 1, "batch": 2}, f"Seed {2**63 - 1} leaves no room for 2 pictures.", None),
        ({"model": "minni"}, '--model: There is no model "minni" here.', 'Did you mean "mini"?'),
        ({"model": "no/such.safetensors"}, None, "Name an existing folder or file"),
    ],
)
def test_options_are_checked_like_settings(moody, options, message, hint):
    with pytest.raises(K2Error) as error:
        shots(Project.open(moody), **options)

    assert message is None or str(error.value) == message
    assert hint is None or hint in error.value.hint


def test_a_wrong_size_in_the_file_names_its_line(moody):
    (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", 'size = "100x100"'))

    with pytest.raises(K2Error, match=r"^k2\.toml, line 5: the sides of 100x100"):
        shots(Project.open(moody))


def test_a_projects_model_stays_inside_it(moody):
    write_weights(moody.parent / "other.safetensors", {})
    (moody / "k2.toml").write_text(PROJECT.replace("seed = 7", 'model = "../other.safetensors"'))

    with pytest.raises(K2Error, match="lies outside the project"):
        Project.open(moody).resolve_settings()

    outside = Project.open(moody, allow_outside=True).resolve_settings()
    # typed in the shell, relative to its folder
    typed = Project.open(moody).resolve_settings(model="../other.safetensors")
    assert Path(outside.model).samefile(typed.model)


@pytest.mark.parametrize(
    "above",
    [
        'text = """\nseed = 3\n[render]\n"""\n',
        'text = "a"\n# text = """a fox\n\n\n',  # no text begins in a comment
    ],
)
def test_lines_are_found_past_long_texts(tmp_path, above):
    (tmp_path / "k2.toml").write_text(f'[[prompt]]\n{above}[render]\n"batch" = 0\n')

    with pytest.raises(K2Error, match="line 7"):
        Project.open(tmp_path)


def test_names_come_from_texts_and_never_collide():
    named = name_files([Prompt("A red fox!"), Prompt("a red fox"), Prompt("x", name="a-red-fox-2"), Prompt("∞")])

    assert [name for _, name in named] == ["a-red-fox", "a-red-fox-3", "a-red-fox-2", "prompt"]
    assert [name for _, name in name_files([Prompt("x", name="Tea"), Prompt("tea")])] == ["Tea", "tea-2"]
    assert slug("an astonishingly long prompt about a lighthouse") == "an-astonishingly-long-prompt-about-a"
    assert slug("ein Ha\u0308schen") == slug("ein H\u00e4schen") == "ein-h\u00e4schen"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("एक लाल लोमड़ी!", "एक-लाल-लोमड़ी"),
        ("สุนัขจิ้งจอก สีแดง", "สุนัขจิ้งจอก-สีแดง"),
        ("İstanbul", "i\u0307stanbul"),
        ("x\u030c ❤\ufe0f fox", "x\u030c-fox"),  # a caron that composes with no letter; how a heart is drawn
        ("ක්\u200dරියා", "ක්රියා"),  # how the letters beside it are drawn
        ("\u0301 fox", "fox"),
        ("_\u0301fox", "fox"),
        ("\u0e01\u0e34" * 30, "\u0e01\u0e34" * 20),
        ("x" + "\u0e01\u0e34" * 30, "x" + "\u0e01\u0e34" * 19),
    ],
)
def test_letters_keep_their_marks_in_file_names(moody, k2, text, name):
    """In many scripts, vowels are marks."""
    made = k2("render", "-p", text, "--json", "--quiet")

    assert json.loads(made.stdout)["file"] == f"outputs/0001-{name}/{name}-7.png"
    assert k2("show", f"outputs/0001-{name}/{name}-7.png").stdout and k2("log", "--run", name).stdout


def test_names_match_however_their_accents_are_composed(moody, k2):
    """And are written in one way."""
    (moody / "k2.toml").write_text(
        '[[prompt]]\nname = "cu\u0308r-लोमड़ी"\ntext = "a"\n[[matrix]]\nprompt = ["cu\u0308r-लोमड़ी"]\nseed = [1]\n'
    )

    assert k2("render", "--only", "cu\u0308r-लोमड़ी", "--quiet").stdout == k2("log").stdout.partition("\t")[0] + "\n"
    assert [path.name for path in moody.glob("outputs/*/*.png")] == ["c\u00fcr-लोमड़ी-01-1.png"]


@given(st.text())
def test_any_text_makes_a_file_name(text):
    name = slug(text)

    assert (
        check_name(name, "") == name
        and len(name) <= 40
        and name == os.path.basename(name)
        and not name.startswith((".", "-"))
    )


@pytest.mark.parametrize(
    ("name", "by_itself", "before_a_seed"),
    [
        *((name, False, True) for name in ("con", "AUX", "Nul", "prn", "com1", "LPT9", "dusk.")),
        *((name, False, False) for name in ("con.x", "lpt1.fox.7")),
        *((name, True, True) for name in ("cone", "com", "com10", "fox.con", "con-fox")),
    ],
)
def test_windows_device_names_are_refused_as_file_names(name, by_itself, before_a_seed):
    """A style's name is that of its file and folder; a prompt's is followed by a seed, so any text may be one."""

    def passes(**how: bool) -> bool:
        try:
            return check_name(name, "here", **how) == name
        except K2Error as error:
            return str(error) != f'here: "{name}" cannot be a file name on Windows.'

    assert (passes(whole_name=True), passes()) == (by_itself, before_a_seed)


@settings(max_examples=50)
@given(st.floats(1 / 8, 8), st.integers(64, 1024))
def test_aspects_keep_area_and_shape(ratio, edge):
    try:
        width, height = fit_aspect(f"{ratio:.4f}:1", edge, "here")
    except K2Error:
        return  # a side would be too short
    assert width % 16 == height % 16 == 0
    assert abs(width - edge * ratio**0.5) <= 8.1 and abs(height - edge / ratio**0.5) <= 8.1


def test_the_largest_resolution_works_in_every_aspect():
    """Rounding a side must not take a picture beyond the most pixels allowed."""
    for aspect in ASPECTS.split(", "):
        for step in (16, 32):
            width, height = fit_aspect(aspect, 2048, "here", step)
            assert width % step == height % step == 0
            assert 0.97 * 2048**2 < width * height <= 2048**2


def test_sizes_and_resolutions_as_people_write_them():
    assert parse_size("256×384", "here") == parse_size("256X384", "here") == (256, 384)
    assert [parse_resolution(text, "here") for text in ("1K", "2k", "1.5K", 256, "0.5K")] == [
        1024,
        2048,
        1536,
        256,
        512,
    ]


def test_the_native_size_is_read_from_the_weights(moody):
    assert models.grid("mini").native == 128


def test_sides_are_multiples_of_a_tokens_pixels(moody):
    """Two cells of 16 pixels, if the VAE's scales say so: shapes are rounded to that, and other sizes refused."""
    about = {"kind": "vae", "config": {"dim_mult": [2, 1, 2, 6, 12]}}
    assert models.grid("mini").step == 16

    write_weights(library.BUNDLED / "mini-vae.safetensors", about)
    assert models.grid("mini").step == 32
    project = Project.open(moody)
    sizes = {(shot.spec.width, shot.spec.height) for shot in shots(project, aspect="3:2")}
    assert sizes == {(160, 96)}
    with pytest.raises(K2Error, match="the sides of 80x96 are not multiples of 32"):
        shots(project, size="80x96")


def test_the_grid_is_that_of_the_autoencoder_in_use(moody):
    """A lone transformer borrows the bundled one; a folder's states its scales in diffusers' config."""
    write_weights(library.BUNDLED / "mini-vae.safetensors", {"kind": "vae", "config": {"dim_mult": [2, 1, 2, 6, 12]}})
    write_weights(moody / "mine.safetensors", {"kind": "dit", "native": 256})
    assert models.grid(str(moody / "mine.safetensors")) == (256, 32, (256**2, 256**2))

    for part in ("transformer", "text_encoder", "vae"):
        (moody / "mine" / part).mkdir(parents=True)
    write_weights(moody / "mine" / "transformer" / "model.safetensors", {"native": 512})
    assert models.grid(str(moody / "mine")) == (512, 16, (512**2, 512**2))
    (moody / "mine" / "vae" / "config.json").write_text(json.dumps({"dim_mult": [1, 2, 4, 4, 4, 4]}))
    assert models.grid(str(moody / "mine")) == (512, 64, (512**2, 512**2))


def test_creativity_differs_by_seed_and_is_recorded(moody, k2):
    project = Project.open(moody)

    def prompts(level: str | None) -> list[str]:
        return [shot.spec.prompt for shot in project.shots(project.resolve_settings(creativity=level, batch=4))]

    assert prompts("raw") == prompts(None) == ["a red fox"] * 4 + ["an owl at night"] * 4
    high = prompts("high")
    assert high == prompts("high") and len(set(high[:4])) == 4
    assert all(text.startswith("a red fox, ") for text in high[:4])
    planned = k2("render", "--creativity", "high", "--batch", "4", "--dry-run").stdout
    assert all(text in planned for text in high)
    made = Path(k2("render", "--creativity", "high", "--only", "fox", "--batch", "1").stdout.strip())
    table = tomllib.loads(made.with_suffix(".toml").read_text())["prompt"]
    assert (table["text"], table["expanded"], table["creativity"]) == ("a red fox", high[0], "high")
    assert "Identical" in k2("rerun", made).stderr
    assert '--creativity cannot be "wild"' in k2("render", "--creativity", "wild", code=2).stderr
