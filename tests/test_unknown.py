"""An image of a product that a model has never seen is called unknown, with a p-value of its own."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unispect.config import merge
from unispect.data.factory import write_products
from unispect.data.folder import read_folder
from unispect.data.records import Record
from unispect.errors import ConfigError
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector, complete
from unispect.report.page import write_findings_report
from unispect.types import Finding

SIDE = 64
CONFIG: dict[str, Any] = {
    "method": "neighbours",
    "preparation": {"size": SIDE},
    "features": {"engine": "torch"},
    "neighbours": {"map_side": SIDE, "bank_images": 4},
    "decision": {"false_alarm_rate": 0.2, "unknown_rate": 0.1},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    """Three products; the third is not learnt."""
    return list(
        read_folder(write_products(tmp_path_factory.mktemp("p"), 40, 4, 1, SIDE, products=["fabric", "gear", "wood"]))
    )


def of(records: list[Record], *products: str) -> list[Record]:
    return [record for record in records if record.product in products]


@pytest.fixture(scope="module")
def inspector(records: list[Record], cache: FeatureCache) -> Inspector:
    return Inspector.fit(of(records, "fabric", "gear"), CONFIG, cache=cache)


def good(inspector: Inspector, records: list[Record], *products: str) -> list[Finding]:
    chosen = [record for record in of(records, *products) if record.split == "test" and not record.label]
    found = [finding for _, finding in inspector.findings(chosen) if isinstance(finding, Finding)]
    assert found
    return found


def test_a_product_never_seen_is_unknown(inspector: Inspector, records: list[Record]) -> None:
    least = 1 / (len(inspector.calibration.novelty) + 1)
    for finding in good(inspector, records, "wood"):
        assert finding.unknown
        assert finding.verdict == "unknown product"
        assert finding.unknown_p_value == pytest.approx(least)
        assert (finding.product, finding.product_probability) == (None, None)


def test_a_known_product_is_not(inspector: Inspector, records: list[Record]) -> None:
    found = good(inspector, records, "fabric", "gear")
    assert sum(finding.unknown for finding in found) <= 1
    assert all(finding.product in ("fabric", "gear") for finding in found if not finding.unknown)
    assert {finding.verdict for finding in found} <= {"normal", "anomalous", "unknown product"}


def test_p_value_and_decision_are_one(inspector: Inspector, records: list[Record]) -> None:
    for finding in good(inspector, records, "fabric", "gear", "wood"):
        assert finding.unknown == (finding.unknown_p_value <= 0.1)


def test_at_most_the_promised_share_of_calibration_images_is_unknown(inspector: Inspector) -> None:
    novelty = inspector.calibration.novelty
    assert (novelty > inspector.unknown_threshold).sum() <= 0.1 * (len(novelty) + 1)


def test_scores_do_not_depend_on_it(inspector: Inspector, records: list[Record], cache: FeatureCache) -> None:
    never = Inspector.fit(of(records, "fabric", "gear"), merge(CONFIG, {"decision": {"unknown_rate": 0.0}}), cache=cache)
    one, other = (good(model, records, "fabric", "gear", "wood") for model in (inspector, never))
    assert [finding.score for finding in one] == [finding.score for finding in other]
    assert not any(finding.unknown for finding in other)
    assert all(finding.product for finding in other)
    assert "not told" in never.card()
    assert "at most 10.00% of normal images" in inspector.card()


def test_too_few_calibration_images_call_nothing_unknown(
    inspector: Inspector, records: list[Record], cache: FeatureCache
) -> None:
    strict = Inspector.fit(of(records, "fabric", "gear"), merge(CONFIG, {"decision": {"unknown_rate": 0.001}}), cache=cache)
    assert strict.unknown_threshold == np.inf
    assert not any(finding.unknown for finding in good(strict, records, "wood"))


def test_it_is_saved_with_the_model(inspector: Inspector, records: list[Record], tmp_path: Path) -> None:
    loaded = Inspector.load(inspector.save(tmp_path / "model"))
    one, other = (good(model, records, "gear", "wood") for model in (inspector, loaded))
    assert [finding.unknown_p_value for finding in one] == [finding.unknown_p_value for finding in other]
    assert json.loads(json.dumps(other[-1].as_dict()))["unknown"] is True


def test_a_product_that_joins_is_known_and_one_that_leaves_is_not(
    inspector: Inspector, records: list[Record], cache: FeatureCache
) -> None:
    wider = inspector.with_product("wood", of(records, "wood"), cache=cache)
    assert len(wider.calibration.novelty) == len(wider.calibration.scores) > len(inspector.calibration.scores)
    assert sum(finding.unknown for finding in good(wider, records, "wood")) <= 1
    narrower = wider.without_product("gear")
    assert all(finding.unknown for finding in good(narrower, records, "gear"))


def test_the_report_says_so(inspector: Inspector, records: list[Record], tmp_path: Path) -> None:
    found = good(inspector, records, "gear", "wood")
    page = write_findings_report(found, tmp_path / "r.html", "Findings", {}).read_text("utf-8")
    assert "Unknown products" in page
    assert "show a product that the model has never seen." in page
    assert "resembles no known product, p = " in page


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_cannot_be(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"\[decision\] unknown_rate: got"):
        complete({"decision": {"unknown_rate": rate}})
