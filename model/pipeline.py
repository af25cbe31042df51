"""From specs to pictures: the seam between this package and whoever calls it.

What pictures share is worked out once: each distinct prompt is encoded and fused once, all steps' modulation is one
product, and neighbours of one size and schedule go through the network together. Prompts of different lengths are
grouped, never padded, so no mask is needed and a picture does not depend on its company.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from model import library
from model.errors import K2Error
from model.latents import noise, patchify, unpatchify
from model.layouts import load_dit
from model.lora import Adapter, laid_over, read_lora
from model.parts import Hashes, Parts, find_parts, load_style, load_vae, pick_device, pick_dtype, sha256
from model.safety import Filter, installed, review
from model.sampler import euler, guided, raw_mu, shifted_sigmas
from model.spec import Lora, Picture, RenderSpec, Style
from model.style import StyleEncoder
from model.text_encoder import TextEncoder
from model.vae import QwenImageVAE

OnStep = Callable[[int, int], None]  # (steps done, steps in all) of the pictures in hand

CELL = 8  # pixels along the side of a latent cell
SIDES = (64, 4096)
MOST_PIXELS = 2048 * 2048
MOST_STEPS = 1000
MOST_REFERENCE_PIXELS = 1 << 26
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 16384}  # where more pictures at once stop being faster; others as cuda
REMEMBERED = 64  # contexts kept: a batch's prompts, and the negative one that all of them share
MOST_ADAPTERS = 8  # kept, of those that the last pictures used
MOST_WEIGHT = 10  # of an adapter, either way


class Pipeline:
    """A text encoder, a transformer and an autoencoder that belong together."""

    def __init__(
        self,
        model: library.Model,
        parts: Parts,
        device: torch.device,
        dtype: torch.dtype,
        filters: Sequence[Filter] | Mapping[str, Filter] = (),
    ):
        self.name, self.device, self.dtype, self.parts, self.filters = model.name, device, dtype, parts, filters
        self._hashes = Hashes(parts.files, model.root)
        self.dit, checkpoint = load_dit(parts.dit, device=device, dtype=dtype)
        self.text = TextEncoder.load(parts.text, device, dtype)
        self.vae = load_vae(parts.vae, device, dtype)
        self.metadata = checkpoint.metadata
        self.variant = checkpoint.metadata.get("variant") or model.variant or "raw"
        self.recommended = library.RECOMMENDED[self.variant] | checkpoint.metadata.get("recommended", {})
        self.native = int(checkpoint.metadata.get("native", 1024))
        self._contexts: dict[Hashable, Tensor] = {}
        self._adapters: dict[Hashable, Adapter] = {}
        self._check_fit()

    @classmethod
    def load(
        cls,
        name: str = "mini",
        variant: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        *,
        filters: Sequence[Filter] | None = None,
    ) -> Pipeline:
        """A model by its name in the box, a folder, or a .safetensors file. Raises K2Error.

        variant: raw or turbo; device: cpu, cuda, cuda:1, mps; dtype: float32 or bfloat16; each chosen where left out.
        filters see every picture before anyone else does (`model/safety.py`); where left out, the installed ones.
        """
        if variant not in (None, "raw", "turbo"):
            raise K2Error(f'There is no variant "{variant}".', hint="There are raw and turbo.")
        chosen = pick_device(device)
        model = library.find(str(name), variant)
        if model is None and variant and library.find(str(name)):
            raise K2Error(f'"{name}" has no {variant} checkpoint here.', hint="Leave the variant out.")
        if model is None:
            raise K2Error(f'There is no model "{name}".', hint=f"In the box: {', '.join(library.box()) or 'none'}.")
        checks = installed() if filters is None else filters
        return cls(model, find_parts(model), chosen, pick_dtype(dtype, chosen), checks)

    def render(self, specs: Sequence[RenderSpec], on_step: OnStep | None = None) -> list[Picture]:
        """Pictures in the specs' order. Raises K2Error for what cannot be rendered, before anything is."""
        return list(self.stream(specs, on_step))

    def stream(self, specs: Iterable[RenderSpec], on_step: OnStep | None = None) -> Iterator[Picture]:
        """Pictures in the specs' order, one after the other; memory does not grow with their number.

        A sequence is checked as a whole before the first picture, an iterator as it goes. `on_step(done, steps)` is
        called after every step of the pictures in hand.
        """
        if isinstance(specs, Sequence):
            for spec in specs:
                self.resolve(spec)
        for batch in self._batches(map(self.resolve, specs)):
            for picture in self._render(batch, on_step):
                yield review(picture, self.filters)

    def export(self, folder: Path | str) -> None:
        """Write the model as a folder that `diffusers.Krea2Pipeline.from_pretrained` opens."""
        from model.export import export_diffusers

        export_diffusers(self, Path(folder))

    def resolve(self, spec: RenderSpec) -> RenderSpec:
        """The spec with every recommendation filled in. Raises K2Error for what cannot be rendered."""
        width, height = (self.native if side is None else side for side in (spec.width, spec.height))
        unit = CELL * self.dit.config.patch
        if not all(SIDES[0] <= side <= SIDES[1] and side % unit == 0 for side in (width, height)):
            fitting = "x".join(str(min(max(round(side / unit) * unit, SIDES[0]), SIDES[1])) for side in (width, height))
            raise K2Error(
                f"A picture of {width}x{height} cannot be made.",
                hint=f"Sides are multiples of {unit} from {SIDES[0]} to {SIDES[1]}: {fitting}, say.",
            )
        if width * height > MOST_PIXELS:
            raise K2Error(f"{width}x{height} is more than {MOST_PIXELS:,} pixels.", hint="Choose a smaller size.")
        steps = self.recommended["steps"] if spec.steps is None else spec.steps
        guidance = float(self.recommended["guidance"] if spec.guidance is None else spec.guidance)
        mu = self.recommended["mu"] if spec.mu is None else spec.mu
        mu = raw_mu(width * height // unit**2) if mu == "auto" else float(mu)
        if not 1 <= steps <= MOST_STEPS:
            raise K2Error(f"{steps} steps cannot be taken.", hint=f"Choose 1 to {MOST_STEPS}.")
        if not (0 <= guidance <= 100 and abs(mu) <= 10):
            raise K2Error(
                f"Guidance {guidance:g} with mu {mu:g} leads nowhere.", hint="Guidance is 0 to 100, mu −10 to 10."
            )
        if not 0 <= spec.seed < 2**63:
            raise K2Error(f"{spec.seed} is no seed.", hint="Seeds are whole numbers from 0 to 2^63 − 1.")
        spec = replace(
            spec,
            width=width,
            height=height,
            steps=int(steps),
            guidance=guidance,
            mu=mu,
            styles=tuple(style for style in spec.styles if style.strength),
            loras=tuple(lora for lora in spec.loras if lora.weight),
        )
        for lora in adapters_of(spec):
            if not abs(lora.weight) <= MOST_WEIGHT:
                raise K2Error(f"{lora.path} cannot have the weight {lora.weight:g}.", hint=f"At most ±{MOST_WEIGHT}.")
            self._adapter(lora)
        return spec

    def _batches(self, specs: Iterable[RenderSpec]) -> Iterator[list[RenderSpec]]:
        """Neighbours that share a schedule, as many at once as make it faster."""
        limit = TOKENS_AT_ONCE.get(self.device.type, TOKENS_AT_ONCE["cuda"])
        batch: list[RenderSpec] = []
        for spec in specs:
            rows = (len(batch) + 1) * (2 if spec.guidance else 1)
            if batch and (schedule(spec) != schedule(batch[0]) or rows * self._image_tokens(spec) > limit):
                yield batch
                batch = []
            batch.append(spec)
        if batch:
            yield batch

    @torch.inference_mode()
    def _render(self, specs: list[RenderSpec], on_step: OnStep | None) -> list[Picture]:
        """Pictures of one schedule, together."""
        started = time.perf_counter()
        adapters = [(self._adapter(lora), lora.weight) for lora in adapters_of(specs[0])]
        with laid_over(self.dit, adapters):
            latents = self._latents(specs, tuple((a.sha256, weight) for a, weight in adapters), on_step)
        images = [to_image(self.vae.decode(each)) for each in latents.split(1)]
        seconds = (time.perf_counter() - started) / len(specs)
        return [Picture(image, self._record(spec, image, seconds)) for spec, image in zip(specs, images, strict=True)]

    def _latents(self, specs: list[RenderSpec], adapters: Hashable, on_step: OnStep | None) -> Tensor:
        """The network's part of it -> [B, C, H/8, W/8]. Raises K2Error where numbers overflow."""
        height, width, steps, mu, guidance, _ = schedule(specs[0])
        config = self.dit.config
        rows, columns = height // CELL, width // CELL
        grid = (rows // config.patch, columns // config.patch)

        contexts = [self._context(spec.prompt, spec.styles, adapters) for spec in specs]
        if guidance:
            contexts += [self._context(spec.negative, (), adapters) for spec in specs]
        groups = [
            (index, torch.cat([contexts[i] for i in index]), self.dit.rope(length, grid))
            for length, index in by_length(contexts).items()
        ]
        sigmas = shifted_sigmas(steps, mu)
        mods = self.dit.modulate(torch.tensor(sigmas[:-1], device=self.device))

        def velocity(tokens: Tensor, step: int) -> Tensor:
            """Integrated in fp32, whatever the network computes in."""
            x = tokens.repeat(2 if guidance else 1, 1, 1)
            v = torch.empty_like(x)
            for index, context, rope in groups:
                v[index] = self.dit.velocity(x[index].to(self.dtype), context, mods[step : step + 1], rope).float()
            if not guidance:
                return v
            conditional, unconditional = v.chunk(2)
            return guided(conditional, unconditional, guidance)

        start = torch.cat([noise(spec.seed, config.channels, rows, columns) for spec in specs]).to(self.device)
        tokens = euler(velocity, patchify(start, config.patch), sigmas, on_step and (lambda done: on_step(done, steps)))
        if not tokens.isfinite().all():
            raise K2Error("The network's answer is not a number.", hint="Render in float32, or with lower guidance.")
        return unpatchify(tokens, config.patch, rows, columns).to(self.dtype)

    def _context(self, prompt: str, styles: tuple[Style, ...], adapters: Hashable) -> Tensor:
        """What the transformer sees of a prompt and its styles, [1, T, D]; kept for the next picture that asks."""
        references = [r for style in styles for r in style.references if r.weight]
        key = (prompt, styles, adapters, *(sha256(r.image) for r in references))
        if key not in self._contexts:
            embeds, _ = self.text.encode([prompt])
            if references:
                embeds = torch.cat((embeds, self._style_rows(styles)[None].to(embeds)), 1)
            if len(self._contexts) >= REMEMBERED:
                del self._contexts[next(iter(self._contexts))]
            self._contexts[key] = self.dit.encode_text(embeds)
        self._contexts[key] = self._contexts.pop(key)  # the one asked for last is forgotten last
        return self._contexts[key]

    def _adapter(self, lora: Lora) -> Adapter:
        """A LoRA's file, matched against the network; read again where it has changed. Raises K2Error."""
        file = lora.path / "adapter_model.safetensors" if lora.path.is_dir() else lora.path
        key = (lora.path, sha256(file))
        if key not in self._adapters:
            if len(self._adapters) >= MOST_ADAPTERS:
                del self._adapters[next(iter(self._adapters))]
            self._adapters[key] = read_lora(lora.path, self.dit)
        self._adapters[key] = self._adapters.pop(key)
        return self._adapters[key]

    def _style_rows(self, styles: tuple[Style, ...]) -> Tensor:
        """Styles as extra prompt rows [K, N, E]. Within a style its references' weights share its strength."""
        rows, strengths = [], []
        for style in styles:
            total = sum(abs(reference.weight) for reference in style.references)
            for reference in style.references:
                if reference.weight:
                    pixels = to_pixels(reference.image, self.native).to(self.device, self.dtype)
                    rows.append(self._style_encoder(self.vae.encode(pixels).float())[0][0])
                    strengths.append(style.strength * reference.weight / total)
        return self._style_encoder.mix(rows, strengths)

    @cached_property
    def _style_encoder(self) -> StyleEncoder:
        if self.parts.style is None:
            raise K2Error(f"{self.name} has no style encoder.", hint="Leave the style references out.")
        return load_style(self.parts.style, self.device)

    def _record(self, spec: RenderSpec, image: Image.Image, seconds: float) -> dict[str, Any]:
        """How a picture was made, in plain values: enough to make it again."""
        return {
            "schema": 1,
            **{key: value for key, value in vars(spec).items() if key not in ("styles", "loras")},
            "styles": [
                {
                    "name": style.name,
                    "strength": style.strength,
                    "keywords": list(style.keywords),
                    "avoids": list(style.avoids),
                    "references": [
                        {"image": str(r.image), "weight": r.weight, "sha256": sha256(r.image)} for r in style.references
                    ],
                }
                for style in spec.styles
            ],
            "loras": [self._adapter(lora).report(lora.weight) for lora in adapters_of(spec)],
            "model": {"name": self.name, "variant": self.variant, "files": self._hashes.by_name()},
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "versions": {"torch": torch.__version__},
            "seconds": round(seconds, 3),
            "pixels": hashlib.sha256(image.tobytes()).hexdigest(),
        }

    def _image_tokens(self, spec: RenderSpec) -> int:
        assert spec.width and spec.height
        return spec.width * spec.height // (CELL * self.dit.config.patch) ** 2

    def _check_fit(self) -> None:
        """The parts must speak of the same numbers. Raises K2Error."""
        dit, text = self.dit.config, self.text.tower.config
        if (text.hidden_size, len(text.taps)) != (dit.text_width, dit.text_taps):
            raise K2Error(
                f"{self.parts.dit} listens to {dit.text_taps} layers of {dit.text_width} numbers, "
                f"{self.parts.text} speaks {len(text.taps)} of {text.hidden_size}.",
                hint="Give the text encoder that the transformer was trained with.",
            )
        channels = self.vae.config.z_dim if isinstance(self.vae, QwenImageVAE) else self.vae.channels
        if channels != dit.channels:
            raise K2Error(
                f"{self.parts.dit} paints in {dit.channels} channels, {self.parts.vae} reads {channels}.",
                hint="Give the autoencoder that the transformer was trained with.",
            )


def schedule(spec: RenderSpec) -> tuple[int, int, int, float, float, tuple[Lora, ...]]:
    """What pictures must share to be rendered together: height, width, steps, mu, guidance, adapters."""
    assert spec.height and spec.width and spec.steps and spec.mu is not None and spec.guidance is not None
    return spec.height, spec.width, spec.steps, spec.mu, spec.guidance, adapters_of(spec)


def adapters_of(spec: RenderSpec) -> tuple[Lora, ...]:
    """The spec's LoRAs and its styles'; their order means nothing."""
    own = (*spec.loras, *(Lora(style.lora, style.strength) for style in spec.styles if style.lora))
    return tuple(sorted(own, key=lambda lora: (lora.path, lora.weight)))


def by_length(contexts: Sequence[Tensor]) -> dict[int, list[int]]:
    """Context length -> the rows that have it."""
    groups: dict[int, list[int]] = {}
    for row, context in enumerate(contexts):
        groups.setdefault(context.shape[1], []).append(row)
    return groups


def to_image(pixels: Tensor) -> Image.Image:
    """pixels [1, 3, H, W] in −1 … 1 -> an 8-bit RGB picture."""
    whole = (pixels[0].float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(whole.permute(1, 2, 0).contiguous().cpu().numpy())


def to_pixels(path: Path, side: int) -> Tensor:
    """A reference picture, cut to a square of `side` pixels -> [1, 3, side, side] in −1 … 1. Raises K2Error."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_REFERENCE_PIXELS:
                raise K2Error(f"{path} is {image.width}x{image.height} pixels.", hint="Make it smaller.")
            rgba = ImageOps.exif_transpose(image).convert("RGBA")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise K2Error(
            f"{path} cannot be read as a picture: {error}.", hint="References are png, jpg or webp."
        ) from None
    on_white = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    pixels = torch.frombuffer(bytearray(ImageOps.fit(on_white, (side, side)).tobytes()), dtype=torch.uint8)
    return pixels.view(1, side, side, 3).permute(0, 3, 1, 2).float() / 127.5 - 1
