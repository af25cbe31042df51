"""Read pictures for moodboards: any file as a small square, and a style encoder's view of many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from model import library, picture_file
from model.errors import K2Error
from model.hashes import sha256
from model.parts import Autoencoder, load_style, load_vae
from model.picture_file import MAX_PIXELS, MIN_SIDE
from model.references import to_rgba
from model.style import StyleEncoder
from model.words import WordTable

Pixels = NDArray[np.uint8]  # RGB [S, S, 3]
MAX_PARALLEL_PIXELS = 1 << 24  # pictures of more pixels are decoded one at a time: each may take half a gigabyte
decode_lock = Lock()


class StyleReader:
    """A style encoder with its autoencoder, and its word table if it has one."""

    def __init__(self, encoder: StyleEncoder, vae: Autoencoder, side: int, words: WordTable | None, words_problem: str):
        self.encoder, self.vae, self.side, self.words, self.words_problem = encoder, vae, side, words, words_problem

    @classmethod
    def load(cls, name: str = "mini", device: str = "cpu") -> StyleReader:
        """The eye of a bundled model. Raises K2Error if it has none."""
        _, vae, style = library.bundled_parts(name)
        if style is None:
            raise K2Error(f"{name} has no style encoder, which moodboards need.", hint="mini has one.")
        where = torch.device(device)
        words, why = None, f"{library.BUNDLED / f'{name}-words.safetensors'} is missing"
        if (table := library.BUNDLED / f"{name}-words.safetensors").is_file():
            words = WordTable.load(table)
            if words.made_for != {"style": sha256(style), "vae": sha256(vae)}:
                words, why = None, f"{table.name} was measured for another style encoder"
        encoder, side = load_style(style, where)
        return cls(encoder, load_vae(vae, where, torch.float32), side, words, why)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, S, S] in −1 … 1 -> unit style vectors [B, V], feature statistics [B, 2·width]."""
        statistics = self.encoder.statistics(self.vae.encode(pixels).float())
        return self.encoder.from_statistics(statistics)[1], statistics


def read_picture(path: Path, side: int) -> Pixels:
    """A picture's central square, uint8 RGB [side, side, 3], on white where transparent. Raises K2Error.

    JPEGs are decoded at reduced size where that is enough: a board may hold hundreds of photographs.
    """
    try:
        picture_file.check_file(path)  # not its `opened`, whose handling of warnings is not thread-safe
        with Image.open(path, formats=picture_file.FORMATS) as image:
            if image.width * image.height > MAX_PIXELS or min(image.size) < MIN_SIDE:
                raise K2Error(f"{path.name} has {image.width} x {image.height} pixels.")
            image.draft("RGB", (2 * side, 2 * side))
            with decode_lock if image.width * image.height > MAX_PARALLEL_PIXELS else nullcontext():
                upright = ImageOps.exif_transpose(image)
                if upright.mode not in ("RGB", "RGBA") or {"transparency", "icc_profile"} & upright.info.keys():
                    upright = to_rgba(upright)
                small = ImageOps.fit(upright, (side, side)).convert("RGBA")
    except K2Error:
        raise
    except Exception as error:  # Pillow's decoders may raise anything for a broken file
        raise K2Error(f"{path.name} cannot be read as a picture.", hint=picture_file.truncation_hint(error)) from None
    return np.asarray(Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB"))


def read_all(paths: Sequence[Path], side: int) -> Iterator[Pixels | K2Error]:
    """Every picture, or its error; files are decoded in parallel."""

    def one(path: Path) -> Pixels | K2Error:
        try:
            return read_picture(path, side)
        except K2Error as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        yield from pool.map(one, paths)
