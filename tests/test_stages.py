"""Every stage from its recipe, at smoke size: it runs, its parts fit together, and it resumes bit for bit."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from workshop import TINY, enlarge, workshop  # noqa: F401

from model import library
from model.checkpoint import read
from model.errors import K2Error
from model.train import judge, loop, recipe, release, states
from model.train.autoencoder import ENCODER_PREFIXES, load, write
from model.train.data import DATA
from model.train.grpo import GRPOStage
from model.train.sharpen import widen
from model.train.states import read_progress
from model.train.stpo import STPOStage
from model.vae import QwenImageVAE

COMMON = 'name = "{name}"\nstage = "{stage}"\n{length}\nlr = 1e-3\nmuon_lr = 1e-3\nwarmup_steps = 1\nevery = {every}\n'
NETWORK = 'size = 64\nbatch = 2\nmu = 0.2\ninit = "base"\n'
WEIGHTS = "weights = {subject = 1.0, style = 0.5, artefact = 0.5, grain = 0.5}\n"
ON_THE_DATA = ("pretrain", "midtrain", "sft", "hearing", "turbo", "stpo", "grpo")
POST = 'judge = "judge-3"\nsample_steps = 3\nprompts = 8\n' + WEIGHTS


def quiet(line):
    pass


def run(name, stage, keys, steps=2, every=2, network=True):
    """A recipe written and run as the command line does."""
    text = COMMON.format(name=name, stage=stage, length=f"steps = {steps}", every=every)
    text += (NETWORK if network else "") + keys + "\n" + (TINY if network else "")
    path = Path(f"{name}.toml")
    path.write_text(text)
    chosen = recipe.load(str(path))
    return recipe.stage_module(chosen.stage, name).main(chosen, "cpu", quiet)


def state(name):
    return load_file(f".runs/{name}/state.safetensors")


def record(name):
    with safe_open(f".runs/{name}/state.safetensors", "pt") as file:
        return json.loads(file.metadata()["record"])


def base(keep=""):
    """What the later stages start from: a pretrained network, and a judge of its own seed. Made once, and copied."""
    shelf = Path("..", "-".join(["base", *keep.split()]))
    if not shelf.exists():
        keys = "steps = 4\nlr = 1e-3\nmuon_lr = 1e-3\nevery = 2\nsize = 64\nbatch = 2\nrepeats = 2\nmu = 0.2\n"
        Path("base.toml").write_text(f'name = "base"\n{keys}{keep}{TINY}')
        first = recipe.load("base.toml")
        recipe.stage_module(first.stage, "base").main(first, "cpu", quiet)
        run("judge-3", "judge", "batch = 8\nseed = 3\nsize = 128\n", network=False)
        shutil.copytree(".runs", shelf)
    else:
        shutil.copytree(shelf, ".runs")


def test_every_stage_runs_from_its_recipe(workshop):  # noqa: F811
    """From nothing to rewarded weights, each stage from the one before, and all of it on record."""
    base("keep = 3\nkeep_every = 1\n")
    run("middle", "midtrain", "repeats = 2\nclusters = 3")
    for name, media in (("plain", '["plain"]'), ("film", '["film", "halftone", "pixel"]')):
        run(f"sft-{name}", "sft", f'media = {media}\njudge = "judge-3"\nper_subject = 3\nrepeats = 2')
    merges = {
        "pma": 'snapshots = "base"\npictures = 4',
        "sft": 'runs = ["sft-plain", "sft-film"]\ndivisions = 2\npictures = 4',
        "moved": 'runs = ["sft-plain", "middle", "base"]\nweights = [1.0, 1.0, -1.0]',
    }
    for name, keys in merges.items():
        Path(f"{name}.toml").write_text(f'name = "{name}"\nstage = "merge"\n{keys}\n')
        chosen = recipe.load(f"{name}.toml")
        recipe.stage_module("merge", name).main(chosen, "cpu", quiet)
    run("stpo", "stpo", POST + "group = 2\nmargin = 0.0\naside = 2\nlook = 1\ncalibrate_at = 1", every=4)
    run("grpo", "grpo", POST + 'group = 3\npool = 4\nstochastic = 1\ngates = {style = "subject"}', every=4)

    figures = record("sft")["figures"]
    assert sum(figures["weights"].values()) == pytest.approx(1)
    assert figures["validation"] <= min(figures["alone"].values())
    weighed = sum(w * state(name)["ema.dit.first.weight"] for name, w in figures["weights"].items())
    torch.testing.assert_close(state("sft")["ema.dit.first.weight"], weighed)
    plain, middle, first = (state(name)["ema.dit.first.weight"] for name in ("sft-plain", "middle", "base"))
    torch.testing.assert_close(state("moved")["ema.dit.first.weight"], plain + (middle - first))
    assert record("pma")["figures"]["snapshots"] == 3
    mean = torch.stack([load_file(path)["dit.first.weight"] for path in states.snapshots(Path(".runs/base"))]).mean(0)
    torch.testing.assert_close(state("pma")["ema.dit.first.weight"], mean)

    parent = state("base")
    for name in ("middle", "sft-plain", "stpo", "grpo"):
        made = state(name)
        before = {key: parent.get(key.replace("model.", "ema."), made[key]) for key in made if key.startswith("model.")}
        moved = {key for key, value in before.items() if not torch.equal(made[key], value)}
        assert any(key.startswith("model.dit.blocks.0") for key in moved), name
        if name in ("stpo", "grpo"):  # they leave styles alone
            assert all(key.startswith("model.dit.") for key in moved), name
        assert record(name)["data"] and record(name)["steps"] == 2

    stpo, grpo = record("stpo")["figures"], record("grpo")["figures"]
    assert {"aside_winner", "aside_loser", "held", "reward_win_rate", "top_octave_after", "apart_after"} <= stpo.keys()
    assert 50 <= stpo["beta"] <= 5000 and stpo["beta"] != 500
    assert record("stpo")["pictures"] == 2 * 2 * 2  # steps, pairs per step, pictures per pair
    assert {"subject", "style", "artefact", "grain", "ratio", "groups", "held"} <= grpo.keys()


def test_midtraining_reinitialises_what_it_is_told_to(workshop, monkeypatch):  # noqa: F811
    """And still finds its clusters by the parent's view."""
    base()
    begun = {}

    def not_trained(run, report):
        begun.update({name: value.clone() for name, value in run.model.state_dict().items()})
        return run

    monkeypatch.setattr(loop, "train", not_trained)
    run("middle", "midtrain", 'repeats = 2\nclusters = 3\nfresh = ["look_head"]')

    parent = state("base")
    old = {name for name, value in begun.items() if torch.equal(value, parent[f"ema.{name}"])}
    assert set(begun) - old == {"look_head.weight", "look_head.bias"}


