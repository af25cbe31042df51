"""The transformer's conditioning: a prompt's rows, with those of styles and pictures, steered away from avoids."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property, partial

import torch
from torch import Tensor

from model.avoid import NEUTRAL_PROMPT, avoided_phrases, directions, steer_away
from model.checkpoint import Checkpoint
from model.dit import Krea2
from model.library import Parts
from model.lru import LRU
from model.parts import Autoencoder, load_style
from model.reference_weights import WeightedReference
from model.references import to_pixels
from model.resolve import ResolvedSpec, references_in
from model.style import StyleEncoder
from model.text_encoder import TextEncoder
from model.vision import EncodedPicture, VisionReader, WeightedPicture, find_tower

MAX_CONTEXTS = 64  # contexts kept: a batch's prompts, and the negative prompt that they share
MAX_TEXTS = 16  # texts and pictures whose rows are kept: of every tapped layer, five times the size of a context
MAX_STYLE_ROWS = 1024  # references whose rows are kept, a few each: styles may have hundreds, and need all of them
SHORT_TEXT_TOKENS = 16  # texts of up to this many tokens are kept as many as contexts: most avoids are that short


class Conditioning:
    """The parts of a model that read prompts and references; style encoder and vision tower are loaded when needed.

    Recent results are kept. T tokens, N tapped layers, E the text encoder's width, D the transformer's.
    """

    def __init__(
        self,
        dit: Krea2,
        text: TextEncoder,
        vae: Autoencoder,
        parts: Parts,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.dit, self.text, self.vae, self.parts = dit, text, vae, parts
        self.device, self.dtype = device, dtype
        self.forget()

    def forget(self) -> None:
        """Drop everything cached; it is read again when next needed."""
        self._contexts: LRU[Tensor] = LRU(MAX_CONTEXTS)
        self._long_texts: LRU[Tensor] = LRU(MAX_TEXTS)
        self._short_texts: LRU[Tensor] = LRU(MAX_CONTEXTS)
        self._style_rows: LRU[Tensor] = LRU(MAX_STYLE_ROWS)
        self._vision_inputs: LRU[EncodedPicture] = LRU(MAX_TEXTS)

    def context(
        self, prompt: str, adapters: Hashable, spec: ResolvedSpec | None = None, branch: str = "plain"
    ) -> Tensor:
        """What the transformer sees of a prompt and, in one of its `prompt_branches`, of a spec's styles, steered away
        from the spec's avoids, [1, T, D]. `adapters` identifies the adapters applied to the transformer."""
        (references, vision_references), away = (
            (references_in(spec, branch), avoided_phrases(spec)) if spec else (((), ()), ())
        )
        tiles, keep_rows = (spec.vision_tiles, bool(spec.vision_rows)) if spec and vision_references else (None, False)

        def read() -> Tensor:
            if vision_references:
                assert tiles
                embeds = self._vision_reader.encode(
                    prompt, self.vision_inputs(vision_references, tiles), keep_rows=keep_rows
                )
            else:
                embeds = self._text_rows(prompt)
            if away:
                directions_away = directions(self._text_rows, self.text.truncated, prompt, away)
                words = len(self.text.token_ids(prompt))  # rows of pictures follow, and stay as they are
                steered = steer_away(embeds[:, :words], directions_away, self._text_rows(NEUTRAL_PROMPT))
                embeds = torch.cat((steered, embeds[:, words:]), 1)
            if references:
                embeds = torch.cat((embeds, self.style_rows(references)[None].to(embeds)), 1)
            return self.dit.encode_text(embeds)

        reference_keys = [tuple((r.sha256, r.weight) for r in each) for each in (references, vision_references)]
        return self._contexts.get((prompt, adapters, away, *reference_keys, tiles, keep_rows), read)

    def style_rows(self, references: tuple[WeightedReference, ...]) -> Tensor:
        """References as extra prompt rows [K, N, E], from the style encoder."""
        encoder, side = self._style_encoder

        def read(reference: WeightedReference) -> Tensor:
            pixels = to_pixels(reference.image, side, side).to(self.device, self.dtype)
            return encoder.encode_reference(self.vae.encode(pixels).float())

        rows = [self._style_rows.get(each.sha256, partial(read, each)) for each in references]
        return encoder.mix(rows, [reference.weight for reference in references])

    def vision_inputs(self, references: tuple[WeightedReference, ...], tiles: int) -> list[WeightedPicture]:
        """References as the text encoder's vision tower sees them."""

        def see(reference: WeightedReference) -> EncodedPicture:
            return self._vision_reader.encode_reference(reference.image, tiles)

        return [
            WeightedPicture(self._vision_inputs.get((each.sha256, tiles), partial(see, each)), each.weight)
            for each in references
        ]

    @property
    def has_vision(self) -> bool:
        """Whether the text encoder has a vision tower."""
        return self._vision_tower is not None

    def _text_rows(self, text: str) -> Tensor:
        """A text's rows [1, T, N, E]; cached, since avoids are read with many prompts."""
        kept = self._short_texts if len(self.text.token_ids(text)) <= SHORT_TEXT_TOKENS else self._long_texts
        return kept.get(text, lambda: self.text.encode([text])[0])

    @cached_property
    def _style_encoder(self) -> tuple[StyleEncoder, int]:
        """The style encoder, and the side in pixels at which it reads references."""
        assert self.parts.style is not None  # or settling would have refused
        return load_style(self.parts.style, self.device)

    @cached_property
    def _vision_tower(self) -> Checkpoint | None:
        """The files of the text encoder's vision tower, not read yet; None if it has none."""
        return find_tower(self.parts.text)

    @cached_property
    def _vision_reader(self) -> VisionReader:
        """The text encoder with its vision tower, which is loaded for the first picture."""
        assert self._vision_tower is not None  # or settling would have refused
        return VisionReader(self.text, self._vision_tower)
