import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unispect.detectors.patchcore import PatchCore
from unispect.nn.patches import averaging, patch_weights


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 4), (10, 4), (7, 7), (3, 8), (1008, 384), (72, 32)])
def test_averaging_is_adaptive_pooling(inputs: int, outputs: int) -> None:
    expected = F.adaptive_avg_pool1d(torch.eye(inputs, dtype=torch.float64)[None], outputs)[0].T
    np.testing.assert_allclose(averaging(inputs, outputs).toarray(), expected.numpy(), atol=1e-15)


@pytest.mark.parametrize("dimension", [10, 12, 50])
@pytest.mark.parametrize("side", [1, 3])
def test_one_convolution_a_level_makes_the_same_patches(side: int, dimension: int) -> None:
    shapes = [(5, 6, 4), (7, 3, 2), (4, 3, 2)]
    detector = PatchCore(shapes, 1, dimension=dimension, neighbourhood=side)
    draws = torch.Generator().manual_seed(0)
    levels = [torch.randn(3, *shape, generator=draws) for shape in shapes]
    torch.testing.assert_close(detector.convolved(levels), detector.embed(levels), rtol=1e-5, atol=1e-6)


def test_a_level_has_a_say_in_its_share_of_the_channels_alone() -> None:
    weights = patch_weights([5, 7], 3, 12)
    assert [(first, tuple(kernel.shape)) for first, kernel in weights] == [(0, (6, 5, 3, 3)), (6, (6, 7, 3, 3))]
