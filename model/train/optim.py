"""Muon for the matrices of blocks and text input layers, AdamW for the rest, and the learning-rate schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.errors import K2Error
from model.plan import native_bf16
from model.train.parallel import distribute_work, local
from model.train.recipe import Recipe

# The quintic of Jordan et al. (Muon, 2024): steep at zero, singular values end near one.
QUINTIC = (3.4445, -4.7750, 2.0315)
QUINTIC_STEPS = 4
MOMENTUM = 0.95
MUON_MODULES = (".blocks.", ".txtfusion.", ".txtmlp.")  # whose matrices it trains, wherever the transformer is nested


def orthogonalise(matrices: Tensor) -> Tensor:
    """Roughly the nearest semi-orthogonal matrices: Newton-Schulz on [G, m, n], all of one shape at once.

    Keeps the dtype: without native bf16 products the usual cast to bf16 costs a hundred times more.
    """
    a, b, c = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(QUINTIC_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum. Updates have the root mean square of AdamW's (0.2), so both share a learning rate."""

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        def orthogonal_update(stacked: Tensor) -> Tensor:
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
                updates = (
                    distribute_work(aheads, shape[0], orthogonal_update)
                    if sharded
                    else orthogonal_update(torch.stack(aheads))
                )
                scale = 0.2 * max(shape[0], shape[1:].numel()) ** 0.5
                for (param, _), update in zip(pairs, updates, strict=True):
                    local(param).mul_(1 - group["lr"] * group["weight_decay"])
                    local(param).add_(update.view_as(local(param)), alpha=-group["lr"] * scale)


def uses_muon(name: str, param: Tensor) -> bool:
    """Whether Muon trains a parameter: the transformer's matrices in the blocks and in the text input layers.

    The text input layers need Muon: AdamW, at a rate that suits the rest, grows one common direction in all their rows
    within a few hundred steps, until the difference between two subjects is a few hundredths of a row.
    """
    return param.ndim == 2 and min(param.shape) > 1 and any(part in f".{name}" for part in MUON_MODULES)


def warmup_stable_decay(step: int, warmup_steps: int, done: float, decay: float) -> float:
    """Factor of the learning rate: rises linearly over the first steps, stays, and falls to zero over the last `decay`.

    step   number of steps taken before
    done   share of the run that is done, 0 … 1, by its steps or by the clock
    """
    falling = max(0.0, min(1.0, (1 - done) / decay)) if decay else 1.0
    return min(1.0, (step + 1) / warmup_steps) * falling


def make_optimisers(
    model: nn.Module, recipe: Recipe, muon: Callable[[str, Tensor], bool], rate: Callable[[str], float]
) -> dict[str, torch.optim.Optimizer]:
    """Muon and AdamW, each only if it has something to train; parameters of rate 0 stay unchanged.

    muon   whether Muon trains a parameter, by its name
    rate   factor of a parameter's learning rate, by its name
    Raises K2Error if nothing learns.
    """
    by_optimiser: dict[bool, dict[float, list[Tensor]]] = {True: defaultdict(list), False: defaultdict(list)}
    for name, param in model.named_parameters():
        param.requires_grad_(rate(name) > 0)
        if param.requires_grad:
            by_optimiser[muon(name, param)][rate(name)].append(param)

    def groups(by_rate: dict[float, list[Tensor]], lr: float) -> list[dict[str, Any]]:
        return [{"params": params, "lr": lr * factor, "peak": lr * factor} for factor, params in by_rate.items()]

    optimisers: dict[str, torch.optim.Optimizer] = {}
    if muon_groups := groups(by_optimiser[True], recipe.muon_lr):
        optimisers["muon"] = Muon(muon_groups, recipe.muon_lr, weight_decay=recipe.weight_decay)
    if adamw_groups := groups(by_optimiser[False], recipe.lr):
        optimisers["adamw"] = torch.optim.AdamW(
            adamw_groups, recipe.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
        )
    if not optimisers:
        raise K2Error(f'Recipe "{recipe.name}": nothing learns, as everything is frozen.')
    return optimisers


def ordered_params(optimiser: torch.optim.Optimizer) -> list[Tensor]:
    """An optimiser's parameters, in the order of its state dict's indices."""
    return [param for group in optimiser.param_groups for param in group["params"]]
