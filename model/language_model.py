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
from model.library import text_weights
from model.parts import DTYPES, pick_device
from model.plan import USABLE_SHARE, default_dtype, free_memory
from model.references import fit_size, to_pixels
from model.text_encoder import TextConfig, TextTower, VisionInputs, read_tower
from model.vision import (
    EncodedPicture,
    PictureTokens,
    VisionTower,
    encode_picture,
    find_tower,
    interleave,
    load_tower,
    read_picture_tokens,
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
    checkpoint = open_checkpoint(text_weights(path))
    config, names = checkpoint.config, checkpoint.tensors
    tied = config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings"))
    has_head = bool(tied) or any(name.endswith("lm_head.weight") for name in names)
    has_norm = any(name.endswith("language_model.norm.weight") for name in names)
    return has_norm and has_head and "qwen3_vl" in str(config.get("model_type", ""))


class LanguageModel:
    """A tower, its head, its tokenizer, and the files of its vision tower, if it has one."""

    def __init__(self, tower: TextTower, head: Tensor, tokenizer: Any, vision_checkpoint: Checkpoint | None = None):
        self.tower, self.head, self.tokenizer, self.vision_checkpoint = tower, head, tokenizer, vision_checkpoint
        self.end_ids = {tokenizer.token_to_id(end) for end in END_TOKENS} - {None}

    @classmethod
    def load(cls, path: Path, device: str | None = None) -> LanguageModel:
        """Load a speaker from the files of a text encoder that `can_answer`; layers are streamed if they do not fit
        into memory. Raises K2Error."""
        place, checkpoint = pick_device(device), open_checkpoint(text_weights(path))
        config = TextConfig.from_dict(checkpoint.config, taps=(1,))
        dtype = DTYPES[default_dtype(place, config.hidden_size)]
        layers = sum(prod(t.shape) for name, t in checkpoint.tensors.items() if ".layers." in name)
        streamed = layers * dtype.itemsize > USABLE_SHARE * free_memory(place)
        tower, tokenizer = read_tower(path, place, dtype, taps=(config.num_hidden_layers,), streamed=streamed)
        head = load_head(checkpoint, place, dtype)
        return cls(tower, tower.embed_tokens.weight if head is None else head, tokenizer, find_tower(path))

    @cached_property
    def vision(self) -> tuple[VisionTower, PictureTokens]:
        """The vision tower and its marks, loaded for the first picture."""
        assert self.vision_checkpoint is not None
        return load_tower(self.vision_checkpoint, self.head.device, self.head.dtype), read_picture_tokens(
            self.vision_checkpoint
        )

    def token_ids(self, text: str, *, user_text: bool = True) -> list[int]:
        """A text's tokens. In `user_text`, template tokens are read as plain text."""
        self.tokenizer.encode_special_tokens = user_text
        return self.tokenizer.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids

    def user_turn(self, text: str, pictures: Sequence[Tensor] = ()) -> tuple[list[int], VisionInputs | None]:
        """A user turn with pictures [1, 3, H, W] and this text, and the start of the answer."""
        user_start, answer_start = (self.token_ids(sign, user_text=False) for sign in (USER_TURN, ASSISTANT_TURN))
        text_ids = [*self.token_ids(text), *answer_start]
        if not pictures:
            return [*user_start, *text_ids], None
        tower, marks = self.vision
        parts: list[list[int] | EncodedPicture] = [user_start]
        for picture in pictures:
            parts += [[marks.start], encode_picture(tower, picture), [marks.end]]
        return interleave([*parts, text_ids], marks.pad)

    def load_picture(self, path: Path) -> Tensor:
        """A picture at the size the tower sees it. Raises K2Error."""
        return to_pixels(path, *fit_size(path, PIXELS, self.vision[0].config.unit)).to(self.head.device)

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
        answer_ids: list[int] = []
        (input_ids, vision), past = self.user_turn(text, pictures), None
        saved_positions = 0 if vision is None else len(input_ids) - 1 - int(vision.positions.max())
        while len(answer_ids) < max_tokens:
            states, past = self.tower(torch.tensor([input_ids], device=self.head.device), past, vision, saved_positions)
            vision = None
            token = sample_token((states[0, -1, 0] @ self.head.T).float().cpu(), temperature, generator)
            if token in self.end_ids:
                break
            answer_ids.append(token)
            input_ids = [token]
        return self.tokenizer.decode(answer_ids)


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
