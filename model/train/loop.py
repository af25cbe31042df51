"""The one loop behind every stage of training: it steps, averages, logs, saves, and resumes bit for bit.

A stage is a recipe, a model, a batch that depends only on the recipe's seed and the step's number, and a loss. All else
is here: AdamW and Muon, warmup-stable-decay, gradient accumulation, averaged weights, snapshots for averaging
afterwards, the log, and a record of the run in its checkpoint's metadata.
"""

from __future__ import annotations

import math
import shutil
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from model.atomic import atomic_write
from model.dit import SingleStreamBlock, TextBlock
from model.errors import K2Error, listed, pluralise
from model.fast import can_compile
from model.plan import native_bf16
from model.train import parallel
from model.train.interrupt import stop_requests
from model.train.journal import Journal, mean_figures
from model.train.optim import make_optimisers, ordered_params, uses_muon, warmup_stable_decay
from model.train.parallel import local, shard_like
from model.train.prefetch import Prefetcher
from model.train.recipe import Recipe
from model.train.run_lock import run_lock
from model.train.states import (
    check_modules,
    code_commit,
    init_from,
    newest_state,
    parent_weights,
    read_copied,
    read_progress,
    snapshot_step,
    snapshots,
    weights_hash,
    write_state,
)

SAVE_EVERY = 180.0  # seconds

Batch = dict[str, Any]
Report = Callable[[str], None]


class Stage(ABC):
    """What a kind of training brings to the loop. Build `model` under the recipe's seed."""

    recipe: Recipe
    model: nn.Module
    data: str = ""  # hash of the data set's manifest, for the record
    frozen: nn.Module | None = None  # a network that the stage learns from; must be unchanged when a run resumes
    entry: tuple[str, ...] = ()  # all methods of the model that `loss` calls: several processes can then shard it
    own: tuple[str, ...] = ()  # tensors of the model that are never taken from a parent
    narrow: bool = True  # products in bf16 where the device multiplies it natively

    @abstractmethod
    def batch(self, step: int, part: int = 0) -> Batch:
        """What one part of a step learns from: a pure function of the recipe, the step and the part."""

    @abstractmethod
    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """The loss to minimise, and figures for the log (numbers or one-element tensors). Runs under autocast."""

    def muon(self, name: str, param: Tensor) -> bool:
        """Whether Muon trains a parameter; AdamW trains the rest."""
        return uses_muon(name, param)

    def rate(self, name: str) -> float:
        """Factor of a parameter's learning rate; 0 freezes it."""
        return 1.0

    def begin(self, averages: Mapping[str, Tensor]) -> None:  # noqa: B027 - most have no use for them
        """Called once a run is set up, with its averaged weights by name; they are updated as the run goes on."""

    def after(self, step: int) -> None:  # noqa: B027 - most have nothing left to do
        """Called after the step with this number; whatever it depends on must be part of `model`."""

    def figures(self) -> Mapping[str, float]:
        """Figures for a line of the log that are too expensive to compute at every step."""
        return {}

    def pictures(self) -> float:
        """Pictures that one part of a step learns from on average; used to report speed."""
        return 1

    def sheets(self) -> float:
        """Minutes between sheets of samples, which are drawn when the run is saved; 0 draws none."""
        return 0.0

    def sheet(self) -> Path | None:
        """Draw one with the averaged weights as saved -> its path."""
        return None

    def compile(self) -> None:  # noqa: B027 - most have nothing to compile
        """Compile what is worth compiling; called for runs of more than two minutes or 200 steps."""


