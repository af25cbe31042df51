"""Muon for the matrices of blocks and of the text's way in, AdamW for the rest, and the learning rate's course."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.errors import K2Error
from model.plan import native_bf16
from model.train.parallel import local, spread
from model.train.recipe import Recipe

# The quintic of Jordan et al. (Muon, 2024): steep at zero, singular values end near one.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 4  # of it
MOMENTUM = 0.95
MUON = (".blocks.", ".txtfusion.", ".txtmlp.")  # whose matrices it takes, wherever the transformer stands


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly: Newton-Schulz on [G, m, n], all of one shape at once.

    In the dtype that it is given: where bf16 products are not native the usual cast to bf16 costs a hundred times more.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal. Updates have the root mean square of AdamW's (0.2), so both share a learning rate."""

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        def work(stacked: Tensor) -> Tensor:
            return orthogonalise(stacked.bfloat16() if native_bf16(stacked.device) else stacked).float()

        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is None:
                    continue
                gradient = local(param.grad)
                if "momentum" not in self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
                momentum = local(self.state[param]["momentum"])
                momentum.lerp_(gradient, 1 - MOMENTUM)
                ahead = gradient.lerp(momentum, MOMENTUM)  # Nesterov
                by_shape[param.shape].append((param, ahead.flatten(1)))  # a kernel [O, I, h, w] is a matrix [O, I·h·w]

            for shape, pairs in by_shape.items():
                aheads, sharded = [ahead for _, ahead in pairs], isinstance(pairs[0][0], DTensor)
                updates = spread(aheads, shape[0], work) if sharded else work(torch.stack(aheads))
                scale = 0.2 * max(shape[0], shape[1:].numel()) ** 0.5
                for (param, _), update in zip(pairs, updates, strict=True):
                    local(param).mul_(1 - group["lr"] * group["weight_decay"])
                    local(param).add_(update.view_as(local(param)), alpha=-group["lr"] * scale)


def for_muon(name: str, param: Tensor) -> bool:
    """Whether Muon takes a parameter: the transformer's matrices inside the blocks, and on the text's way in.

    The text's way belongs to Muon: AdamW at a rate that suits the rest grows one common direction in all its rows
    within a few hundred steps, until what tells one subject from another is a few hundredths of a row.
    """
    return param.ndim == 2 and min(param.shape) > 1 and any(part in f".{name}" for part in MUON)


def warmup_stable_decay(step: int, warmup_steps: int, done: float, decay: float) -> float:
    """Factor of the learning rate: linearly up over the first steps, flat, and down to zero over the last `decay`.

    step   how many were taken before
    done   how much of the run is, 0 … 1, by its steps or by the clock
    """
    falling = max(0.0, min(1.0, (1 - done) / decay)) if decay else 1.0
    return min(1.0, (step + 1) / warmup_steps) * falling


def optimisers_of(
    model: nn.Module, recipe: Recipe, muon: Callable[[str, Tensor], bool], rate: Callable[[str], float]
) -> dict[str, torch.optim.Optimizer]:
    """Muon and AdamW, as far as they have something to do; parameters of rate 0 stay as they are.

    muon   whether it takes a parameter, by its name
    rate   factor of a parameter's learning rate, by its name
    Raises K2Error where nothing learns.
    """
    shares: dict[bool, dict[float, list[Tensor]]] = {True: defaultdict(list), False: defaultdict(list)}
    for name, param in model.named_parameters():
        param.requires_grad_(rate(name) > 0)
        if param.requires_grad:
            shares[muon(name, param)][rate(name)].append(param)

    def groups(by_rate: dict[float, list[Tensor]], lr: float) -> list[dict[str, Any]]:
        return [{"params": params, "lr": lr * factor, "peak": lr * factor} for factor, params in by_rate.items()]

    made: dict[str, torch.optim.Optimizer] = {}
    if inside := groups(shares[True], recipe.muon_lr):
        made["muon"] = Muon(inside, recipe.muon_lr, weight_decay=recipe.weight_decay)
    if rest := groups(shares[False], recipe.lr):
        made["adamw"] = torch.optim.AdamW(
            rest, recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
        )
    if not made:
        raise K2Error(f'Recipe "{recipe.name}": nothing learns, as all of it is frozen.')
    return made


def params_of(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """Its parameters, in the order of its state dict's numbers."""
    return [param for group in optimiser.param_groups for param in group["params"]]
