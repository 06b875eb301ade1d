"""Attention whose places may be kept from looking at their neighbours, and the layers that UniAD is made of.

Attention is all you need (Vaswani et al., 2017), https://arxiv.org/abs/1706.03762. The mask and the layer with queries of
its own are from A unified model for multi-class anomaly detection (You et al., 2022), https://arxiv.org/abs/2206.03687. In
all layers the sum comes first and its normalisation after it, and positions are added to queries and keys, never to values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unispect.errors import ConfigError


def neighbour_mask(side: int, neighbourhood: int) -> Tensor:
    """What each place of a square grid may look at, (side^2, side^2) bool: all outside of the square window around it.

    side            of the grid, places
    neighbourhood   side of the window, an odd number below that of the grid; 0: no window, all may be looked at
    """
    if neighbourhood and (neighbourhood % 2 == 0 or not 0 < neighbourhood < side):
        raise ConfigError(
            f"neighbourhood: got {neighbourhood}, expected 0 or an odd number below {side}, the side of the grid: "
            "with a larger one the place in the middle would have nothing to look at"
        )
    steps = torch.arange(side)
    apart = (steps[:, None] - steps).abs() > neighbourhood // 2 if neighbourhood else torch.ones(side, side).bool()
    return (apart[:, None, :, None] | apart[None, :, None, :]).reshape(side * side, side * side)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with Xavier's uniform weights and no bias at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    """Multi-head attention, as torch.nn.MultiheadAttention computes it and begins.

    width     W, of the vectors; a multiple of the number of heads
    dropout   share of the weights left out in training
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ConfigError(f"heads: got {heads}, expected a divisor of width={width}")
        self.heads, self.dropout = heads, dropout
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(3 * width, width)))
        self.bias = nn.Parameter(torch.zeros(3 * width))
        self.joined = linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Queries (N, q, W), or (1, q, W) that serve all images, keys and values (N, k, W) -> (N, q, W).

        mask   (q, k) bool, true where a query may look
        """
        parts = zip((query, key, value), self.weight.chunk(3), self.bias.chunk(3), strict=True)
        q, k, v = (F.linear(x, weight, bias).unflatten(2, (self.heads, -1)).transpose(1, 2) for x, weight, bias in parts)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q.expand(k.shape[0], -1, -1, -1), k, v, mask, dropout)
        joined: Tensor = self.joined(seen.transpose(1, 2).flatten(2))
        return joined


class PostNorm(nn.Module):
    """What comes after each part of a layer: dropout of its result, the sum with what it was given, LayerNorm of that."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)

    def forward(self, x: Tensor, change: Tensor) -> Tensor:
        """(N or 1, t, W) and (N, t, W) -> (N, t, W)."""
        total: Tensor = self.norm(x + self.dropout(change))
        return total


class EncoderLayer(nn.Module):
    """Attention of places to one another, then two linear layers on each.

    hidden    channels between the two
    dropout   share left out in training, of the attention's weights, of the hidden channels and of both results
    """

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.feedforward = _feedforward(width, hidden, dropout)
        self.after = nn.ModuleList([PostNorm(width, dropout) for _ in range(2)])

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Tokens (N, t, W) at positions (t, W) -> (N, t, W)."""
        placed = x + position
        x = self.after[0](x, self.attention(placed, placed, x, mask))
        changed: Tensor = self.after[1](x, self.feedforward(x))
        return changed


class QueryLayer(nn.Module):
    """UniAD's decoder layer: learnt queries look at the encoder's output, their results at that of the layer before; then
    two linear layers.

    The tokens themselves are in no sum, so a layer cannot hand them on unchanged. Arguments: see EncoderLayer.
    """

    def __init__(self, tokens: int, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(tokens, width))
        self.attention = nn.ModuleList([Attention(width, heads, dropout) for _ in range(2)])
        self.feedforward = _feedforward(width, hidden, dropout)
        self.after = nn.ModuleList([PostNorm(width, dropout) for _ in range(3)])

    def forward(self, before: Tensor, memory: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        """Output of the layer before (N, t, W), of the encoder (N, t, W) and positions (t, W) -> (N, t, W)."""
        x = self.query[None]
        for attention, after, source in zip(self.attention, self.after, (memory, before), strict=False):
            x = after(x, attention(x + position, source + position, source, mask))
        changed: Tensor = self.after[2](x, self.feedforward(x))
        return changed


def _feedforward(width: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), linear(hidden, width))
