"""The parts of a model: their sizes, how they are loaded, and whether they fit together."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch

from model.checkpoint import WIDE_DTYPES, StoredTensor, load, open_checkpoint, refuse_unreadable
from model.dit import PRESETS, DiTConfig, Krea2, hidden_width
from model.errors import K2Error, brief
from model.flux_vae import FluxVAE, FluxVAEConfig
from model.headers import FETCH_AGAIN
from model.layouts import dit_config, is_packed, native_names, stored_precision
from model.library import OPEN_WEIGHTS_SIDE, Parts, text_weights
from model.plan import ModelSize, default_dtype
from model.style import StyleConfig, StyleEncoder
from model.text_encoder import QWEN3_VL_4B, TextEncoder, TextTower, tokenizer_file
from model.vae import QwenImageVAE, VAEConfig

Autoencoder = QwenImageVAE | FluxVAE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QWEN_VAE_NUMBERS = 127_000_000
INSTALL_OTHER_BUILD = (
    "Old cards need a build for an older CUDA, new ones for a newer one: https://pytorch.org/get-started/locally"
)


def part_files(parts: Parts) -> list[Path]:
    """Every file that affects a picture: weights, the transformer's first, the tokenizer, and the folders' configs."""
    paths = [parts.dit, text_weights(parts.text), parts.vae, *([parts.style] if parts.style else [])]
    stated = [*(path / "config.json" for path in paths), parts.text / "model_index.json"]
    weights = [file for path in paths for file in open_checkpoint(path).files]
    return [*weights, tokenizer_file(parts.text), *filter(Path.is_file, stated)]


def count_numbers(parts: Parts, device: torch.device | str) -> ModelSize:
    """How many numbers the parts hold, by their headers, and how a device would hold them. Raises K2Error if the
    transformer is not one."""
    dit = native_names(open_checkpoint(parts.dit))
    text = open_checkpoint(text_weights(parts.text))
    tower = {name: stored for name, stored in text.tensors.items() if "visual." not in name}
    layers = {name: stored for name, stored in tower.items() if ".layers." in f".{name}"}
    rest = [open_checkpoint(path) for path in (parts.vae, parts.style) if path]
    blocks = {name: stored for name, stored in dit.tensors.items() if name.startswith("blocks.")}
    return ModelSize(
        *memory_shape(dit_config(dit)),
        native=int(dit.metadata.get("native") or OPEN_WEIGHTS_SIDE),
        inside=total_numbers(blocks),
        outside=total_numbers(dit.tensors) - total_numbers(blocks),
        layers=len({name.partition("layers.")[2].partition(".")[0] for name in layers}) or 1,
        text=total_numbers(layers),
        others=total_numbers(tower) - total_numbers(layers) + sum(total_numbers(each.tensors) for each in rest),
        stored=stored_precision(dit),
        packed=is_packed(dit),
        on_gpu=is_gpu(device),
        wide=total_numbers({name: stored for name, stored in blocks.items() if stored.dtype in WIDE_DTYPES}),
    )


def is_gpu(device: torch.device | str) -> bool:
    return torch.device(device).type == "cuda"


def total_numbers(tensors: Mapping[str, StoredTensor]) -> int:
    return sum(prod(stored.shape) for stored in tensors.values())


def memory_shape(config: DiTConfig) -> tuple[int, int, int]:
    """What working memory depends on: width, the feed-forwards' width, blocks."""
    return config.width, hidden_width(config.width, config.multiplier), config.blocks


def release_size(device: torch.device | str = "cpu") -> ModelSize:
    """The numbers of the open 12.9B weights, with their text encoder and autoencoder, in bf16."""
    with torch.device("meta"):
        dit, tower = Krea2(PRESETS["medium"]), TextTower(QWEN3_VL_4B)
    inside, text = (sum(p.numel() for p in stack.parameters()) for stack in (dit.blocks, tower.layers))
    outside = sum(p.numel() for p in dit.parameters()) - inside
    embedding = sum(p.numel() for p in tower.parameters()) - text
    return ModelSize(
        *memory_shape(dit.config),
        native=OPEN_WEIGHTS_SIDE,
        inside=inside,
        outside=outside,
        layers=len(tower.layers),
        text=text,
        others=embedding + QWEN_VAE_NUMBERS,
        on_gpu=is_gpu(device),
    )


