"""LoRA training: a low-rank adapter of any Krea 2 checkpoint, learned from a folder of pictures.

The base is frozen: its weights are read as `k2 render` reads them, in 8 bits where memory is short, by the same code
from mini to the 12.9B. The result is a file in diffusers' layout, `transformer.NAME.lora_A.weight`; train on Raw, use
on Raw and Turbo.

Text features and latents are computed once, and their encoders are freed before the transformer is loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from model import library
from model.adapter_path import LowRank
from model.checkpoint import open_checkpoint, save
from model.dit import Krea2
from model.errors import K2Error, pluralise
from model.hashes import sha256
from model.latents import patchify, token_grid
from model.layouts import diffusers_names, load_dit
from model.low_bit import FewBitLinear
from model.parts import DTYPES, count_numbers, load_vae, pick_device, pick_dtype
from model.plan import PRECISIONS, SMALL_MODEL, plan_on, supported_precisions
from model.spec import MAX_PIXELS, raw_mu
from model.text_encoder import MAX_PROMPT_TOKENS, TextEncoder
from model.train import loop, states
from model.train.data import stable_seed
from model.train.loop import Batch, Report, Stage
from model.train.pictures import describe_captions, encode, manifest, read_folder, shorten_caption, unused_files
from model.train.pretrain import checkpoint_blocks
from model.train.recipe import check_at_least, check_positive, check_share, reject
from model.train.rollout import add_noise
from model.train.training_set import pad_features

LAYERS: dict[str, Callable[[str], bool]] = {  # which linear layers learn, by native name
    "attention": lambda name: name.startswith("blocks.") and ".attn." in name,
    "blocks": lambda name: name.startswith("blocks."),
    "all": lambda name: name.startswith(("blocks.", "txtfusion.", "txtmlp.")) and name != "txtfusion.projector",
}


@dataclass(frozen=True, kw_only=True)
class Recipe(loop.Recipe):
    """A LoRA's recipe. All keys but name and pictures have defaults."""

    stage: str = "lora"
    pictures: str  # folder; captions are text files beside the pictures, else file names
    model: str = "mini"  # as for `k2 render`
    variant: str = "raw"  # undistilled; the adapter works on Turbo as well
    trigger: str = ""  # words that end every caption, and later ask for what was learned
    rank: int = 16
    layers: str = "blocks"  # one of LAYERS
    size: int = 0  # side of a square with as many pixels as each picture gets; 0: the model's own
    batch: int = 4
    repeats: int = 1  # noise levels for each picture
    mu: float | None = None  # shift of the training timesteps; default: Raw's own for the number of image tokens
    drop: float = 0.1  # share of the pictures shown without their caption, for guidance
    mirror: bool = False  # show pictures mirrored left to right as well
    precision: str = ""  # of the frozen base: native, int8, fp8, int4; default: what fits into memory
    recompute: bool | None = None  # recompute blocks in the backward pass instead of keeping them; default: if large

    lr: float = 1e-3
    muon_lr: float = 0.0  # both halves are thin: AdamW trains them
    warmup_steps: int = 20
    decay: float = 0.3
    weight_decay: float = 0.0
    clip: float = 1.0
    average: float = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
        known = {"layers": tuple(LAYERS), "variant": ("raw", "turbo"), "precision": ("", *PRECISIONS)}
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise K2Error(
                    f'Recipe "{self.name}": {key} is "{getattr(self, key)}".',
                    hint=f"Choose one of {', '.join(value for value in values if value)}.",
                )
        if not self.pictures:  # as a path it would be the current folder
            raise K2Error(f'Recipe "{self.name}": pictures names no folder.', hint="Give a folder of pictures.")
        check_at_least(self, 1, "rank", "batch", "repeats")
        check_at_least(self, 0, "size")
        if self.size**2 > MAX_PIXELS:
            hint = f"At most {math.isqrt(MAX_PIXELS)}, as for rendering; default: the model's own."
            raise K2Error(f'Recipe "{self.name}": a size of {self.size} is too large.', hint=hint)
        if self.init in ("box", "turbo"):
            hint = "init names another LoRA's run to start from; the base to train on is model."
            raise K2Error(f'Recipe "{self.name}": init = "{self.init}" is not a LoRA.', hint=hint)
        check_positive(self, "lr")  # AdamW trains all of it
        check_share(self, "drop")
        reject(self, "muon_lr", "fresh")


