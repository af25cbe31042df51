"""The text encoder as a language model: Qwen3-VL answers an instruction, to expand a prompt or describe pictures.

The same tower that reads prompts, with all layers, the last norm and the head. The bundled encoder cannot do this: it
was trained only to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import Checkpoint, open_checkpoint
from model.library import weights_of
from model.parts import DTYPES, pick_device
from model.plan import USABLE_SHARE, default_dtype, free_memory
from model.references import fit_size, to_pixels
from model.text_encoder import TextConfig, TextTower, VisionInputs, read_tower
from model.vision import (
    PictureTokens,
    SeenPicture,
    VisionTower,
    find_tower,
    interleave,
    load_tower,
    marks_of,
    see_picture,
)

USER_TURN, ASSISTANT_TURN = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
MAX_TOKENS = 200  # of an answer
PIXELS = 384 * 384  # at which a picture is shown: enough to see its style
TEMPERATURE, TOP_K, TOP_P = 0.7, 20, 0.8  # as Qwen3-VL-Instruct's own generation config has them


def can_answer(path: Path) -> bool:
    """Whether a text encoder (as in `Parts.text`) can answer: a Qwen3-VL with its last norm and head."""
    if not path.is_dir():
        return False
    checkpoint = open_checkpoint(weights_of(path))
    config, names = checkpoint.config, checkpoint.tensors
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    headed = bool(tied) or any(name.endswith("lm_head.weight") for name in names)
    whole = any(name.endswith("language_model.norm.weight") for name in names)
    return whole and headed and "qwen3_vl" in str(config.get("model_type", ""))


class LanguageModel:
    """A tower, its head, its tokenizer, and the files of its vision tower, if it has one."""

    def __init__(self, tower: TextTower, head: Tensor, tokenizer: Any, sight: Checkpoint | None = None):
        self.tower, self.head, self.tokenizer, self.sight = tower, head, tokenizer, sight
        self.ends = {tokenizer.token_to_id(end) for end in END_TOKENS} - {None}

    @classmethod
    def load(cls, path: Path, device: str | None = None) -> LanguageModel:
        """Load a speaker from the files of a text encoder that `can_answer`; layers are streamed if they do not fit
        into memory. Raises K2Error."""
        place, checkpoint = pick_device(device), open_checkpoint(weights_of(path))
        config = TextConfig.from_dict(checkpoint.config, taps=(1,))
        dtype = DTYPES[default_dtype(place, config.hidden_size)]
        layers = sum(prod(t.shape) for name, t in checkpoint.tensors.items() if ".layers." in name)
        streamed = layers * dtype.itemsize > USABLE_SHARE * free_memory(place)
        tower, tokenizer = read_tower(path, place, dtype, taps=(config.num_hidden_layers,), streamed=streamed)
        head = load_head(checkpoint, place, dtype)
        return cls(tower, tower.embed_tokens.weight if head is None else head, tokenizer, find_tower(path))

    @cached_property
    def eyes(self) -> tuple[VisionTower, PictureTokens]:
        """The vision tower and its marks, loaded for the first picture."""
        assert self.sight is not None
        return load_tower(self.sight, self.head.device, self.head.dtype), marks_of(self.sight)

    def tokens(self, text: str, *, written: bool = True) -> list[int]:
        """A text's tokens. In user text (`written`), template tokens are read as plain text."""
        self.tokenizer.encode_special_tokens = written
        return self.tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def turn(self, text: str, pictures: Sequence[Tensor] = ()) -> tuple[list[int], VisionInputs | None]:
        """A user turn with pictures [1, 3, H, W] and this text, and the start of the answer."""
        asks, answers = (self.tokens(sign, written=False) for sign in (USER_TURN, ASSISTANT_TURN))
        said = [*self.tokens(text), *answers]
        if not pictures:
            return [*asks, *said], None
        tower, marks = self.eyes
        parts: list[list[int] | SeenPicture] = [asks]
        for picture in pictures:
            parts += [[marks.start], see_picture(tower, picture), [marks.end]]
        return interleave([*parts, said], marks.pad)

    def show(self, path: Path) -> Tensor:
        """A picture at the size the tower sees it. Raises K2Error."""
        return to_pixels(path, *fit_size(path, PIXELS, self.eyes[0].config.unit)).to(self.head.device)

    @torch.inference_mode()
    def answer(
        self,
        text: str,
        seed: int,
        pictures: Sequence[Tensor] = (),
        *,
        max_tokens: int = MAX_TOKENS,
        temperature: float = TEMPERATURE,
    ) -> str:
        """The model's answer to a text and pictures, the same for the same seed; at temperature 0 the likeliest."""
        generator = torch.Generator().manual_seed(seed)
        said: list[int] = []
        (given, seen), past = self.turn(text, pictures), None
        saved = 0 if seen is None else len(given) - 1 - int(seen.positions.max())
        while len(said) < max_tokens:
            states, past = self.tower(torch.tensor([given], device=self.head.device), past, seen, saved)
            seen = None
            token = sample_token((states[0, -1, 0] @ self.head.T).float().cpu(), temperature, generator)
            if token in self.ends:
                break
            said.append(token)
            given = [token]
        return self.tokenizer.decode(said)


def sample_token(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """Sample a token from logits [V], among the TOP_K likeliest that make up TOP_P of the probability."""
    if temperature == 0:
        return int(logits.argmax())
    best, tokens = logits.topk(min(TOP_K, len(logits)))
    odds = (best / temperature).softmax(0)
    odds = torch.where(odds.cumsum(0) - odds < TOP_P, odds, 0.0)  # the first always stays
    return int(tokens[torch.multinomial(odds, 1, generator=generator)])


def load_head(checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> Tensor | None:
    """The head [V, E]; None if it is tied to the embedding."""
    name = next((name for name in checkpoint.tensors if name.endswith("lm_head.weight")), None)
    return None if name is None else dict(checkpoint.read([name], device=device, dtype=dtype))[name]
