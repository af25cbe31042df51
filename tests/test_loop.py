"""The training loop by itself, fitting a line: kill and resume, accumulation, snapshots, log and record."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageColor
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from model.errors import K2Error
from model.train import loop, states
from model.train.data import stable_seed
from model.train.journal import COLOURS, Journal
from model.train.loop import Run, Stage, train
from model.train.recipe import Recipe

RECIPE = Recipe(name="line", steps=12, lr=0.05, muon_lr=0.05, warmup_steps=2, decay=0.5, every=3, weight_decay=0.0)


class Line(Stage):
    """y = 2a - b + noise, from eight points per step."""

    def __init__(self, recipe, size=8, die_at=None):
        torch.manual_seed(recipe.seed)
        self.recipe, self.size, self.die_at = recipe, size, die_at
        self.model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)]), "out": nn.Linear(2, 1)})

    def batch(self, step, part=0):
        if step == self.die_at:
            raise KeyboardInterrupt
        generator = torch.Generator().manual_seed(stable_seed(self.recipe.seed, step, part) % 2**63)
        x = torch.randn(self.size, 2, generator=generator)
        return {"x": x, "y": 2 * x[:, :1] - x[:, 1:] + 0.1 * torch.randn(self.size, 1, generator=generator)}

    def loss(self, batch):
        made = self.model["out"](self.model["blocks"][0](batch["x"]))
        return (made - batch["y"]).square().mean(), {"size": len(batch["x"])}

    def pictures(self):
        return self.size


def run(recipe, folder, **options):
    return Run(Line(recipe, **options), folder)


@pytest.fixture(autouse=True)
def saves_at_every_line(monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", -1.0)


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def columns(folder):
    return {k: v for k, v in Journal(folder / "log.csv", 10**9).read().items() if k != "seconds"}


def test_averages_follow_closely_early_in_a_run(tmp_path):
    """At 0.998 they would otherwise hardly have moved after five steps, and they are what a run leaves behind."""
    young = run(replace(RECIPE, steps=5, average=0.998), tmp_path)
    wanted = young.model["out"].weight.detach().clone()
    for step in range(5):
        young.advance(young.stage.batch(step))
        wanted.lerp_(young.model["out"].weight.detach(), 1 - (step + 2) / (step + 21))

    torch.testing.assert_close(young.ema["out.weight"], wanted)


@pytest.mark.parametrize("die_at", [4, 6, 11])
def test_killed_run_ends_like_an_uninterrupted_one(tmp_path, die_at):
    """Weights, averages, optimisers and log are the same to the last bit, wherever it was stopped."""
    train(run(RECIPE, tmp_path / "straight"), lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        train(run(RECIPE, tmp_path / "killed", die_at=die_at), lambda line: None)

    again = run(RECIPE, tmp_path / "killed")
    assert again.step == die_at // 3 * 3
    train(again, lambda line: None)

    states = [load_file(tmp_path / name / "state.safetensors") for name in ("straight", "killed")]
    assert any(name.startswith("muon.") for name in states[0]) and any(name.startswith("adamw.") for name in states[0])
    assert same(*states)
    assert columns(tmp_path / "straight") == columns(tmp_path / "killed")
    assert columns(tmp_path / "killed")["step"] == [3, 6, 9, 12]


class Watched(Line):
    """Measures something for every line of the log."""

    def figures(self):
        return {"weight": float(self.model["out"].weight.detach().sum())}


def test_log_covers_the_last_step(tmp_path):
    """Steps left over since the last full line get a line of their own, and the record holds the final figures."""
    recipe = Recipe(**{**RECIPE.__dict__, "steps": 5})
    done = train(Run(Watched(recipe), tmp_path), lambda line: None)

    found = columns(tmp_path)
    assert found["step"] == [3, 5] and (tmp_path / "curves.png").exists()
    assert done.figures == {name: values[-1] for name, values in found.items() if name != "step"}
    assert done.figures["weight"] == pytest.approx(float(done.model["out"].weight.detach().sum()), rel=1e-3)

    train(run(replace(recipe, steps=9), tmp_path), lambda line: None)
    assert columns(tmp_path)["step"] == [3, 5, 6, 9]


def test_log_line_holds_means_and_the_last_rate(tmp_path):
    done, rows = run(RECIPE, tmp_path), []
    advance = done.advance
    done.advance = lambda *batches: rows.append(advance(*batches)) or rows[-1]
    train(done, lambda line: None)

    found = columns(tmp_path)
    assert found["lr"] == pytest.approx([rows[i]["lr"] for i in (2, 5, 8, 11)], rel=1e-3)
    assert found["loss"] == pytest.approx(
        [sum(row["loss"] for row in rows[i : i + 3]) / 3 for i in (0, 3, 6, 9)], rel=1e-3
    )


class Pressed(Line):
    """Ctrl-C arrives in the middle of steps."""

    at = ()

    def batch(self, step, part=0):
        if step in self.at:
            signal.raise_signal(signal.SIGINT)
        return super().batch(step, part)


@pytest.mark.parametrize(("at", "saved"), [((4,), 6), ((5,), 6), ((4, 5), None)])
def test_interrupted_run_is_saved_and_resumes_exactly(tmp_path, monkeypatch, at, saved):
    """It stops once a line of the log is complete; pressing Ctrl-C again stops it at once."""
    monkeypatch.setattr(loop, "SAVE_EVERY", 1e9)
    train(run(RECIPE, tmp_path / "straight"), lambda line: None)
    stage, said = Pressed(RECIPE), []
    stage.at = at
    with pytest.raises(KeyboardInterrupt):
        train(Run(stage, tmp_path / "stopped"), said.append)

    again = run(RECIPE, tmp_path / "stopped")
    assert again.step == (saved or 0)
    assert ("line: saves and stops in 1 step; press Ctrl-C again to stop at once" in said) == (4 in at)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(again, lambda line: None)
    assert same(*(load_file(tmp_path / name / "state.safetensors") for name in ("straight", "stopped")))
    assert columns(tmp_path / "straight") == columns(tmp_path / "stopped")


@pytest.mark.parametrize(
    ("steps", "at", "told"),
    [
        (10, 8, ["line: ends in 1 step; press Ctrl-C again to stop at once"]),
        (12, 9, ["line: ends in 2 steps; press Ctrl-C again to stop at once"]),
        (10, 9, []),  # in the last step
    ],
)
def test_interrupt_near_the_end_lets_the_run_finish(tmp_path, steps, at, told):
    """It is not cut short, so nothing is raised."""
    stage, said = Pressed(Recipe(**{**RECIPE.__dict__, "steps": steps, "every": 6})), []
    stage.at = (at,)

    assert train(Run(stage, tmp_path), said.append).done
    assert [line for line in said if "Ctrl-C" in line] == told


class Picture(Stage):
    """Convolutions whose channels are innermost in memory, as in the autoencoder; AdamW trains them."""

    def __init__(self, recipe):
        torch.manual_seed(recipe.seed)
        self.recipe, self.model = recipe, nn.Conv2d(8, 3, 3).to(memory_format=torch.channels_last)

    def batch(self, step, part=0):
        return {"x": torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(step))}

    def loss(self, batch):
        return (self.model(batch["x"]) - 1).square().mean(), {}


def test_resume_is_exact_for_any_memory_layout(tmp_path):
    """Files store numbers in the order of the axes; AdamW takes its moments in memory order."""
    straight, halved = Run(Picture(RECIPE), tmp_path / "a"), Run(Picture(RECIPE), tmp_path / "b")
    for step in range(8):
        straight.advance(straight.stage.batch(step))
        halved.advance(halved.stage.batch(step))
        if step == 3:
            halved.save()
            halved = Run(Picture(RECIPE), tmp_path / "b")

    assert same(straight.state(), halved.state())


def test_unsaved_log_lines_are_cut_on_resume(tmp_path):
    log = Journal(tmp_path / "log.csv")
    for step in (3, 6, 9):
        log.add({"step": step, "loss": 1 / step})

    assert Journal(tmp_path / "log.csv", 6).read()["step"] == [3, 6]


def test_late_figures_get_their_own_columns(tmp_path):
    log = Journal(tmp_path / "log.csv")
    log.add({"step": 1, "loss": 2.0, "align": 0.5, "norm": 7.0})
    log.add({"step": 2, "loss": 1.0, "norm": 6.0})
    log.add({"step": 3, "loss": 0.5, "norm": 5.0, "held": 0.25})

    read = log.read()
    assert read["norm"] == [7, 6, 5] and read["align"][0] == 0.5 and read["held"][2] == 0.25
    assert [math.isnan(value) for value in read["align"]] == [False, True, True]


def test_log_is_intact_whenever_a_run_is_killed(tmp_path, monkeypatch):
    """Lines are appended; when a figure is added, a new file replaces the log once it is written."""
    log = Journal(tmp_path / "log.csv")
    log.add({"step": 1, "loss": 2.0})
    before = log.path.read_bytes()

    class Killed(csv.DictWriter):
        def writerows(self, rows):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(csv, "DictWriter", Killed)
        log.add({"step": 2, "loss": 1.0, "held": 0.5})
    assert log.path.read_bytes() == before and os.listdir(tmp_path) == ["log.csv"]

    log.add({"step": 2, "loss": 1.0})
    assert log.path.read_bytes().startswith(before) and log.read()["loss"] == [2, 1]


def test_nan_gradient_ends_the_run_and_keeps_the_state(tmp_path):
    one = run(RECIPE, tmp_path)
    one.advance(one.stage.batch(0))
    one.save()
    kept = (tmp_path / "state.safetensors").read_bytes()
    loss = one.stage.loss
    one.stage.loss = lambda batch: (loss(batch)[0] * math.nan, {})

    with pytest.raises(K2Error, match="gradient of step 2 is not finite"):
        loop.train(one, lambda line: None)
    assert (tmp_path / "state.safetensors").read_bytes() == kept
    assert all(tensor.isfinite().all() for tensor in one.model.state_dict().values())


@pytest.mark.parametrize("at", [6, 12])
def test_non_finite_weights_end_the_run_and_keep_the_state(tmp_path, at):
    """After the last step there is no further gradient to check."""
    one = run(RECIPE, tmp_path)
    step = one.optimisers["adamw"].step

    def break_at() -> None:
        step()
        if one.step + 1 == at:
            with torch.no_grad():
                one.model["out"].weight[0, 0] = math.inf

    one.optimisers["adamw"].step = break_at
    with pytest.raises(K2Error, match=f"weights of step {at} are not finite"):
        train(one, lambda line: None)
    assert run(RECIPE, tmp_path).step == at - 3


class Narrower(Line):
    """A recipe edited so that fewer parameters learn: the optimisers' parameters move up."""

    def rate(self, name):
        return float(name != "blocks.0.bias")


