"""Rewards: the value of a picture in training, 0 … 1. Never used for evaluation.

subject   the judge's probability that the picture shows the requested subject, among all names
style     the judge's likeness of its style to that of real pictures in the requested look
artefact  the critic's probability that nothing in it is broken
grain     the power in the top octave of its spectrum against real pictures of the look: grainy looks must not be
          smoothed, nor smooth ones roughened
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.checkpoint import open_checkpoint
from model.errors import K2Error
from model.library import BUNDLED
from model.train.autoencoder import load as load_autoencoder
from model.train.data import fingerprint
from model.train.judge import SIZE, Critic, Judge
from model.train.looks import Look
from model.train.recipe import reject
from model.train.rollout import RolloutPrompt, decode
from model.train.states import RUNS, weights_hash
from model.train.training_set import Recipe, TrainingSet
from model.vae import QwenImageVAE

EVALUATION_SEED = 77  # the seed of the judge for evaluation only
REAL_PICTURES = 6  # pictures of each look that define its style and spectrum
JUDGING_KEYS = (  # keys of a recipe that a model's own judged pictures depend on
    *("init", "preset", "network", "seed", "size", "prompts", "white", "grounds", "later", "sample_steps"),
    *("judge", "weights"),
)


def top_octave(pictures: Tensor) -> Tensor:
    """Mean power of brightness from half the highest frequency up along an axis: [B, 3, H, W] -> [B].

    Under a Hann window, so that a picture whose opposite sides differ does not seem to have an edge there.
    """
    grey = pictures.float().mean(1)
    sides = [torch.hann_window(side, device=grey.device) for side in grey.shape[1:]]
    window = sides[0][:, None] * sides[1]
    grey = (grey - grey.mean((1, 2), keepdim=True)) * window / window.square().mean().sqrt()
    power = torch.fft.fft2(grey, norm="ortho").abs().square()
    rows, columns = (torch.fft.fftfreq(side, device=grey.device).abs() for side in grey.shape[1:])
    top = (rows[:, None] >= 0.25) | (columns >= 0.25)
    return power[:, top].mean(1).clamp_min(1e-8)


@dataclass(frozen=True, kw_only=True)
class JudgedRecipe(Recipe):
    """A run that learns from the model's own pictures by a judge's rewards."""

    init: str = "box"
    repeats: int = 1
    judge: str = "judge-11"
    weights: dict[str, float]  # of the rewards

    def __post_init__(self) -> None:
        super().__post_init__()
        reject(self, "references", "null", "style_loss", "repeats", "shapes", "shaped", "frozen")
        reject(self, "fresh", "align", "said", "unasked", "forms", "reworded", "strangers", "two")
        if sum(self.weights.values()) <= 0:
            raise K2Error(f'Recipe "{self.name}": weights must name rewards and sum to more than 0.')


def choice_key(
    recipe: JudgedRecipe, keys: Sequence[str], dit: nn.Module, rewards: Rewards, data: TrainingSet
) -> dict[str, Any]:
    """What a choice among a network's own pictures depends on, to be stored with it: keys of the recipe, the data set's
    manifest, and a hash of the networks that read, paint, decode and judge, as one of the same name may be
    retrained."""
    networks = [data.text.tower, dit, rewards.vae, rewards.judge, rewards.critic or nn.Identity()]
    found = {"data": fingerprint(data.catalog), "networks": weights_hash(nn.ModuleList(networks))}
    return {key: getattr(recipe, key) for key in keys} | found


def apply_gates(found: Mapping[str, Tensor], gates: Mapping[str, str]) -> dict[str, Tensor]:
    """Rewards by name, each multiplied by the one that gates it, if any."""
    return {name: reward * found[gates[name]] if name in gates else reward for name, reward in found.items()}


class Rewards:
    """All rewards of one judge, with their statistics of real pictures: the train split's, through the decoder."""

    def __init__(
        self,
        judge: Judge,
        critic: Critic | None,
        vae: QwenImageVAE,
        data: TrainingSet,
        device: str = "cpu",
    ):
        self.judge, self.critic, self.vae = judge.to(device), critic and critic.to(device), vae.to(device)
        self.subjects = list(data.catalog.subjects)
        self.name_embeddings = judge.read(self.subjects).detach()
        self.subject_index = {name: index for index, name in enumerate(self.subjects)}
        self.styles: dict[Look, Tensor] = {}
        self.log_octaves: dict[Look, Tensor] = {}
        chosen = {
            look: members[:: max(1, len(members) // REAL_PICTURES)][:REAL_PICTURES]
            for look, members in data.by_look.items()
        }
        indices = [index for members in chosen.values() for index in members]
        styles: dict[Look, list[Tensor]] = defaultdict(list)
        octaves: dict[Look, list[Tensor]] = defaultdict(list)
        for start in range(0, len(indices), 32):
            part = indices[start : start + 32]
            pictures = decode(self.vae, data.latents[part].to(device))
            for index, style, octave in zip(part, self.embed(pictures)[1], top_octave(pictures), strict=True):
                styles[data.items[index].look].append(style)
                octaves[data.items[index].look].append(octave.log())
        for look in chosen:
            self.styles[look] = F.normalize(torch.stack(styles[look]).mean(0), dim=0)
            self.log_octaves[look] = torch.stack(octaves[look]).mean()

    @classmethod
    def load(cls, name: str, data: TrainingSet, device: str = "cpu") -> Rewards:
        """The rewards of a judge in `.runs/judge`. Raises `K2Error` if it is missing or for evaluation only."""
        path = RUNS / "judge" / f"{name}.safetensors"
        if not path.exists():
            raise K2Error(f'There is no judge "{name}" for rewards.', hint="Train one first: k2 train judge-11")
        seed = open_checkpoint(path).metadata["training"]["seed"]
        if seed == EVALUATION_SEED:
            raise K2Error(
                f"Judge {seed} is for evaluation; no training may use it.",
                hint="Train one with another seed for rewards.",
            )
        critic = path.with_name(name.replace("judge", "critic") + ".safetensors")
        return cls(
            Judge.load(path),
            Critic.load(critic) if critic.exists() else None,
            load_autoencoder(BUNDLED / "mini-vae.safetensors"),
            data,
            device,
        )

    def embed(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """The judge's subject and style embeddings of pictures of any size."""
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
            return self.judge(F.adaptive_avg_pool2d(pictures.float(), SIZE))

    def chosen(self, pictures: Tensor, prompts: Sequence[RolloutPrompt], names: Collection[str]) -> dict[str, Tensor]:
        """These rewards by name, [B] each, in fp32, of pictures [B, 3, H, W] in −1 … 1. Raises K2Error for unknown
        ones; without a critic there is no `artefact`."""
        with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
            subject, style = self.embed(pictures)
            wanted = torch.tensor([self.subject_index[a.subject] for a in prompts], device=subject.device)
            real = torch.stack([self.styles[a.look] for a in prompts])
            octave = torch.stack([self.log_octaves[a.look] for a in prompts])
            known: dict[str, Callable[[], Tensor]] = {
                "subject": lambda: (16 * subject @ self.name_embeddings.T).softmax(1).gather(1, wanted[:, None])[:, 0],
                "style": lambda: (1 + (style * real).sum(1)) / 2,
                "grain": lambda: (-(top_octave(pictures).log() - octave).abs()).exp(),
            }
            if (critic := self.critic) is not None:
                known["artefact"] = lambda: critic(F.adaptive_avg_pool2d(pictures.float(), SIZE)).sigmoid()
            for name in names:
                if name not in known:
                    reason = "needs a critic beside the judge" if name == "artefact" else "is unknown"
                    raise K2Error(f'The reward "{name}" {reason}.', hint=f"Available: {', '.join(known)}.")
            return {name: known[name]() for name in names}

    def total(
        self,
        pictures: Tensor,
        prompts: Sequence[RolloutPrompt],
        weights: Mapping[str, float],
        gates: Mapping[str, str] | None = None,
    ) -> Tensor:
        """The weighted mean of gated rewards [B], 0 … 1."""
        gates = gates or {}
        found = apply_gates(self.chosen(pictures, prompts, dict.fromkeys((*weights, *gates.values()))), gates)
        return sum((weight * found[name] for name, weight in weights.items()), torch.zeros(())) / sum(weights.values())
