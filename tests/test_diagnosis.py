"""Looking inside a flow: what is drawn is what the detector says, and labelled images have no part in the model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from unispect import Inspector
from unispect.data.factory import write_products
from unispect.data.folder import read_folder
from unispect.errors import ConfigError, DataError, LeakError
from unispect.evaluation import Centres, Check, Diagnosis, Look, diagnose
from unispect.features.cache import FeatureCache
from unispect.report.diagnosis import lead, sections, write_diagnosis

SIDE = 64
CONFIG = {
    "preparation": {"size": SIDE},
    "features": {"engine": "torch", "layers": ["blocks.2"], "pooled": ["blocks.4"]},
    "training": {"steps": 6, "images": 8, "places": 16, "checks": 3, "patience": 9},
    "hgad": {"blocks": 1, "position": 4, "centres": 3, "map_side": 32},
    "decision": {"false_alarm_rate": 0.2},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), 30, 4, 2, SIDE, products=["fabric", "gear"])


@pytest.fixture(scope="module")
def inspector(products: Path, cache: FeatureCache) -> Inspector:
    return Inspector.fit(products, CONFIG, cache=cache)


@pytest.fixture(scope="module")
def found(inspector: Inspector, products: Path, cache: FeatureCache) -> Diagnosis:
    return diagnose(inspector, products, cache=cache)


def test_training_again_gives_the_model_itself(found: Diagnosis, inspector: Inspector) -> None:
    assert found.same is True
    assert found.training is not None
    assert [check.step for check in found.training] == [0, 2, 4, 6]
    history = inspector.facts["history"]
    assert list(found.kept) == history["kept"]
    for number, check in enumerate(found.training):
        assert check.held_out == pytest.approx(np.mean([level[number] for level in history["held_out"]]), rel=1e-12)


def test_what_is_drawn_is_what_the_detector_says(
    found: Diagnosis, inspector: Inspector, products: Path, cache: FeatureCache
) -> None:
    records = {str(record.path): record for record in read_folder(products) if record.split == "test"}
    assert {look.path for look in found.looks} == set(records)
    for look in found.looks[::5]:
        record = records[look.path]
        assert (look.product, look.defective) == (record.product, record.label == 1)
        features, _ = inspector.features([record], cache=cache)
        levels = next(iter(features.batches(1)))[1]
        densities = inspector.detector.likelihoods(levels, torch.tensor([inspector.products.index(look.product)]))  # type: ignore
        worst = [np.sort(-density.numpy().ravel())[::-1] for density in densities]
        expected = np.mean([values[: max(1, int(0.01 * len(values)))].mean() for values in worst])
        assert look.unlikely == pytest.approx(expected, rel=1e-4)


def test_the_auroc_is_the_pooled_one(found: Diagnosis) -> None:
    labels, scores = zip(*((look.defective, look.unlikely) for look in found.looks), strict=True)
    assert found.auroc == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)
    assert found.training is not None
    kept = [check for check in found.training if check.step == found.kept[0]]
    if len(set(found.kept)) == 1:  # the state that was kept is the model's
        assert kept[0].auroc == pytest.approx(found.auroc, rel=1e-12)


def test_the_mixture_is_the_detectors_own(found: Diagnosis, inspector: Inspector) -> None:
    mains = inspector.detector.main_centres()  # type: ignore[operator]
    for centres, main in zip(found.centres, mains, strict=True):
        gap = float(torch.linalg.vector_norm(main[0] - main[1]))
        assert centres.distances[0][1] == centres.distances[1][0] == pytest.approx(gap, rel=1e-5)
        assert centres.distances[0][0] == 0
        for number in range(2):
            share, alive = centres.shares[number], centres.alive(number)
            assert share is not None
            assert alive is not None
            assert sum(share) == pytest.approx(1, rel=1e-9)
            assert 1 <= alive <= 3
            assert 1 / 3 <= (centres.sharp[number] or 0) <= 1


def test_effective_numbers_of_centres() -> None:
    centres = Centres("level", [[0.0]], [[0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], None], [None] * 4)
    assert [centres.alive(number) for number in range(4)] == pytest.approx([4.0, 1.0, 2.0, None])


def test_the_model_is_not_changed_and_labelled_images_have_no_part_in_it(
    inspector: Inspector, products: Path, cache: FeatureCache
) -> None:
    before = {name: value.clone() for name, value in inspector.detector.state_dict().items()}
    few = [record for record in read_folder(products) if record.split == "test"][:3]
    found = diagnose(inspector, few, cache=cache)
    assert found.same is True
    assert all(torch.equal(value, before[name]) for name, value in inspector.detector.state_dict().items())


def test_good_images_alone_have_no_auroc(inspector: Inspector, products: Path, cache: FeatureCache, tmp_path: Path) -> None:
    good = [record for record in read_folder(products) if record.split == "test" and record.label == 0]
    found = diagnose(inspector, good, cache=cache)
    assert found.auroc is None
    assert found.training is not None
    assert all(check.auroc is None for check in found.training)
    assert lead(found) == "8 good and 0 defective images: an AUROC needs both."
    assert "polyline" in write_diagnosis(found, tmp_path, "t", {}).read_text("utf-8")


def test_images_that_are_gone_leave_the_course_out(products: Path, cache: FeatureCache, tmp_path: Path) -> None:
    own = write_products(tmp_path / "own", 30, 2, 1, SIDE, products=["gear"])
    inspector = Inspector.fit(own, CONFIG, cache=cache)
    learnt = inspector.split.train[0].path
    learnt.unlink()
    found = diagnose(inspector, own, cache=cache)
    assert found.training is None
    assert found.missing == f"{learnt}: gone or changed since the model learnt from it, so it cannot be trained again"
    assert f"Not drawn. {learnt}" in sections(found)[1][1][0]
    assert diagnose(inspector, own, training=False, cache=cache).missing == ""


def test_a_diagnosis_is_a_page_and_plain_numbers(found: Diagnosis, tmp_path: Path) -> None:
    page = write_diagnosis(found, tmp_path / "out", "<model>", {"Seed": "0"}).read_text("utf-8")
    assert "&lt;model&gt;" in page
    for text in ("Likelihoods", "Loss and AUROC over the training", "bit by bit", "Distances of main centres", "Shares of"):
        assert text in page
    numbers = json.loads((tmp_path / "out" / "diagnosis.json").read_text("utf-8"))
    assert len(numbers["looks"]) == len(found.looks)
    assert numbers["auroc"] == found.auroc
    assert numbers["alive"][0] == [found.centres[0].alive(number) for number in range(2)]


def test_forty_products_fit_on_a_page(tmp_path: Path) -> None:
    names = tuple(f"product-{number}" for number in range(40))
    looks = tuple(
        Look(f"{name}/{label}", name, bool(label), number + label) for number, name in enumerate(names) for label in (0, 1)
    )
    centres = Centres(
        "level", [[abs(a - b) * 1.0 for a in range(40)] for b in range(40)], [[0.1] * 10] * 39 + [None], [0.1] * 39 + [None]
    )
    found = Diagnosis("hgad", names, looks, (Check(0, 2.0, 0.5), Check(5, 1.0, 0.4)), (5,), False, "", (centres,))
    page = write_diagnosis(found, tmp_path, "forty", {}).read_text("utf-8")
    assert page.count('class="cell"') == 40 * 40 + 40 * 10
    assert "Its weights are NOT the model&#39;s" in page
    assert "the loss goes from 2.0000 to 1.0000 and the AUROC from 0.500 to 0.400" in page


def test_a_method_without_likelihoods_is_told(products: Path, cache: FeatureCache) -> None:
    config = {**CONFIG, "method": "neighbours"}
    inspector = Inspector.fit(
        products, {name: part for name, part in config.items() if name not in ("training", "hgad")}, cache=cache
    )
    with pytest.raises(
        ConfigError, match=r"method 'neighbours' has no likelihoods to look at: diagnose a flow \(hgad, cflow, fastflow\)"
    ):
        diagnose(inspector, products, cache=cache)


def test_images_that_it_learnt_from_and_strange_ones_are_refused(
    inspector: Inspector, products: Path, cache: FeatureCache
) -> None:
    test = [record for record in read_folder(products) if record.split == "test"]
    seen = replace(inspector.split.train[0], split="test")
    with pytest.raises(LeakError):
        diagnose(inspector, [*test, seen], cache=cache)
    with pytest.raises(DataError, match="none of 12 labelled test images is of a product that the model knows"):
        diagnose(inspector, [replace(record, product="bolt") for record in test if record.product == "gear"], cache=cache)