class Wider(Line):
    """A recipe edited so that there are more weights."""

    def __init__(self, recipe):
        super().__init__(recipe)
        self.model["more"] = nn.Linear(1, 1)


@pytest.mark.parametrize(("before", "now"), [(Line, Narrower), (Narrower, Line), (Line, Wider), (Wider, Line)])
def test_state_of_another_recipe_is_refused(tmp_path, before, now):
    """Optimiser states are saved by number and would be taken for those of other parameters."""
    train(Run(before(RECIPE), tmp_path), lambda line: None)
    kept = (tmp_path / "state.safetensors").read_bytes()

    with pytest.raises(K2Error, match=r"saved with other weights than its recipe now trains: steps 12 → 15\."):
        Run(now(Recipe(**{**RECIPE.__dict__, "steps": 15})), tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == kept


def test_finished_run_is_left_alone(tmp_path):
    done = loop.train(run(RECIPE, tmp_path), lambda line: None)
    written = (tmp_path / "state.safetensors").read_bytes()

    said: list[str] = []
    loop.train(run(RECIPE, tmp_path), said.append)
    shorter = Recipe(**{**RECIPE.__dict__, "steps": 6, "lr": 0.5})
    again = loop.train(run(shorter, tmp_path), said.append)

    idle = "line: already done at step 12; with more steps or minutes it continues"
    assert said == [idle, idle, "line: changes without effect on a finished run: steps 12 → 6, lr 0.05 → 0.5"]
    assert (again.step, again.figures) == (done.step, done.figures) and again.figures
    assert (tmp_path / "state.safetensors").read_bytes() == written


OTHER = "import sys; from pathlib import Path; from model.train.run_lock import run_lock\n"
OTHER += "with run_lock(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no such locks")
def test_two_processes_cannot_train_in_one_folder(tmp_path):
    train(run(RECIPE, tmp_path), lambda line: None)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    longer = Recipe(**{**RECIPE.__dict__, "steps": 15})
    kept["snapshot-0000014.safetensors"] = b"of the other"
    (tmp_path / "snapshot-0000014.safetensors").write_bytes(b"of the other")
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(K2Error, match="Another process is training in"):
            train(run(longer, tmp_path), lambda line: None)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
        other.kill()

    assert train(run(longer, tmp_path), lambda line: None).step == 15


