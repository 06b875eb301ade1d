"""Which of a bank to measure at all: the lowest of many values in few steps, and candidates from few channels.

For exported graphs on a CPU, where a product with a large bank takes longer than the network that the features come from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FOLD = 16  # values of which the lowest stands for all at first


def lowest(values: Tensor, k: int) -> Tensor:
    """Places of the k lowest of each row, ascending, (n, m) -> (n, k); k is at most m.

    They lie in the k groups whose lowest are lowest, so a minimum, which is quick, leaves few to be ordered.
    """
    groups = values.shape[1] // FOLD
    if groups <= 2 * k:
        return values.topk(k, dim=1, largest=False).indices
    whole = groups * FOLD
    chosen = values[:, :whole].unflatten(1, (FOLD, groups)).amin(1).topk(k, dim=1, largest=False).indices
    members = chosen[:, None] + groups * torch.arange(FOLD, device=values.device)[:, None]
    over = torch.arange(whole, values.shape[1], device=values.device).expand(values.shape[0], -1)
    places = torch.cat([members.flatten(1), over], 1)
    return places.gather(1, values.gather(1, places).topk(k, dim=1, largest=False).indices)


class Shortlist(nn.Module):
    """Candidates by their distance along the main axes of the bank.

    A distance along some axes is never above the whole, but the nearest along them need not be the nearest: what is left
    out is small where few axes hold most of the bank's spread. docs/statistical.md has how often that goes wrong. No state:
    it is made from the bank whenever it is wanted.

    bank      (m, C)
    channels  number of axes
    """

    centre: Tensor
    axes: Tensor
    turned: Tensor
    norms: Tensor

    def __init__(self, bank: Tensor, channels: int) -> None:
        super().__init__()
        centre = bank.mean(0)
        shifted = (bank - centre).double()
        axes = torch.linalg.eigh(shifted.mT @ shifted).eigenvectors[:, -channels:]
        turned = (shifted @ axes).to(bank)
        for name, value in {"centre": centre, "axes": axes.to(bank), "turned": turned}.items():
            self.register_buffer(name, value, persistent=False)
        self.register_buffer("norms", turned.square().sum(1) / 2, persistent=False)

    def forward(self, queries: Tensor, count: int) -> Tensor:
        """Places of the candidates of each query, (n, C) -> (n, count)."""
        return lowest(F.linear((self.centre - queries) @ self.axes, self.turned, self.norms), count)
