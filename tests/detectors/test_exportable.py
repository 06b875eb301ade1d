"""Detectors that route images to what is known of their product, and aligners on them, as one graph in two engines."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from onnxscript.optimizer import optimize_ir
from test_conformance import PRODUCTS, SHAPES, SMALL, defective, normal
from torch import Tensor, nn

from exported import ENGINES, Engine, exported
from planted import labelled
from unispect.align.aligners import ALIGNERS
from unispect.align.base import Aligner, Pairs, Statistics, view, width
from unispect.decide.unknown import Novelty
from unispect.detectors.base import Detector, Recipe, StatisticalDetector
from unispect.detectors.methods import build, sections
from unispect.fit import Labelled, fit, learn
from unispect.inspector import complete
from unispect.types import Features, Scores

BATCHES = (1, 2, 5)
BRIEF = Recipe(steps=4, images=12, places=2, checks=1)
FEW = 3  # images of the last product: what is known of the products differs in size


@dataclass(frozen=True)
class Case:
    """A method and its options, with an aligner after it or none."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    aligner: str = ""
    alignment: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("hgad", {"blocks": 1}),
    Case("hgad", {"blocks": 1, "score": "aligned", "likelihood": "marginal", "position": 0}),
    Case("hgad", {"blocks": 1, "score": "aligned", "covariance": "place"}),
    Case("hgad", {"blocks": 1, "score": "gated", "covariance": "identity", "likelihood": "marginal"}),
    Case("hgad", {"blocks": 1, "score": "product", "start": "published", "covariance": "identity", "criterion": "entropy"}),
    Case("opca"),
    Case("opca", {"image": "top", "per_product": False, "components": "all"}),
    Case("opca", {"mode": "pooled", "components": "pca", "variance": 0.95}, "cada"),
    Case("neighbours"),
    Case("neighbours", {"support": 50, "neighbours": 1}, "cada-b"),
    Case("ensemble", {}, "cada", {"gap": "plain", "balanced": False, "score": "map", "blur": True, "grid": 3, "kernel": 3}),
    Case("ensemble", {"members": ["opca"], "weights": [1.0]}),
]
every_case = pytest.mark.parametrize(
    "case", CASES, ids=[f"{case.method}{case.aligner and '-' + case.aligner}-{n}" for n, case in enumerate(CASES)]
)


class Whole(nn.Module):
    """Levels of features -> image score, map, novelty and, where they are known, products, as a graph gives them."""

    def __init__(self, detector: Detector, aligner: Aligner | None, novelty: Novelty) -> None:
        super().__init__()
        self.detector, self.aligner, self.novelty = detector, aligner, novelty

    @torch.no_grad()
    def forward(self, *levels: Tensor) -> tuple[Tensor, ...]:
        features = list(levels)
        scores = self.detector(features)
        if self.aligner is not None:
            scores = self.aligner(features, scores)
        found = (scores.image, scores.maps, self.novelty(features), scores.products)
        return tuple(value for value in found if value is not None)


def uneven() -> tuple[Features, Tensor]:
    """Normal images, of the last product few."""
    levels, product = normal(60, 1)
    kept = (product < PRODUCTS - 1) | (torch.arange(60) < FEW * PRODUCTS)
    return [level[kept] for level in levels], product[kept]


def learnt(case: Case) -> Whole:
    levels, product = uneven()
    own = SMALL[case.method] | case.options
    given = {name: SMALL[name] for name in sections(case.method, own)} | {case.method: own}
    detector = build(complete({"method": case.method, "seed": 0} | given), SHAPES, PRODUCTS, None)
    teach(detector, labelled(levels, product.numpy()))
    novelty = Novelty(tuple(channels for channels, _, _ in SHAPES), PRODUCTS)
    novelty.update(levels, product)
    novelty.finish()
    return Whole(detector, aligned(case, detector) if case.aligner else None, novelty).eval()


def teach(detector: Detector, images: Labelled) -> None:
    if isinstance(detector, StatisticalDetector):
        learn(detector, images)
    else:
        levels, product = normal(24, 2)
        fit(detector, images, labelled(levels, product.numpy()), BRIEF, 0)  # type: ignore[arg-type]


def aligned(case: Case, detector: Detector) -> Aligner:
    levels, product = normal(24, 3)
    scores: Scores = detector(levels)
    aligner = ALIGNERS[case.aligner](channels=width(levels, scores), products=PRODUCTS, **{"steps": 20} | case.alignment)
    aligner.learn(Pairs(view(levels, scores, aligner.grid), Statistics.of(scores), product))
    return aligner


def images(count: int) -> Features:
    """Normal ones with defects among them."""
    good, spoilt = normal(count, 4)[0], defective(count, 5)[0]
    marred = torch.arange(count) % 2 == 1
    return [torch.where(marred[:, None, None, None], other, level) for level, other in zip(good, spoilt, strict=True)]


@every_case
def test_the_graph_says_what_the_detector_says(case: Case, tmp_path: Path) -> None:
    model = learnt(case)
    path = exported(model, tuple(images(2)), tmp_path / "model.onnx", len(SHAPES))
    engines = [Engine(path, kind) for kind in ENGINES]
    spreads = [float(value.std()) for value in model(*images(20))]  # of many images: that of one is none
    for count in BATCHES:
        expected = model(*images(count))
        for engine in engines:
            for found, value, spread in zip(engine(*images(count)), expected, spreads, strict=True):
                torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4 * spread + 1e-7)


def test_what_is_known_of_the_products_is_stacked_once_and_not_for_every_image(tmp_path: Path) -> None:
    path = exported(learnt(Case("neighbours")), tuple(images(2)), tmp_path / "model.onnx", len(SHAPES))
    model = onnx_ir.load(path)
    optimize_ir(model, input_size_limit=2**31, output_size_limit=2**31)
    constant = [
        node.name for node in model.graph if all(value is not None and value.is_initializer() for value in node.inputs)
    ]
    assert not constant
