"""Apply low-rank adapters to a network, and remove them again.

A LoRA adds `weight · alpha / rank · up @ down` to the matrix of a linear layer: down [r, in], up [out, r]. Applied, it
is a second, narrow path beside the layer: the base is neither copied nor changed, so removing it restores the network
bit for bit. Some files add a full matrix to a layer (`.diff`), a term to its bias (`.diff_b`), a Kronecker product
(LoKr) or a Hadamard product (LoHa), or set the norms of its rows (DoRA): see `model/adapter_path.py`. Others change the
scales of norms, or what a layer adds to the time modulation: these few numbers are swapped in while the layer that they
belong to runs. `model/lora_match.py` reads a file and matches it with a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.adapter_path import AdapterPath, Update
from model.dit import Krea2, Modulation


@dataclass(frozen=True)
class ParameterUpdate:
    """What is added, at weight 1, to a parameter outside linear layers."""

    delta: Tensor  # in the parameter's shape

    def changes(self) -> bool:
        return bool(self.delta.any())


Change = Update | ParameterUpdate


@dataclass(frozen=True)
class Adapter:
    """A LoRA file, matched against a network."""

    path: Path
    sha256: str  # of the file and any settings beside it: see `hashes.identity`
    layers: Mapping[str, Change]  # by the native name of the linear layer or parameter
    unmatched: tuple[str, ...]  # layers that the network lacks, under the file's names

    def report(self, weight: float) -> dict[str, Any]:
        """For records: `matched` of `modules` layers are in use, others are named. An `idle` adapter changes none."""
        idle = not any(each.changes() for each in self.layers.values())
        return {
            "path": str(self.path),
            "sha256": self.sha256,
            "weight": weight,
            "matched": len(self.layers),
            "modules": len(self.layers) + len(self.unmatched),
            "unmatched": list(self.unmatched),
            **({"idle": True} if idle else {}),
        }


@contextmanager
def applied(network: Krea2, adapters: Iterable[tuple[Adapter, float]]) -> Iterator[None]:
    """Within the context the adapters are applied, each at its weight (also negative), in any order.

    Weight 0 adds nothing, not even rounding. Contexts can be nested: their adapters add up.
    """
    with ExitStack() as stack:
        for name, changes in combine(adapters).items():
            if updates := [(each, weight) for each, weight in changes if isinstance(each, Update)]:
                stack.enter_context(network.get_submodule(name).register_forward_hook(AdapterPath(updates)))
            else:
                stack.enter_context(ParameterSwap(network, name, changes).active())
        yield


class ParameterSwap:
    """Swaps a parameter while the module that reads it runs, and restores it afterwards, even after an error."""

    def __init__(self, network: Krea2, name: str, weighted: Sequence[tuple[Change, float]]):
        above, _, self.attribute = name.rpartition(".")
        self.holder = self.reader = network.get_submodule(above)
        if isinstance(self.holder, Modulation):  # only holds the parameter; its parent reads it
            self.reader = network.get_submodule(above.rpartition(".")[0])
        self.delta = torch.stack(
            [each.delta * weight for each, weight in weighted if isinstance(each, ParameterUpdate)]
        ).sum(0)
        self.replaced: list[nn.Parameter] = []

    @contextmanager
    def active(self) -> Iterator[None]:
        """Streamed blocks have weights only while they run: so the swap comes after they are filled and ends before
        they are emptied, and nested swaps end in reverse order."""
        with (
            self.reader.register_forward_pre_hook(self.swap_in),
            self.reader.register_forward_hook(self.swap_out, prepend=True, always_call=True),
        ):
            yield

    def swap_in(self, reader: nn.Module, inputs: Any) -> None:
        old = self.holder.get_parameter(self.attribute)
        self.replaced.append(old)
        new = (old.float() + self.delta.to(old.device)).to(old.dtype)
        setattr(self.holder, self.attribute, nn.Parameter(new, requires_grad=False))

    def swap_out(self, reader: nn.Module, inputs: Any, output: Any) -> None:
        if self.replaced:
            setattr(self.holder, self.attribute, self.replaced.pop())


def combine(adapters: Iterable[tuple[Adapter, float]]) -> dict[str, list[tuple[Change, float]]]:
    """Combine adapters: layer -> its changes and their weights, in an order that does not depend on the caller's."""
    in_use = sorted(((a, weight) for a, weight in adapters if weight), key=lambda pair: (pair[0].sha256, pair[1]))
    changes: dict[str, list[tuple[Change, float]]] = {}
    for adapter, weight in in_use:
        for name, each in adapter.layers.items():
            changes.setdefault(name, []).append((each, weight))
    return changes