def test_averages_are_evaluated_and_the_last_weights_saved(workshop, monkeypatch):  # noqa: F811
    from model.train import validation

    seen = {}

    def look(model):
        seen.update({name: value.clone() for name, value in model.state_dict().items()})

    monkeypatch.setattr(validation, "validation_loss", lambda model, *_: look(model) or 0.5)
    monkeypatch.setattr(STPOStage, "evaluate", lambda stage, *_: look(stage.model) or {"reward_after": 0.5})
    base()
    stages = {"midtrain": "repeats = 2\nclusters = 3", "stpo": POST + "group = 2\nmargin = 0.0\naside = 1"}
    for stage, keys in stages.items():
        run(stage, stage, keys)
        made = state(stage)

        assert 0.5 in record(stage)["figures"].values()
        assert all(torch.equal(made[f"ema.{name}"], value) for name, value in seen.items())
        assert not all(torch.equal(made[f"model.{name}"], value) for name, value in seen.items())
        seen.clear()


def test_merges_leave_out_what_only_training_needed(workshop):  # noqa: F811
    """A head that predicts a teacher's view, as pretraining may have one, or a preference's β is not merged."""
    base("align = 0.1\n")
    run("middle", "midtrain", "repeats = 1\nclusters = 2")
    Path("both.toml").write_text(
        'name = "both"\nstage = "merge"\nruns = ["base", "middle"]\ndivisions = 1\npictures = 2\n'
    )
    recipe.stage_module("merge", "both").main(recipe.load("both.toml"), "cpu", quiet)

    assert any(name.startswith("ema.pupil.") for name in state("base"))
    assert state("both").keys() == {name for name in state("middle") if name.startswith("ema.")}


