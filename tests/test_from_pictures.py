"""`k2 new --from PICTURE`: a project that requests pictures again, and messages about what is not imported."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from conftest import write_weights
from PIL import Image
from test_origins import GRAPH, PARAMETERS, png

from k2cli import from_pictures, origins
from k2cli.models import default_mu
from k2cli.project import Project
from model import library
from model.spec import raw_mu


def test_prompts_keep_the_names_of_k2_pictures(moody, k2, tmp_path):
    """--only and the old files use those names; where a matrix numbered its cells, the number is dropped."""
    k2("render", "--only", "fox", "--batch", "2")
    k2("render", "--only", "fox", "--matrix", "sampler=euler,ab2")
    pictures = sorted((moody / "outputs").glob("*/fox*.png"))
    k2("new", tmp_path / "taken", "--from", *pictures)

    names = {prompt.name for prompt in Project.open(tmp_path / "taken").prompts}
    assert len(pictures) == 4 and names == {"fox"}


def test_new_project_from_pictures(moody, k2, tmp_path):
    png(tmp_path / "a.png", parameters=PARAMETERS)
    png(tmp_path / "b.png", prompt=json.dumps(GRAPH))

    result = k2("new", tmp_path / "taken", "--from", tmp_path / "a.png", "--from", tmp_path / "b.png")

    assert "Not imported from a.png: LoRA dusk_v2." in result.stderr
    text = (tmp_path / "taken" / "k2.toml").read_text()
    assert "# guidance = 6        # with dreams_v8" in text and "# it was 512x768" in text
    project = Project.open(tmp_path / "taken")
    shots = project.shots(project.resolve_settings())
    assert [(shot.spec.prompt, shot.spec.negative, shot.spec.seed) for shot in shots] == [
        ("a red fox, film grain, second line", "blurry, text", 1234567890),
        ("a {red} fox", "blurry", 99),
    ]
    assert shots[0].spec.width < shots[0].spec.height  # the same shape, at the model's own size
    assert len(k2("render", tmp_path / "taken").stdout.splitlines()) == 2


def test_unreadable_project_is_not_created(k2, tmp_path):
    (tmp_path / "many").mkdir()
    for index in range(60):
        png(tmp_path / "many" / f"{index}.png", parameters=f"a fox {index} " + "x" * 18_000 + "\nSteps: 4, Seed: 1")
    png(tmp_path / "long.png", parameters="a fox " + "x" * 20_000 + "\nSteps: 4, Seed: 1")

    assert "add up to more than 1 MB" in k2("new", tmp_path / "new", "--from", tmp_path / "many", code=1).stderr
    said = k2("new", tmp_path / "new", "--from", tmp_path / "long.png", code=1).stderr
    assert "long.png has a prompt of more than 20,000 characters." in said
    assert not (tmp_path / "new").exists()


def test_overlong_prompt_in_a_folder_is_skipped(k2, tmp_path):
    (tmp_path / "some").mkdir()
    png(tmp_path / "some" / "long.png", parameters="a fox " + "x" * 20_000 + "\nSteps: 4, Seed: 1")
    refused = k2("new", tmp_path / "new", "--from", tmp_path / "some", code=1).stderr
    assert "some/long.png has a prompt of more than 20,000 characters." in refused

    png(tmp_path / "some" / "short.png", parameters="an owl\nSteps: 4, Seed: 1")
    said = k2("new", tmp_path / "new", "--from", tmp_path / "some").stderr

    assert "Passed over for a prompt of more than 20,000 characters: long.png." in " ".join(said.split())
    assert [prompt.text for prompt in Project.open(tmp_path / "new").prompts] == ["an owl"]


def test_folder_of_pictures_becomes_batches(moody, k2, tmp_path):
    """Consecutive seeds are a batch; pictures without a prompt are reported; a run's contact sheet is no picture."""
    k2("render", "-p", "a fox", "--batch", "3", "--steps", "3")
    k2("render", "-p", "a fox", "--seed", "40", "--steps", "3")
    (tmp_path / "old").mkdir()
    for made in moody.glob("outputs/*/a-fox-*.png"):
        shutil.copy(made, tmp_path / "old")
    for name in ("bare.png", "plain.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / "old" / name)

    said = k2("new", tmp_path / "again", "--from", tmp_path / "old").stderr
    project = Project.open(tmp_path / "again")

    assert "Passed over: bare.png and 1 more, which state no prompt." in said
    assert len(project.prompts) == 2
    assert sorted(shot.spec.seed for shot in project.shots(project.resolve_settings())) == [7, 8, 9, 40]

    assert "Not imported" not in k2("new", tmp_path / "run", "--from", *moody.glob("outputs/0001-*")).stderr
    said = k2("new", tmp_path / "all", "--from", *moody.glob("outputs/0001-*/*.png")).stderr  # as a shell expands it
    assert "Passed over: 1 contact sheet." in said and "Not imported" not in said
    for name in ("bare.png", "plain.png"):
        shutil.move(tmp_path / "old" / name, tmp_path)
    (tmp_path / "nothing").mkdir()
    for folder in (tmp_path / "nothing", tmp_path / "old" / ".."):
        k2("new", tmp_path / "none", "--from", folder, code=1)
    refused = k2("new", tmp_path / "none", "--from", tmp_path / "old", "--from", tmp_path / "nothing", code=1)
    assert "nothing holds no picture." in refused.stderr and not (tmp_path / "none").exists()


def test_batches_differ_only_in_seeds():
    def made(*seeds, **facts):
        return [origins.Origin("k2", prompt="fox", seed=seed, **facts) for seed in seeds]

    found = from_pictures.group_batches([*made(9, 7, 8, 7, 40), *made(10, width=64), *made(None)])

    assert list(found.items()) == [(made(7)[0], 3), (made(40)[0], 1), (made(10, width=64)[0], 1), (made(None)[0], 1)]


def test_equal_prompt_names_are_numbered():
    """Whatever numbers they have already."""
    named = from_pictures.name_prompts(
        [origins.Origin("k2", prompt=prompt) for prompt in ("fox", "fox 3", "fox", "fox")]
    )
    assert list(named) == ["fox", "fox-3", "fox-2", "fox-4"]


@pytest.mark.parametrize("keep", ["k2", "parameters"])
def test_k2_picture_is_requested_again(moody, k2, tmp_path, keep):
    numbers = ("--size", "64x96", "--steps", "5", "--guidance", "1.5")
    k2("render", "-p", r"a fox in \{a|b\}", *numbers, "--guidance-until", "0.5", "--sampler", "ab2")
    (made,) = moody.glob("outputs/*/*-7.png")
    with Image.open(made) as image:
        png(tmp_path / "moved.png", **{keep: image.text[keep]})

    k2("new", tmp_path / "again", "--from", tmp_path / "moved.png")
    project = Project.open(tmp_path / "again")
    (shot,) = project.shots(project.resolve_settings())

    assert shot.spec.prompt == "a fox in {a|b}" and shot.spec.seed == 7
    assert (shot.spec.width, shot.spec.height, shot.spec.steps, shot.spec.guidance) == (64, 96, 5, 1.5)
    assert (shot.spec.guidance_until, shot.spec.sampler) == ((0.5, "ab2") if keep == "k2" else (None, None))


@pytest.mark.parametrize("keep", ["k2", "parameters"])
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (("--steps", "8", "--guidance", "0"), (None, None)),  # Turbo's defaults, with which Raw is useless
        (("--steps", "12", "--guidance", "0"), (12, None)),
        (("--steps", "8", "--guidance", "2"), (None, 2)),
    ],
)
def test_turbo_picture_requests_turbo(moody, k2, tmp_path, keep, options, kept):
    write_weights(library.BUNDLED / "mini-turbo.safetensors", {"kind": "dit", "variant": "turbo"})
    k2("render", "-p", "a fox", "--turbo", *options)
    (made,) = moody.glob("outputs/*/*-7.png")
    with Image.open(made) as image:
        png(tmp_path / "moved.png", **{keep: image.text[keep]})

    result = k2("new", tmp_path / "again", "--from", tmp_path / "moved.png")
    settings = Project.open(tmp_path / "again").settings

    assert "&& k2 render\n" in result.stderr and "Not imported" not in result.stderr
    assert (settings.model, settings.variant, settings.steps, settings.guidance) == ("mini", "turbo", *kept)


