"""Few images: all of them to learn from and all of them to calibrate, by models that each left some of them out.

Cross-conformal predictors (Vovk, 2015), https://arxiv.org/abs/1208.0806; CV+ in *Predictive inference with the jackknife+*
(Barber, Candès, Ramdas, Tibshirani, 2021), https://arxiv.org/abs/1905.02928. The n images are dealt into K folds; model k
has learnt from all others and scores an image of fold k as s_i, a new one as s_k(x). Then

    p(x) = (1 + sum over k of #{i in fold k: s_i >= s_k(x)}) / (n + 1)

and P(p <= a) <= 2 a + (1 - K / n) / (K + 1) for exchangeable images: a weaker promise than that of split conformal, though
in practice it is about a (Barber et al., section 4). Every image is scored by K models.

The score that is handed on is the number of images whose scores are exceeded, and a fraction below one that grows with
the scores, so that a rule for one model and calibration scores 1, 2, ..., n gives just this p-value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from unispect.align.base import Aligner
from unispect.decide.judge import Calibration
from unispect.decide.unknown import Novelty
from unispect.detectors.base import Detector
from unispect.nn.buffers import Learnt
from unispect.types import Features, Scores


class Tally(Learnt):
    """Counts over folds. Scores of each fold's images by the model that left them out, and their middle and spread."""

    values: Tensor
    middle: Tensor
    spread: Tensor

    def __init__(self, folds: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(folds, 0))
        self.register_buffer("middle", torch.zeros(folds))
        self.register_buffer("spread", torch.ones(folds))

    def learn(self, scores: Sequence[Tensor]) -> None:
        """Scores of each fold's images, (n_k,)."""
        longest = max(len(part) for part in scores)
        lowest = torch.finfo(torch.float32).min  # below any score: it only fills up
        self.values = torch.stack([nn.functional.pad(part, (0, longest - len(part)), value=lowest) for part in scores])
        self.middle = torch.stack([part.median() for part in scores])
        # Of all folds, whose images are few.
        spread = torch.cat([part - middle for part, middle in zip(scores, self.middle, strict=True)]).abs().mean()
        self.spread = spread.clamp(min=1e-9).expand(len(scores)).clone()

    def standard(self, scores: Tensor) -> Tensor:
        """Scores (K, ...) by each model in units of what it says of normal images, (K, ...)."""
        shape = (-1, *[1] * (scores.dim() - 1))
        return (scores - self.middle.view(shape)) / self.spread.view(shape)

    def forward(self, scores: Tensor) -> Tensor:
        """Scores (K, N) by each model -> how many images they exceed, and a fraction, (N,)."""
        below = (self.values[:, :, None] < scores[:, None]) & (self.values > torch.finfo(torch.float32).min)[:, :, None]
        fraction = 0.5 + 0.98 * self.standard(scores).mean(0).atan() / math.pi
        return below.sum((0, 1)).to(scores) + fraction


class Crossed(Detector):
    """K detectors, each with its aligner, as one.

    Maps are the mean of those of all, each in units of what its model says of normal images. Their threshold is set on maps
    of single models, which is no proof; regions are for looking at.
    """

    def __init__(self, detectors: Sequence[Detector], aligners: Sequence[Aligner | None]) -> None:
        super().__init__()
        self.detectors = nn.ModuleList(detectors)
        self.aligners = nn.ModuleList(aligner for aligner in aligners if aligner is not None)
        self.images, self.peaks = Tally(len(detectors)), Tally(len(detectors))

    def each(self, features: Features) -> list[Scores]:
        """What each model says, aligned."""
        said: list[Scores] = [detector(features) for detector in self.detectors]
        if not self.aligners:
            return said
        return [aligner(features, scores) for aligner, scores in zip(self.aligners, said, strict=True)]

    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores with maps (N, side, side)."""
        said = self.each(features)
        image = self.images(torch.stack([scores.image for scores in said]))
        maps = self.peaks.standard(torch.stack([scores.maps for scores in said])).mean(0)
        known = [scores.products for scores in said if scores.products is not None]
        return Scores(image, maps, torch.stack(known).mean(0).log_softmax(1) if known else None)


class CrossedNovelty(nn.Module):
    """K measures of novelty as one."""

    def __init__(self, parts: Sequence[Novelty]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.tally = Tally(len(parts))

    def each(self, features: Features) -> Tensor:
        """What each says, (K, N)."""
        return torch.stack([part(features) for part in self.parts])

    def forward(self, features: Features) -> Tensor:
        """L levels (N, C, h, w) -> (N,)."""
        novelty: Tensor = self.tally(self.each(features))
        return novelty


def crossed(detector: Crossed, novelty: CrossedNovelty, parts: Sequence[Calibration]) -> Calibration:
    """What each model says of the images that it left out, as what the whole is decided by; it is told what to count by.

    Scores and novelty become 1, 2, ..., n in their order, so that a rule for one model gives the p-value above.
    """
    images, places, strange = detector.images, detector.peaks, novelty.tally
    images.learn([_tensor(part.scores) for part in parts])
    places.learn([_tensor(part.peaks) for part in parts])
    strange.learn([_tensor(part.novelty) for part in parts])
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.with_also(part)
    return replace(
        whole,
        scores=_ranks(_standard(images, [part.scores for part in parts])),
        peaks=_standard(places, [part.peaks for part in parts]),
        medians=_standard(places, [part.medians for part in parts]),
        novelty=_ranks(_standard(strange, [part.novelty for part in parts])),
        regions=None,
    )


def _standard(tally: Tally, parts: Sequence[np.ndarray]) -> np.ndarray:
    """Numbers of each fold's images in the units of its own model, (n,)."""
    units = zip(parts, tally.middle.tolist(), tally.spread.tolist(), strict=True)
    return np.concatenate([(part - middle) / spread for part, middle, spread in units])


def _ranks(values: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(values))
    ranks[values.argsort(kind="stable")] = np.arange(1, len(values) + 1)
    return ranks


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values).float()
