"""What runs leave on disk and start from: states, snapshots, progress, and parents' weights.

`.runs/NAME/state.safetensors` holds `model.*`, `ema.*`, `muon.I.*` and `adamw.I.*`; its metadata holds `place` (where
the run stands) and `record` (how it came about).
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from model import checkpoint
from model.errors import K2Error
from model.library import BUNDLED
from model.train import parallel

RUNS = Path(".runs")
BUNDLED_VARIANTS = {"box": "raw", "turbo": "turbo"}  # name of the bundled weights in recipes -> variant


def write_state(folder: Path, tensors: dict[str, Tensor], progress: dict[str, Any], record: dict[str, Any]) -> None:
    """Write a state and its record into a run's folder, in one move."""
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"place": json.dumps(progress), "record": json.dumps(record)}
    checkpoint.write(folder / "state.safetensors", tensors, metadata)


def newest_state(folder: Path) -> Path | None:
    """What a run resumes from: the complete state of one process or the parts of several, whichever is further."""
    file = folder / "state.safetensors"
    found = [*([file] if file.exists() else []), *parallel.sharded_states(folder)[-1:]]
    return max(found, key=lambda path: read_progress(path)["step"], default=None)


def read_progress(path: Path) -> dict[str, Any]:
    """Where a saved run stands, of one process or of several: step, seconds, recipe."""
    if path.is_dir():
        return parallel.read_progress(path)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["place"])


def snapshots(folder: Path) -> list[Path]:
    """A run's kept snapshots, oldest first."""
    return sorted(folder.glob("snapshot-*.safetensors"))


def snapshot_step(snapshot: Path) -> int:
    """The number of steps after which a snapshot was taken."""
    return int(snapshot.stem.rpartition("-")[2])


def code_commit() -> str:
    """The commit of the running code, with a + if files differ from it; empty outside its repository. A repository that
    it is merely installed in does not count."""
    here = Path(__file__)
    commands = (
        ("ls-files", "--error-unmatch", here.name),
        ("rev-parse", "HEAD"),
        ("status", "--porcelain", "--untracked-files=no", "--", "../.."),
    )
    try:
        _, head, status = (
            subprocess.run(["git", *each], cwd=here.parent, capture_output=True, text=True, check=True).stdout.strip()
            for each in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if status else "")


def parent_weights(name: str, runs: Path = RUNS) -> dict[str, Tensor]:
    """The weights that a recipe's `init` names: the bundled Raw or Turbo, or a run's averages."""
    if name in BUNDLED_VARIANTS:
        return bundled_state(BUNDLED_VARIANTS[name])
    path = runs / name / "state.safetensors"
    if not path.exists():
        raise K2Error(f'There is no run "{name}" to start from.', hint=f"{path} does not exist: train that run first.")
    return averaged_weights(path)


def averaged_weights(path: Path) -> dict[str, Tensor]:
    """The averaged weights of a run."""
    return {name[4:]: tensor for name, tensor in load_file(path).items() if name.startswith("ema.")}


def bundled_state(variant: str = "raw") -> dict[str, Tensor]:
    """The bundled weights under a trainee's names, without the head that tells looks apart."""
    parts = {"dit.": f"mini-{variant}", "style.": "mini-style"}
    states = ((prefix, checkpoint.read(BUNDLED / f"{name}.safetensors")[0]) for prefix, name in parts.items())
    return {prefix + name: tensor for prefix, state in states for name, tensor in state.items()}


def check_modules(model: nn.Module, recipe: str, key: str, modules: tuple[str, ...]) -> None:
    """Raises K2Error if a recipe's list names a module that the model lacks."""
    for module in modules:
        if not any(f"{name}.".startswith(f"{module}.") for name in model.state_dict()):
            hint = f"Name {', '.join(name for name, _ in model.named_children())}, or a part of one."
            raise K2Error(f'Recipe "{recipe}": {key} names no module "{module}".', hint=hint)


def init_from(model: nn.Module, weights: Mapping[str, Tensor], fresh: tuple[str, ...] = ()) -> None:
    """Copy a parent's weights into a model, except modules that start from scratch and those that the parent lacks."""
    own_weights = model.state_dict()
    fresh_prefixes = tuple(f"{module}." for module in fresh)
    shared = [name for name in own_weights if name in weights and not f"{name}.".startswith(fresh_prefixes)]
    if not shared:
        raise K2Error("The parent's weights share no names with this model.")
    for name in shared:
        if own_weights[name].shape != weights[name].shape:
            parents, own = list(weights[name].shape), list(own_weights[name].shape)
            raise K2Error(f"The parent's {name} is {parents}, but this model's is {own}.")
        own_weights[name].copy_(weights[name])


def read_copied(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    """A file's tensors, in memory of their own: Windows cannot replace a file that is still mapped."""
    return {name: tensor.clone() for name, tensor in load_file(path, str(device)).items()}


def weights_hash(network: nn.Module) -> str:
    """sha256 of a network's weights."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