def test_turbo_picture_brings_its_other_settings(moody, k2, tmp_path):
    write_weights(library.BUNDLED / "mini-turbo.safetensors", {"kind": "dit", "variant": "turbo"})
    turbo = ("--turbo", "--steps", "8", "--guidance", "2")
    first = k2("render", "-p", "a fox", *turbo, "--guidance-until", "0.5", "--sampler", "ab2").stdout.strip()
    other = k2("render", "-p", "an owl", "--turbo", "--steps", "4", "--guidance", "0").stdout.strip()

    said = k2("new", tmp_path / "again", "--from", first, other).stderr
    project = Project.open(tmp_path / "again")
    settings = project.settings

    assert (settings.guidance, settings.guidance_until, settings.sampler) == (2, 0.5, "ab2")
    assert [prompt.settings for prompt in project.prompts] == [{"seed": 7}, {"seed": 7, "steps": 4, "guidance": 0}]
    assert "steps" not in said and "guidance 0.0" not in said
    k2("new", tmp_path / "turned", "--from", other, first)
    turned = Project.open(tmp_path / "turned").prompts[1].settings
    assert turned == {"seed": 7, "steps": 8, "guidance": 2}  # Turbo's own steps, too, as [render] has others


def test_other_checkpoints_settings_are_not_imported(moody, k2, tmp_path):
    write_weights(library.BUNDLED / "mini-turbo.safetensors", {"kind": "dit", "variant": "turbo"})
    ways = (("--turbo", "4"), ("--raw", "6"), ("--turbo", "6"))
    turbo, raw, moved = (k2("render", "-p", "a fox", way, "--steps", steps).stdout.strip() for way, steps in ways)
    with Image.open(moved) as image:
        png(tmp_path / "nyx.png", k2=image.text["k2"].replace('name = "mini"', 'name = "nyx"'))

    said = k2("new", tmp_path / "again", "--from", turbo, raw, tmp_path / "nyx.png").stderr

    assert "Not imported from a-fox-7.png: variant raw." in said and "Not imported from nyx.png: model nyx." in said
    project = Project.open(tmp_path / "again")
    assert project.settings.variant == "turbo"
    assert [prompt.settings for prompt in project.prompts] == [{"seed": 7}]