def load_vae(path: Path, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """An autoencoder from our own file or a diffusers folder. Raises K2Error."""
    checkpoint = open_checkpoint(path)
    refuse_unreadable(checkpoint)
    stated = checkpoint.metadata.get("config") or checkpoint.config
    stated = stated if isinstance(stated, Mapping) else {}
    flux = stated.get("_class_name") == "AutoencoderKLFlux2"
    if not flux and (checkpoint.metadata.get("kind", "vae") != "vae" or "latents_mean" not in stated):
        raise K2Error(f"{path} is not an autoencoder that k2 knows.", hint="k2 knows Qwen-Image's and FLUX.2's.")
    try:
        with torch.device("meta"):
            vae = FluxVAE(FluxVAEConfig.from_dict(stated)) if flux else QwenImageVAE(VAEConfig.from_dict(stated))
    except (TypeError, ValueError) as error:
        raise K2Error(f"The config of {path} cannot be used: {error}.", hint=FETCH_AGAIN) from None
    state = dict(checkpoint.read(device=device, dtype=dtype))
    try:
        vae.load_diffusers(state)
    except RuntimeError as error:
        raise K2Error(f"The tensors of {path} do not fit its config: {brief(error)}.", hint=FETCH_AGAIN) from None
    if isinstance(vae, QwenImageVAE):
        for name, values in (("mean", vae.config.latents_mean), ("std", vae.config.latents_std)):
            setattr(vae, name, torch.tensor(values, device=device, dtype=dtype).view(1, -1, 1, 1))
        if device.type == "cpu":  # halves the time of narrow outer scales' convolutions, saves a sixth on the release's
            vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return vae.requires_grad_(False).eval()


def load_style(path: Path, device: torch.device) -> tuple[StyleEncoder, int]:
    """A style encoder from our own file, and the side in pixels of the pictures it reads. Raises K2Error.

    It is small, so it always runs in fp32.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.metadata.get("kind") != "style":
        raise K2Error(f"{path} is not a style encoder.", hint=FETCH_AGAIN)
    with torch.device("meta"):
        encoder = StyleEncoder(StyleConfig(**checkpoint.metadata["config"]))
    load(encoder, checkpoint, device=device, dtype=torch.float32)
    return encoder, int(checkpoint.metadata.get("native", 128))


def check_fit(parts: Parts, dit: Krea2, text: TextEncoder, vae: Autoencoder) -> None:
    """Check that the parts' dimensions fit together. Raises K2Error."""
    wanted, given = dit.config, text.tower.config
    hint = "Give the {} that the transformer was trained with."
    if (given.hidden_size, len(given.taps)) != (wanted.text_width, wanted.text_taps):
        raise K2Error(
            f"{parts.dit} needs {wanted.text_taps} text layers of width {wanted.text_width}, "
            f"but {parts.text} gives {len(given.taps)} of {given.hidden_size}.",
            hint=hint.format("text encoder"),
        )
    if vae.channels != wanted.channels:
        raise K2Error(
            f"{parts.dit} works in {wanted.channels} latent channels, but {parts.vae} has {vae.channels}.",
            hint=hint.format("autoencoder"),
        )


def has_kernels(card: int) -> bool:
    """Whether this PyTorch can run on a card: it has binaries for the card's generation, no newer than the card, or PTX
    no newer, which the driver compiles."""
    built = torch.cuda.get_arch_list()  # sm_80 is a binary, compute_120 PTX
    if torch.version.hip or not built:
        return True  # assumed
    capability = torch.cuda.get_device_capability(card)
    versions = [(kind, divmod(int(number.rstrip("af")), 10)) for kind, number in (each.split("_") for each in built)]
    return any(
        version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in versions
    )


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the best available. Raises K2Error if it does not exist here."""
    available, unsupported = ["cpu"], {}
    if torch.backends.mps.is_available():
        available = ["mps", *available]
    if torch.cuda.is_available():
        cards = {f"cuda:{i}": i for i in range(torch.cuda.device_count())}
        cards = {"cuda": torch.cuda.current_device()} | cards
        unsupported = {each: i for each, i in cards.items() if not has_kernels(i)}
        available = [*(each for each in cards if each not in unsupported), *available]
    if name in unsupported:
        raise K2Error(
            f"This PyTorch has no kernels for {torch.cuda.get_device_name(unsupported[name])}.",
            hint=INSTALL_OTHER_BUILD,
        )
    if name not in (None, *available):
        raise K2Error(f'There is no device "{name}".', hint=f"Available: {', '.join(available)}.")
    return torch.device(name or available[0])


def pick_dtype(name: str | None, device: torch.device, width: int) -> str:
    """The name of the number format to compute in: the given one, else what suits the device and the network's width.

    Raises K2Error.
    """
    if name is None:
        return default_dtype(device, width)
    if name not in DTYPES:
        raise K2Error(f'"{name}" is not a number format to render in.', hint=f"Choose {' or '.join(DTYPES)}.")
    return name