def test_a_turbo_can_be_moved_to_a_later_raw(workshop):  # noqa: F811
    """The run itself, not the bundled copy: its fake score, and what tells a Raw's looks apart, are left out."""
    base()
    run("later", "midtrain", "repeats = 1\nclusters = 2")
    run("fast", "turbo", 'method = "trajectory"\nteacher = "base"\nwalk_steps = 2\nreferences = 0.0')

    def merged(name, runs, weights):
        keys = f"runs = {json.dumps(runs)}\nweights = {json.dumps(weights)}\n"
        Path(f"{name}.toml").write_text(f'name = "{name}"\nstage = "merge"\n{keys}')
        recipe.stage_module("merge", name).main(recipe.load(f"{name}.toml"), "cpu", quiet)
        return {key.removeprefix("ema."): tensor for key, tensor in state(name).items()}

    fast, later, first = (state(name) for name in ("fast", "later", "base"))
    assert any(name.startswith("ema.fake.") for name in fast)
    moved = merged("moved", ["fast", "later", "base"], [1.0, 1.0, -1.0])
    assert {f"ema.{name}" for name in moved} == {name for name in fast if name.startswith("ema.dit.")}
    for name, tensor in moved.items():
        torch.testing.assert_close(tensor, fast[f"ema.{name}"] + (later[f"ema.{name}"] - first[f"ema.{name}"]))

    raw = merged("raw", ["later", "box"], [0.5, 0.5])
    assert {name.partition(".")[0] for name in raw} == {"dit", "style"}
    with pytest.raises(K2Error, match=r"if one lacks style\.") as error:  # a run from a Raw without it would reset it
        merged("lost", ["later", "fast", "base"], [1.0, 1.0, -1.0])
    assert "name it first" in error.value.hint


def test_the_autoencoder_runs_from_its_recipe(workshop, monkeypatch):  # noqa: F811
    """Both halves, and one more scale; then the bundled decoder alone, so that latents stay what they are."""
    sizes = "pictures = 16\nheld_out = 12\nbatch = 2\ncrop = 32\n"
    run("both", "autoencoder", sizes, network=False)
    run("half", "autoencoder", sizes + "decoder = true\ntexture = 0.05\ngrainy = 0.5\n", network=False)

    enlarge(workshop / DATA)
    finer = 'teacher = "both"\n' + sizes.replace("crop = 32", "crop = 64").replace("held_out = 12", "held_out = 24")
    run("more", "finer", finer, network=False)

    mini = library.BUNDLED / "mini-vae.safetensors"
    paths = [f".runs/{name}/vae.safetensors" for name in ("both", "more", "half")]
    both, more, half, box = (read(path)[0] for path in (*paths, mini))
    assert more.keys() == half.keys() == box.keys() and len(box) > len(both)
    assert read(paths[1])[1]["native"] == 256 and Path(".runs/more/sheet.png").exists()
    for name, tensor in half.items():
        assert torch.equal(tensor, box[name]) == name.startswith(ENCODER_PREFIXES), name
    assert not torch.equal(both["encoder.conv_in.weight"], box["encoder.conv_in.weight"])
    assert Path(".runs/half/sheet.png").exists() and record("half")["data"]

    narrow = QwenImageVAE(replace(load(mini).config, base_dim=4, dim_mult=(1, 1, 2, 6, 12)))
    write(narrow, Path("narrow.safetensors"), {}, 256)
    monkeypatch.setattr("model.train.sharpen.AUTOENCODER", Path("narrow.safetensors"))
    keys = "pictures = 4\nheld_out = 24\nbatch = 1\ncrop = 64\ntaken = [1]\nwidths = [8, 8, 16, 24, 48]\n"
    run("sharp", "sharpen", keys, network=False)
    sharp, begun = read(".runs/sharp/vae.safetensors")[0], widen(narrow, (8, 8, 16, 24, 48)).state_dict()
    for name, tensor in sharp.items():
        assert torch.equal(tensor, begun[name]) == name.startswith(ENCODER_PREFIXES), name

    Path("out").mkdir()
    release.main("half", Path("out"))
    stored, metadata = read("out/mini-vae.safetensors")
    assert metadata["training"]["decoder"] and [path.name for path in Path("out").iterdir()] == ["mini-vae.safetensors"]
    for name, tensor in half.items():
        assert (stored[name] - tensor).abs().max() <= tensor.abs().max() / 100, name