class Run:
    """A stage under way: model, optimisers, averaged weights, and how far it has come."""

    def __init__(self, stage: Stage, folder: Path, device: str = "cpu"):
        self.stage, self.recipe, self.folder = stage, stage.recipe, folder
        self.device, self.world = torch.device(device), parallel.world()
        self.parts = self.world.parts(self.recipe.accumulate)
        self.model = stage.model.to(self.device)
        check_modules(self.model, self.recipe.name, "fresh", self.recipe.fresh)
        self.folder.mkdir(parents=True, exist_ok=True)
        state = newest_state(self.folder)
        if state is not None and not read_progress(state)["step"]:
            state = None  # no step was taken: start as the recipe now says
        if self.recipe.init and state is None:
            init_from(
                self.model, parent_weights(self.recipe.init, self.folder.parent), (*self.recipe.fresh, *stage.own)
            )
        self.sharded = self.world.size > 1 and bool(stage.entry)
        if self.sharded:
            units = [m for m in self.model.modules() if isinstance(m, SingleStreamBlock | TextBlock)]
            parallel.shard(self.model, units, stage.entry, self.device)
        self.optimisers = make_optimisers(self.model, self.recipe, stage.muon, stage.rate)
        self.ema = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.step, self.seconds = 0, 0.0
        self.figures: dict[str, float] = {}
        self.idle = False  # nothing was left to do or to write
        self.recipe_changes: list[str] = []  # how the recipe differs from the one that the run was saved with
        self.bf16 = stage.narrow and native_bf16(self.device)
        self.learned_from = {"data set": stage.data} if stage.data else {}
        if stage.frozen is not None:
            self.learned_from["frozen network"] = weights_hash(stage.frozen)
        if state is not None:
            self.load(state)
        stage.begin(self.ema)

    @property
    def progress(self) -> float:
        """How much of the run is done, in the unit of the recipe's `total`."""
        return self.step if self.recipe.steps else self.seconds

    @property
    def saved(self) -> Path:
        """Its complete state on disk, once it is done."""
        return self.folder / "state.safetensors"

    @property
    def result(self) -> Path:
        """What it leaves behind."""
        return self.saved

    @property
    def done(self) -> bool:
        return self.progress >= self.recipe.total

    def advance(self, *batches: Batch) -> dict[str, float]:
        """One step of the optimisers by the mean gradient of its parts; `batches` are those of this process."""
        recipe = self.recipe
        done = self.progress / recipe.total
        factor = warmup_stable_decay(self.step, recipe.warmup_steps, done, recipe.decay)
        rows: list[dict[str, float]] = []
        for batch in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                loss, figures = self.stage.loss(batch)
            (loss / len(batches)).backward()
            rows.append({"loss": float(loss.detach())} | {key: float(value) for key, value in figures.items()})
        trained = [param for param in self.model.parameters() if param.requires_grad]
        if self.world.size > 1 and not self.sharded:
            parallel.average_gradients(trained)
        norm = parallel.full_tensor(nn.utils.clip_grad_norm_(trained, recipe.clip))
        if not math.isfinite(norm):
            raise self.diverged(f"the gradient of step {self.step + 1} is not finite")
        for optimiser in self.optimisers.values():
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * factor
            optimiser.step()
            optimiser.zero_grad()
        self.step += 1
        decay = min(recipe.average, (self.step + 1) / (self.step + 20))
        floats = [(self.ema[k], v) for k, v in self.model.state_dict().items() if v.is_floating_point()]
        torch._foreach_lerp_([local(mean) for mean, _ in floats], [local(value) for _, value in floats], 1 - decay)
        self.stage.after(self.step)
        return mean_figures(self.world.gather(rows)) | {"norm": float(norm), "lr": factor * recipe.lr}

    @property
    def layout(self) -> dict[str, Any]:
        """What a state consists of: the model's tensors and shapes, and each optimiser's parameters in order."""
        names: dict[Tensor, str] = {param: name for name, param in self.model.named_parameters()}
        shapes = {name: list(value.shape) for name, value in self.model.state_dict().items()}
        return {"model": shapes} | {
            key: [names[p] for p in ordered_params(each)] for key, each in self.optimisers.items()
        }

    def state(self) -> dict[str, Tensor]:
        """All tensors that a run resumes from, by the names that they are saved under."""
        tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.items()}
        for name, optimiser in self.optimisers.items():
            for index, state in optimiser.state_dict()["state"].items():
                tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
        return tensors

    def diverged(self, what: str) -> K2Error:
        hint = f"Lower the learning rate. The run resumes from where it was last saved in {self.folder}."
        return K2Error(f"{self.recipe.name}: {what}.", hint=hint)

    def save(self, *, last: bool = False) -> None:
        """Save the complete state, replacing the old one in one move; while several processes train, each writes its
        own part. Raises K2Error if the last step broke the weights, which no gradient has shown yet."""
        trained = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
        if not parallel.all_finite(tensor for name, param in trained for tensor in (param, self.ema[name])):
            raise self.diverged(f"the weights of step {self.step} are not finite")
        progress = {
            "step": self.step,
            "seconds": self.seconds,
            "recipe": asdict(self.recipe),
            "figures": self.figures,
            "learned_from": self.learned_from,
            "layout": self.layout,
        }
        if self.sharded and not last:
            parallel.save(self.folder, self.state(), progress, self.record())
            return
        tensors = parallel.collect(self.state())
        if self.world.is_main:
            write_state(self.folder, tensors, progress, self.record())
            for old in parallel.sharded_states(self.folder):
                shutil.rmtree(old)
        self.world.wait()

    def load(self, path: Path) -> None:
        """Back to where `save` was called; bit for bit if the number of processes is the same.

        Raises K2Error if the recipe now makes or trains other tensors than were saved.
        """
        progress = read_progress(path)
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.figures = progress.get("figures", {})
        new_recipe = asdict(self.recipe)
        self.recipe_changes = [
            f"{key} {old} → {new_recipe[key]}"
            for key, old in progress["recipe"].items()
            if key in new_recipe
            and (list(new_recipe[key]) if isinstance(new_recipe[key], tuple) else new_recipe[key]) != old
        ]
        old_sources = progress.get("learned_from", {})
        self.recipe_changes += [
            f"another {key}" for key, hash_ in self.learned_from.items() if old_sources.get(key, hash_) != hash_
        ]
        if progress.get("layout", self.layout) != self.layout:
            raise K2Error(
                f'The run "{self.recipe.name}" was saved with other weights than its recipe now trains: '
                f"{', '.join(self.recipe_changes) or 'they are of another kind'}.",
                hint=f"Restore the recipe, remove {self.folder} to start over, or give the run another name.",
            )
        tensors = parallel.load(path, self._buffer) if path.is_dir() else read_copied(path, self.device)
        weights = self.model.state_dict()
        self.model.load_state_dict({name: shard_like(tensors[f"model.{name}"], like) for name, like in weights.items()})
        self.ema = {name: shard_like(tensors[f"ema.{name}"], like) for name, like in weights.items()}
        for name, optimiser in self.optimisers.items():
            states: dict[int, dict[str, Tensor]] = defaultdict(dict)
            for key, value in tensors.items():
                if key.startswith(f"{name}."):
                    _, index, slot = key.split(".")
                    param = ordered_params(optimiser)[int(index)]
                    if value.shape == param.shape:  # fused kernels walk through memory and ignore strides
                        value = torch.empty_like(param, dtype=value.dtype).copy_(shard_like(value, param))
                    states[int(index)][slot] = value
            optimiser.load_state_dict({"state": dict(states), "param_groups": optimiser.state_dict()["param_groups"]})

    def _buffer(self, name: str, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory to read a tensor of a saved state into."""
        kind, _, rest = name.partition(".")
        if kind in ("model", "ema"):
            return torch.empty_like(self.model.state_dict()[rest])
        param = ordered_params(self.optimisers[kind])[int(rest.partition(".")[0])]
        return torch.empty_like(param) if param.shape == shape else torch.empty(shape, dtype=dtype)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the model has its averaged weights, which are what others use of the run."""
        last = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.ema)
        try:
            yield
        finally:
            self.model.load_state_dict(last)

    def snapshot(self) -> None:
        """Keep the weights of this step, and of as many earlier ones as the recipe says."""
        recipe = self.recipe
        stable = self.progress <= (1 - recipe.decay) * recipe.total
        if not (recipe.keep and recipe.keep_every and stable) or self.step % recipe.keep_every:
            return
        path = self.folder / f"snapshot-{self.step:07d}.safetensors"
        weights = parallel.collect(self.model.state_dict())
        if not self.world.is_main:
            return
        with atomic_write(path) as draft:
            save_file({k: v.contiguous() for k, v in weights.items()}, draft)
        for old in snapshots(self.folder)[: -recipe.keep]:
            old.unlink()

    def record(self) -> dict[str, Any]:
        """How the weights came about."""
        return {
            "recipe": asdict(self.recipe),
            "data": self.stage.data,
            "commit": code_commit(),
            "versions": {"torch": torch.__version__, "numpy": np.__version__},
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "bf16": self.bf16,
            "processes": self.world.size,
            "steps": self.step,
            "pictures": round(self.step * self.recipe.accumulate * self.stage.pictures()),
            "seconds": round(self.seconds, 1),
            "figures": self.figures,
        }


