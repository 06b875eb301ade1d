"""The affine coupling block of CFLOW-AD, HGAD and FastFlow, and the flow made of it.

Analyzing inverse problems with invertible neural networks (Ardizzone et al., 2019), https://arxiv.org/abs/1808.04730;
the block with a global affine and a fixed rotation is FrEIA's "AllInOne" block. The same block serves vectors (n, C),
with fully connected subnets and a condition, and whole maps (N, C, h, w), with convolutional subnets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unispect.errors import ConfigError, unknown_name

CLAMPS = ("tanh", "scaled_tanh")
MIXINGS = ("rotation", "permutation")
PRECISIONS = (torch.float32, torch.bfloat16)
UNIT_SCALE = 2 * math.log(math.exp(5) - 1)  # 0.1 * softplus(UNIT_SCALE, beta=0.5) = 1


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A rotation drawn from the Haar measure on SO(size), (size, size) float64.

    QR of a Gaussian matrix, with the signs of R's diagonal moved into Q (Mezzadri, 2007, arXiv:math-ph/0609050).
    """
    q: Tensor
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    q = q * r.diagonal().sign()
    q[:, 0] *= torch.linalg.det(q).sign()
    return q


class CouplingBlock(nn.Module):
    """One block: half of the channels is scaled and shifted by what the other half and the condition say.

    channels    C of a vector or map
    condition   channels of the condition, 0 for none; of vectors only
    alpha       bound of the log-scale
    clamp       "tanh": alpha * tanh(a), as in FrEIA 0.2 and the published CFLOW and HGAD;
                "scaled_tanh": alpha * tanh(a / alpha), as in later FrEIA
    mixing      of the channels at the end: by a fixed random "rotation" or "permutation"
    kernel      0: vectors, subnets of two linear layers; odd: maps, subnets of two convolutions of that size
    ratio       hidden channels of the subnet for each of its inputs

    `precision` is that of the products inside the subnet alone; what they give, the mixing, exp, tanh and all sums keep
    the precision of the weights. `dropout` is the share of hidden channels left out in training. Neither is state: a model
    is saved and loaded without them.
    """

    rotation: Tensor
    order: Tensor
    precision: torch.dtype = torch.float32
    dropout: float = 0.0

    def __init__(
        self,
        channels: int,
        condition: int = 0,
        alpha: float = 1.9,
        clamp: str = "tanh",
        generator: torch.Generator | None = None,
        mixing: str = "rotation",
        kernel: int = 0,
        ratio: float = 2.0,
    ) -> None:
        super().__init__()
        _check_sizes(channels, condition, kernel, ratio)
        _check_names(clamp, mixing)
        self.alpha, self.clamp, self.mixing, self.kernel = alpha, clamp, mixing, kernel
        self.kept, self.moved = channels - channels // 2, channels // 2
        inputs = self.kept + condition
        width = max(1, int(ratio * inputs))
        self.hidden, self.output = _layer(inputs, width, kernel), _layer(width, 2 * self.moved, kernel)
        self.scale = nn.Parameter(torch.full((channels,), UNIT_SCALE))
        self.offset = nn.Parameter(torch.zeros(channels))
        generator = generator or torch.Generator().manual_seed(0)
        if mixing == "rotation":
            self.register_buffer("rotation", random_rotation(channels, generator).to(self.scale.dtype))
        else:
            self.register_buffer("order", torch.randperm(channels, generator=generator))

    def condition_term(self, condition: Tensor | None) -> Tensor | None:
        """What the condition adds to the hidden layer, (p, P) -> (p, H): needed once for each place, not each vector.

        Without one, the bias, (1, H); of maps None, for the convolution adds it.
        """
        if self.kernel:
            return None
        weight, bias = self.hidden.weight, self.hidden.bias
        if condition is None:
            assert bias is not None
            return bias[None]
        return self._product(condition, weight[:, self.kept :], bias)

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The linear layer or convolution, computed in `precision`, given in that of x."""
        if self.precision == torch.float32:
            return self._layered(x, weight, bias)
        reduced = self._layered(x.to(self.precision), weight.to(self.precision), None).to(x.dtype)
        return reduced if bias is None else reduced + self._wide(bias)

    def _layered(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, weight, bias, padding=self.kernel // 2) if self.kernel else F.linear(x, weight, bias)

    def _wide(self, channels: Tensor) -> Tensor:
        """A value for each channel, (C,), shaped to meet vectors or maps."""
        return channels[:, None, None] if self.kernel else channels

    def _hidden(self, kept: Tensor, term: Tensor | None) -> Tensor:
        if term is None:
            return self._product(kept, self.hidden.weight, self.hidden.bias)
        hidden = self._product(kept, self.hidden.weight[:, : self.kept])
        # The terms in turn, image after image, without a copy of them for each.
        total: Tensor = hidden.unflatten(0, (-1, term.shape[0])) + term
        return total.flatten(0, 1)

    def _scale_and_shift(self, kept: Tensor, term: Tensor | None) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the moved half, each (n, C/2) or (N, C/2, h, w)."""
        hidden = F.dropout(self._hidden(kept, term).relu(), self.dropout, self.training and self.dropout > 0)
        raw, shift = (0.1 * self._product(hidden, self.output.weight, self.output.bias)).split(self.moved, dim=1)
        if self.clamp == "tanh":
            return self.alpha * raw.tanh(), shift
        return self.alpha * (raw / self.alpha).tanh(), shift

    def global_scale(self) -> Tensor:
        """The learnt scale of each channel, (C,), positive; 1 at the start."""
        return 0.1 * F.softplus(self.scale, beta=0.5)

    def _mixed(self, y: Tensor, scale: Tensor) -> Tensor:
        """R (g * y + o)."""
        if self.mixing == "permutation":
            return (y * self._wide(scale) + self._wide(self.offset)).index_select(1, self.order)
        # One product: the scale is folded into the rotation.
        return self._rotated(y, self.rotation * scale, self.rotation @ self.offset)

    def _unmixed(self, z: Tensor) -> Tensor:
        if self.mixing == "permutation":
            y = z.index_select(1, self.order.argsort())
        else:
            y = self._rotated(z, self.rotation.T)
        return (y - self._wide(self.offset)) / self._wide(self.global_scale())

    def _rotated(self, x: Tensor, matrix: Tensor, offset: Tensor | None = None) -> Tensor:
        return F.conv2d(x, matrix[:, :, None, None], offset) if self.kernel else F.linear(x, matrix, offset)

    def forward(self, x: Tensor, term: Tensor | None) -> tuple[Tensor, Tensor]:
        """Vectors (n, C), their condition terms (p, H) in turn, p a divisor of n -> (n, C) and the log-determinant (n,).

        Maps (N, C, h, w) -> the same and the part of every place in the log-determinant, (N, h, w).
        """
        kept, moved = x.split([self.kept, self.moved], dim=1)
        log_scale, shift = self._scale_and_shift(kept, term)
        y = torch.cat([kept, moved * log_scale.exp() + shift], dim=1)
        scale = self.global_scale()
        return self._mixed(y, scale), log_scale.sum(1) + scale.log().sum()

    def inverse(self, z: Tensor, term: Tensor | None) -> Tensor:
        """The vectors or maps that `forward` maps to z."""
        kept, moved = self._unmixed(z).split([self.kept, self.moved], dim=1)
        log_scale, shift = self._scale_and_shift(kept, term)
        return torch.cat([kept, (moved - shift) * (-log_scale).exp()], dim=1)


