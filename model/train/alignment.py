"""Self-representation alignment: an early block learns to predict what a later one makes of a cleaner picture.

After SRA (arXiv 2505.02831), which needs no external encoder: the teacher is the average of the network's own weights,
cut after its later block, and sees the same picture under less noise. Ours: cosine distance, at a third and two thirds
of the depth, and only in the first epoch of the first stage, as alignment speeds up the start and constrains later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.dit import Krea2
from model.train.parallel import full_tensor

MAX_SIGMA_GAP = 0.2  # the most by which the teacher's noise level lies below the pupil's


class PassThrough(nn.Module):
    """Replaces the last layer: passes on the blocks' output as is."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        return x


class Teacher:
    """The averaged weights up to the later block; not a module, so that no run saves it."""

    def __init__(self, student: Krea2):
        with torch.device("meta"):
            self.dit = Krea2(replace(student.config, blocks=max(1, 2 * student.config.blocks // 3)))
        self.dit.last, self.dit.side = PassThrough(), student.side  # type: ignore[assignment]
        self.dit.to_empty(device=student.first.weight.device).requires_grad_(False)

    @torch.no_grad()
    def update(self, averages: Mapping[str, Tensor]) -> None:
        """Take over a trainee's averaged weights; every process must call this if they are sharded."""
        for name, param in self.dit.named_parameters():
            param.copy_(full_tensor(averages[f"dit.{name}"]))

    @torch.no_grad()
    def features(self, tokens: Tensor, sigma: Tensor, embeds: Tensor, mask: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the later block makes of noised pictures, several per prompt -> [B·R, L, D].

        tokens [B·R, L, C·p·p], sigma [B·R], embeds [B, T, N, E], mask [B, T], rows and columns of a picture in tokens
        """
        repeats = len(tokens) // len(embeds)
        context = self.dit.encode_text(embeds, mask).repeat_interleave(repeats, 0)
        rope = self.dit.rope(context.shape[1], grid)
        mask = mask.repeat_interleave(repeats, 0)
        return self.dit.velocity(tokens, context, self.dit.modulate(sigma), rope, mask)


class AlignmentHead(nn.Module):
    """What the early block sees, [B, L, D], through a head of its own that is discarded after training."""

    def __init__(self, dit: Krea2):
        super().__init__()
        width = dit.config.width
        self.head = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self._recorded: list[Tensor] = []
        dit.blocks[max(0, dit.config.blocks // 3 - 1)].register_forward_hook(self._record)

    def _record(self, block: nn.Module, given: Any, output: Tensor) -> None:
        self._recorded[:] = [output] if self.training and torch.is_grad_enabled() else []

    def distance(self, target: Tensor) -> Tensor:
        """Mean cosine distance of the image tokens just seen from the teacher's view [B, L, D]: 0 the same … 2."""
        seen = self._recorded.pop()[:, -target.shape[1] :]
        return 1 - F.cosine_similarity(self.head(seen).float(), target.float(), -1).mean()