def test_run_advanced_by_another_process_is_not_overwritten(tmp_path):
    """Another process may come and go between reading the state and locking the folder."""
    late = run(RECIPE, tmp_path)
    train(run(RECIPE, tmp_path), lambda line: None)
    kept = (tmp_path / "state.safetensors").read_bytes()

    with pytest.raises(K2Error, match="Another process has meanwhile trained in"):
        train(late, lambda line: None)
    assert (tmp_path / "state.safetensors").read_bytes() == kept


def test_accumulated_gradient_equals_the_whole(tmp_path):
    whole, halves = run(RECIPE, tmp_path / "a"), run(RECIPE, tmp_path / "b")
    batch = whole.stage.batch(0)
    whole.bf16 = halves.bf16 = False

    whole.advance(batch)
    halves.advance(*({k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4)))

    for name in ("muon", "adamw"):  # first moments are the gradient's own; updates amplify its rounding
        states = [each.optimisers[name].state_dict()["state"] for each in (whole, halves)]
        for one, other in zip(states[0].values(), states[1].values(), strict=True):
            key = "momentum" if name == "muon" else "exp_avg"
            torch.testing.assert_close(one[key], other[key])


def test_each_part_is_seen_once(tmp_path):
    seen = []

    class Watched(Line):
        def batch(self, step, part=0):
            seen.append((step, part))
            return super().batch(step, part)

    recipe = Recipe(**{**RECIPE.__dict__, "accumulate": 2, "steps": 3})
    done = train(Run(Watched(recipe), tmp_path / "a"), lambda line: None)

    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert done.record()["pictures"] == 3 * 2 * 8