def test_sidecar_record_is_read(moody, k2, tmp_path):
    made = k2("render", "-p", "a fox", "--seed", "40", "--size", "64x96", "--no-embed").stdout.strip()

    k2("new", tmp_path / "again", "--from", made)
    (shot,) = (project := Project.open(tmp_path / "again")).shots(project.resolve_settings())

    assert (shot.given, shot.spec.seed, shot.spec.width, shot.spec.height) == ("a fox", 40, 64, 96)


@pytest.mark.parametrize(("seed", "told"), [(2**63 - 1, False), (2**63, True), (2**64 - 1, True)])
def test_unusable_seed_is_reported(k2, fake, tmp_path, seed, told):
    graph = json.loads(json.dumps(GRAPH).replace("99", str(seed)))
    png(tmp_path / "a.png", prompt=json.dumps(graph))

    said = k2("new", tmp_path / "taken", "--from", tmp_path / "a.png").stderr

    assert (f"Not imported from a.png: seed {seed}." in said) == told
    assert Project.open(tmp_path / "taken").prompts[0].settings.get("seed") == (None if told else seed)


def test_from_takes_pictures_as_a_shell_expands_them(k2, fake, tmp_path):
    pictures = [
        png(tmp_path / f"{name}.png", parameters=f"a {name}\nSteps: 20, Seed: 3") for name in ("fox", "owl", "cup")
    ]

    k2("new", tmp_path / "taken", "--from", *pictures)

    assert [prompt.text for prompt in Project.open(tmp_path / "taken").prompts] == ["a fox", "a owl", "a cup"]
    assert "pictures need --from" in k2("new", tmp_path / "my", "project", code=2).stderr


def test_unimported_settings_of_k2_pictures_are_reported(moody, k2, tmp_path):
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["film grain"]\n')
    k2("render", "-p", "a fox", "--style", "dusk=0.5")
    (made,) = moody.glob("outputs/*/*-7.png")

    result = k2("new", tmp_path / "again", "--from", made)

    assert f"Not imported from {made.name}: style dusk." in result.stderr and "&& k2 render\n" in result.stderr


