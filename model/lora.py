"""Low-rank adapters laid over a network and taken off again.

A LoRA adds `weight · alpha / rank · up @ down` to the matrix of a linear layer: down [r, in], up [out, r]. Laid over,
it is a second, narrow path beside the layer: the base is neither copied nor changed, so taking it off leaves the very
bits that were there. Some files add a whole matrix to a layer (`.diff`), something to its bias (`.diff_b`), a Kronecker
product (LoKr) or a Hadamard one (LoHa), or say how long its rows are to be (DoRA): see `model/second_path.py`. And some
change the scales of norms, or what a layer adds to the time's modulation. These few numbers are exchanged for as long
as the layer that they belong to works. `model/lora_match.py` reads a file and matches it with a network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.dit import Krea2, Modulation
from model.second_path import SecondPath, Update


@dataclass(frozen=True)
class Shift:
    """What is added to a parameter that is no linear layer's at weight 1."""

    delta: Tensor  # in the parameter's shape

    def changes(self) -> bool:
        return bool(self.delta.any())


Change = Update | Shift


@dataclass(frozen=True)
class Adapter:
    """A LoRA file, matched against a network."""

    path: Path
    sha256: str  # of the file, and of settings beside it: see `hashes.identity`
    layers: Mapping[str, Change]  # by the native name of the linear layer, or of the parameter
    unmatched: tuple[str, ...]  # layers that the network lacks, as the file calls them

    def report(self, weight: float) -> dict[str, Any]:
        """For records: matched of modules layers are in use; the others are named. `idle` is one that changes none."""
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
def laid_over(network: Krea2, adapters: Iterable[tuple[Adapter, float]]) -> Iterator[None]:
    """Within the context the network answers with the adapters, each at its weight (negative too), in any order.

    Weight 0 adds nothing, not even a rounding. Contexts may be nested: they add.
    """
    with ExitStack() as stack:
        for name, changes in together(adapters).items():
            if updates := [(each, weight) for each, weight in changes if isinstance(each, Update)]:
                stack.enter_context(network.get_submodule(name).register_forward_hook(SecondPath(updates)))
            else:
                stack.enter_context(Exchange(network, name, changes).at_work())
        yield


class Exchange:
    """A parameter is another while the module that reads it works; then it is itself again, also where that failed."""

    def __init__(self, network: Krea2, name: str, weighted: Sequence[tuple[Change, float]]):
        above, _, self.own = name.rpartition(".")
        self.holder = self.reader = network.get_submodule(above)
        if isinstance(self.holder, Modulation):  # it only holds
            self.reader = network.get_submodule(above.rpartition(".")[0])
        self.delta = torch.stack([each.delta * weight for each, weight in weighted if isinstance(each, Shift)]).sum(0)
        self.before: list[nn.Parameter] = []

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Blocks that are streamed have their numbers only while they work: so it comes after their filling, and ends
        before their emptying, as one of these within another does."""
        with (
            self.reader.register_forward_pre_hook(self.put),
            self.reader.register_forward_hook(self.take, prepend=True, always_call=True),
        ):
            yield

    def put(self, reader: nn.Module, inputs: Any) -> None:
        old = self.holder.get_parameter(self.own)
        self.before.append(old)
        new = (old.float() + self.delta.to(old.device)).to(old.dtype)
        setattr(self.holder, self.own, nn.Parameter(new, requires_grad=False))

    def take(self, reader: nn.Module, inputs: Any, answer: Any) -> None:
        if self.before:
            setattr(self.holder, self.own, self.before.pop())


def together(adapters: Iterable[tuple[Adapter, float]]) -> dict[str, list[tuple[Change, float]]]:
    """Several adapters as one: layer -> what changes it, and at which weight, in an order of their own."""
    in_use = sorted(((a, weight) for a, weight in adapters if weight), key=lambda pair: (pair[0].sha256, pair[1]))
    changes: dict[str, list[tuple[Change, float]]] = {}
    for adapter, weight in in_use:
        for name, each in adapter.layers.items():
            changes.setdefault(name, []).append((each, weight))
    return changes
