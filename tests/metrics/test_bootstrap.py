"""Weighted metrics against scikit-learn's, weights that depend on the image alone, intervals that cover."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from unispect.metrics import regions
from unispect.metrics.bootstrap import PixelReplicates, image_replicates, interval, weights
from unispect.metrics.streaming import keys, middles


def sample(images: int, ties: bool, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 2, images)
    scores = random.normal(size=images) + labels
    return np.round(scores) if ties else scores, labels


def test_weights_are_poisson_and_depend_on_seed_and_image_alone() -> None:
    whole = weights(50, 400, seed=3)
    assert whole.shape == (400, 50)
    assert whole.dtype == np.uint8
    assert np.array_equal(whole[:, 20:], weights(30, 400, seed=3, start=20))
    assert not np.array_equal(whole, weights(50, 400, seed=4))
    assert whole.mean() == pytest.approx(1.0, abs=0.03)
    assert whole.var() == pytest.approx(1.0, abs=0.05)
    assert abs(np.corrcoef(whole[:, :10].T)[0, 1]) < 0.2


@pytest.mark.parametrize("ties", [False, True])
def test_each_replicate_equal_to_scikit_learn_with_sample_weights(ties: bool) -> None:
    scores, labels = sample(60, ties)
    drawn = weights(60, 25)
    found = image_replicates(scores, labels, drawn)
    for row, weight in enumerate(drawn):
        assert found["image_auroc"][row] == pytest.approx(roc_auc_score(labels, scores, sample_weight=weight), abs=1e-12)
        ap = average_precision_score(labels, scores, sample_weight=weight)
        assert found["image_ap"][row] == pytest.approx(ap, abs=1e-12)
        precision, recall, _ = precision_recall_curve(labels, scores, sample_weight=weight)
        some = precision + recall > 0
        f1 = (2 * precision[some] * recall[some] / (precision + recall)[some]).max()
        assert found["image_f1max"][row] == pytest.approx(f1, abs=1e-12)
        alarms, detected, _ = roc_curve(labels, scores, sample_weight=weight, drop_intermediate=False)
        assert found["detection_at_1"][row] == pytest.approx(detected[alarms <= 0.01].max(), abs=1e-12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, labels = sample(40, True)
    drawn = weights(40, 30)
    whole = image_replicates(scores, labels, drawn)
    monkeypatch.setattr("unispect.metrics.bootstrap.CHUNK", 100)
    for name, values in image_replicates(scores, labels, drawn).items():
        assert np.array_equal(values, whole[name], equal_nan=True)


@pytest.mark.parametrize("label", [0, 1])
def test_a_class_without_weight_gives_no_number(label: int) -> None:
    found = image_replicates(np.arange(5.0), np.full(5, label), weights(5, 10))
    assert all(np.isnan(values).all() for values in found.values())


def maps(count: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    masks = np.zeros((count, 20, 20), bool)
    masks[::2, 3:9, 4:12] = masks[::4, 14:17, 2:5] = True
    return (random.normal(size=masks.shape) + 1.2 * masks).astype(np.float32), masks


def replicated(drawn: np.ndarray, scores: np.ndarray, masks: np.ndarray) -> PixelReplicates:
    found = PixelReplicates(len(drawn))
    for number, (one, mask) in enumerate(zip(scores, masks, strict=True)):
        found.add(one, mask, drawn[:, number])
    return found


def test_pixel_replicates_equal_to_metrics_of_the_repeated_images() -> None:
    scores, masks = maps(10)
    drawn = weights(10, 20)
    found = replicated(drawn, scores, masks).metrics()
    binned = middles(keys(scores, 5), 5).reshape(scores.shape)
    for row, weight in enumerate(drawn):
        some, truth = np.repeat(binned, weight, axis=0), np.repeat(masks, weight, axis=0)
        assert found["pixel_auroc"][row] == pytest.approx(roc_auc_score(truth.ravel(), some.ravel()), abs=1e-10)
        assert found["pixel_ap"][row] == pytest.approx(average_precision_score(truth.ravel(), some.ravel()), abs=1e-10)
        assert found["aupro"][row] == pytest.approx(regions.aupro(some, truth), abs=0.02)


def test_pixel_replicates_add_up() -> None:
    scores, masks = maps(8)
    drawn = weights(8, 15)
    whole = replicated(drawn, scores, masks)
    parts = replicated(drawn[:, :3], scores[:3], masks[:3]).merged(replicated(drawn[:, 3:], scores[3:], masks[3:]))
    for name, values in whole.metrics().items():
        assert np.allclose(values, parts.metrics()[name], atol=1e-12)
    assert whole.points()["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), scores.ravel()), abs=0.01)
    with pytest.raises(ValueError, match="another number"):
        whole.merged(PixelReplicates(3))


def test_interval_is_moved_clipped_or_missing() -> None:
    drawn = np.linspace(0.5, 0.7, 201)
    assert interval(drawn, 0.6, 0.6) == pytest.approx((0.505, 0.695))
    assert interval(drawn, 0.65, 0.6) == pytest.approx((0.555, 0.745))
    assert interval(drawn + 0.3, 0.9, 0.9)[1] == pytest.approx(0.995)
    assert interval(drawn + 0.4, 1.0, 1.0)[1] == 1.0
    assert interval(drawn - 0.55, 0.05, 0.05) == pytest.approx((0.0, 0.145))
    few = np.where(np.arange(201) < 30, np.nan, drawn)
    assert np.isnan(interval(few, 0.6, 0.6)).all()
    assert np.isnan(interval(drawn, float("nan"), 0.6)).all()