def test_a_policy_is_on_policy_in_every_other_step(workshop, monkeypatch):  # noqa: F811
    base()
    ratios = []
    inner = GRPOStage.loss

    def watched(self, batch):
        loss, figures = inner(self, batch)
        ratios.append(float(figures["ratio"]))
        return loss, figures

    monkeypatch.setattr(GRPOStage, "loss", watched)
    run("grpo", "grpo", POST + "group = 3\npool = 4\nstochastic = 1", steps=4)

    assert ratios[0] == 0 and ratios[2] == 0
    assert ratios[1] > 0 and ratios[3] > 0


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("stpo", POST + "group = 2\nmargin = 0.0\naside = 2\nlook = 1\ncalibrate_at = 1"),
        ("grpo", POST + "group = 3\npool = 4\nstochastic = 1"),
    ],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(workshop, monkeypatch, stage, keys):  # noqa: F811
    base()
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)
    run("whole", stage, keys, steps=4)
    Path(".runs/whole").rename(".runs/straight")

    advance, calls = loop.Run.advance, []

    def dies(self, *batches):
        calls.append(self.step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return advance(self, *batches)

    monkeypatch.setattr(loop.Run, "advance", dies)
    with pytest.raises(KeyboardInterrupt):
        run("whole", stage, keys, steps=4)
    assert read_progress(Path(".runs/whole/state.safetensors"))["step"] == 2
    run("whole", stage, keys, steps=4)

    assert calls == [0, 1, 2, 3, 2, 3]
    first, second = state("straight"), state("whole")
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_preferences_start_with_their_own_beta_after_others(workshop):  # noqa: F811
    """β belongs to pairs and a reference; that of the run that another starts from is for its own pairs."""
    base()
    keys = POST + "group = 2\nmargin = 0.0\nlook = 0\n"
    run("first", "stpo", keys + "aside = 2\ncalibrate_at = 1", steps=1, every=1)
    assert state("first")["model.beta"] != 500
    again = replace(recipe.load("first.toml"), name="second", init="first", beta=300.0, aside=1, steps=2)

    recipe.stage_module("stpo", "second").main(again, "cpu", quiet)

    assert state("second")["model.beta"] == 300  # a single pair held aside shows no variance
    assert record("second")["figures"]["loss"] > 0


@pytest.mark.parametrize(
    ("stage", "file", "keys"),
    [
        ("stpo", "pairs.safetensors", "group = 2\nmargin = 0.0\naside = 2\nlook = 0"),
        ("grpo", "pool.json", "group = 3\npool = 4\nstochastic = 1"),
    ],
)
def test_choices_of_another_recipe_are_made_again(workshop, stage, file, keys):  # noqa: F811
    """A run may be stopped once it has chosen what to learn from, and its reward weights changed."""
    base()
    run("first", stage, POST + keys)
    chosen = Path(".runs/first") / file
    before = chosen.read_bytes()

    run("first", stage, POST + keys, steps=4)
    assert chosen.read_bytes() == before
    otherwise = POST.replace("subject = 1.0", "subject = 0.0") + keys
    run("first", stage, otherwise, steps=4)
    assert chosen.read_bytes() == before  # the run is finished, and this is what it learned from
    run("first", stage, otherwise, steps=6)
    assert chosen.read_bytes() != before


def test_a_released_judge_is_small_and_judges_alike(workshop):  # noqa: F811
    """So that anyone can measure the figures again."""
    base()
    Path("out").mkdir()
    release.main("judge-3", Path("out"))
    assert sorted(path.name for path in Path("out").iterdir()) == ["critic-3.safetensors", "judge-3.safetensors"]
    pictures = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for network in (judge.Judge, judge.Critic):
        own = judge.judge_path(network.__name__.lower(), 3)
        stored = Path("out", own.name)
        assert stored.stat().st_size < 0.6 * own.stat().st_size
        assert read(stored)[1] == read(own)[1]
        before, after = (network.load(path) for path in (own, stored))
        with torch.inference_mode():
            for a, b in zip(before(pictures), after(pictures), strict=True):
                torch.testing.assert_close(b, a, rtol=0, atol=0.02)


def test_the_evaluation_judge_never_rewards(workshop):  # noqa: F811
    run("judge-77", "judge", "batch = 8\nseed = 77\nsize = 128\n", steps=1, every=1, network=False)
    keys = POST.replace("judge-3", "judge-77") + "group = 2"
    with pytest.raises(K2Error, match="evaluation"):
        run("stpo", "stpo", keys)
    with pytest.raises(K2Error, match="no judge"):
        run("stpo", "stpo", keys.replace("judge-77", "judge-5"))


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("hearing", ("whole", "swapped", "pool")),
        ("turbo", ("walk_steps", "fakes")),
        ("stpo", ("prompts", "sample_steps", "group", "batch")),
        ("grpo", ("updates", "prompts", "pool", "group")),
        ("lora", ("rank", "repeats")),
    ],
)
def test_zero_counts_are_refused_before_loading(stage, keys):
    table = least(stage)
    recipe.saved_recipe(table)
    for key in keys:
        with pytest.raises(K2Error, match=f"{key} must be at least"):
            recipe.saved_recipe(table | {key: 0})