class TrainablePairs(nn.Module):
    """The trainable halves of an adapter: down [r, in] and up [out, r] for each of a frozen network's layers.

    `up` starts at zero, so the first step sees the base as is. The network is not part of this module: only the adapter
    is saved, averaged and handed to the optimiser.
    """

    def __init__(self, network: Krea2, layers: str, rank: int):
        super().__init__()
        chosen = {name: m for name, m in network.named_modules() if isinstance(m, nn.Linear) and LAYERS[layers](name)}
        device = network.first.weight.device
        self.names = tuple(chosen)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, layer in chosen.items():
            key = name.replace(".", "_")
            self.down[key] = nn.Parameter((torch.randn(rank, layer.in_features) * layer.in_features**-0.5).to(device))
            self.up[key] = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
            layer.register_forward_hook(partial(self._add, key))

    def _add(self, key: str, layer: nn.Module, inputs: tuple[Tensor], answer: Tensor) -> Tensor:
        """A forward hook: the layer's output plus up(down(x))."""
        (x,) = inputs
        down, up = self.down[key].to(x.dtype), self.up[key].to(x.dtype)
        return answer + F.linear(F.linear(x, down), up).to(answer.dtype)

    def pairs(self, state: Mapping[str, Tensor] | None = None) -> dict[str, LowRank]:
        """Native layer -> its halves, the current ones or those of a state dict."""
        state = self.state_dict() if state is None else state
        keys = {name: name.replace(".", "_") for name in self.names}
        return {name: LowRank(state[f"down.{key}"], state[f"up.{key}"]) for name, key in keys.items()}


@dataclass
class TrainingMaterial:
    """All that a step draws from: latents by shape, text features by picture, and the files that they came from."""

    latents: dict[tuple[int, int], tuple[Tensor, list[int]]]  # as `pictures.encode` returns them
    embeds: list[Tensor]  # per picture, [T, N, E]
    empty: Tensor  # of the empty prompt, [T, N, E]
    files: list[dict[str, str]]


class AdapterStage(Stage):
    """The stage: rectified flow on few pictures, the base frozen."""

    def __init__(self, recipe: Recipe, network: Krea2, material: TrainingMaterial):
        torch.manual_seed(recipe.seed)
        self.recipe: Recipe = recipe
        self.network, self.material = freeze(network), material
        if recipe.recompute if recipe.recompute is not None else weight_bytes(network) > SMALL_MODEL:
            checkpoint_blocks(network)
        self.model: TrainablePairs = TrainablePairs(network, recipe.layers, recipe.rank)
        self.data = data_hash(material.files)

    def batch(self, step: int, part: int = 0) -> Batch:
        """Pictures of one shape, each shape as often as it has pictures."""
        rng = np.random.default_rng(stable_seed(self.recipe.seed, self.recipe.name, step, part))
        shapes = list(self.material.latents)
        counts = np.array([len(self.material.latents[shape][1]) for shape in shapes], dtype=float)
        latents, pictures = self.material.latents[shapes[int(rng.choice(len(shapes), p=counts / counts.sum()))]]
        chosen = rng.choice(len(pictures), self.recipe.batch, replace=self.recipe.batch > len(pictures))
        rows = [
            self.material.empty if rng.random() < self.recipe.drop else self.material.embeds[pictures[index]]
            for index in chosen
        ]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        return {"latents": latents[chosen], "embeds": rows, "generator": generator}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        """Mean flow-matching loss of the batch's pictures, each at `repeats` noise levels."""
        recipe, network = self.recipe, self.network
        device, dtype = network.first.weight.device, network.first.weight.dtype
        embeds, mask = pad_features(batch["embeds"], max(map(len, batch["embeds"])))
        same_length = bool(mask.all())  # no mask if all have the same length
        context = network.encode_text(embeds.to(device, dtype), None if same_length else mask.to(device))
        image = patchify(batch["latents"], network.config.patch).repeat_interleave(recipe.repeats, 0)
        mu = raw_mu(image.shape[1]) if recipe.mu is None else recipe.mu
        tokens, noise, sigma = add_noise(image, mu, batch["generator"])
        velocity = network.velocity(
            tokens.to(device, dtype),
            context.repeat_interleave(recipe.repeats, 0),
            network.modulate(sigma.to(device)),
            network.rope(context.shape[1], token_grid(batch["latents"], network.config.patch)),
            None if same_length else mask.to(device).repeat_interleave(recipe.repeats, 0),
        )
        return (velocity.float() - (noise - image).to(device)).square().mean(), {}

    def pictures(self) -> int:
        return self.recipe.batch * self.recipe.repeats


