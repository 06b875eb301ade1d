"""Log-likelihoods by dimension: under the standard normal, what is usual of normal images, and maps made of both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unispect.errors import UnispectError
from unispect.nn.maps import upsampled
from unispect.nn.mixture import LOG_2PI

STEPS = 4096  # of a tally in one unit of asinh: its values are right to 1.3e-4 nats, or that share of a large one
LIMIT = 32  # asinh of what counts as endless, 4e13


def standard_normal(z: Tensor, logdet: Tensor) -> Tensor:
    """Log-likelihood per dimension, nats, where the flow's prior is N(0, I).

    Vectors (n, C) and log-determinants (n,) -> (n,); maps (N, C, h, w) and the parts of the places (N, h, w) -> (N, h, w),
    whose mean over the places is the log-likelihood of the whole map by dimension.
    """
    return (logdet - z.square().sum(1) / 2) / z.shape[1] - LOG_2PI / 2


class Tally:
    """Counts of values in steps of asinh: quantiles of any number of values in 2 MiB. Adds up, in any order."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * LIMIT * STEPS + 1, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Take in log-likelihoods of any shape. Raises UnispectError for one that is no finite number."""
        if not bool(torch.isfinite(values).all()):
            raise UnispectError(
                "log-likelihoods of held-out normal images are not finite: the flow has diverged; "
                "expected finite ones, so lower training.learning_rate or set training.checks above 0"
            )
        steps = (values.detach().double().cpu().asinh() * STEPS).round().long().flatten() + LIMIT * STEPS
        self.counts += torch.bincount(steps.clamp(0, len(self.counts) - 1), minlength=len(self.counts))

    def quantile(self, share: float) -> float:
        """The smallest value that at least this share of the values does not exceed."""
        total = int(self.counts.sum())
        if not total:
            raise UnispectError("no held-out normal images to measure likelihoods on: set split.held_out above 0")
        rank = max(1, math.ceil(share * total - 1e-9))
        step = int(torch.searchsorted(self.counts.cumsum(0), rank))
        return math.sinh((step - LIMIT * STEPS) / STEPS)


def unlikely(densities: Sequence[Tensor], ceilings: Tensor, side: int) -> Tensor:
    """K - sum over the levels of exp(min(l - a, 0)), in [0, K], from l (N, h, w) and ceilings a (K,) -> (N, side, side).

    CFLOW-AD and HGAD subtract the maximum over the test set for a, which makes a score depend on the other images; a is
    the ceiling of held-out normals here. Corners are aligned, as in both published codes.
    """
    likely = [
        upsampled((density - ceiling).clamp(max=0).exp(), side) for density, ceiling in zip(densities, ceilings, strict=True)
    ]
    return len(likely) - torch.stack(likely).sum(0)