@pytest.mark.parametrize(
    ("stage", "keys", "to"),
    [
        ("judge", {"average": 0.5}, 'the stage "judge"'),
        ("autoencoder", {"decoder": True, "kl": 3.0}, "a decoder alone"),
        ("stpo", {"kind": "dpo", "anchor": 0.3}, 'the kind "dpo"'),
        ("stpo", {"kind": "dpo+sft", "hinge": 9.0}, 'the kind "dpo\\+sft"'),
    ],
)
def test_keys_that_do_nothing_are_refused(stage, keys, to):
    with pytest.raises(K2Error, match=f"{[*keys][-1]} has no meaning for {to}"):
        recipe.saved_recipe(least(stage) | keys)


def least(stage):
    """A recipe with no more keys than it needs."""
    table = {"name": "x", "stage": stage, "steps": 1, "lr": 0.1, "muon_lr": 0.0, "every": 2}
    table |= {"pictures": "."} if stage == "lora" else {}
    table |= {"size": 64, "batch": 1, "repeats": 1, "mu": 0.0} if stage in ON_THE_DATA else {}
    table |= {"weights": {"subject": 1.0}} if stage in ("stpo", "grpo") else {}
    return table | ({"method": "trajectory"} if stage == "turbo" else {})


@pytest.mark.parametrize(
    ("stage", "key", "wrong", "message"),
    [
        *(("pretrain", key, 1.7, "from 0 to 1") for key in ("references", "said", "reworded", "strangers", "shaped")),
        ("pretrain", "null", -1, "from 0 to 1"),
        *(("pretrain", key, -3, "at least 0") for key in ("white", "grounds", "later", "style_loss", "align")),
        ("pretrain", "unasked", ["notto"], 'no drawing set "notto"'),
        ("sft", "on", ["gradiant"], 'no ground "gradiant"'),
        ("sft", "media", ["oyl"], 'no medium "oyl"'),
        ("sft", "per_subject", 0, "at least 1"),
        ("midtrain", "balance", 2, "from 0 to 1"),
        ("stpo", "beta", -5, "more than 0"),
        ("stpo", "aside", -3, "at least 0"),
        ("stpo", "weights", {}, "must name rewards"),
        ("grpo", "weights", {"style": 0.0}, "must name rewards"),
        ("grpo", "noise", 0, "more than 0"),
        ("turbo", "untouched", 2, "from 0 to 1"),
        ("hearing", "plain", 2, "from 0 to 1"),
        ("lora", "drop", 2, "from 0 to 1"),
        ("lora", "lr", 0.0, "more than 0"),
        *((stage, "batch", 0, "at least 1") for stage in ("judge", "text", "autoencoder", "finer", "sharpen")),
        ("sharpen", "widths", (), "widths must be a list of numbers from 1 up"),
        ("sharpen", "taken", (2, 0), "taken must be a list of numbers from 1 up"),
        ("sharpen", "crop", 16, "at least 32"),
        ("sharpen", "crop", 272, "at most size, 256"),
        ("sharpen", "critic", -1, "at least 0"),
    ],
)
def test_invalid_values_are_refused_before_loading(stage, key, wrong, message):
    table = least(stage) | ({"init": "box"} if stage == "midtrain" else {})
    recipe.saved_recipe(table)
    with pytest.raises(K2Error, match=message) as error:
        recipe.saved_recipe(table | {key: tuple(wrong) if isinstance(wrong, list) else wrong})
    assert str(error.value).startswith('Recipe "x": ')