def freeze(network: Krea2) -> Krea2:
    """Nothing in it learns, and quantised layers compute as their dequantised matrices would."""
    for layer in network.modules():
        if isinstance(layer, FewBitLinear):
            layer.exact = True
    return network.requires_grad_(False).eval()


def weight_bytes(network: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


# ---- from a recipe to a file ------------------------------------------------------------------------------------


def prepare(recipe: Recipe, device: torch.device, report: Report) -> tuple[AdapterStage, dict[str, Any]]:
    """A stage ready to run, and what its base is, for the adapter's metadata. Raises K2Error."""
    pictures = read_folder(Path(recipe.pictures), recipe.trigger)
    model = library.find(recipe.model, recipe.variant)
    if model is None:
        raise K2Error(
            f'There is no {recipe.variant} checkpoint of "{recipe.model}" here.',
            hint=f"Bundled: {', '.join(library.bundled_models()) or 'none'}. Open weights: k2 models pull krea-2-raw",
        )
    parts = library.find_parts(model)
    numbers = count_numbers(parts, device)
    if recipe.rank > numbers.width:
        hint = f"At most {numbers.width}, the network's width; 16 is usual."
        raise K2Error(f'Recipe "{recipe.name}": a rank of {recipe.rank} is too large to be read back.', hint=hint)
    dtype = DTYPES[pick_dtype(None, device, numbers.width)]
    files = manifest(pictures)
    previous = started_with(states.RUNS / recipe.name)
    check_same_run(recipe, previous, {"data": data_hash(files)})
    vae = load_vae(parts.vae, device, dtype)
    cell = vae.factor
    latents = encode(
        pictures,
        vae,
        recipe.size or numbers.native,
        2 * cell,
        mirrored=recipe.mirror,
        report=lambda line: report(f"{recipe.name}: {line}"),
    )
    del vae
    text = TextEncoder.load(parts.text, device, dtype)
    captions = [shorten_caption(picture.caption, recipe.trigger, text.truncated) for picture in pictures]
    if cut := sum(text.truncated(picture.caption) > 0 for picture in pictures):
        report(f"{recipe.name}: {pluralise(cut, 'caption')} too long, cut to {MAX_PROMPT_TOKENS} tokens")
    embeds = [text.encode([caption])[0][0].cpu() for caption in captions]
    material = TrainingMaterial(latents, embeds, text.encode([""])[0][0].cpu(), files)
    del text
    precision, dtype_name = recipe.precision, str(dtype).removeprefix("torch.")
    if not precision and previous.get("precision") in supported_precisions(device):  # resume with the same base
        precision = previous["precision"]
    precision = plan_on(device, numbers, dtype=dtype_name, precision=precision or None, offload="none").precision
    network, checkpoint = load_dit(parts.dit, device=device, dtype=dtype, precision=precision, cell_size=cell)
    summary = f"{pluralise(len(pictures), 'picture')} in {pluralise(len(latents), 'shape')}"
    report(f"{recipe.name}: {summary}; {model.name}, weights {precision}")
    report(f"{recipe.name}: {describe_captions(Path(recipe.pictures), pictures)}")
    if unused := unused_files(Path(recipe.pictures)):
        report(unused)
    base = {
        "name": model.name,
        "variant": checkpoint.metadata.get("variant") or model.variant or recipe.variant,
        "sha256": {file.name: sha256(file) for file in checkpoint.files},
        "precision": precision,
    }
    check_same_run(recipe, previous, {"base": base_hashes(base)})
    return AdapterStage(replace(recipe, precision=precision), network, material), base


class Run(loop.Run):
    """An adapter under way."""

    stage: AdapterStage

    def __init__(self, stage: AdapterStage, folder: Path, base: Mapping[str, Any], device: str = "cpu"):
        super().__init__(stage, folder, device)
        self.base = base
        self.learned_from |= {"base": base_hashes(base), "precision": base["precision"]}

    @property
    def result(self) -> Path:
        return self.folder / f"{self.recipe.name}.safetensors"

    def finish(self) -> None:
        """Write the averaged adapter, unless that of these steps already exists."""
        if not self.world.is_main or (self.idle and adapter_steps(self.result) == self.step):
            return
        record = self.record()
        public_recipe = {
            key: value for key, value in record["recipe"].items() if key not in ("pictures", "model", "init")
        }
        metadata = {
            "kind": "lora",
            "triggers": [self.stage.recipe.trigger] if self.stage.recipe.trigger else [],
            "base": self.base,
            "pictures": [file["sha256"] for file in self.stage.material.files],  # not names: it may be shared
            "training": record | {"recipe": public_recipe},
        }
        write(self.result, self.stage.model.pairs(self.ema), self.stage.network.config.blocks, metadata)


def main(recipe: Recipe, device: str | None = None, report: Report = print) -> Run:
    """Train an adapter to its end from where it stands. Raises K2Error."""
    chosen = pick_device(device)
    stage, base = prepare(recipe, chosen, report)
    run = Run(stage, states.RUNS / recipe.name, base, str(chosen))
    loop.train(run, report)
    run.finish()
    return run


def adapter_steps(adapter: Path) -> int | None:
    """The number of steps after which an adapter was written; None if it cannot be read."""
    try:
        return open_checkpoint(adapter).metadata["training"]["steps"]
    except (K2Error, KeyError):
        return None


def base_hashes(base: Mapping[str, Any]) -> str:
    return json.dumps(base["sha256"], sort_keys=True)


def data_hash(files: list[dict[str, str]]) -> str:
    """sha256 of a run's training data."""
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def started_with(folder: Path) -> dict[str, Any]:
    """What a run started with: `recipe`, hashes of `data` and `base`, the base's `precision`; {} before its start."""
    saved = folder / "state.safetensors"
    if not saved.exists():
        return {}
    with safe_open(saved, "pt") as file:
        progress, record = (json.loads(file.metadata()[key]) for key in ("place", "record"))
    return {"recipe": progress["recipe"], "data": record.get("data")} | progress.get("learned_from", {})


def check_same_run(recipe: Recipe, previous: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """A run resumes only with what it started with. Raises K2Error if the recipe differs, or one of the hashes known
    now: `data`, of pictures, captions and trigger, or `base`."""
    if not previous:
        return
    old_recipe, new_recipe = previous["recipe"], asdict(recipe)
    changed = [key for key in ("model", "variant", "rank", "layers") if old_recipe.get(key) != new_recipe[key]]
    if hashes.get("data", previous["data"]) != previous["data"]:  # the trigger is part of the captions
        trigger = old_recipe.get("trigger", "")
        trigger_change = f"the trigger ({json.dumps(trigger, ensure_ascii=False) if trigger else 'none'} then)"
        changed.append(trigger_change if trigger != recipe.trigger else "the pictures or their captions")
    if "base" in hashes and previous.get("base", hashes["base"]) != hashes["base"]:
        changed.append("the base's weights")
    if changed:
        raise K2Error(
            f'The run "{recipe.name}" started differently; what differs now: {", ".join(changed)}.',
            hint=f"Undo that, remove {states.RUNS / recipe.name} to start over, or give the run another name in a "
            "recipe.",
        )


def write(path: Path, layers: Mapping[str, LowRank], blocks: int, metadata: Mapping[str, Any]) -> None:
    """Save an adapter in diffusers' layout; `metadata` becomes its `k2` metadata.

    Scales go into the `up` halves, so alpha is the rank, and a reader that ignores alpha gets the same result.
    """
    names = diffusers_names(blocks)
    module_names = {name: names[f"{name}.weight"].removesuffix(".weight") for name in layers}
    state = {}
    for name, pair in layers.items():
        state[f"transformer.{module_names[name]}.lora_A.weight"] = pair.down.float()
        state[f"transformer.{module_names[name]}.lora_B.weight"] = pair.up.float() * pair.scale
    save(path, state, metadata, lora_adapter_metadata=peft_settings(module_names.values(), shared_rank(layers)))


def shared_rank(layers: Mapping[str, LowRank]) -> int:
    (rank,) = {len(pair.down) for pair in layers.values()}
    return rank


def peft_settings(modules: Iterable[str], rank: int) -> str:
    """The settings that diffusers keeps beside the tensors, under its own names."""
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(modules), "bias": "none", "use_rslora": False}
    settings["rank_pattern"] = {}  # diffusers 0.39 requires it
    return json.dumps({f"transformer.{key}": value for key, value in settings.items()})
