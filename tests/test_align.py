"""A whole model with an aligner: what it learns from, how it is kept, and that labels have no say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unispect.align.base import Pairs
from unispect.align.cada import CADA
from unispect.align.perclass import PerClass
from unispect.config import merge
from unispect.data.factory import write_products
from unispect.data.folder import read_folder
from unispect.errors import ConfigError, StoreError
from unispect.evaluation import evaluate
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector, complete
from unispect.types import Finding

SIDE = 64
BASE: dict[str, Any] = {
    "preparation": {"size": SIDE},
    "features": {"engine": "torch"},
    "decision": {"false_alarm_rate": 0.2},
    "cada": {"steps": 40, "hidden": 16},
    "cada-b": {"steps": 40, "hidden": 16},
}
PATCHCORE = merge(BASE, {"method": "patchcore", "patchcore": {"dimension": 32, "max_bank_vectors": 300, "map_side": SIDE}})
REVDIST = merge(
    BASE,
    {
        "method": "revdist",
        "revdist": {"depths": [1, 1, 1], "map_side": SIDE},
        "training": {"steps": 3, "images": 4, "checks": 1},
    },
)
MODELS = {
    "patchcore-cada": PATCHCORE | {"aligner": "cada"},
    "patchcore-cada-b": PATCHCORE | {"aligner": "cada-b"},
    "patchcore-held-out": merge(PATCHCORE, {"aligner": "cada", "split": {"held_out": 0.2, "folds": 0}}),
    "revdist-cada": REVDIST | {"aligner": "cada"},
    "revdist-folds": merge(REVDIST, {"aligner": "cada", "split": {"folds": 2}}),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products; no test changes them."""
    return write_products(tmp_path_factory.mktemp("products"), 30, 3, 1, SIDE, products=["fabric", "gear"])


@pytest.fixture(scope="module")
def models(products: Path, cache: FeatureCache) -> dict[str, Inspector]:
    return {name: Inspector.fit(products, config, cache=cache) for name, config in MODELS.items()}


def asked(folder: Path) -> Any:
    return [record for record in read_folder(folder) if record.split == "test"]


def scores(inspector: Inspector, folder: Path) -> np.ndarray:
    found = [finding for _, finding in inspector.findings(asked(folder)) if isinstance(finding, Finding)]
    return np.array([finding.score for finding in found])


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_scores_the_same(name: str, models: dict[str, Inspector], products: Path, tmp_path: Path) -> None:
    loaded = Inspector.load(models[name].save(tmp_path / "model"))
    assert np.array_equal(scores(loaded, products), scores(models[name], products))
    assert loaded.config == models[name].config
    assert f"brought to one scale by: {models[name].config['aligner']}, learnt" in loaded.card()


@pytest.mark.parametrize("name", ["patchcore-cada", "revdist-cada"])
def test_the_same_seed_learns_the_same(name: str, models: dict[str, Inspector], products: Path, cache: FeatureCache) -> None:
    again = Inspector.fit(products, MODELS[name], cache=cache)
    assert np.array_equal(scores(again, products), scores(models[name], products))


@pytest.mark.parametrize("name", MODELS)
def test_the_threshold_is_that_of_aligned_scores(name: str, models: dict[str, Inspector], products: Path) -> None:
    """The calibration images, scored anew as any image is, give the scores that the threshold stands on."""
    inspector = models[name]
    anew = [finding for _, finding in inspector.findings(inspector.split.calibration)]
    assert np.allclose(
        [finding.score for finding in anew if isinstance(finding, Finding)],
        inspector.calibration.scores,
        rtol=1e-2,
        atol=2e-2,
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_score_before_is_kept_beside(name: str, models: dict[str, Inspector], products: Path) -> None:
    result = evaluate(models[name], products)
    assert result.unaligned is not None
    assert not np.allclose(result.unaligned, result.scores)


def test_an_aligner_leaves_the_detector_as_it_is(models: dict[str, Inspector], products: Path, cache: FeatureCache) -> None:
    plain = Inspector.fit(products, PATCHCORE, cache=cache)
    state = models["patchcore-cada"].detector.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.detector.state_dict().items())
    before = evaluate(models["patchcore-cada"], products).unaligned
    assert before is not None
    np.testing.assert_allclose(before, scores(plain, products), rtol=1e-6)


# What it learns from


class Listening:
    """Keeps the pairs that an aligner is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pairs: list[Pairs] = []
        learn = CADA.learn

        def listen(aligner: CADA, pairs: Pairs) -> None:
            self.pairs.append(pairs)
            learn(aligner, pairs)

        monkeypatch.setattr(CADA, "learn", listen)


@pytest.mark.parametrize(("name", "role"), [("patchcore-cada", "train"), ("patchcore-held-out", "held_out")])
def test_every_image_is_scored_by_a_detector_that_has_not_learnt_from_it(
    name: str, role: str, products: Path, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PatchCore without a coreset gives 0 to an image that it has learnt from."""
    heard = Listening(monkeypatch)
    own = {"patchcore": {"coreset": 1.0, "max_bank_vectors": 20000, "sigma": 0.0}}
    inspector = Inspector.fit(products, merge(MODELS[name], own), cache=cache)
    (pairs,) = heard.pairs
    assert len(pairs.product) == len(getattr(inspector.split, role))
    assert float(pairs.statistics.score.min()) > 0.01
    learnt = evaluate_on_train(inspector)
    assert max(learnt) < 0.01


