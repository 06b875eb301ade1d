"""The affine coupling block of CFLOW-AD, HGAD and FastFlow, and the flow made of it.

Analyzing inverse problems with invertible neural networks (Ardizzone et al., 2019), https://arxiv.org/abs/1808.04730;
the block with a global affine and a fixed rotation is FrEIA's "AllInOne" block. Vectors only: (n, C).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unispect.errors import ConfigError, unknown_name

CLAMPS = ("tanh", "scaled_tanh")
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

    channels    C of a vector
    condition   channels of the condition, 0 for none
    alpha       bound of the log-scale
    clamp       "tanh": alpha * tanh(a), as in FrEIA 0.2 and the published CFLOW and HGAD;
                "scaled_tanh": alpha * tanh(a / alpha), as in later FrEIA
    """

    rotation: Tensor

    def __init__(
        self,
        channels: int,
        condition: int = 0,
        alpha: float = 1.9,
        clamp: str = "tanh",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if channels < 2:
            raise ConfigError(f"channels: got {channels}, expected at least 2: a coupling needs two halves")
        if clamp not in CLAMPS:
            raise ConfigError(unknown_name("clamp", clamp, CLAMPS))
        self.alpha, self.clamp = alpha, clamp
        self.kept, self.moved = channels - channels // 2, channels // 2
        inputs = self.kept + condition
        self.hidden = nn.Linear(inputs, 2 * inputs)
        self.output = nn.Linear(2 * inputs, 2 * self.moved)
        self.scale = nn.Parameter(torch.full((channels,), UNIT_SCALE))
        self.offset = nn.Parameter(torch.zeros(channels))
        rotation = random_rotation(channels, generator or torch.Generator().manual_seed(0))
        self.register_buffer("rotation", rotation.to(self.scale.dtype))

    def condition_term(self, condition: Tensor | None) -> Tensor:
        """What the condition adds to the hidden layer, (p, P) -> (p, H): needed once for each place, not each vector."""
        if condition is None:
            return self.hidden.bias[None]
        return F.linear(condition, self.hidden.weight[:, self.kept :], self.hidden.bias)

    def _scale_and_shift(self, kept: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
        """Log-scale and shift of the moved half, each (n, C/2)."""
        hidden = F.linear(kept, self.hidden.weight[:, : self.kept]) + term
        raw, shift = (0.1 * self.output(hidden.relu())).split(self.moved, dim=-1)
        if self.clamp == "tanh":
            return self.alpha * raw.tanh(), shift
        return self.alpha * (raw / self.alpha).tanh(), shift

    def global_scale(self) -> Tensor:
        """The learnt scale of each channel, (C,), positive; 1 at the start."""
        return 0.1 * F.softplus(self.scale, beta=0.5)

    def forward(self, x: Tensor, term: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (n, C) and their condition terms (n or 1, H) -> (n, C) and the log-determinant (n,)."""
        kept, moved = x.split([self.kept, self.moved], dim=-1)
        log_scale, shift = self._scale_and_shift(kept, term)
        y = torch.cat([kept, moved * log_scale.exp() + shift], dim=-1)
        scale = self.global_scale()
        # R (g * y + o) as one product: the scale is folded into the rotation.
        z = F.linear(y, self.rotation * scale, self.rotation @ self.offset)
        return z, log_scale.sum(-1) + scale.log().sum()

    def inverse(self, z: Tensor, term: Tensor) -> Tensor:
        """The vectors that `forward` maps to z, (n, C) -> (n, C)."""
        y = (F.linear(z, self.rotation.T) - self.offset) / self.global_scale()
        kept, moved = y.split([self.kept, self.moved], dim=-1)
        log_scale, shift = self._scale_and_shift(kept, term)
        return torch.cat([kept, (moved - shift) * (-log_scale).exp()], dim=-1)


class Flow(nn.Module):
    """A chain of coupling blocks. Seeded: the rotations are part of the model.

    still   begin with couplings that do nothing, so that the flow starts as a rotation
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
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            chain = [CouplingBlock(channels, condition, alpha, clamp, generator) for _ in range(blocks)]
        self.blocks = nn.ModuleList(chain)
        if still:
            self._silence()

    @torch.no_grad()
    def _silence(self) -> None:
        for block in self.blocks:
            assert isinstance(block, CouplingBlock)
            block.output.weight.zero_()
            block.output.bias.zero_()

    def forward(self, x: Tensor, condition: Tensor | None = None, place: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latent vectors (n, C) and log-determinants (n,).

        condition   (p, P), one row for each place of the grid, or None
        place       (n,) the row of each vector; None where the vectors run through all places, image after image
        """
        logdet = x.new_zeros(len(x))
        for block in self.blocks:
            assert isinstance(block, CouplingBlock)
            x, part = block(x, _spread(block.condition_term(condition), len(x), place))
            logdet = logdet + part
        return x, logdet

    def inverse(self, z: Tensor, condition: Tensor | None = None, place: Tensor | None = None) -> Tensor:
        """The vectors that the flow maps to z, (n, C) -> (n, C)."""
        for block in reversed(self.blocks):
            assert isinstance(block, CouplingBlock)
            z = block.inverse(z, _spread(block.condition_term(condition), len(z), place))
        return z


def _spread(term: Tensor, vectors: int, place: Tensor | None) -> Tensor:
    """A row for each vector, (p, H) -> (n, H); one row serves all as it is."""
    if len(term) == 1:
        return term
    # Not term[place]: the gradient of that adds up with atomics, in an order that changes from run to run.
    return term.index_select(0, place) if place is not None else term.repeat(vectors // len(term), 1)
