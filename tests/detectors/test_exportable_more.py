"""Detectors as one ONNX graph with a free batch: two engines make of it what torch does. For hgad, opca, neighbours and
ensemble see test_exportable."""

from dataclasses import replace
from pathlib import Path

import pytest
import test_conformance as conformance
import torch
from test_conformance import CASES, Case, planted

from exported import ENGINES, Engine, Fields, exported, present
from unispect.detectors.base import Detector, GradientDetector, StatisticalDetector
from unispect.detectors.patchcore import PatchCore
from unispect.fit import fit, learn

OWN = ("cflow", "draem", "fastflow", "padim", "patchcore", "recontrast", "revdist", "spade", "uniad")
MORE = [
    Case("cflow", {"clamp": "scaled_tanh"}),
    Case("fastflow", {"mixing": "rotation"}, conformance.MAPS),
    Case("patchcore", {"neighbours": 3, "index": "faiss"}),
    Case("patchcore", {"coreset": 0.01, "reweighting": "softmax"}),
    Case("spade", {"neighbours": 1}),
]
EVERY = [*(case for case in CASES if case.method in OWN), *MORE]
IDS = [f"{case.method}-{number}" for number, case in enumerate(EVERY)]


def taught(case: Case) -> Detector:
    """The detector after what is enough to give it scores."""
    conformance.CASES.append(case)
    try:
        detector = conformance.empty(len(CASES) - 1)
    finally:
        conformance.CASES.pop()
    train, held_out = planted(24, 1, case.world), planted(12, 2, case.world)
    if isinstance(detector, StatisticalDetector):
        learn(detector, train)
    else:
        assert isinstance(detector, GradientDetector)
        fit(detector, train, held_out, replace(case.recipe, steps=2, checks=0), 0)
    return detector.eval()


def images(case: Case, count: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Levels of images with the case's defect."""
    return tuple(conformance.defective(count, seed, case.defect, case.world)[0])


@pytest.mark.parametrize("case", EVERY, ids=IDS)
def test_two_engines_agree_with_torch_at_any_batch(case: Case, tmp_path: Path) -> None:
    detector = taught(case)
    detector.check_exportable()
    path = exported(Fields(detector), images(case, 2, 3), tmp_path / "model.onnx", many=True)
    for kind in ENGINES:
        engine = Engine(path, kind)
        for count in (1, 2, 5):
            levels = images(case, count, 10 + count)
            for given, expected in zip(engine(*levels), present(detector(list(levels))), strict=True):
                torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_quick_search_in_a_graph_finds_the_same_where_few_axes_hold_the_spread(tmp_path: Path) -> None:
    case = Case("patchcore", {"coreset": 1.0, "neighbours": 2})
    detector = taught(case)
    assert isinstance(detector, PatchCore)
    detector.quicken(channels=24, candidates=64)
    path = exported(Fields(detector), images(case, 2, 3), tmp_path / "model.onnx", many=True)
    levels = images(case, 5, 4)
    for given, expected in zip(Engine(path, "openvino")(*levels), present(detector(list(levels))), strict=True):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
