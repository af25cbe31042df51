"""Encode the data set's pictures once, before training: latents of every training picture at a size.

`python -m model.train.encode SIZE [DEVICE]` writes `latents-SIZE-….npy`, float16 [pictures, C, H/f, W/f] for an
autoencoder of factor f, in the order of the train split. SIZE is the side of a square, for all pictures, or a shape
like 320x192, for those that come in it. With `--two`, the pictures of two subjects instead (`two_subjects.py`).
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.atomic import atomic_write
from model.errors import exit_on_error
from model.references import from_bytes
from model.train.autoencoder import load as load_autoencoder
from model.train.data import AUTOENCODER, DATA, Catalog, Item, latents_file
from model.train.looks import resize
from model.train.shapes import Shape, indices_in_shape
from model.train.two_subjects import pictures_of_two

PARTS_AHEAD = 32  # batches of pictures that wait to be encoded, at most


def to_tensor(pictures: list[NDArray[np.uint8]], size: int) -> Tensor:
    """uint8 RGB pictures -> [B, 3, size, size] in -1 ... 1."""
    return from_bytes(np.stack([resize(picture, size) for picture in pictures]))


@cache
def cached_catalog(folder: Path, size: int) -> Catalog:
    return Catalog(folder, size)


def compose_all(folder: Path, size: int | Shape, items: list[Item]) -> NDArray[np.uint8]:
    """Pictures of items, uint8 RGB [B, H, W, 3]."""
    catalog = cached_catalog(folder, size if isinstance(size, int) else size.render_size)
    return np.stack([catalog.picture(item, None if isinstance(size, int) else size) for item in items])


def compose_ahead(pool: Executor, size: int | Shape, parts: Sequence[list[Item]]) -> Iterator[NDArray[np.uint8]]:
    """The pictures of each part in order, composed only a few parts ahead: all together take gigabytes."""
    waiting: deque[Future[NDArray[np.uint8]]] = deque()
    for part in parts:
        waiting.append(pool.submit(compose_all, DATA, size, part))
        if len(waiting) > PARTS_AHEAD:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


@torch.inference_mode()
def main(size: int | Shape, device: str = "cpu", *, batch: int = 64, two: bool = False) -> None:
    """Write the latents of the train split at a size, or of the pictures of two subjects. Pictures are composed on all
    cores."""
    catalog = Catalog(DATA)
    items: list[Item] = [*pictures_of_two(catalog)] if two else catalog.items("train")
    if isinstance(size, Shape):
        items = [items[index] for index in indices_in_shape(items, size)]
    vae = load_autoencoder(AUTOENCODER).to(device)
    cells = [side // vae.factor for side in ((size, size) if isinstance(size, int) else size)]
    with atomic_write(latents_file(DATA, size, two)) as draft, ProcessPoolExecutor() as pool:
        out = np.lib.format.open_memmap(draft, "w+", np.float16, (len(items), vae.config.z_dim, *cells))
        starts = range(0, len(items), batch)
        parts = compose_ahead(pool, size, [items[start : start + batch] for start in starts])
        for start, pictures in zip(starts, parts, strict=True):
            latents = vae.encode(from_bytes(pictures).to(device))
            out[start : start + batch] = latents.half().cpu().numpy()
        out.flush()


if __name__ == "__main__":
    with exit_on_error():
        parser = argparse.ArgumentParser(description="Encode the train split at a size.")
        parser.add_argument("size", help="side of a square, or a shape like 320x192")
        parser.add_argument("device", nargs="?", default="cpu")
        parser.add_argument("--two", action="store_true", help="pictures of two subjects")
        options = parser.parse_args()
        size = int(options.size) if options.size.isdecimal() else Shape.parse(options.size)
        main(size, options.device, two=options.two)
