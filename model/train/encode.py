"""Encode the data set's pictures once, ahead of training: latents of every training picture at a size.

`python -m model.train.encode SIZE` writes `latents-SIZE.npy`, float16 [pictures, C, SIZE/8, SIZE/8], in the train
split's own order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.train.autoencoder import load as load_autoencoder
from model.train.data import DATA, Catalog

RUNS = Path(".runs")


def to_tensor(pictures: list[np.ndarray], size: int) -> Tensor:
    """uint8 RGB pictures -> [B, 3, size, size] in -1 ... 1; smaller sizes by area."""
    resized = [np.asarray(Image.fromarray(p).resize((size, size), Image.Resampling.BOX)) for p in pictures]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def main(size: int, batch: int = 32) -> None:
    catalog = Catalog(DATA)
    items = catalog.items("train")
    vae = load_autoencoder(RUNS / "vae" / "encoder-frozen.safetensors")
    target = DATA / f"latents-{size}.npy"
    draft = target.with_suffix(".draft")
    out = np.lib.format.open_memmap(draft, "w+", np.float16, (len(items), vae.config.z_dim, size // 8, size // 8))
    for start in range(0, len(items), batch):
        pictures = [catalog.picture(item) for item in items[start : start + batch]]
        out[start : start + batch] = vae.encode(to_tensor(pictures, size)).half().numpy()
    out.flush()
    draft.replace(target)


if __name__ == "__main__":
    main(int(sys.argv[1]))
