"""Products that come and go, while what is known of the others stays as it is, bit by bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unispect import cli
from unispect.data.factory import write_products
from unispect.data.folder import read_folder
from unispect.data.records import Record
from unispect.errors import CalibrationError, ConfigError, DataError
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector
from unispect.types import Finding

SIDE = 64
NAMES = ["fabric", "gear", "wood"]
CONFIG: dict[str, Any] = {
    "preparation": {"size": SIDE},
    "features": {"engine": "torch", "layers": ["blocks.2"], "pooled": ["blocks.4"]},
    "decision": {"false_alarm_rate": 0.2},
    "opca": {"map_side": SIDE},
    "ensemble": {"map_side": SIDE},
    "neighbours": {"map_side": SIDE, "bank_images": 12.5},
}
METHODS = ["opca", "neighbours", "ensemble"]
every_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three products; no test changes them."""
    return write_products(tmp_path_factory.mktemp("products"), 24, 3, 1, SIDE, products=NAMES)


def of(images: Path, *products: str) -> list[Record]:
    return [record for record in read_folder(images) if record.product in products]


def settings(method: str, **more: Any) -> dict[str, Any]:
    sections = {name: CONFIG[name] for name in ("preparation", "features", "decision")} | {method: CONFIG.get(method, {})}
    return {"method": method} | sections | ({"neighbours": CONFIG["neighbours"]} if method == "ensemble" else {}) | more


def fitted(images: Path, method: str, cache: FeatureCache, *products: str) -> Inspector:
    return Inspector.fit(of(images, *products), settings(method), cache=cache)


def scores(inspector: Inspector, records: list[Record]) -> list[Finding]:
    return [finding for _, finding in inspector.findings(records) if isinstance(finding, Finding)]


def same_of(one: Inspector, other: Inspector, records: list[Record]) -> bool:
    """Scores, guesses and places where maps are highest are the same bits; thresholds may differ."""
    pairs = list(zip(scores(one, records), scores(other, records), strict=True))
    assert len(pairs) == len(records)
    return all(a.score == b.score and a.product == b.product for a, b in pairs)


@every_method
def test_others_score_the_same_when_a_product_joins_leaves_or_is_replaced(
    method: str, images: Path, cache: FeatureCache
) -> None:
    two = fitted(images, method, cache, "fabric", "gear")
    tests = [record for record in of(images, "fabric", "gear") if record.split == "test"]
    three = two.with_product("wood", of(images, "wood"), cache=cache)
    assert three.products == ("fabric", "gear", "wood")
    assert same_of(two, three, tests)
    fewer = [record for record in of(images, "wood") if record.split == "train"][:12]
    other = three.with_product("wood", fewer, replace=True, cache=cache)
    assert same_of(two, other, tests)
    back = three.without_product("wood")
    assert same_of(two, back, tests)
    assert back.threshold == two.threshold
    assert back.calibration.as_dict() == two.calibration.as_dict()
    first = three.without_product("fabric")
    assert first.products == ("gear", "wood")
    assert same_of(two, first, [record for record in tests if record.product == "gear"])


@every_method
def test_a_product_that_joins_is_known_as_if_it_had_been_there(method: str, images: Path, cache: FeatureCache) -> None:
    joined = fitted(images, method, cache, "fabric", "gear").with_product("wood", of(images, "wood"), cache=cache)
    at_once = fitted(images, method, cache, *NAMES)
    tests = [record for record in of(images, *NAMES) if record.split == "test"]
    assert same_of(joined, at_once, tests)
    assert sorted(joined.calibration.scores) == pytest.approx(sorted(at_once.calibration.scores), rel=1e-6)
    guesses = [finding.product for finding in scores(joined, of(images, "wood"))]
    assert guesses.count("wood") >= len(guesses) - 1


def test_the_others_maps_stay_too(images: Path, cache: FeatureCache) -> None:
    two = fitted(images, "opca", cache, "fabric", "gear")
    three = two.with_product("wood", of(images, "wood"), cache=cache)
    records = [record for record in of(images, "gear") if record.split == "test"]
    for one, other in zip(scores(two, records), scores(three, records), strict=True):
        back = [
            found.map * (model.judge.pixel_threshold - model.calibration.median)
            for found, model in ((one, two), (other, three))
        ]
        shifted = [part + model.calibration.median for part, model in zip(back, (two, three), strict=True)]
        np.testing.assert_allclose(*shifted, rtol=1e-4, atol=1e-4)