def evaluate_on_train(inspector: Inspector) -> list[float]:
    """Raw scores of what was learnt from."""
    found = [finding for _, finding in inspector.findings(inspector.split.train[:4])]
    return [float(finding.unaligned) for finding in found if isinstance(finding, Finding) and finding.unaligned is not None]


def test_a_bottleneck_is_read_of_the_detector_that_is_kept(
    products: Path, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of two folds have nothing in common with it."""
    heard = Listening(monkeypatch)
    inspector = Inspector.fit(products, MODELS["revdist-folds"], cache=cache)
    (pairs,) = heard.pairs
    features, _ = inspector.features(inspector.split.train, cache=cache)
    with torch.inference_mode():
        contexts = [inspector.detector(levels).context.mean((2, 3)) for _, levels in features.batches(16)]
    expected = torch.cat(contexts)
    for row in pairs.views[:, :, 0, 0]:
        assert float((expected - row).abs().amax(1).min()) < 1e-3
    assert isinstance(inspector.aligner, CADA)
    assert inspector.facts["view"] == 224


def test_many_images_are_taken_evenly(products: Path, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Listening(monkeypatch)
    monkeypatch.setattr("unispect.inspector.MOST_PAIRS", 12)
    Inspector.fit(products, MODELS["patchcore-cada"], cache=cache)
    assert len(heard.pairs[0].product) == 12
    assert set(heard.pairs[0].product.tolist()) == {0, 1}


# Labels


def test_products_have_no_say_in_cada(products: Path, cache: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learnt with other labels, from the same folds: the same regressor."""
    heard = Listening(monkeypatch)
    Inspector.fit(products, MODELS["patchcore-held-out"], cache=cache)
    (pairs,) = heard.pairs
    states = []
    for product in (pairs.product, torch.zeros_like(pairs.product)):
        aligner = CADA(pairs.views.shape[1], 2, steps=20)
        aligner.learn(replace(pairs, product=product))
        states.append(aligner.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_told_the_product_cada_b_is_cada_a(models: dict[str, Inspector], products: Path) -> None:
    inspector = models["patchcore-cada-b"]
    assert inspector.takes_product
    assert not models["patchcore-cada"].takes_product
    aligner = inspector.aligner
    assert isinstance(aligner, PerClass)
    records = asked(products)
    wrong = [replace(record, product="gear") for record in records]
    rows = zip(inspector.findings_given(records), inspector.findings_given(wrong), strict=True)
    for (record, told, given), (_, still, misled) in rows:
        assert isinstance(told, Finding)
        assert isinstance(still, Finding)
        assert told.score == still.score
        assert given is not None
        assert misled is not None
        assert given.unaligned is not None
        product = inspector.products.index(str(record.product))
        middle, width = (float(aligner.get_buffer(name)[product]) for name in ("middle", "width"))
        assert given.score == pytest.approx((given.unaligned - middle) / width, rel=1e-4, abs=1e-4)
        assert (misled.score == given.score) is (record.product == "gear")


def test_unlabelled_products_need_no_names(products: Path, cache: FeatureCache) -> None:
    records = [replace(record, product=None) for record in read_folder(products)]
    inspector = Inspector.fit(records, MODELS["patchcore-cada"], cache=cache)
    assert np.isfinite(scores(inspector, products)).all()
    assert not inspector.takes_product


# Settings and limits


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"aligner": "cado"}, "unknown aligner 'cado'.*cada"),
        (
            {"method": "revdist", "aligner": "cada", "split": {"held_out": 0.0}},
            r"set split\.held_out above 0, or set split\.folds to 2 or more",
        ),
        ({"aligner": "cada", "split": {"folds": 0}}, r"hgad learns from held-out ones, so set split\.folds to 2 or more"),
        ({"split": {"folds": 1}}, r"\[split\] folds: got 1, expected 0 or at least 2"),
        ({"cada": 3}, r"cada: got 3, expected a table \[cada\]"),
        ({"aligner": "cada", "cada": {"step": 3}}, r"\[cada\] unknown setting 'step'"),
    ],
)
def test_settings_that_cannot_be(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        complete(table)


def test_folds_are_the_default_of_what_learns_in_passes_or_from_held_out_images() -> None:
    assert complete({"method": "patchcore", "aligner": "cada"})["split"]["folds"] == 4
    assert complete({"method": "patchcore"})["split"]["folds"] == 0
    assert complete({"method": "hgad", "aligner": "cada"})["split"]["folds"] == 4
    assert complete({"method": "revdist", "aligner": "cada"})["split"]["folds"] == 0
    table = complete({"method": "patchcore", "aligner": "cada-b"})
    assert complete(table) == table
    assert "cada" not in table


def test_products_cannot_come_and_go(products: Path, cache: FeatureCache) -> None:
    inspector = Inspector.fit(products, merge(BASE, {"method": "neighbours", "aligner": "cada"}), cache=cache)
    with pytest.raises(ConfigError, match="aligner 'cada' learns all products as one"):
        inspector.without_product("gear")


def test_a_model_whose_aligner_is_damaged_is_an_error(models: dict[str, Inspector], tmp_path: Path) -> None:
    inspector = models["patchcore-cada"]
    inspector.aligner, kept = CADA(7, 2), inspector.aligner
    try:
        path = inspector.save(tmp_path / "model")
    finally:
        inspector.aligner = kept
    with pytest.raises(StoreError, match="the weights are not those of method 'patchcore'"):
        Inspector.load(path)