def test_rate_factor_freezes_or_scales(tmp_path):
    class Partly(Line):
        def rate(self, name):
            return {"blocks.0.weight": 0.0, "out.weight": 0.5}.get(name, 1.0)

    plain, partly = run(RECIPE, tmp_path / "a"), Run(Partly(RECIPE), tmp_path / "b")
    before = {k: v.clone() for k, v in partly.model.state_dict().items()}
    for each in (plain, partly):
        each.advance(each.stage.batch(0))

    moved = {k: (v - before[k]).abs().max().item() for k, v in partly.model.state_dict().items()}
    full = {k: (v - before[k]).abs().max().item() for k, v in plain.model.state_dict().items()}
    assert moved["blocks.0.weight"] == 0
    assert moved["out.weight"] == pytest.approx(full["out.weight"] / 2, rel=1e-3)
    assert moved["out.bias"] == pytest.approx(full["out.bias"], rel=1e-3)


def test_warmup_scales_the_first_steps(tmp_path):
    """Both optimisers' first updates have the size of the rate, whatever the size of the gradient."""
    moved = []
    for warmup in (1, 4):
        one = run(Recipe(**{**RECIPE.__dict__, "warmup_steps": warmup}), tmp_path / str(warmup))
        before = {k: v.clone() for k, v in one.model.state_dict().items()}
        one.advance(one.stage.batch(0))
        moved.append({k: v - before[k] for k, v in one.model.state_dict().items()})

    for name, by in moved[0].items():
        torch.testing.assert_close(moved[1][name], by / 4, rtol=1e-3, atol=1e-6)


def test_gradient_is_clipped_to_the_recipes_norm(tmp_path):
    """First moments show what the optimisers were given: a twentieth of it in Muon, a tenth in AdamW."""
    one = run(Recipe(**{**RECIPE.__dict__, "clip": 0.01}), tmp_path)
    norm = one.advance(one.stage.batch(0))["norm"]

    moments = {"muon": ("momentum", 0.05), "adamw": ("exp_avg", 0.1)}
    given = [
        state[key].flatten() / share
        for name, (key, share) in moments.items()
        for state in one.optimisers[name].state_dict()["state"].values()
    ]
    assert norm > 0.1 and torch.cat(given).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_stage_without_trainable_parameters_is_refused(tmp_path):
    class Frozen(Line):
        def rate(self, name):
            return 0.0

    with pytest.raises(K2Error, match="nothing learns"):
        Run(Frozen(RECIPE), tmp_path)


def test_snapshots_are_limited_and_only_from_the_stable_phase(tmp_path):
    recipe = Recipe(**{**RECIPE.__dict__, "keep": 2, "keep_every": 2})
    train(run(recipe, tmp_path / "a"), lambda line: None)

    assert [path.name for path in states.snapshots(tmp_path / "a")] == [
        "snapshot-0000004.safetensors",
        "snapshot-0000006.safetensors",
    ]