def test_keys_that_mean_nothing_to_a_stage_are_refused():
    idle = {"references": 0.2, "align": 0.5, "said": 0.2, "reworded": 0.2, "strangers": 0.2, "fresh": ("dit",)}
    idle |= {"unasked": ("noto",), "forms": (1.0, 0.0, 0.0)}
    for stage in ("stpo", "grpo"):
        for key, value in idle.items():
            with pytest.raises(K2Error, match=f"{key} has no meaning"):
                recipe.saved_recipe(least(stage) | {key: value})
    for stage in ("stpo", "grpo", "sft", "hearing", "midtrain"):  # which go by one subject per picture
        with pytest.raises(K2Error, match="two has no meaning"):
            recipe.saved_recipe(least(stage) | {"two": 0.5})
    for key, value in (("fakes", 3), ("fake_rate", 2.0)):
        recipe.saved_recipe(least("turbo") | {key: value})
        with pytest.raises(K2Error, match=f"{key} has no meaning"):
            recipe.saved_recipe(least("turbo") | {"method": "guidance", key: value})
    with pytest.raises(K2Error, match="fresh has no meaning"):
        recipe.saved_recipe(least("lora") | {"fresh": ("up",)})
    with pytest.raises(K2Error, match="muon_lr"):
        recipe.saved_recipe(least("lora") | {"muon_lr": 1e-3})


@pytest.mark.parametrize(
    ("settings", "message"), [({"init": ""}, "init names none"), ({"clusters": 0}, "clusters must be at least 1")]
)
def test_midtraining_needs_a_run_and_clusters(settings, message):
    whole = asdict(recipe.load("midtrain-256"))
    with pytest.raises(K2Error, match=message):
        recipe.saved_recipe(whole | settings)
