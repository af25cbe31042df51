"""The words read off pictures: `python -m model.train.words` writes the bundled `mini-words.safetensors`.

Pictures and words share no space, so the table is measured: statistics of the bundled style encoder over pictures of
the data set, and a linear discriminant for each kind of words. Drawing, medium, ground and palette are drawn freely,
not paired as in the training looks: there a palette gives a drawing set away, unlike on a user's board. Drawings in
permanently held-out media are not measured on; they give the accuracy that decides which kinds of words are reported.
Three minutes on one core; rebuild it whenever the style encoder or the autoencoder changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import library
from model.board_pictures import StyleReader
from model.checkpoint import save
from model.errors import exit_on_error
from model.hashes import sha256
from model.train.data import DATA, Catalog, Item, stable_seed
from model.train.encode import to_tensor
from model.train.looks import DRAWINGS, GROUNDS, MEDIA, PALETTES, Look, split_looks

MEASURED_PICTURES = 6000  # pictures measured
UNSEEN_PICTURES = 600  # pictures of held-out looks
SHRINKAGE = 0.03  # of the covariance of standardised statistics towards the identity
KNOWN_SHARE = 0.99  # share of the unseen pictures that count as known


def words_by_kind(look: Look) -> dict[str, str]:
    """The words for a look, by kind."""
    dark = look.medium in ("neon", "lowkey")
    return {"medium": look.medium, "drawing": look.drawing, "ground": "dark" if dark else look.ground}


def draw_items(catalog: Catalog) -> list[Item]:
    """Pictures in freely drawn looks: no held-out pair, and no drawing in a medium that is held out for it."""
    rng = np.random.default_rng(1)
    held = {(look.drawing, look.medium) for drawing in DRAWINGS for look in split_looks(drawing)[1]}
    rows = [(row, pair) for row, pair in enumerate(catalog.pairs) if not pair.held_out]
    items: list[Item] = []
    while len(items) < MEASURED_PICTURES:
        row, pair = rows[int(rng.integers(len(rows)))]
        medium, ground, palette = (str(rng.choice(names)) for names in (list(MEDIA), GROUNDS, list(PALETTES)))
        if (pair.drawing, medium) not in held:
            items.append(Item(row, pair, Look(pair.drawing, medium, ground, palette)))
    return items


def unseen_items(catalog: Catalog) -> list[Item]:
    """Pictures of the permanently held-out looks."""
    items = catalog.items("styles")
    return [items[i] for i in np.random.default_rng(stable_seed("words")).permutation(len(items))[:UNSEEN_PICTURES]]


def measure_statistics(catalog: Catalog, items: Sequence[Item], eye: StyleReader) -> Tensor:
    """[B, F], fp64."""
    parts = []
    for start in range(0, len(items), 32):
        pictures = [catalog.picture(item) for item in items[start : start + 32]]
        parts.append(eye.encode(to_tensor(pictures, eye.side))[1])
    return torch.cat(parts).double()


def discriminant(x: Tensor, index: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fisher's discriminant: x [B, F], index [B] -> weight [C, F], offset [C], means [C, F], precision [F, F]."""
    means = torch.stack([x[index == c].mean(0) for c in range(classes)])
    away = x - means[index]
    covariance = away.T @ away / len(x)
    precision = torch.linalg.inv(covariance + SHRINKAGE * torch.eye(len(covariance), dtype=x.dtype))
    weight = means @ precision
    return weight, -0.5 * (weight * means).sum(1), means, precision


@torch.inference_mode()
def build(catalog: Catalog) -> dict[str, float]:
    """Measure and write mini-words.safetensors -> the share of correct answers on unseen looks, by kind."""
    eye = StyleReader.load("mini")
    items, others = draw_items(catalog), unseen_items(catalog)
    raw, new = measure_statistics(catalog, items, eye), measure_statistics(catalog, others, eye)
    mean, deviation = raw.mean(0), raw.std(0) + 1e-6
    x, y = (raw - mean) / deviation, (new - mean) / deviation
    state: dict[str, Tensor] = {"mean": mean, "deviation": deviation}
    names: dict[str, list[str]] = {}
    right: dict[str, float] = {}
    furthest = 0.0
    for kind in words_by_kind(items[0].look):
        names[kind] = sorted({words_by_kind(item.look)[kind] for item in items})
        index, truth = (
            torch.tensor([names[kind].index(words_by_kind(item.look)[kind]) for item in group])
            for group in (items, others)
        )
        weight, offset, means, precision = discriminant(x, index, len(names[kind]))
        state |= {f"{kind}.weight": weight, f"{kind}.offset": offset}
        right[kind] = round((y @ weight.T + offset).argmax(1).eq(truth).double().mean().item(), 3)
        if kind == "medium":
            state |= {"middle": means, "precision": precision}
            away = y[:, None] - means
            furthest = ((away @ precision) * away).sum(-1).min(1).values.quantile(KNOWN_SHARE).item()
    _, vae, style = library.bundled_parts("mini")
    assert style is not None
    about = {
        "kind": "words",
        "names": names,
        "unseen": right,
        "furthest": round(furthest, 3),
        "made_for": {"style": sha256(style), "vae": sha256(vae)},
        "training": {
            "pictures": MEASURED_PICTURES,
            "unseen": UNSEEN_PICTURES,
            "data": catalog.manifest["renders"]["sha256"],
        },
    }
    save(library.BUNDLED / "mini-words.safetensors", {k: v.float() for k, v in state.items()}, about)
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the words of the bundled style encoder.")
    parser.add_argument("--data", type=Path, default=DATA, help="the data set's folder")
    for kind, share in build(Catalog(parser.parse_args().data, StyleReader.load("mini").side)).items():
        print(f"{kind}: {share:.0%} correct on unseen looks")


if __name__ == "__main__":
    with exit_on_error():
        main()
