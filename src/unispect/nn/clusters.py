"""Groups among unlabelled vectors, for images whose products nobody named."""

from __future__ import annotations

import torch
from torch import Tensor

SEPARATED = 0.25  # mean silhouette below which the vectors count as one group
ROUNDS = 50
SAMPLE = 1000


def discover(vectors: Tensor, most: int = 12, seed: int = 0) -> Tensor:
    """The number of groups with the best mean silhouette, and the group of each vector, (n, C) -> (n,) int64.

    One group where no partition is well separated. Silhouettes: a graphical aid (Rousseeuw, 1987); k-means++ starts.
    """
    scaled = (vectors - vectors.mean(0)) / vectors.std(0).clamp(min=1e-6) if len(vectors) > 1 else vectors
    sample = slice(None, None, -(-len(vectors) // SAMPLE))  # evenly, since images often come product by product
    best, labels = SEPARATED, torch.zeros(len(vectors), dtype=torch.int64)
    for groups in range(2, min(most, len(vectors) // 4) + 1):
        found = kmeans(scaled, groups, seed)
        if (quality := silhouette(scaled[sample], found[sample])) > best:
            best, labels = quality, found
    numbered: Tensor = labels.unique(return_inverse=True)[1]
    return numbered


def kmeans(vectors: Tensor, groups: int, seed: int) -> Tensor:
    """Lloyd's algorithm from a k-means++ start, the best of five, (n, C) -> (n,) int64."""
    generator = torch.Generator().manual_seed(seed)
    return min((_lloyd(vectors, groups, generator) for _ in range(5)), key=lambda result: result[0])[1]


def _lloyd(vectors: Tensor, groups: int, generator: torch.Generator) -> tuple[float, Tensor]:
    centres = vectors[torch.randint(len(vectors), (1,), generator=generator)]
    while len(centres) < groups:
        nearest = torch.cdist(vectors, centres).amin(1).square() + 1e-12
        centres = torch.cat([centres, vectors[torch.multinomial(nearest, 1, generator=generator)]])
    for _ in range(ROUNDS):
        labels = torch.cdist(vectors, centres).argmin(1)
        moved = torch.stack([vectors[labels == k].mean(0) if (labels == k).any() else centres[k] for k in range(groups)])
        if torch.equal(moved, centres):
            break
        centres = moved
    distance, labels = torch.cdist(vectors, centres).min(1)
    return float(distance.square().sum()), labels


def silhouette(vectors: Tensor, labels: Tensor) -> float:
    """Mean silhouette of the vectors, in [-1, 1]; -1 where there is one group."""
    groups = labels.unique()
    if len(groups) < 2:
        return -1.0
    member = (labels[:, None] == groups).to(vectors.dtype)
    totals, sizes = torch.cdist(vectors, vectors) @ member, member.sum(0)
    own = (totals * member).sum(1) / (sizes * member).sum(1).sub(1).clamp(min=1)
    other = (totals / sizes).masked_fill(member.bool(), torch.inf).amin(1)
    values = (other - own) / torch.maximum(other, own).clamp(min=1e-12)
    return float(values[(sizes * member).sum(1) > 1].sum() / len(vectors))