def train(run: Run, report: Report = print) -> Run:
    """Take a run to its end from where it stands; `report` gets a line now and then. Raises K2Error, and
    KeyboardInterrupt: at once if several processes train, else when the run is saved."""
    requests = stop_requests() if run.world.size == 1 else nullcontext(lambda: False)
    with run_lock(run.folder) if run.world.is_main else nullcontext(), requests as stop_requested:
        if run.world.is_main:
            remove_stale(run)
        return _train(run, report, stop_requested)


def remove_stale(run: Run) -> None:
    """Remove snapshots of steps that were not saved. Raises K2Error if they, or a result, are all that is left of a
    run, or if another process has meanwhile gone further: the run was read before it was locked."""
    state = newest_state(run.folder)
    result = run.folder / f"{run.recipe.name}.safetensors"
    if state is None and (left := [*([result] if result.exists() else []), *snapshots(run.folder)]):
        raise K2Error(
            f"{run.folder} holds files of a run without a saved state: {listed([path.name for path in left], 3)}.",
            hint="Move them elsewhere to start over, or give the run another name in a recipe.",
        )
    if state is not None and read_progress(state)["step"] > run.step:
        raise K2Error(
            f"Another process has meanwhile trained in {run.folder}.", hint="Train again: it resumes from there."
        )
    for later in snapshots(run.folder):
        if snapshot_step(later) > run.step:
            later.unlink()