def test_styles_avoids_are_not_imported(moody, k2, tmp_path):
    """A phrase that both the prompt and its styles avoid stays, once."""
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["grain"]\navoids = ["glossy, neon", "text"]\n')
    (moody / "styles" / "ink.toml").write_text('keywords = ["bold lines"]\navoids = ["text"]\n')
    (moody / "styles" / "soft.toml").write_text('keywords = ["blurry"]\navoids = ["sharp"]\n')
    text = 'text = "a red fox"'
    (moody / "k2.toml").write_text(
        (moody / "k2.toml").read_text().replace(text, f'{text}\navoid = "snow, glossy,  text"')
    )
    k2("render", "--only", "fox", "--style", "dusk=0.5", "--style", "ink=0.5", "--style", "soft=-0.5")
    (made,) = moody.glob("outputs/*/*-7.png")

    k2("new", tmp_path / "again", "--from", made)

    assert Project.open(tmp_path / "again").prompts[0].avoid == "snow, glossy, text"


def with_mu(moody, mu: float) -> None:
    toml = (moody / "k2.toml").read_text()
    (moody / "k2.toml").write_text(re.sub(r"seed = 7\n(mu = .*\n)?", f"seed = 7\nmu = {mu!r}\n", toml))


@pytest.mark.parametrize("turbo", [False, True])
def test_chosen_mu_is_imported(moody, k2, tmp_path, turbo):
    """The model's own mu for a size would be wrong for another size."""
    write_weights(library.BUNDLED / "mini-turbo.safetensors", {"kind": "dit", "variant": "turbo"})
    variant, own = (("--turbo",), "turbo") if turbo else ((), "raw")
    size = ("--size", "64x96")
    with_mu(moody, default_mu("mini", own, 64, 96))
    plain = k2("render", "-p", "a fox", *size, *variant).stdout.strip()
    with_mu(moody, 0.875)
    chosen = k2("render", "-p", "an owl", *size, *variant).stdout.strip()

    assert "Not imported" not in k2("new", tmp_path / "plain", "--from", plain).stderr
    k2("new", tmp_path / "chosen", "--from", chosen)
    mixed = k2("new", tmp_path / "mixed", "--from", plain, chosen).stderr

    opened = [Project.open(tmp_path / name).settings.mu for name in ("plain", "chosen", "mixed")]
    assert opened == [None, 0.875, None] and ": mu 0.875." in mixed


def test_differing_defaults_are_reported(moody, k2, tmp_path):
    with_mu(moody, chosen := 2.123456789)
    dog = k2("render", "-p", "a dog", "--sampler", "ab2", "--guidance-until", "0.5", "--creativity", "low")
    other = k2("render", "-p", "an owl", "--sampler", "ab2", "--guidance-until", "0.5", "--creativity", "low")
    with_mu(moody, default_mu("mini", "raw", 64, 64))
    cat = k2("render", "-p", "a cat")

    said = k2("new", tmp_path / "again", "--from", *(each.stdout.strip() for each in (dog, other, cat))).stderr

    assert Project.open(tmp_path / "again").settings.mu == chosen
    for each in ("the model's own mu", "the model's own sampler", "the model's own guidance_until"):
        assert f"Not imported from a-cat-7.png: {each}." in said
    assert said.count("Not imported") == 3
    creative = [prompt.settings.get("creativity") for prompt in Project.open(tmp_path / "again").prompts]
    assert creative == [None, None, "raw"]


@pytest.mark.parametrize("model", ["krea/Krea-2-Raw", "/models/fox.safetensors", "models/fox"])
def test_unimported_model_is_reported(moody, k2, tmp_path, model):
    with_mu(moody, default_mu("mini", "raw", 64, 64))
    k2("render", "-p", "a fox")
    (made,) = moody.glob("outputs/*/*-7.png")
    with Image.open(made) as image:
        moved = png(tmp_path / "moved.png", k2=image.text["k2"].replace('name = "mini"', f'name = "{model}"'))

    result = k2("new", tmp_path / "again", "--from", moved, "--from", made)

    assert result.stderr.count("Not imported") == 1 and f"Not imported from moved.png: model {model}." in result.stderr
    assert Project.open(tmp_path / "again").settings.model == "mini"


