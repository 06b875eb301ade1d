"""Cross-conformal calibration: the p-value of the definition, its promise by simulation, and whole models."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom

from unispect import runtime
from unispect.calibrate import recalibrated, redecided
from unispect.cross import Crossed, CrossedNovelty, Tally
from unispect.data.factory import write_products
from unispect.data.folder import read_folder
from unispect.decide.conformal import ConformalRule
from unispect.errors import CalibrationError, ConfigError, DataError, ExportError
from unispect.export.bundle import export
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector, complete
from unispect.preflight import plan
from unispect.types import Finding

SMALL: dict[str, Any] = {
    "method": "opca",
    "preparation": {"size": 64},
    "features": {"engine": "torch"},
    "decision": {"false_alarm_rate": 0.05},
    "split": {"cross": 3},
    "opca": {"map_side": 64},
}


@pytest.mark.parametrize("values", [3, 10**6], ids=["ties", "no ties"])
def test_a_rule_on_counts_gives_the_p_value_of_the_definition(values: int) -> None:
    random = np.random.default_rng(values)
    parts = [random.integers(values, size=size) / 8 for size in (7, 5, 9)]
    tally = Tally(3)
    tally.learn([torch.tensor(part, dtype=torch.float32) for part in parts])
    asked = random.integers(values, size=(3, 200)) / 8
    counted = tally(torch.tensor(asked, dtype=torch.float32)).numpy()
    rule, n = ConformalRule(np.arange(1, 22)), 21
    for scores, count in zip(asked.T, counted, strict=True):
        as_high = sum(int((part >= score).sum()) for part, score in zip(parts, scores, strict=True))
        assert rule.p_value(float(count)) == pytest.approx((1 + as_high) / (n + 1))


def test_the_fraction_grows_with_the_scores_and_stays_one() -> None:
    tally = Tally(2)
    tally.learn([torch.arange(5.0), torch.arange(5.0)])
    high = tally(torch.tensor([[5.0, 50.0, 5e9], [5.0, 50.0, 5e9]]))
    assert high.tolist() == sorted(high.tolist())
    assert all(10 < value < 11 for value in high.tolist())
    assert tally(torch.tensor([[-5e9], [-5e9]])).item() > 0


def test_the_promise_holds_by_simulation() -> None:
    """The detector is the distance to the mean of what it learnt from, which few images make unlike for those left out."""
    random, rate, rounds, n, folds, size = np.random.default_rng(0), 0.1, 2000, 20, 5, 8
    alarms = naive = 0
    for _ in range(rounds):
        images = random.normal(size=(n + 1, size))
        known, new = images[:n], images[n]
        part = np.arange(n) % folds
        means = np.stack([known[part != fold].mean(0) for fold in range(folds)])
        tally = Tally(folds)
        tally.learn([
            torch.tensor(np.linalg.norm(known[part == fold] - means[fold], axis=1), dtype=torch.float32)
            for fold in range(folds)
        ])  # fmt: skip
        counted = tally(torch.tensor(np.linalg.norm(new - means, axis=1), dtype=torch.float32)[:, None])
        alarms += float(counted) > ConformalRule(np.arange(1, n + 1)).threshold(rate)
        own = np.linalg.norm(known - known.mean(0), axis=1)
        naive += np.linalg.norm(new - known.mean(0)) > ConformalRule(own).threshold(rate)
    assert alarms <= binom.ppf(0.999, rounds, 2 * rate + (1 - folds / n) / (folds + 1))  # what is proven
    assert alarms <= binom.ppf(0.999, rounds, rate) + 0.02 * rounds  # what is usual
    assert naive > 1.5 * alarms  # calibrating on what was learnt from does not do


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), 12, 3, 2, 80, products=["fabric", "gear"])


@pytest.fixture(scope="module")
def inspector(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return Inspector.fit(products, SMALL, cache=FeatureCache(tmp_path_factory.mktemp("cache")))


def test_all_images_are_learnt_from_and_all_calibrate(inspector: Inspector, products: Path) -> None:
    assert len(inspector.calibration) == 24
    assert sorted(inspector.calibration.scores.tolist()) == list(range(1, 25))
    assert len(inspector.learnt) == 24
    assert isinstance(inspector.detector, Crossed)
    assert isinstance(inspector.novelty, CrossedNovelty)
    assert len(inspector.detector.detectors) == 3
    assert inspector.decision.guarantee == "cross"
    assert "at most 10.00% and a term that falls" in inspector.card()
    split = {**SMALL, "split": {}}
    with pytest.raises(CalibrationError, match="4 calibration images cannot support"):
        Inspector.fit(products, split)


def test_no_image_is_scored_by_a_model_that_learnt_from_it(inspector: Inspector, products: Path) -> None:
    """Scored by all models, images that were learnt from look more normal than their own scores say."""
    learnt = [record.path for record in read_folder(products) if record.split == "train"]
    found = [inspector.inspect(path) for path in learnt]
    again = [one.score for one in found if isinstance(one, Finding)]
    assert np.mean(again) < np.mean(inspector.calibration.scores)


def test_findings_survive_saving_and_exporting(inspector: Inspector, products: Path, tmp_path: Path) -> None:
    paths = [record.path for record in read_folder(products) if record.split == "test"]
    before = [inspector.inspect(path) for path in paths]
    inspector.save(tmp_path / "m")
    export(inspector, tmp_path / "x")
    for model in (Inspector.load(tmp_path / "m"), runtime.Inspector.load(tmp_path / "x")):
        for path, one in zip(paths, before, strict=True):
            found = model.inspect(path)
            assert isinstance(found, Finding)
            assert isinstance(one, Finding)
            assert found.score == pytest.approx(one.score, abs=1e-3)
            assert (found.anomalous, found.unknown, found.product) == (one.anomalous, one.unknown, one.product)
            np.testing.assert_allclose(found.map, one.map, atol=2e-3)
    with pytest.raises(ExportError, match=r"split.cross has no calibration images"):
        export(inspector, tmp_path / "y", int8=True)


def test_methods_with_training_steps_and_a_checkpoint_are_crossed_too(products: Path, tmp_path: Path) -> None:
    steps = {"training": {"steps": 4, "checks": 2}, "hgad": {"map_side": 64, "blocks": 2}, "method": "hgad"}
    known = {name: value for name, value in SMALL.items() if name != "opca"} | steps | {"split": {"cross": 2}}
    place = tmp_path / "work" / "checkpoint.safetensors"
    model = Inspector.fit(products, known, cache=FeatureCache(tmp_path / "cache"), checkpoint=place)
    assert len(model.calibration) == 24
    assert not place.exists()


def test_clusters_are_no_products_of_several_models(products: Path, tmp_path: Path) -> None:
    records = [replace(record, product=None) for record in read_folder(products)]
    with pytest.raises(DataError, match=r"split.cross: products without names are other clusters in each part"):
        Inspector.fit(records, SMALL, cache=FeatureCache(tmp_path))


def test_defects_are_found(inspector: Inspector, products: Path) -> None:
    test = [record for record in read_folder(products) if record.split == "test"]
    scores = {label: [inspector.inspect(one.path).score for one in test if one.label == label] for label in (0, 1)}  # type: ignore[union-attr]
    assert np.mean(scores[1]) > np.mean(scores[0])


def test_other_images_make_it_an_ordinary_promise(inspector: Inspector, tmp_path: Path) -> None:
    new = read_folder(write_products(tmp_path, 12, 1, 0, 80, seed=5, products=["fabric", "gear"]))
    change = recalibrated(inspector, new)
    assert change.after.judge.decision.guarantee == "image"
    with pytest.raises(ConfigError, match="which cannot become 'product' by the images that it has"):
        redecided(inspector, {"guarantee": "product"})
    with pytest.raises(ConfigError, match="which cannot become 'cross'"):
        redecided(change.after, {"guarantee": "cross"})
    assert redecided(inspector, {"false_alarm_rate": 0.1}).after.judge.decision.guarantee == "cross"


def test_what_cannot_be_is_told(inspector: Inspector, products: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected split.cross, the number of parts"):
        complete({"decision": {"guarantee": "cross"}})
    with pytest.raises(ConfigError, match=r"split.cross=3: cross-conformal calibration has no promise for each group"):
        complete({"split": {"cross": 3}, "decision": {"guarantee": "group"}})
    with pytest.raises(ConfigError, match="cross: got 1, expected 0 or at least 2"):
        complete({"split": {"cross": 1}})
    with pytest.raises(DataError, match=r"split.cross=50: 24 images are too few for so many parts"):
        Inspector.fit(products, SMALL | {"split": {"cross": 50}})
    with pytest.raises(ConfigError, match=r"split.cross: what several models take is not predicted"):
        plan(products, SMALL)
    with pytest.raises(ConfigError, match=r"split.cross: the model is several"):
        inspector.without_product("gear")