def _train(run: Run, report: Report, stop_requested: Callable[[], bool]) -> Run:
    recipe, stage, world = run.recipe, run.stage, run.world
    journal = Journal(run.folder / "log.csv", run.step) if world.is_main else None
    report = report if world.is_main else lambda line: None
    if run.done and newest_state(run.folder) == run.saved:
        run.idle = True
        report(f"{recipe.name}: already done at step {run.step}; with more steps or minutes it continues")
        if run.recipe_changes:
            report(f"{recipe.name}: changes without effect on a finished run: {', '.join(run.recipe_changes)}")
        return run
    if run.recipe_changes:
        report(f"{recipe.name}: resumed with changes: {', '.join(run.recipe_changes)}")
    compiles = type(stage).compile is not Stage.compile
    if compiles and max(recipe.minutes, recipe.steps / 100) > 2:  # compiling takes a minute
        if can_compile(run.device):
            stage.compile()
        else:
            report(f"{recipe.name}: no working compiler here (C++; on a GPU Triton), so it takes longer")
    if (
        recipe.keep and not run.step
    ):  # so that snapshots always have a state, whenever the run is killed: see `remove_stale`
        run.save()
    last_save = started = time.monotonic()
    seconds_before, first_step, last_sheet = run.seconds, run.step, run.seconds
    window: list[dict[str, float]] = []
    stopping = False
    batches = Prefetcher(lambda step: [stage.batch(step, part) for part in run.parts], run.device)
    while not run.done:
        window.append(run.advance(*batches(run.step)))
        run.seconds = world.broadcast(seconds_before + time.monotonic() - started)
        run.snapshot()
        was_stopping, stopping = stopping, stop_requested()
        if stopping and not was_stopping and (note := stop_note(run)):
            report(f"{recipe.name}: {note}; press Ctrl-C again to stop at once")
        if run.step % recipe.every == 0 or run.done:
            figures = mean_figures(window) | {"lr": window[-1]["lr"]} | dict(stage.figures())
            run.figures = {key: float(f"{value:.4g}") for key, value in figures.items()}
            window = []
            if journal:
                journal.add({"step": run.step, "seconds": round(run.seconds, 1)} | run.figures)
            report(progress_line(run, first_step, seconds_before))
            if not run.done and (stopping or world.broadcast(time.monotonic() - last_save) > SAVE_EVERY):
                run.save()
                if journal:
                    journal.draw()
                if stopping:
                    batches.stop()
                    raise KeyboardInterrupt
                last_sheet = draw_samples(run, last_sheet, report)
                last_save = time.monotonic()
    batches.stop()
    run.save(last=True)
    if journal:
        journal.draw()
    draw_samples(run, -math.inf, report)
    return run


def stop_note(run: Run) -> str:
    """How a run that is asked to stop does so: at its next log line, or at its end if that is earlier; "" if now."""
    left = -run.step % run.recipe.every
    if not left or run.done:
        return ""
    if run.recipe.steps and (rest := run.recipe.steps - run.step) <= left:
        return f"ends in {pluralise(rest, 'step')}"
    return f"saves and stops in {pluralise(left, 'step')}"


def draw_samples(run: Run, last: float, report: Report) -> float:
    """Draw a sheet of samples if one is due -> the run's seconds at the last one."""
    every = 60 * run.stage.sheets()
    if not every or run.seconds - last < every:
        return last
    if run.world.is_main and (run.folder / "state.safetensors").exists() and (sheet := run.stage.sheet()):
        report(f"{run.recipe.name}: {sheet}")
    return run.seconds


def progress_line(run: Run, first_step: int, seconds_before: float) -> str:
    """One line on how a run is doing; speed is measured since step `first_step`, at `seconds_before`."""
    recipe, spent = run.recipe, max(run.seconds - seconds_before, 1e-9)
    speed = (run.step - first_step) * recipe.accumulate * run.stage.pictures() / spent
    left = recipe.total - run.progress
    seconds = left * spent / (run.step - first_step) if recipe.steps else left
    figures = ", ".join(f"{key} {value:g}" for key, value in run.figures.items())
    return f"{recipe.name} {run.step}: {figures}; {speed:.1f} pictures/s, {max(seconds, 0) / 60:.1f} min left"
