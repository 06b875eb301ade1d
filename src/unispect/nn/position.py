"""Where a vector stands in the image: as sines and cosines, or learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from unispect.errors import ConfigError


def positional_encoding(channels: int, height: int, width: int) -> Tensor:
    """Two-dimensional sinusoidal encoding, (channels, height, width) float64.

    With h = channels / 2 and w_j = 10000^(-2j/h): channels 2j and 2j+1 hold sin and cos of column * w_j, channels h+2j
    and h+2j+1 those of row * w_j. CFLOW-AD (Gudovskiy et al., 2022), https://arxiv.org/abs/2107.12571, Section 4.
    """
    if channels % 4:
        raise ConfigError(f"position channels: got {channels}, expected a multiple of 4")
    half = channels // 2
    frequency = 10000 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half) if half else torch.zeros(0)
    rows = _waves(torch.arange(height, dtype=torch.float64), frequency)[:, :, None].expand(half, height, width)
    columns = _waves(torch.arange(width, dtype=torch.float64), frequency)[:, None, :].expand(half, height, width)
    return torch.cat([columns, rows])


class LearntPosition(nn.Module):
    """A learnt vector for each place of a grid: that of its column, then that of its row, each drawn from [0, 1).

    UniAD (You et al., 2022), https://arxiv.org/abs/2206.03687, and DETR (Carion et al., 2020) before it.
    """

    def __init__(self, channels: int, height: int, width: int) -> None:
        super().__init__()
        if channels % 2:
            raise ConfigError(
                f"position channels: got {channels}, expected an even number, for half of them are the column's"
            )
        self.column = nn.Parameter(torch.rand(width, channels // 2))
        self.row = nn.Parameter(torch.rand(height, channels // 2))

    def forward(self) -> Tensor:
        """All places row by row, (h*w, C)."""
        height, width = len(self.row), len(self.column)
        columns = self.column[None].expand(height, -1, -1)
        rows = self.row[:, None].expand(-1, width, -1)
        return torch.cat([columns, rows], 2).flatten(0, 1)


def _waves(steps: Tensor, frequency: Tensor) -> Tensor:
    """Sine and cosine of every frequency in turn, (n,) and (h/2,) -> (h, n)."""
    angle = frequency[:, None] * steps
    return torch.stack([angle.sin(), angle.cos()], dim=1).flatten(0, 1)
