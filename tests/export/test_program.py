"""Preparation as a graph against Pillow, in torch, onnxruntime and OpenVINO."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image

from unispect.data.loader import Preparation
from unispect.export.onnx import OPSET, _graph
from unispect.export.program import Prepared

CASES = {
    "squash": (Preparation(48), False),
    "squash by products": (Preparation(48), True),
    "crop": (Preparation(48, "crop"), False),
    "lanczos": (Preparation(48, filter="lanczos"), False),
    "crop, lanczos": (Preparation(40, "crop", "lanczos"), True),
}
SIZES = [(70, 90), (91, 60), (20, 31), (300, 201), (48, 300), (300, 120), (300, 20)]
every_case = pytest.mark.parametrize("case", CASES)
Run = Callable[[np.ndarray], np.ndarray]


def image(height: int, width: int) -> np.ndarray:
    """Noise of some smoothness, as images have it."""
    small = np.random.default_rng(height).integers(0, 256, (height // 3 + 1, width // 3 + 1, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


@lru_cache
def runs(case: str) -> dict[str, Run]:
    """The same graph in every library that reads it."""
    preparation, products = CASES[case]
    part = Prepared(preparation, products)
    model = _graph(part, torch.zeros(2, 51, 53, 3, dtype=torch.uint8), {0: "n", 1: "h", 2: "w"}, "images", ["prepared"])
    assert [entry.version for entry in model.opset_import] == [OPSET]
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found: dict[str, Run] = {
        "torch": lambda images: part(torch.from_numpy(images)).numpy(),
        "onnxruntime": lambda images: session.run(None, {"images": images})[0],
    }
    if part.products:
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found["openvino"] = lambda images: compiled([images])[0].copy()
    return found


@every_case
def test_it_prepares_as_pillow_does(case: str) -> None:
    preparation = CASES[case][0]
    for height, width in SIZES:
        given = image(height, width)
        expected = preparation.image(given).astype(np.float32)
        for name, run in runs(case).items():
            apart = np.abs(run(given[None])[0] - expected)
            assert apart.max() <= 1, name
            # Sides in simple ratios have many values at the half of a grey level; the wrong order of passes gives 0.2.
            assert (apart > 0).mean() < 0.06, (name, height, width)


@every_case
def test_an_image_of_the_size_comes_out_as_it_is(case: str) -> None:
    size = CASES[case][0].size
    given = image(size, size)
    for run in runs(case).values():
        np.testing.assert_array_equal(run(given[None])[0], given.transpose(2, 0, 1))


@every_case
def test_several_at_once_are_as_alone(case: str) -> None:
    given = np.stack([image(60, 70), image(60, 70)[::-1], image(60, 70)[:, ::-1]])
    for run in runs(case).values():
        together = run(np.ascontiguousarray(given))
        alone = np.concatenate([run(np.ascontiguousarray(one[None])) for one in given])
        assert np.abs(together - alone).max() <= 1


def test_constants_stay_constant() -> None:
    for case in CASES:
        for grey in (0, 128, 255):
            given = np.full((1, 37, 83, 3), grey, np.uint8)
            for run in runs(case).values():
                assert (run(given) == grey).all()