def test_a_changed_model_is_saved_and_loaded(images: Path, cache: FeatureCache, tmp_path: Path) -> None:
    three = fitted(images, "ensemble", cache, "fabric", "gear").with_product("wood", of(images, "wood"), cache=cache)
    three.save(tmp_path / "model")
    again = Inspector.load(tmp_path / "model")
    tests = [record for record in of(images, *NAMES) if record.split == "test"]
    assert same_of(three, again, tests)
    assert again.threshold == three.threshold
    assert again.counts() == three.counts()


def test_its_images_are_seen_and_forgotten(images: Path, cache: FeatureCache) -> None:
    two = fitted(images, "opca", cache, "fabric", "gear")
    three = two.with_product("wood", of(images, "wood"), cache=cache)
    assert len(three.seen.contents) == len(two.seen.contents) + 24
    assert len(three.facts["marks"]) == len(two.facts["marks"]) + 24
    assert three.without_product("wood").seen == two.seen


def test_what_cannot_be_done_is_told(images: Path, cache: FeatureCache) -> None:
    two = fitted(images, "opca", cache, "fabric", "gear")
    with pytest.raises(ConfigError, match="'gear': the model knows it already"):
        two.with_product("gear", of(images, "gear"), cache=cache)
    with pytest.raises(ConfigError, match="'wood': the model does not know it"):
        two.with_product("wood", of(images, "wood"), replace=True, cache=cache)
    with pytest.raises(ConfigError, match="did you mean 'gear'"):
        two.without_product("gaer")
    with pytest.raises(DataError, match="none of them to learn from"):
        two.with_product("wood", [record for record in of(images, "wood") if record.split == "test"], cache=cache)
    with pytest.raises(CalibrationError, match="3 calibration images cannot support"):
        two.without_product("fabric")
    padim = Inspector.fit(of(images, "fabric", "gear"), settings("padim", padim={"dimension": 8}), cache=cache)
    with pytest.raises(ConfigError, match=r"'padim' learns all products as one.*neighbours.*opca"):
        padim.without_product("gear")


def test_the_only_product_cannot_leave(images: Path, cache: FeatureCache) -> None:
    config = settings("opca", decision={"false_alarm_rate": 0.3})
    one = Inspector.fit(of(images, "gear"), config, cache=cache)
    with pytest.raises(ConfigError, match="'gear' is the only one"):
        one.without_product("gear")


def test_products_found_by_clustering_cannot_leave(images: Path, cache: FeatureCache) -> None:
    nameless = [Record(record.path, None, 0) for record in of(images, "fabric", "gear") if record.split == "train"]
    model = Inspector.fit(nameless, settings("opca"), cache=cache)
    with pytest.raises(ConfigError, match="found by clustering"):
        model.without_product(model.products[0])


# Command line


def test_the_command_line_lists_adds_replaces_and_removes(
    images: Path, cache: FeatureCache, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, at = tmp_path / "model", ["--cache", str(cache.root)]
    fitted(images, "opca", cache, "fabric", "gear").save(model)
    call = ["products", str(model)]
    good = str(images / "wood" / "train" / "good")
    assert cli.main([*call, "add", "wood", good, "-o", str(tmp_path / "other"), *at]) == 0
    assert Inspector.load(model).products == ("fabric", "gear")
    assert Inspector.load(tmp_path / "other").products == ("fabric", "gear", "wood")
    assert cli.main([*call, "add", "wood", str(images), *at]) == 0
    assert cli.main([*call, "add", "wood", good, "--replace", *at]) == 0
    capsys.readouterr()
    assert cli.main([*call, "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["wood"] == {"train": 21, "held_out": 0, "calibration": 3}
    assert cli.main([*call, "remove", "gear"]) == 0
    assert "gear" not in capsys.readouterr().out
    assert Inspector.load(model).products == ("fabric", "wood")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["lst"], "did you mean 'list'"),
        (["add", "wood"], "products MODEL add NAME DATA"),
        (["remove"], "products MODEL remove NAME"),
        (["list", "gear"], "expected `unispect products MODEL list`"),
    ],
)
def test_a_wrong_call_is_told(given: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["products", str(tmp_path), *given]) == 2
    assert text in capsys.readouterr().err
