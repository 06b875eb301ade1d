"""The papers' tables: complete, in range, means that are means, and what is said when one is set beside measurements."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from unispect.data.datasets import DATASETS
from unispect.errors import ConfigError
from unispect.metrics.protocol import METRICS
from unispect.published.tables import Entry, Measured, Published, compare, published, tables

PAGE = Path(__file__).parents[2] / "docs" / "published.md"
EXPECTED = {
    "hgad": (1, 2, 3),
    "cada": (1, 3, 4, 5),
    "cflow": (2, 3, 4, 5, 6),
    "opca": (1, 2, 3, 4, 5),
}
NO_PERCENT = {"images_per_s_256", "images_per_s_512", "stc_mb", "mvtec_mb", "seconds", "test_images"}
MISPRINTED = {
    ("cflow-table-3", "SPADE", "aupro"),
    ("cflow-table-3", "PaDiM", "aupro"),
    ("opca-table-1", "DifferNet", "image_auroc"),
}
every = pytest.mark.parametrize("name", tables())


def rows(table: Published) -> dict[tuple[str, ...], list[Entry]]:
    """Entries by method, setting, data set and metric."""
    found = defaultdict(list)
    for entry in table.entries:
        found[entry.method, entry.setting, entry.dataset, entry.metric].append(entry)
    return found


def test_all_tables_are_there() -> None:
    assert tables() == sorted(f"{paper}-table-{number}" for paper, numbers in EXPECTED.items() for number in numbers)


@every
def test_a_table_is_well_formed(name: str) -> None:
    table = published(name)
    assert table.id == name
    assert name.endswith(f"-{table.table}")
    assert table.link.startswith("https://")
    assert set(table.metrics) <= {*METRICS, *NO_PERCENT}
    for entry in table.entries:
        assert entry.metric in NO_PERCENT or 15 <= entry.value <= 100
        assert entry.dataset in DATASETS or entry.metric in NO_PERCENT
        known = DATASETS[entry.dataset].counts if entry.dataset in DATASETS else {}
        assert entry.product in ("mean", "pooled") or entry.product in known
    places = Counter((e.method, e.setting, e.dataset, e.product, e.metric) for e in table.entries)
    assert max(places.values()) == 1


@every
def test_printed_means_are_the_means_of_the_classes(name: str) -> None:
    """But for those that are listed as misprints; this is how transcription errors would show."""
    table = published(name)
    for (method, _, dataset, metric), entries in rows(table).items():
        classes = [entry.value for entry in entries if entry.product not in ("mean", "pooled")]
        mean = [entry.value for entry in entries if entry.product == "mean"]
        if classes and mean:
            assert len(classes) == len(DATASETS[dataset].counts)
            digits = 2 if name.startswith("cflow") and method == "CFLOW-AD" else 1
            wrong = abs(float(np.mean(classes)) - mean[0]) > 0.9 * 10**-digits  # some means are cut off, not rounded
            assert wrong is ((name, method, metric) in MISPRINTED), (method, metric)
    assert not any(name == misprinted[0] for misprinted in MISPRINTED) or table.misprints


def test_tables_agree_where_they_report_the_same_run() -> None:
    def value(name: str, **wanted: str) -> float:
        found = [e.value for e in published(name).entries if all(getattr(e, key) == text for key, text in wanted.items())]
        assert len(found) == 1, wanted
        return found[0]

    same = {"method": "RevDist", "dataset": "mvtec", "product": "pooled", "metric": "image_auroc"}
    assert value("cada-table-1", **same) == value("cada-table-4", **same) == value("cada-table-5", **same) == 85.0
    mean = {"dataset": "mvtec", "product": "mean", "metric": "image_auroc"}
    assert value("hgad-table-1", method="HGAD", **mean) == 98.4
    assert value("opca-table-1", method="OPCA-MVG", **mean) == 98.6
    own = {"method": "CFLOW-AD", "setting": "one-for-one, wide_resnet50_2"}
    assert value("cflow-table-3", **own, **mean) == value("cflow-table-4", method="CFLOW-AD", **mean) == 98.26
    localisation = [e.value for e in published("opca-table-3").entries if e.metric == "pixel_auroc"]
    assert np.mean(localisation) == pytest.approx(value("opca-table-2", method="OPCA-MVG", metric="pixel_auroc"), abs=0.2)
    images = {e.product: e.value for e in published("opca-table-3").entries if e.metric == "test_images"}
    assert images == {product: good + bad for product, (_, good, bad) in DATASETS["mvtec"].counts.items()}


@pytest.mark.parametrize(
    ("encoder", "sizes"),
    [
        ("resnet18", ("resnet18, 8 couplings, 3 pools, 256 px", "resnet18, 8 couplings, 3 pools, 512 px")),
        ("wide_resnet50_2", ("wrn50, 8 couplings, 3 pools, 256 px", "wrn50, 8 couplings, 3 pools, 512 px")),
    ],
)
def test_the_best_input_size_of_one_table_is_the_number_of_the_next(encoder: str, sizes: tuple[str, ...]) -> None:
    """But for the transistor, which the paper takes at 128 px: two tables that were transcribed apart agree cell by cell."""
    ablation = defaultdict(list)
    for entry in published("cflow-table-2").entries:
        if entry.setting in sizes and entry.product not in ("mean", "transistor"):
            ablation[entry.product].append(entry.value)
    wanted = ("CFLOW-AD", f"one-for-one, {encoder}", "mvtec", "pixel_auroc")
    detailed = {entry.product: entry.value for entry in rows(published("cflow-table-3"))[wanted]}
    assert len(ablation) == 14
    assert {product: max(values) for product, values in ablation.items()} == {
        product: detailed[product] for product in ablation
    }


def test_an_unknown_table_is_told() -> None:
    with pytest.raises(ConfigError, match="unknown published table 'hgad-table1': did you mean 'hgad-table-1'"):
        published("hgad-table1")


def test_the_page_lists_every_table() -> None:
    text = PAGE.read_text("utf-8")
    for name in tables():
        assert f"| {name} | {published(name).caption} | {len(published(name).entries)} |" in text
        assert all(misprint in text for misprint in published(name).misprints)


# Beside measurements

PROTOCOL = {
    "label_given": False,
    "test_normalised": False,
    "checkpoint": "held-out normals",
    "image_size": 256,
    "backbone": "lite0",
    "aupro": "exact",
}


def test_a_measured_number_stands_beside_that_of_its_own_method() -> None:
    values = {"image_auroc": 0.9, "pixel_auroc": 0.95, "image_ap": 0.5}
    found = compare(published("hgad-table-1"), [Measured("hgad", "mvtec", "mean", values, PROTOCOL)])
    assert [(line.metric, line.method, line.published, line.measured) for line in found.lines] == [
        ("image_auroc", "HGAD", 98.4, 90.0),
        ("pixel_auroc", "HGAD", 97.9, 95.0),
    ]
    assert found.lines[0].difference == pytest.approx(-8.4)
    assert found.unmatched == ()
    assert "hgad, lite0: the product is given when scoring: yes there, no here" in found.differences
    assert "-8.4" in found.text()
    assert found.as_dict()["lines"][1]["measured"] == pytest.approx(95.0)


def test_a_method_that_the_table_lacks_stands_beside_the_best() -> None:
    found = compare(published("cflow-table-4"), [Measured("hgad", "mvtec", "mean", {"aupro": 0.8}, PROTOCOL)])
    assert [(line.method, line.published) for line in found.lines] == [("CFLOW-AD", 94.6)]
    assert "hgad, lite0: AUPRO routine: cflow there, exact here" in found.differences


def test_pooled_is_not_set_beside_a_mean() -> None:
    measured = [Measured("cada", "mvtec", "pooled", {"image_auroc": 0.8}, PROTOCOL)]
    assert compare(published("hgad-table-1"), measured).lines == ()
    assert len(compare(published("cada-table-1"), measured).lines) == 1


def test_what_was_not_measured_is_told() -> None:
    found = compare(published("hgad-table-2"), [Measured("hgad", "btad", "mean", {"image_auroc": 0.9}, PROTOCOL)])
    assert found.unmatched == ("mvtec3d", "visa", "union")
    assert "Nothing was measured on visa." in found.text()


def test_a_data_set_that_was_measured_is_not_said_to_be_missing() -> None:
    measured = [Measured("revdist", "mvtec", "pooled", {"image_auroc": 0.9}, PROTOCOL)]
    found = compare(published("cada-table-1"), measured)
    assert found.unmatched == ("mvtec with each class by itself",)
    assert "Nothing was measured on mvtec." not in found.text()


def test_costs_are_not_a_data_set() -> None:
    measured = [Measured("cflow", "mvtec", "mean", {"image_auroc": 0.9}, PROTOCOL)]
    assert compare(published("cflow-table-6"), measured).unmatched == ()


def test_numbers_that_found_no_partner_are_told() -> None:
    measured = [Measured("opca", "mvtec", "mean", {"pixel_auroc": 0.9}, PROTOCOL)]
    assert compare(published("opca-table-3"), measured).unmatched == ("mvtec",)


def test_the_aupro_routine_matters_only_to_tables_with_aupro() -> None:
    measured = [Measured("cflow", "mvtec", "mean", {"pixel_auroc": 0.9}, PROTOCOL)]
    assert not any("AUPRO" in text for text in compare(published("cflow-table-2"), measured).differences)


def test_the_label_given_is_a_way_of_its_own() -> None:
    given = PROTOCOL | {"label_given": True}
    measured = [Measured("hgad", "mvtec", "mean", {"image_auroc": 0.9}, one) for one in (PROTOCOL, given)]
    found = compare(published("hgad-table-1"), measured)
    assert [line.how for line in found.lines] == ["hgad, lite0", "hgad, lite0, label given"]
    assert not any("label given: the product is given" in text for text in found.differences)
