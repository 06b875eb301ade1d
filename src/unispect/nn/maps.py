"""Score maps: resizing, blur and the summary of a map in one number."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor


def upsampled(maps: Tensor, side: int, aligned: bool = True) -> Tensor:
    """Bilinear, (N, h, w) -> (N, side, side). Published codes differ in whether corners are aligned."""
    if torch.compiler.is_exporting():  # in a graph two small products are quicker
        return maps if maps.shape[1:] == (side, side) else magnified(maps, side, 0.0, aligned)
    return F.interpolate(maps[:, None], (side, side), mode="bilinear", align_corners=aligned)[:, 0]


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """Gaussian blur as scipy.ndimage.gaussian_filter does it (mirrored edges, cut at 4 sigma), (N, h, w) -> (N, h, w)."""
    if not sigma:
        return maps
    rows, columns = (torch.from_numpy(_blur_matrix(side, sigma)).to(maps) for side in maps.shape[1:])
    return rows @ maps @ columns.T


def magnified(maps: Tensor, side: int, sigma: float, aligned: bool = True) -> Tensor:
    """`blurred(upsampled(maps, side, aligned), sigma)` without the large map between, (N, h, w) -> (N, side, side)."""
    rows, columns = (torch.from_numpy(_growth(size, side, sigma, aligned)).to(maps) for size in maps.shape[1:])
    return rows @ maps @ columns.T


@lru_cache(maxsize=16)
def _growth(size: int, side: int, sigma: float, aligned: bool) -> np.ndarray:
    """Both steps along one side as a matrix, (side, size)."""
    places = np.arange(side)
    centres = places * (size - 1) / max(side - 1, 1) if aligned else (places + 0.5) * size / side - 0.5
    centres = centres.clip(0, size - 1)
    lower = np.floor(centres).astype(int)
    upper = np.minimum(lower + 1, size - 1)
    matrix = np.zeros((side, size))
    np.add.at(matrix, (places, lower), 1 - (centres - lower))
    np.add.at(matrix, (places, upper), centres - lower)
    return _blur_matrix(side, sigma) @ matrix if sigma else matrix


@lru_cache(maxsize=16)
def _blur_matrix(side: int, sigma: float) -> np.ndarray:  # no tensor: one made while a graph is traced is none
    matrix: np.ndarray = gaussian_filter1d(np.eye(side), sigma, axis=0)
    return matrix


def box_mean(maps: Tensor, side: int, padding: int = 0) -> Tensor:
    """Mean of the square around each place, zeros beyond the edge, (N, h, w) -> (N, h', w')."""
    # Rows, then columns: both at once would be many times as much work.
    rows = F.avg_pool2d(maps[:, None], (side, 1), stride=1, padding=(padding, 0))
    return F.avg_pool2d(rows, (1, side), stride=1, padding=(0, padding))[:, 0]


def top_mean(maps: Tensor, share: float) -> Tensor:
    """Mean of the highest share of each map, at least one place, (N, h, w) -> (N,)."""
    places = maps.flatten(1)
    return places.topk(max(1, int(share * places.shape[1])), dim=1).values.mean(1)
