"""From specs to pictures: the interface between this package and its callers.

What pictures share is computed once: each distinct prompt is encoded and fused once, all steps' modulation is one
product, and neighbours of the same size and schedule go through the network together. Prompts of different lengths are
grouped, never padded, so no mask is needed and a picture does not depend on the others in its batch.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from model import library
from model.branches import GuidedVelocity, PromptContexts, WeightedContexts
from model.cohesion import LeadAttention, is_lead, lead_spec, shared_noise
from model.conditioning import Conditioning
from model.errors import K2Error, TooLittleMemory
from model.fast import accelerate, keep_freed_memory
from model.hashes import Hashes, cache_folder, identity, sha256
from model.headers import VARIANTS
from model.init_image import InitImages
from model.latents import draw_noise, patchify, unpatchify
from model.layouts import load_dit
from model.lora import Adapter, applied
from model.lora_match import read_lora, weights_file
from model.lru import LRU
from model.parts import DTYPES, check_fit, count_numbers, load_vae, part_files, pick_device, pick_dtype
from model.plan import Plan, memory_errors, plan_on
from model.reference_weights import WeightedReference, weigh
from model.references import to_pixels
from model.resolve import (
    Capabilities,
    ResolvedSpec,
    batch_key,
    evaluations,
    fade_weight,
    prompt_branches,
    resolve_spec,
    weighted_negatives,
    weighted_prompts,
)
from model.safety import Filter, check_filters, installed_filters, review
from model.sampler import adams_bashforth, euler, shifted_sigmas
from model.spec import Lora, Picture, RenderSpec
from model.spec_table import spec_table
from model.splice import REFERENCE_PROMPT, REFERENCE_SEED, Capture, CaptureCache, Splice, add_noise, capture
from model.text_encoder import TextEncoder

OnStep = Callable[[int, int], None]  # (steps done, steps in all) of the pictures being rendered

DECODE_PIXELS = 2**19  # decoded together: eight pictures of 256 px, less memory than one of 1024
BATCH_TOKENS = {"cpu": 512, "cuda": 16384}  # above this, larger batches are no faster; other devices as cuda
ONE_STREAM_TOKENS = 4096  # above this, a group is enough work by itself, and saves the memory
STREAMED_BATCH_TOKENS = 4096  # if weights are read at every step: more pictures share one read
MAX_ADAPTERS = 8  # recently used adapters kept; more if one picture uses more


class Pipeline:
    """A text encoder, a transformer and an autoencoder that belong together."""

    def __init__(
        self,
        model: library.Model,
        parts: library.Parts,
        device: torch.device,
        plan: Plan,
        filters: Sequence[Filter] | Mapping[str, Filter] = (),
    ):
        self.name, self.device, self.plan, self.parts, self.filters = model.name, device, plan, parts, filters
        self.dtype = dtype = DTYPES[plan.dtype]
        self._hashes = Hashes(part_files(parts), (model.root, parts.companion_folder))
        streamed = plan.offload == "all"
        if device.type == "cpu":
            keep_freed_memory()  # before weights are rounded, which allocates as much memory again and again
        self.vae = load_vae(parts.vae, device, dtype)
        self.dit, checkpoint = load_dit(
            parts.dit,
            device=device,
            dtype=dtype,
            precision=plan.precision,
            streamed=streamed,
            cell_size=self.vae.factor,
        )
        self.text = TextEncoder.load(parts.text, device, dtype, streamed=plan.offload != "none")
        if device.type == "cuda" and not streamed:
            accelerate(self.dit)
        self.metadata = checkpoint.metadata
        self.variant = model.variant or "raw"
        self.recommended = library.recommended(self.variant, checkpoint.metadata, model.path)
        self.native = int(checkpoint.metadata.get("native") or library.OPEN_WEIGHTS_SIDE)
        self._adapters: LRU[Adapter] = LRU(MAX_ADAPTERS)
        self._out_of_memory: dict[tuple[int, int, bool], int] = {}  # batch sizes for which memory ran out
        check_fit(parts, self.dit, self.text, self.vae)
        self.conditioning = Conditioning(self.dit, self.text, self.vae, parts, device, dtype)
        self.init_images = InitImages(self.vae, self.dit.config.patch, device, dtype)

    @classmethod
    def load(
        cls,
        name: str = "mini",
        variant: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        *,
        precision: str | None = None,
        offload: str | None = None,
        filters: Sequence[Filter] | None = None,
    ) -> Pipeline:
        """Load a bundled model by name, a folder, or a .safetensors file. Raises K2Error.

        variant: raw or turbo; device: cpu, cuda, cuda:1, mps; dtype: float32 or bfloat16; each has a suitable default.
        precision, offload: how the weights are held (`model/plan.py`); default: the best that fits into memory.
        filters see every picture before anyone else does (`model/safety.py`); default: the installed ones.
        """
        if variant not in (None, *VARIANTS):
            raise K2Error(f'There is no variant "{variant}".', hint="Choose raw or turbo.")
        chosen = pick_device(device)
        model = library.find(str(name), variant)
        if model is None and variant and library.find(str(name)):
            raise K2Error(f'"{name}" has no {variant} checkpoint here.', hint="Omit the variant, or name another.")
        if model is None:
            raise K2Error(
                f'There is no model "{name}".', hint=f"Bundled: {', '.join(library.bundled_models()) or 'none'}."
            )
        checks = installed_filters() if filters is None else check_filters(filters)
        library.check_text_encoder(model)
        parts = library.find_parts(model)
        model_size = count_numbers(parts, chosen)
        if chosen.index is not None and chosen.type == "cuda":
            torch.cuda.set_device(chosen)  # streams and graphs belong to the current card
        dtype = pick_dtype(dtype, chosen, model_size.width)
        plan = plan_on(chosen, model_size, dtype=dtype, precision=precision, offload=offload)
        with memory_errors(f"the weights of {model.name}"):
            return cls(model, parts, chosen, plan, checks)

    def render(self, specs: Sequence[RenderSpec], on_step: OnStep | None = None) -> list[Picture]:
        """Pictures in the specs' order. Raises K2Error, before rendering any, if one of them cannot be rendered."""
        return list(self.stream(specs, on_step))

    def stream(self, specs: Iterable[RenderSpec], on_step: OnStep | None = None) -> Iterator[Picture]:
        """Pictures in the specs' order, one after the other; memory does not grow with their number.

        A sequence is checked completely before the first picture, an iterator as it is consumed. `on_step(done, steps)`
        is called after every step of the pictures being rendered.
        """
        resolved = self._resolved(specs)
        if isinstance(specs, Sequence):
            for spec in specs:
                self.resolve(spec)
        for batch in self._batches(resolved):
            for picture in self._render_in_memory(batch, on_step):
                yield review(picture, self.filters)

    def batches(self, specs: Iterable[RenderSpec]) -> list[int]:
        """Sizes of the batches in which `stream` renders specs, if memory suffices. Raises K2Error for a spec that
        cannot be rendered.

        A picture does not depend on its batch, but for the last bits of its numbers: kernels choose the order of
        summation by batch size.
        """
        return [len(batch) for batch in self._batches(self._resolved(specs))]

    def hashes(self) -> dict[str, str]:
        """sha256 of the files that the weights came from, by name."""
        return self._hashes.by_name()

    def forget(self) -> None:
        """Drop cached prompts and styles; they are read again when next needed."""
        self.conditioning.forget()

    def export(self, folder: Path | str) -> None:
        """Write the model as a folder that `diffusers.Krea2Pipeline.from_pretrained` opens."""
        from model.export import export_diffusers

        export_diffusers(self, Path(folder))

    def resolve(self, spec: RenderSpec) -> ResolvedSpec:
        """The spec with every default filled in. Raises K2Error if it cannot be rendered."""
        spec = resolve_spec(spec, self._capabilities)
        self.init_images.check(spec)
        self._adapters.capacity = max(self._adapters.capacity, len(spec.adapters))
        for lora in spec.adapters:
            self._adapter(lora)
        return spec

    def _resolved(self, specs: Iterable[RenderSpec]) -> Iterator[ResolvedSpec]:
        """Specs resolved one by one, as they are consumed. Raises K2Error for a single spec, or anything else that is
        not a list of specs."""
        if isinstance(specs, str) or not isinstance(specs, Iterable):
            raise K2Error("Pictures are rendered from a list of specs.", hint="Like render([RenderSpec(...)]).")
        return map(self.resolve, specs)

    @cached_property
    def _capabilities(self) -> Capabilities:
        reads, sees = self.parts.style is not None, self.conditioning.has_vision
        return Capabilities(
            self.name, self.native, self._unit, self.recommended, has_style_encoder=reads, has_vision=sees
        )

    def _batches(self, specs: Iterable[ResolvedSpec]) -> Iterator[list[ResolvedSpec]]:
        """Neighbours that share a schedule, in batches of a size that is fastest."""
        limit = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        if self.plan.offload == "all":
            limit = max(limit, STREAMED_BATCH_TOKENS)
        batch: list[ResolvedSpec] = []
        for spec in specs:
            rows = (len(batch) + 1) * evaluations(spec)
            roomy = self.device.type == "cpu" or self.plan.offload == "all"
            max_tokens = limit * (2 if spec.cohesion and roomy else 1)  # in larger batches a lead picture costs less
            if batch and (batch_key(spec) != batch_key(batch[0]) or rows * self._image_tokens(spec) > max_tokens):
                yield batch
                batch = []
            batch.append(spec)
        if batch:
            yield batch

    def _render_in_memory(self, batch: list[ResolvedSpec], on_step: OnStep | None) -> list[Picture]:
        """Pictures of one schedule, in halves if memory runs out for all of them together, or did before."""
        first = batch[0]
        kind = (first.width, first.height, first.guidance > 0)
        if len(batch) < self._out_of_memory.get(kind, len(batch) + 1):
            try:
                with memory_errors(f"a picture of {first.width}x{first.height}"):
                    return self._render(batch, on_step)
            except TooLittleMemory:
                if len(batch) == 1:
                    raise
            self._out_of_memory[kind] = len(batch)
        half = len(batch) // 2  # only here has the failed attempt's memory been freed
        return [*self._render_in_memory(batch[:half], on_step), *self._render_in_memory(batch[half:], on_step)]

    @torch.inference_mode()
    def _render(self, specs: list[ResolvedSpec], on_step: OnStep | None) -> list[Picture]:
        """Pictures of one schedule, together."""
        started = time.perf_counter()
        if self.device.type == "cuda":  # another pipeline may have switched the current card
            torch.cuda.set_device(self.dit.first.weight.device)
        adapters = [(self._adapter(lora), lora.weight) for lora in specs[0].adapters]
        pictures = [r.image for spec in specs for style in spec.styles for r in style.references]
        pictures += [path for spec in specs for path in (spec.init_image, spec.mask) if isinstance(path, Path)]
        files = {path: sha256(path) for path in pictures}  # as they are now: they may be gone when rendering is done
        kept = [self.init_images.kept_pixels(spec) for spec in specs]
        with applied(self.dit, adapters):
            latents = self._latents(specs, tuple((a.sha256, weight) for a, weight in adapters), on_step)
        at_once = max(1, DECODE_PIXELS // (latents[0, 0].numel() * self.vae.factor**2))
        decoded = (picture for some in latents.split(at_once) for picture in self.vae.decode(some))
        images = [to_image(rest.composite(each) if rest else each) for rest, each in zip(kept, decoded, strict=True)]
        seconds = (time.perf_counter() - started) / len(specs)
        loras = [adapter.report(weight) for adapter, weight in adapters]
        return [
            Picture(image, self._record(spec, image, seconds, files, loras))
            for spec, image in zip(specs, images, strict=True)
        ]

    def _latents(self, specs: list[ResolvedSpec], adapters: Hashable, on_step: OnStep | None) -> Tensor:
        """Latents [B, C, H/f, W/f] of pictures of one schedule: the network's part of the work. Raises K2Error if
        numbers overflow."""
        first, config = specs[0], self.dit.config
        rows, columns = first.height // self.vae.factor, first.width // self.vae.factor
        grid = (rows // config.patch, columns // config.patch)

        leader = lead_spec(first)
        rendered = specs if leader is None else [leader, *(spec for spec in specs if not is_lead(spec))]
        prompts = list(zip(*map(weighted_prompts, rendered), strict=True))  # for each version, every picture's prompt
        negative = list(zip(*map(weighted_negatives, rendered), strict=True)) if first.guidance else []
        context = self.conditioning.context

        def contexts(branch: str) -> list[WeightedContexts]:
            return [
                WeightedContexts(
                    version[0].share,
                    [context(p.prompt, adapters, spec, branch) for p, spec in zip(version, rendered, strict=True)],
                )
                for version in prompts
            ]

        conditioning = PromptContexts(
            {branch: contexts(branch) for branch in prompt_branches(first)},
            [
                WeightedContexts(version[0].share, [context(each.prompt, adapters) for each in version])
                for version in negative
            ],
        )
        sigmas = shifted_sigmas(first.steps, first.mu)
        mods = self.dit.modulate(torch.tensor(sigmas[:-1], device=self.device))
        splice = self._splice(first, sigmas, mods, grid, adapters)
        cohesion = None
        if leader:
            cohesion = LeadAttention(config, first.cohesion, sigmas, math.prod(grid), self.dit.column_offset(grid))
        velocity_of = partial(
            GuidedVelocity,
            self.dit,
            mods=mods,
            grid=grid,
            guidance=first.guidance,
            style_guidance=first.style_guidance,
            fade=fade_weight(first),
            splice=splice,
            cohesion=cohesion,
            one_stream=self._one_stream_tokens,
        )
        guided = unguided = velocity_of(conditioning)  # while guidance is on, and after it
        if first.first_step < first.end_of_guidance < first.steps:
            unguided = velocity_of(conditioning._replace(negative=()))

        start = torch.cat([draw_noise(spec.seed, config.channels, rows, columns) for spec in rendered])
        if leader:
            start = shared_noise(start, first.cohesion)
        start = patchify(start.to(self.device), config.patch)
        trajectory = self.init_images.trajectory(rendered, start, sigmas[first.first_step])

        def velocity(tokens: Tensor, step: int) -> Tensor:
            return trajectory.blend((guided if step < first.end_of_guidance else unguided)(tokens, step))

        def report(done: int) -> None:
            if on_step is not None:
                on_step(done, first.steps - first.first_step)

        if first.sampler == "euler":
            tokens = euler(velocity, trajectory.start, sigmas, report, first.first_step)
        else:
            changed = {first.end_of_guidance, *([1] if splice else [])}  # nothing is spliced into pure noise
            tokens = adams_bashforth(velocity, trajectory.start, sigmas, report, changed, first.first_step)
        if leader:
            following = iter(range(1, len(rendered)))
            tokens = tokens[[0 if is_lead(spec) else next(following) for spec in specs]]
        if not tokens.isfinite().all():
            hint = "Render in float32, or with lower guidance."
            if self.dtype == torch.float32 and not (first.guidance or first.style_guidance):
                hint = "The weights, or a LoRA's, hold NaN or infinite numbers: fetch the file again."
            raise K2Error("The network's answer holds NaN or infinite numbers.", hint=hint)
        return unpatchify(tokens, config.patch, rows, columns).to(self.dtype)

    def _adapter(self, lora: Lora) -> Adapter:
        """A LoRA's file, matched against the network; read again if it has changed. Raises K2Error."""
        key = (lora.path, identity(weights_file(lora.path)))
        return self._adapters.get(key, lambda: read_lora(lora.path, self.dit))

    @cached_property
    def _captures(self) -> CaptureCache:
        return CaptureCache(cache_folder() / "splice")

    def _splice(
        self, spec: ResolvedSpec, sigmas: list[float], mods: Tensor, grid: tuple[int, int], adapters: Hashable
    ) -> Splice | None:
        """Spliced references for pictures of one schedule; each is encoded once, and runs once per step if uncached."""
        references = weigh(spec.styles, "splice")
        if not references:
            return None
        assert spec.leak_guard
        context = self.conditioning.context(REFERENCE_PROMPT, adapters)
        rope = self.dit.rope(context.shape[1], grid)
        patch, shape = self.dit.config.patch, (spec.height // self.vae.factor, spec.width // self.vae.factor)
        reference_noise = draw_noise(REFERENCE_SEED, self.dit.config.channels, *shape).to(self.device)
        pixels = {r.sha256: to_pixels(r.image, spec.width, spec.height) for r in references}
        latents: dict[str, Tensor] = {}
        facts = {
            "model": self.hashes(),
            "adapters": adapters,
            "computed": [str(self.device), str(self.dtype), self.plan.precision, torch.__version__, self._threads],
            "size": [spec.width, spec.height],
            "prompt": REFERENCE_PROMPT,
            "noise": REFERENCE_SEED,
        }
        images = {key: hashlib.sha256(image.numpy().tobytes()).hexdigest() for key, image in pixels.items()}

        def capture_at(reference: WeightedReference, step: int) -> Capture:
            key = reference.sha256
            about = facts | {"image": images[key], "sigma": sigmas[step]}
            found = self._captures.get(about, self.device)
            if found is None:
                if key not in latents:
                    latents[key] = self.vae.encode(pixels[key].to(self.device, self.dtype))
                tokens = add_noise(latents[key], reference_noise, sigmas[step], patch).to(self.dtype)
                found = capture(self.dit, tokens, context, mods[step : step + 1], rope)
                self._captures.put(about, found, count=len(references) * (len(sigmas) - 1))
            return found

        return Splice(self.dit, references, capture_at, sigmas, self.dit.column_offset(grid), spec.leak_guard)

    def _record(
        self,
        spec: ResolvedSpec,
        image: Image.Image,
        seconds: float,
        files: Mapping[Path, str],
        loras: list[dict[str, Any]],
    ) -> dict[str, Any]:
        """How a picture was made, in plain values: enough to reproduce it. `files` are the hashes of its references and
        of its init image."""
        unread = self.text.truncated(spec.prompt)
        return {
            "schema": 1,
            **spec_table(spec, files),
            **({"unread": unread} if unread else {}),
            "loras": loras,
            "model": {"name": self.name, "variant": self.variant, "files": self.hashes()},
            "device": str(self.device),
            "dtype": self.plan.dtype,
            "precision": self.plan.precision,
            "offload": self.plan.offload,
            **({"threads": self._threads} if self._threads else {}),
            "versions": {"torch": str(torch.__version__)},  # its own class would import torch when unpickled
            "seconds": round(seconds, 3),
            "pixels": hashlib.sha256(image.tobytes()).hexdigest(),
        }

    @property
    def _threads(self) -> int | None:
        """The number of CPU threads, on which the last bits depend; None on a card."""
        return torch.get_num_threads() if self.device.type == "cpu" else None

    def _image_tokens(self, spec: ResolvedSpec) -> int:
        return spec.width * spec.height // self._unit**2

    @property
    def _one_stream_tokens(self) -> int:
        """The most image tokens that share one reading of the weights, whatever their prompts' lengths."""
        if self.plan.offload == "all":
            return sys.maxsize
        return ONE_STREAM_TOKENS if self.device.type == "cpu" else 0  # on a card compiled kernels gain more

    @property
    def _unit(self) -> int:
        """The side of a token in pixels."""
        return self.vae.factor * self.dit.config.patch


def to_image(pixels: Tensor) -> Image.Image:
    """pixels [3, H, W] in −1 … 1 -> an 8-bit RGB picture."""
    whole = (pixels.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(whole.permute(1, 2, 0).contiguous().cpu().numpy())
