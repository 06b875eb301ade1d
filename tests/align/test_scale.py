"""The alignment itself against the paper's formulas: Eq. 1 and 5, the smooth L1 loss, the blur and the count of places."""

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from torch import Tensor

from unispect.align.base import Statistics
from unispect.align.cada import CADA
from unispect.align.scale import Output, Scale, smoothed
from unispect.errors import ConfigError
from unispect.nn.maps import top_mean
from unispect.types import Scores


def maps(count: int = 4, side: int = 12, seed: int = 0) -> Tensor:
    return 3 + 2 * torch.rand(count, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own(scores: Scores) -> Scale:
    """Each image under its own statistics."""
    known = Statistics.of(scores)
    return Scale(known.level, known.reach("max"), known.score, torch.ones_like(known.score))


def test_a_map_under_its_own_statistics_has_mean_0_and_highest_place_1() -> None:
    scores = Scores(torch.zeros(4), maps())
    aligned = Output("map", 0.01, False)(scores, own(scores), None)
    torch.testing.assert_close(aligned.maps.mean((1, 2)), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(aligned.maps.amax((1, 2)), torch.ones(4, dtype=torch.float64), atol=1e-12, rtol=0)
    assert torch.equal(aligned.image, aligned.maps.flatten(1).amax(1))  # 1 % of 144 places is one


@pytest.mark.parametrize("blur", [False, True])
def test_affine_changes_that_the_statistics_follow_do_not_show(blur: bool) -> None:
    scores = Scores(torch.zeros(4), maps())
    moved = Scores(scores.image, 0.1 * scores.maps - 7)
    output = Output("map", 0.05, blur)
    one, other = output(scores, own(scores), None), output(moved, own(moved), None)
    torch.testing.assert_close(one.maps, other.maps, atol=1e-12, rtol=0)
    torch.testing.assert_close(one.image, other.image, atol=1e-12, rtol=0)


def test_the_blur_is_the_published_kernel_with_zeros_outside() -> None:
    kernel = np.array([0.1876, 0.2061, 0.2126, 0.2061, 0.1876])
    image = maps(1)[0]
    expected = correlate1d(correlate1d(image.numpy(), kernel, 0, mode="constant"), kernel, 1, mode="constant")
    torch.testing.assert_close(smoothed(image[None])[0], torch.from_numpy(expected), atol=2e-3, rtol=0)
    spot = torch.zeros(1, 11, 11, dtype=torch.float64)
    spot[0, 5, 5] = 1
    found = smoothed(spot)[0]
    assert float(found.sum()) == pytest.approx(1)
    spread = float((found.sum(0) * (torch.arange(11) - 5) ** 2).sum()) ** 0.5
    assert spread == pytest.approx(1.38, abs=0.005)  # the nominal sigma of 4 is cut off


@pytest.mark.parametrize(("side", "count"), [(256, 655), (224, 501)])
def test_one_per_cent_of_the_places(side: int, count: int) -> None:
    flat = torch.arange(side * side, dtype=torch.float64)
    assert float(top_mean(flat.reshape(1, side, side), 0.01)) == pytest.approx(float(flat[-count:].mean()))


@pytest.mark.parametrize("threshold", [0.1, 10.0])
def test_the_loss_is_equation_4(threshold: float) -> None:
    aligner = CADA(4, 1, threshold=threshold)
    errors = torch.linspace(-12, 12, 101, dtype=torch.float64)
    far = errors.abs() - threshold / 2
    expected = torch.where(errors.abs() < threshold, errors.square() / (2 * threshold), far).mean()
    assert float(aligner._smooth(errors)) == pytest.approx(float(expected), rel=1e-12)


def test_sigma_stands_for_the_highest_place() -> None:
    known = Statistics.of(Scores(torch.zeros(4), maps()))
    places = maps().flatten(1).numpy()
    np.testing.assert_allclose(known.reach("sigma"), 3 * places.std(1))
    np.testing.assert_allclose(known.reach("max"), places.max(1) - places.mean(1))
    joined = Statistics.joined([known, known])
    assert torch.equal(joined.level, torch.cat([known.level, known.level]))


@pytest.mark.parametrize("score", ["median", ""])
def test_an_unknown_score_is_an_error(score: str) -> None:
    with pytest.raises(ConfigError, match="unknown score"):
        Output(score, 0.01, False)