@pytest.mark.parametrize(("model", "chosen"), [("nyx", None), ("krea-2-raw", None), ("krea-2-raw", 0.25)])
def test_missing_named_model_is_imported_with_the_size(moody, k2, tmp_path, model, chosen):
    """Weights of that name may be added later; until then the project says that they are missing."""
    with_mu(moody, raw_mu(6 * 4) if chosen is None else chosen)  # the open weights' own for 96x64
    k2("render", "-p", "a fox", "--size", "96x64")
    (made,) = moody.glob("outputs/*/*-7.png")
    with Image.open(made) as image:
        moved = png(tmp_path / "moved.png", k2=image.text["k2"].replace('name = "mini"', f'name = "{model}"'))

    k2("new", tmp_path / "again", "--from", moved)

    settings = Project.open(tmp_path / "again").settings
    assert (settings.model, settings.size) == (model, "96x64")
    assert settings.mu == chosen
    assert model in k2("render", tmp_path / "again", code=1).stderr


def test_invalid_settings_are_not_imported(k2, fake, tmp_path):
    text = "a fox\nSteps: 0, CFG scale: 500, Seed: 3, Size: 64x64, Model: mini-raw, Version: k2 0.1.0"
    png(tmp_path / "a.png", parameters=text)

    result = k2("new", tmp_path / "taken", "--from", tmp_path / "a.png")

    assert "Not imported from a.png: steps 0." in result.stderr
    assert "Not imported from a.png: guidance 499.0." in result.stderr
    assert len(k2("render", tmp_path / "taken").stdout.splitlines()) == 1


def test_level_is_imported_ties_are_not(moody, k2, tmp_path):  # its name is in paths that are printed
    k2("render", "-p", "a fox", "--batch", "2", "--cohesion", "0.5", "--creativity", "low", "--steps", "3")
    k2("render", "-p", "an owl", "--creativity", "high", "--steps", "4")
    led, owl = moody.glob("outputs/0001-*/*-8.png"), moody.glob("outputs/0002-*/*-7.png")

    said = k2("new", tmp_path / "again", *(word for path in (*led, *owl) for word in ("--from", path))).stderr
    project = Project.open(tmp_path / "again")

    assert (project.settings.creativity, project.settings.steps, project.settings.cohesion) == ("low", 3, 0.0)
    assert 'fox-8.png: cohesion 0.5 with "a fox' in said
    assert project.prompts[-1].settings == {"seed": 7, "steps": 4, "creativity": "high"}
    assert "creativity" not in said and "steps" not in said


def test_pictures_differing_only_in_unimported_settings_merge(moody, k2, tmp_path):
    (moody / "styles").mkdir()
    (moody / "styles" / "dusk.toml").write_text('keywords = ["film grain"]\n')
    axes = ("style.dusk=0,0.5,1", "sampler=euler,ab2", "seed=7,8,20")
    k2("render", "-p", "a fox", *(word for axis in axes for word in ("--matrix", axis)))

    said = k2("new", tmp_path / "again", "--from", *moody.glob("outputs/*/")).stderr

    project = Project.open(tmp_path / "again")
    assert [shot.spec.seed for shot in project.shots(project.resolve_settings())] == [7, 8, 20]
    assert "Not imported from a-fox-07-7.png and 11 more: style dusk.\n" in said and said.count("Not imported") == 2


@pytest.mark.parametrize(("shared", "told"), [("0.0", False), ("0.25", True)])
def test_cohesion_is_reported_only_if_something_was_shared(moody, k2, tmp_path, shared, told):
    k2("render", "-p", "a fox", "--cohesion", "0.5")
    (made,) = moody.glob("outputs/*/*-7.png")
    with Image.open(made) as image:
        record = image.text["k2"].replace("[leader]", f"[leader]\nshared = {{noise = {shared}, attention = 0.0}}")
        moved = png(tmp_path / "moved.png", k2=record)

    assert ("cohesion 0.5" in k2("new", tmp_path / "again", "--from", moved).stderr) is told


def test_pictures_keep_their_own_shapes(moody, k2, tmp_path):
    k2("render", "-p", "a fox", "--size", "64x96")
    k2("render", "-p", "an owl", "--size", "96x64")
    png(tmp_path / "wide.png", parameters="tea\nSteps: 20, Size: 1024x512")
    fox, owl = moody.glob("outputs/*/*-7.png")

    k2("new", tmp_path / "again", *(word for path in (fox, owl, tmp_path / "wide.png") for word in ("--from", path)))
    project = Project.open(tmp_path / "again")

    sizes = {shot.given: (shot.spec.width, shot.spec.height) for shot in project.shots(project.resolve_settings())}
    assert sizes == {"a fox": (64, 96), "an owl": (96, 64), "tea": (176, 96)}