@pytest.mark.parametrize("result", [True, False])
def test_remains_of_a_run_without_a_state_are_left_alone(tmp_path, result):
    """An unreadable state has to be removed, which makes the snapshots and the result all the more valuable."""
    recipe = Recipe(**{**RECIPE.__dict__, "keep": 2, "keep_every": 2})
    train(run(recipe, tmp_path / "a"), lambda line: None)
    (tmp_path / "a" / "state.safetensors").unlink()
    if result:
        for path in states.snapshots(tmp_path / "a"):
            path.unlink()
        (tmp_path / "a" / f"{recipe.name}.safetensors").touch()
    before = sorted(path.name for path in (tmp_path / "a").iterdir())

    with pytest.raises(K2Error, match="without a saved state"):
        train(run(recipe, tmp_path / "a"), lambda line: None)

    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before
    for path in (tmp_path / "a").glob("*.safetensors"):
        path.unlink()
    train(run(recipe, tmp_path / "a"), lambda line: None)


def test_run_killed_before_its_first_save_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SAVE_EVERY", 1e9)
    recipe = Recipe(**{**RECIPE.__dict__, "keep": 2, "keep_every": 2})
    train(run(recipe, tmp_path / "straight"), lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        train(run(recipe, tmp_path / "killed", die_at=5), lambda line: None)
    assert [states.snapshot_step(path) for path in states.snapshots(tmp_path / "killed")] == [2, 4]

    train(run(recipe, tmp_path / "killed"), lambda line: None)

    for name in ("snapshot-0000004.safetensors", "snapshot-0000006.safetensors", "state.safetensors"):
        assert same(*(load_file(tmp_path / each / name) for each in ("straight", "killed")))
    assert columns(tmp_path / "straight") == columns(tmp_path / "killed")


def test_run_killed_before_its_first_step_follows_the_current_recipe(tmp_path):
    recipe = Recipe(**{**RECIPE.__dict__, "keep": 2, "keep_every": 2})
    other = Recipe(**{**recipe.__dict__, "seed": 6})
    train(run(other, tmp_path / "straight"), lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        train(run(recipe, tmp_path / "killed", die_at=0), lambda line: None)

    again = run(other, tmp_path / "killed")
    assert not again.recipe_changes
    train(again, lambda line: None)

    assert same(*(load_file(tmp_path / name / "state.safetensors") for name in ("straight", "killed")))


def test_unsaved_snapshots_are_dropped(tmp_path, monkeypatch):
    recipe = Recipe(**{**RECIPE.__dict__, "keep": 2, "keep_every": 2, "every": 100})
    monkeypatch.setattr(loop, "SAVE_EVERY", 1e9)
    with pytest.raises(KeyboardInterrupt):
        train(run(recipe, tmp_path / "a", die_at=5), lambda line: None)
    assert [states.snapshot_step(path) for path in states.snapshots(tmp_path / "a")] == [2, 4]
    begun = run(recipe, tmp_path / "a")
    begun.step = 2
    begun.save()

    with pytest.raises(KeyboardInterrupt):
        train(run(recipe, tmp_path / "a", die_at=2), lambda line: None)

    assert [states.snapshot_step(path) for path in states.snapshots(tmp_path / "a")] == [2]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_resumed_run_does_not_keep_its_state_file_open(tmp_path):
    train(run(RECIPE, tmp_path / "a"), lambda line: None)
    again = run(RECIPE, tmp_path / "a")
    assert again.step == 12 and str(tmp_path / "a") not in Path("/proc/self/maps").read_text()


def test_checkpoint_records_its_training(tmp_path):
    train(run(RECIPE, tmp_path / "a"), lambda line: None)

    with safe_open(tmp_path / "a" / "state.safetensors", "pt") as file:
        record = json.loads(file.metadata()["record"])
    assert record["recipe"]["name"] == "line" and record["steps"] == 12
    assert record["versions"]["torch"] == torch.__version__
    assert record["figures"]["loss"] == pytest.approx(columns(tmp_path / "a")["loss"][-1])
    assert len(record["commit"].rstrip("+")) in (0, 40)


def test_progress_messages(tmp_path):
    lines = []
    train(run(RECIPE, tmp_path / "a"), lines.append)
    goes_on = Recipe(**{**RECIPE.__dict__, "steps": 15})
    train(run(goes_on, tmp_path / "a"), lines.append)

    assert "loss" in lines[0] and "pictures/s" in lines[0] and "min left" in lines[0]
    assert any("steps 12 → 15" in line for line in lines)


@pytest.mark.parametrize("compiler", [True, False])
def test_long_run_continues_without_a_compiler(tmp_path, monkeypatch, compiler):
    """The first compiled block would end the run, deep inside PyTorch."""
    compiled, lines = [], []

    class Compiled(Line):
        def compile(self):
            compiled.append(self)

    monkeypatch.setattr(loop, "can_compile", lambda device: compiler)
    train(Run(Compiled(Recipe(**{**RECIPE.__dict__, "steps": 201})), tmp_path), lines.append)

    assert bool(compiled) == compiler
    assert ("no working compiler here" in lines[0]) != compiler


def test_curves_match_the_log(tmp_path):
    """A falling figure is a falling line: the curve's colour is higher on the left than on the right."""
    log = Journal(tmp_path / "log.csv")
    for step in range(1, 6):
        log.add({"step": step, "seconds": step, "loss": 6 - step, "lr": 1.0, "low": math.nan})
    log.draw()

    picture = Image.open(tmp_path / "curves.png").convert("RGB")
    blue = [[y for y in range(40, picture.height) if picture.getpixel((x, y)) == (0x1F, 0x6F, 0xEB)] for x in (60, 840)]
    assert blue[0] and blue[1] and max(blue[0]) < min(blue[1])


def test_every_figure_gets_a_curve(tmp_path):
    log = Journal(tmp_path / "log.csv")
    for step in range(1, 8):
        log.add(
            {"step": step}
            | {f"figure_{index}": step * (index + 2) % 7 + index * step * step / 40 for index in range(9)}
        )
    log.draw()

    colours = {colour for _, colour in Image.open(tmp_path / "curves.png").convert("RGB").getcolors(1 << 20)}
    named = {ImageColor.getrgb(colour) for colour in COLOURS[:9]}
    assert len(named) == 9 and named < colours


def test_commit_is_that_of_the_codes_repository(tmp_path, monkeypatch):
    """Installed inside somebody else's project, it would report their commit."""
    installed = tmp_path / ".venv" / "model" / "train" / "states.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*author, "commit", "-q", "--allow-empty", "-m", "theirs"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(states, "__file__", str(installed))
    assert states.code_commit() == ""

    for command in (["add", "-f", str(installed)], [*author, "commit", "-q", "-m", "ours"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert len(states.code_commit()) == 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 0}, "either minutes or steps"),
        ({"minutes": 2}, "either minutes or steps"),
        ({"steps": -3, "minutes": 5}, "steps must be at least 0"),
        ({"every": 0}, "every"),
        ({"seed": -1}, "-1 is not a seed"),
        ({"seed": 2**63}, "is not a seed"),
        ({"clip": 0}, "clip must be more than 0"),
        ({"decay": 1.5}, "decay must be from 0 to 1"),
        ({"average": -0.1}, "average must be from 0 to 1"),
        ({"average": 1}, "average must be less than 1"),
        ({"keep": -1, "keep_every": 1}, "keep must be at least 0"),
        ({"keep": 2}, "keep and keep_every"),
        ({"keep_every": 2}, "keep and keep_every"),
    ],
)
def test_impossible_recipe_says_why(change, words):
    with pytest.raises(K2Error, match=words):
        Recipe(**{**RECIPE.__dict__, **change})


def test_missing_or_misfitting_parent_is_refused(tmp_path):
    with pytest.raises(K2Error, match='no run "none"'):
        run(Recipe(**{**RECIPE.__dict__, "init": "none"}), tmp_path / "a")
    model = nn.Linear(2, 2)
    with pytest.raises(K2Error, match="share no names"):
        states.init_from(model, {"other": torch.zeros(2)})
    parted = nn.ModuleList([nn.Linear(1, 1) for _ in range(11)])
    before = {name: value.clone() for name, value in parted.state_dict().items()}
    states.init_from(parted, {name: value + 1 for name, value in before.items()}, ("1",))
    assert torch.equal(parted[1].weight, before["1.weight"]) and not torch.equal(parted[10].weight, before["10.weight"])
    with pytest.raises(K2Error, match='fresh names no module "in"'):
        run(Recipe(**{**RECIPE.__dict__, "fresh": ("in",)}), tmp_path / "a")
    with pytest.raises(K2Error, match="weight is"):
        states.init_from(model, {"weight": torch.zeros(3, 3)})
