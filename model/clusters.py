"""The looks of a board: clusters of unit style vectors, as many as the data supports."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MAX_LOOKS = 8
MIN_SILHOUETTE = 0.25  # silhouette below which a split is not structure (Kaufman & Rousseeuw 1990)
# Cosine of two centres from which they are one look: a silhouette has no scale and splits any tight group. An even
# split is less likely to be due to a few odd pictures, so EVEN_SPLIT times the smallest look's share is added: up to
# 0.675 for two halves.
MAX_COSINE, EVEN_SPLIT = 0.5, 0.35
MIN_SHARE, MIN_PICTURES = 0.05, 3  # smallest share of a board, and number of pictures, for a look
MAX_ROUNDS = 50  # of k-means, at most


def find_looks(vectors: Array) -> list[list[int]]:
    """Unit vectors [B, V] -> clusters of their indices, the largest first, each ordered by distance to its centre.

    Spherical k-means for every number of looks up to `MAX_LOOKS`; among the splits into looks that are separate and
    not too small, the highest mean silhouette wins. If none reaches `MIN_SILHOUETTE`, there is one look.
    """
    best, labels = MIN_SILHOUETTE, np.zeros(len(vectors), int)
    for count in range(2, min(MAX_LOOKS, len(vectors) // MIN_PICTURES) + 1):
        found = spherical_kmeans(vectors, count)
        if are_separate(vectors, found) and (score := silhouette(vectors, found)) > best + 1e-9:
            best, labels = score, found
    looks = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        middle = vectors[members].mean(0)
        looks.append([int(i) for i in sorted(members, key=lambda i: (-(vectors[i] @ middle).round(9), i))])
    return sorted(looks, key=lambda look: (-len(look), min(look)))


def are_separate(vectors: Array, labels: NDArray[np.intp]) -> bool:
    """Whether every cluster is large enough for a look, and no two are too similar."""
    names, counts = np.unique(labels, return_counts=True)
    middles = np.stack([vectors[labels == name].mean(0) for name in names])
    middles /= np.maximum(np.linalg.norm(middles, axis=1, keepdims=True), 1e-12)
    nearest = (middles @ middles.T - 3 * np.eye(len(names))).max()
    least = counts.min()
    enough = least >= max(MIN_PICTURES, MIN_SHARE * len(labels))
    return bool(enough and nearest < MAX_COSINE + EVEN_SPLIT * least / len(labels))


def spherical_kmeans(vectors: Array, count: int) -> NDArray[np.intp]:
    """Unit vectors [B, V] -> labels [B]. Starts from the vector nearest to the mean, then the furthest from those."""
    chosen = [int((vectors @ vectors.mean(0)).argmax())]
    while len(chosen) < count:
        chosen.append(int((vectors @ vectors[chosen].T).max(1).argmin()))
    centres, labels = vectors[chosen], np.full(len(vectors), -1)
    for _ in range(MAX_ROUNDS):
        nearest = (vectors @ centres.T).argmax(1)
        if (nearest == labels).all():
            break
        labels = nearest
        sums = np.stack([vectors[labels == k].sum(0) if (labels == k).any() else centres[k] for k in range(count)])
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return labels


def silhouette(vectors: Array, labels: NDArray[np.intp]) -> float:
    """Mean of (b − a) / max(a, b): a the mean cosine distance to one's own cluster, b to the nearest other one.

    A cluster of one counts 0 (Rousseeuw 1987).
    """
    distances = 1 - vectors @ vectors.T
    names, counts = np.unique(labels, return_counts=True)
    if len(names) < 2:
        return 0.0
    sums = np.stack([distances[:, labels == name].sum(1) for name in names], 1)  # [B, clusters]
    own = np.searchsorted(names, labels)
    row = np.arange(len(labels))
    within = sums[row, own] / np.maximum(counts[own] - 1, 1)
    means = sums / counts
    means[row, own] = np.inf
    beyond = means.min(1)
    scores = (beyond - within) / np.maximum(np.maximum(within, beyond), 1e-12)
    return float(np.where(counts[own] > 1, scores, 0.0).mean())
