"""Means, covariances and whitening from sums that add up over batches."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Count, sum and second moment of vectors, by group.

    Kept in double precision and around a fixed shift, so that the grouping of the batches does not matter.
    """

    def __init__(self, groups: int, channels: int, shift: Tensor | None = None) -> None:
        self.shift = torch.zeros(channels, dtype=torch.float64) if shift is None else shift.double()
        self.count = torch.zeros(groups, dtype=torch.float64)
        self.sum = torch.zeros(groups, channels, dtype=torch.float64)
        self.second = torch.zeros(groups, channels, channels, dtype=torch.float64)
        self.cubic = torch.zeros(groups, channels, dtype=torch.float64)
        self.quartic = torch.zeros(groups, dtype=torch.float64)

    def add(self, groups: Tensor, vectors: Tensor) -> None:
        """More vectors (g, n, C) of the groups (g,), which are all different."""
        x = vectors.double() - self.shift
        square = x.square().sum(2)
        self.count[groups] += x.shape[1]
        self.sum[groups] += x.sum(1)
        self.second[groups] += x.mT @ x
        self.cubic[groups] += (x.mT @ square[..., None])[..., 0]
        self.quartic[groups] += square.square().sum(1)

    def joined(self) -> Moments:
        """All groups as one."""
        return self._chosen(torch.ones(len(self.count), dtype=torch.bool))

    def without(self, group: int) -> Moments:
        """All groups but this one as one."""
        return self._chosen(torch.arange(len(self.count)) != group)

    def _chosen(self, groups: Tensor) -> Moments:
        one = Moments(1, len(self.shift), self.shift)
        for name in ("count", "sum", "second", "cubic", "quartic"):
            setattr(one, name, getattr(self, name)[groups].sum(0, keepdim=True))
        return one

    def mean(self) -> Tensor:
        """(groups, C); the shift where a group is empty."""
        return self.shift + self.sum / self.count.clamp(min=1)[:, None]

    def covariance(self) -> Tensor:
        """Biased (1/n) covariance, (groups, C, C); zero where a group is empty."""
        return self.covariance_of(slice(None))

    def covariance_of(self, groups: slice) -> Tensor:
        """`covariance` of some groups alone, so that not all need be in memory twice."""
        count = self.count[groups].clamp(min=1)
        centre = self.sum[groups] / count[:, None]
        return self.second[groups] / count[:, None, None] - centre[:, :, None] * centre[:, None, :]

    def fourth(self) -> Tensor:
        """Sum over the vectors of the fourth power of their distance to the mean, (groups,), multiplied out."""
        count = self.count.clamp(min=1)
        centre = self.sum / count[:, None]
        norm, trace = centre.square().sum(1), self.second.diagonal(dim1=1, dim2=2).sum(1)
        along = (centre[:, None] @ self.second @ centre[..., None])[:, 0, 0]
        total = self.quartic - 4 * (centre * self.cubic).sum(1) + 4 * along + 2 * norm * trace - 3 * count * norm.square()
        return total.clamp(min=0)


def within(moments: Moments) -> tuple[Tensor, Tensor]:
    """Mean of the group means (C,) and the covariance around the groups' own means (C, C), each group counting alike."""
    filled = moments.count > 0
    return moments.mean()[filled].mean(0), moments.covariance()[filled].mean(0)


def ledoit_wolf(covariance: Tensor, fourth: float, count: float) -> float:
    """Optimal shrinkage towards the scaled identity, in [0, 1].

    A well-conditioned estimator for large-dimensional covariance matrices (Ledoit and Wolf, 2004), Theorem 3.2.

    covariance   biased, (C, C)
    fourth       sum over the vectors of the fourth power of their distance to the mean
    """
    scale = covariance.diagonal().mean()
    spread = float(((covariance - scale * torch.eye(len(covariance), dtype=covariance.dtype)) ** 2).sum())
    if spread <= 0:
        return 1.0
    noise = (fourth / count - float((covariance**2).sum())) / count
    return min(max(noise, 0.0), spread) / spread


def shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    """(1 - a) S + a (tr S / C) I, (C, C) -> (C, C)."""
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    return (1 - shrinkage) * covariance + shrinkage * covariance.diagonal().mean() * identity


def whitening(covariance: Tensor, floor: float = 1e-3) -> Tensor:
    """W with W S W^T = I, symmetric, (..., C, C) -> (..., C, C); variances below `floor` times their mean count as that."""
    values, vectors = torch.linalg.eigh(covariance)
    least = (floor * values.mean(-1, keepdim=True)).clamp(min=1e-12)
    white: Tensor = (vectors * values.clamp(min=least).rsqrt()[..., None, :]) @ vectors.mT
    return white