class Flow(nn.Module):
    """A chain of coupling blocks. Seeded: the rotations and permutations are part of the model.

    kernels   of the blocks in turn, such as (3, 1); none: a flow of vectors
    still     begin with couplings that do nothing, so that the flow starts as a rotation
    others    as in CouplingBlock
    """

    def __init__(
        self,
        channels: int,
        condition: int = 0,
        blocks: int = 8,
        alpha: float = 1.9,
        clamp: str = "tanh",
        still: bool = False,
        seed: int = 0,
        mixing: str = "rotation",
        kernels: Sequence[int] = (),
        ratio: float = 2.0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = _sizes(kernels, blocks)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            chain = [CouplingBlock(channels, condition, alpha, clamp, generator, mixing, size, ratio) for size in sizes]
        self.blocks = nn.ModuleList(chain)
        if still:
            self._silence()

    @torch.no_grad()
    def _silence(self) -> None:
        for block in self.blocks:
            assert isinstance(block, CouplingBlock)
            block.output.weight.zero_()
            assert block.output.bias is not None
            block.output.bias.zero_()

    def set_precision(self, precision: torch.dtype) -> None:
        """Of the products inside the subnets: torch.float32, that of the weights, or torch.bfloat16. No state."""
        if precision not in PRECISIONS:
            raise ConfigError(f"precision: got {precision}, expected one of {', '.join(map(str, PRECISIONS))}")
        for block in self.blocks:
            assert isinstance(block, CouplingBlock)
            block.precision = precision

    def set_dropout(self, share: float) -> None:
        """Of the hidden channels, in training."""
        if not 0 <= share < 1:
            raise ConfigError(f"dropout: got {share}, expected a share from 0 to below 1")
        for block in self.blocks:
            assert isinstance(block, CouplingBlock)
            block.dropout = share

    def forward(self, x: Tensor, condition: Tensor | None = None, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent vectors (n, C) and log-determinants (n,); or maps (N, C, h, w) and (N,), summed over the places.

        condition   (p, P), one row for each place of the grid, or None
        place       (n,) the row of each vector; None where the vectors run through all places, image after image
        """
        z, logdet = self.by_place(x, condition, place)
        return z, logdet.sum((1, 2)) if logdet.dim() == 3 else logdet

    def by_place(self, x: Tensor, condition: Tensor | None = None, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As forward, with the part of every place in the log-determinant of a map, (N, h, w)."""
        logdet = torch.zeros_like(x[:, 0])
        for block in self.blocks:
            assert isinstance(block, CouplingBlock)
            x, part = block(x, _chosen(block.condition_term(condition), place))
            logdet = logdet + part
        return x, logdet

    def inverse(self, z: Tensor, condition: Tensor | None = None, place: Tensor | None = None) -> Tensor:
        """The vectors or maps that the flow maps to z."""
        for block in reversed(self.blocks):
            assert isinstance(block, CouplingBlock)
            z = block.inverse(z, _chosen(block.condition_term(condition), place))
        return z


def _chosen(term: Tensor | None, place: Tensor | None) -> Tensor | None:
    """The rows of places (n,) of (p, H); all of them where no places are given, and the one row that serves all."""
    if term is None or place is None or term.shape[0] == 1:
        return term
    # Not term[place]: the gradient of that adds up with atomics, in an order that changes from run to run.
    return term.index_select(0, place)


def _layer(inputs: int, outputs: int, kernel: int) -> nn.Linear | nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2) if kernel else nn.Linear(inputs, outputs)


def _sizes(kernels: Sequence[int], blocks: int) -> list[int]:
    """Kernel of every block; 0 for vectors."""
    if any(kernel < 1 for kernel in kernels):
        raise ConfigError(f"kernels: got {list(kernels)}, expected odd numbers of at least 1")
    return [kernels[number % len(kernels)] if kernels else 0 for number in range(blocks)]


def _check_sizes(channels: int, condition: int, kernel: int, ratio: float) -> None:
    if channels < 2:
        raise ConfigError(f"channels: got {channels}, expected at least 2: a coupling needs two halves")
    if kernel and kernel % 2 == 0:
        raise ConfigError(f"kernel: got {kernel}, expected an odd number: a map must keep its size")
    if kernel and condition:
        raise ConfigError(f"condition: got {condition} channels with kernel={kernel}, expected 0: only vectors take one")
    if ratio <= 0:
        raise ConfigError(f"ratio: got {ratio}, expected above 0")


def _check_names(clamp: str, mixing: str) -> None:
    if clamp not in CLAMPS:
        raise ConfigError(unknown_name("clamp", clamp, CLAMPS))
    if mixing not in MIXINGS:
        raise ConfigError(unknown_name("mixing", mixing, MIXINGS))
