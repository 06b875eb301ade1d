"""PatchCore's pooled neighbourhoods as one convolution a level: windows and means of runs of them are linear in it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor


def averaging(inputs: int, outputs: int) -> csr_array:
    """What adaptive average pooling multiplies by, (outputs, inputs): means of runs, which may overlap."""
    rows = np.arange(outputs)
    first, beyond = rows * inputs // outputs, -(-(rows + 1) * inputs // outputs)
    sizes = beyond - first
    columns = np.concatenate([np.arange(start, end) for start, end in zip(first, beyond, strict=True)])
    values = np.repeat(1 / sizes, sizes)
    return csr_array((values, columns, np.concatenate([[0], sizes.cumsum()])), shape=(outputs, inputs))


def patch_weights(channels: Sequence[int], side: int, dimension: int) -> list[tuple[int, Tensor]]:
    """For each level of so many channels the first of the channels that it has a say in, and the kernel, (c, C, side, side).

    Windows of side^2 places, all their numbers averaged in `dimension` runs, then those of all levels, one after another,
    in `dimension` runs again.
    """
    joined, found = averaging(len(channels) * dimension, dimension).tocsc(), []
    for number, width in enumerate(channels):
        whole = joined[:, number * dimension : (number + 1) * dimension] @ averaging(width * side**2, dimension)
        rows = np.flatnonzero(whole.sum(1))
        kernel = whole.tocsr()[rows[0] : rows[-1] + 1].toarray().astype(np.float32)
        found.append((int(rows[0]), torch.from_numpy(kernel).unflatten(1, (width, side, side))))
    return found
