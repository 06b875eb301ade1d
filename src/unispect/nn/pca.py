"""Principal components kept by the variance they account for, and the Mahalanobis distance among them as one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from unispect.nn.buffers import Learnt
from unispect.nn.gaussian import Moments, ledoit_wolf
from unispect.nn.routing import stacked, taken

FLOOR = 1e-6  # of the mean variance of all components: less counts as that, so that a constant direction stays finite


def kept(variances: Tensor, rule: str, share: float) -> slice:
    """Which components to keep, of variances that fall, (C,).

    rule   "pca": those of the most variance, up to the first with which they account for more than `share`;
           "opca": those of the least variance, which account for `share`, from the component before the first with
           which the larger ones account for more than 1 - share, as the code that OPCA is based on has it; "all"
    """
    total = float(variances.sum())
    if rule == "all" or total <= 0:
        return slice(0, len(variances))
    explained = variances.cumsum(0) / total
    beyond = (explained > (share if rule == "pca" else 1 - share)).nonzero()
    first = int(beyond[0]) if len(beyond) else len(variances) - 1
    return slice(0, first + 1) if rule == "pca" else slice(max(first - 1, 0), len(variances))


class Subspace(Learnt):
    """A Gaussian on kept components, folded: the Mahalanobis distance of x is the norm of matrix (x - mean).

    Build Gaussian Distribution Under Deep Features for Anomaly Detection and Localization (Wang et al., 2022),
    https://doi.org/10.32604/jnm.2022.032447: components, and a covariance after Ledoit and Wolf.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("matrix", torch.zeros(0, channels))

    def forward(self, vectors: Tensor) -> Tensor:
        """Distance of vectors, (n, C) -> (n,)."""
        distance: Tensor = torch.linalg.vector_norm((vectors - self.mean) @ self.matrix.T, dim=1)
        return distance

    def learn(self, components: Components, fourth: float) -> None:
        """Take over kept components whose vectors have this sum of fourth powers of their norm."""
        variances = components.variances
        shrinkage = ledoit_wolf(variances.diag(), fourth, components.count)
        shrunk = ((1 - shrinkage) * variances + shrinkage * variances.mean()).clamp(min=components.floor)
        self.mean = components.mean.float()
        self.matrix = (components.directions / shrunk.sqrt()).T.float().contiguous()


class Components:
    """Principal components of some vectors that a rule keeps.

    mean        (C,)
    directions  (C, p) orthonormal
    variances   (p,), falling
    """

    def __init__(self, moments: Moments, rule: str, share: float) -> None:
        values, directions = torch.linalg.eigh(moments.covariance()[0])
        self.count = float(moments.count[0])
        # Of n vectors there are no more than n components; the rest of the space is left out.
        most = int(min(self.count, len(values)))
        values, directions = values.flip(0)[:most].clamp(min=0), directions.flip(1)[:, :most]
        chosen = kept(values, rule, share)
        self.mean, self.variances, self.directions = moments.mean()[0], values[chosen], directions[:, chosen]
        self.floor = max(FLOOR * float(values.sum()) / directions.shape[0], 1e-12)

    def fourth(self, vectors: Tensor) -> float:
        """Sum of the fourth powers of the norms of vectors (n, C) among the components."""
        reduced = (vectors.double() - self.mean) @ self.directions
        return float(reduced.square().sum(1).square().sum())


def distances(parts: Sequence[Subspace], vectors: Tensor, product: Tensor) -> Tensor:
    """Distances of vectors (N, p, C) of images under the Gaussian of their product (N,), (N, p)."""
    if torch.compiler.is_exporting():
        offset = vectors - taken([part.mean for part in parts], product)[:, None]
        matrix = stacked([part.matrix for part in parts]).index_select(0, product)
        found: Tensor = torch.linalg.vector_norm(offset @ matrix.mT, dim=2)
        return found
    return torch.stack([parts[y](image) for image, y in zip(vectors, product.tolist(), strict=True)])
