"""The hierarchical Gaussian mixture of HGAD: a Gaussian for each product, and several centres inside each.

Hierarchical Gaussian mixture normalizing flow modeling for unified anomaly detection (Yao et al., 2024),
https://arxiv.org/abs/2403.13349, Section 3; losses as in the published code (methods of the paper's Eq. 6 to 11).

Vectors come as (m, c, q, D): m images, c cells of the grid, q places in each cell. Covariances are the identity, as in
the paper, or one matrix for each product and cell; every density below is that of x -> metric (z - mu - offset).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, slots=True)
class MixtureTerms:
    """The five losses of HGAD, each a scalar to be minimised."""

    inter: Tensor
    information: Tensor
    entropy: Tensor
    intra: Tensor
    sigmoid: Tensor


class HierarchicalMixture(nn.Module):
    """Main centres mu_y, centres mu_y + delta_{y,i} inside each product, and the weights of both.

    products, channels, centres   Y, D and M; centre 0 of a product is mu_y itself
    cells                         number of grid cells with a covariance of their own; 0: the identity everywhere
    main                          main centres "learnt", "fixed" where they start, or a "single" fixed one for all products
    """

    metric: Tensor
    offset: Tensor
    log_volume: Tensor

    def __init__(
        self,
        products: int,
        channels: int,
        centres: int = 10,
        delta_scale: float = 1.0,
        cells: int = 0,
        main: str = "learnt",
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.channels, self.cells, self.single = channels, cells, main == "single"
        first = spread_centres(products, channels, generator) * (0 if self.single else 1)
        self.mu = nn.Parameter(first, requires_grad=main == "learnt")
        delta = torch.randn(products, centres - 1, channels, generator=generator)
        self.delta = nn.Parameter(delta_scale * delta)
        self.psi = nn.Parameter(torch.zeros(products))
        self.psi_intra = nn.Parameter(torch.zeros(products, centres))
        self.register_buffer("metric", torch.eye(channels).repeat(products, cells, 1, 1))
        self.register_buffer("offset", torch.zeros(products, cells, channels))
        self.register_buffer("log_volume", torch.zeros(products, cells))

    @property
    def products(self) -> int:
        return len(self.mu)

    def residual(self, z: Tensor, product: int, centre: Tensor) -> Tensor:
        """metric (z - centre - offset) under one product, (m, c, q, D) -> (m, c, q, D)."""
        if not self.cells:
            return z - centre
        moved = z - centre - self.offset[product][:, None]
        return torch.einsum("mcqd,ced->mcqe", moved, self.metric[product])

    def volume(self, product: int | Tensor) -> Tensor:
        """log |det metric|, broadcastable to (..., c, q)."""
        if not self.cells:
            return self.mu.new_zeros(1, 1)
        return self.log_volume[product][..., None]

    def logits(self, z: Tensor) -> Tensor:
        """log N(z; mu_y) + (D/2) ln 2 pi for every product, (m, c, q, D) -> (Y, m, c, q)."""
        if not self.cells:
            squared = (z**2).sum(-1, keepdim=True) - 2 * z @ self.mu.T + (self.mu**2).sum(-1)
            return -squared.movedim(-1, 0) / 2
        if self.cells == 1 and torch.compiler.is_exporting():
            return self._logits_together(z)
        rows = [self.residual(z, y, self.mu[y]).square().sum(-1) for y in range(self.products)]
        return -torch.stack(rows) / 2 + self.log_volume[:, None, :, None]

    def _logits_together(self, z: Tensor) -> Tensor:
        """`logits` under one covariance a product, by one matrix product, (m, 1, q, D) -> (Y, m, 1, q)."""
        offset = torch.einsum("yd,yed->ye", self.mu + self.offset[:, 0], self.metric[:, 0])
        residual = z @ self.metric.flatten(0, 2).T - offset.flatten()
        squared = residual.unflatten(-1, (self.products, self.channels)).square().sum(-1)
        logits: Tensor = -squared.movedim(-1, 0) / 2 + self.log_volume[:, None, :, None]
        return logits

    def inside(self, z: Tensor, product: int) -> Tensor:
        """log of one product's mixture at z, + (D/2) ln 2 pi, (m, c, q, D) -> (m, c, q). The main centre is fixed."""
        return self._inside(self.residual(z, product, self.mu[product].detach()), product) + self.volume(product)

    def own(self, z: Tensor, product: Tensor) -> Tensor:
        """`inside` under each image's own product, (m, c, q, D) and (m,) -> (m, c, q)."""
        if self.cells <= 1 or torch.compiler.is_exporting():
            return self._own(z, product)
        out = z.new_empty(z.shape[:-1])  # a matrix for each image and cell would be too much to gather
        for y in product.unique().tolist():
            out = out.index_put((torch.nonzero(product == y)[:, 0],), self.inside(z[product == y], y))
        return out

    def _own(self, z: Tensor, product: Tensor) -> Tensor:
        """All images at once; in shapes alone, so that it can be compiled."""
        residual = z - self.mu.detach().index_select(0, product)[:, None, None]
        if self.cells:
            residual = residual - self.offset[product][:, :, None]
            residual = torch.einsum("mcqd,mced->mcqe", residual, self.metric[product])
        delta = nn.functional.pad(self.delta, (0, 0, 1, 0)).index_select(0, product)
        along = (residual.flatten(1, 2) @ delta.mT).unflatten(1, z.shape[1:3])
        squared = residual.square().sum(-1, keepdim=True) - 2 * along + delta.square().sum(-1)[:, None, None]
        weights = self.psi_intra.log_softmax(-1).index_select(0, product)[:, None, None]
        return torch.logsumexp(-squared / 2 + weights, -1) + self.volume(product)

    def _inside(self, residual: Tensor, product: int) -> Tensor:
        delta = torch.cat([self.delta.new_zeros(1, self.channels), self.delta[product]])
        squared = (residual**2).sum(-1, keepdim=True) - 2 * residual @ delta.T + (delta**2).sum(-1)
        return torch.logsumexp(-squared / 2 + self.psi_intra[product].log_softmax(-1), dim=-1)

    def responsibilities(self, z: Tensor, product: int) -> Tensor:
        """Share of each centre of a product in each vector, (m, c, q, D) -> (m, c, q, M)."""
        residual = self.residual(z, product, self.mu[product])
        delta = torch.cat([self.delta.new_zeros(1, self.channels), self.delta[product]])
        squared = (residual[..., None, :] - delta).square().sum(-1)
        return (-squared / 2 + self.psi_intra[product].log_softmax(-1)).softmax(-1)

    def terms(self, z: Tensor, logdet: Tensor, product: Tensor, smoothing: float, second_stage: bool = True) -> MixtureTerms:
        """All losses, from z (m, c, q, D), log-determinants (m, c, q) and the product of each image (m,).

        In the first stage `intra` and `sigmoid` are 0 and are not computed: what they teach gets no gradient, not one of 0.

        Main centres and product weights learn from `inter`, `information` and `entropy` only; the product weights
        from `inter` alone; centres inside a product from `intra` and `sigmoid`.
        """
        logits, weights = self.logits(z), self.psi.log_softmax(0)[:, None, None, None]
        inter = -(torch.logsumexp(logits + weights, dim=0) + logdet).mean() / self.channels
        fixed = weights.detach()
        posterior = (logits + fixed).log_softmax(0) - fixed
        target = smoothed(product, self.products, smoothing).to(z.dtype).T[:, :, None, None]
        information = -(target * posterior).sum(0).mean()
        uncertain = entropy(logits).mean()
        if not second_stage:
            return MixtureTerms(inter, information, uncertain, inter.new_zeros(()), inter.new_zeros(()))
        inside = self.own(z, product) + logdet
        density = (inside - self.channels / 2 * LOG_2PI) / self.channels
        likely = -nn.functional.logsigmoid(density).mean()
        return MixtureTerms(inter, information, uncertain, -inside.mean() / self.channels, likely)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax over products (first dimension), in nats, (Y, ...) -> (...)."""
    logp = logits.log_softmax(0)
    return -(logp.exp() * logp).sum(0)


def smoothed(product: Tensor, products: int, smoothing: float) -> Tensor:
    """One-hot targets mixed with the uniform distribution, (m,) -> (m, Y) float64."""
    hot = nn.functional.one_hot(product, products).double()
    return (1 - smoothing) * hot + smoothing / products


def spread_centres(products: int, channels: int, generator: torch.Generator) -> Tensor:
    """First main centres: pairwise about 5 apart, (Y, D).

    A scaled identity, tiled along the channels, as in the published code; with more products than channels, where that
    has no room, random directions of the same length.
    """
    tiles = channels // products
    if not tiles:
        directions = torch.randn(products, channels, generator=generator)
        return 5 / math.sqrt(2) * nn.functional.normalize(directions, dim=1)
    centres = torch.zeros(products, channels)
    centres[:, : tiles * products] = torch.eye(products).repeat(1, tiles)
    return centres * 5 / math.sqrt(2 * channels // products)
