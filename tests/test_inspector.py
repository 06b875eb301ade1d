"""From good images to findings, on products small enough for a test."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unispect.data.factory import draw, write_products
from unispect.data.folder import read_folder
from unispect.data.loader import Failure
from unispect.data.records import ROLES, Record, split_normals
from unispect.errors import CalibrationError, ConfigError, DataError, ImageError, LeakError, StoreError
from unispect.evaluation import evaluate
from unispect.features.cache import FeatureCache
from unispect.inspector import FILES, Fit, Inspector, complete
from unispect.types import Finding

SIDE = 64
CONFIG: dict[str, Any] = {
    "preparation": {"size": SIDE},
    "features": {"engine": "torch"},
    "training": {"steps": 6, "checks": 2},
    "hgad": {"map_side": SIDE},
    "decision": {"false_alarm_rate": 0.2},
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    """Keyed by content, so tests may share it."""
    return FeatureCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products; no test changes them."""
    return write_products(tmp_path_factory.mktemp("products"), 30, 3, 1, SIDE, products=["fabric", "gear"])


@pytest.fixture(scope="session")
def inspector(products: Path, cache: FeatureCache) -> Inspector:
    return Inspector.fit(products, CONFIG, cache=cache)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A product of one's own to spoil."""
    return write_products(tmp_path / "own", 30, 1, 1, SIDE, products=["gear"])


def good(folder: Path, product: str = "gear") -> list[Path]:
    return sorted((folder / product / "train" / "good").glob("*.png"))


def noise(height: int, width: int) -> np.ndarray:
    """What no product looks like."""
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def same(one: Finding, other: Finding) -> bool:
    return np.array_equal(one.map, other.map) and one.as_dict() == other.as_dict()


def close(one: Finding, other: Finding) -> bool:
    """Equal up to the order of sums, which depends on the size of the batch."""
    near = np.isclose(one.score, other.score, rtol=1e-4, atol=1e-5)
    return bool(near and np.allclose(one.map, other.map, rtol=1e-3, atol=1e-3))


def found(inspector: Inspector, records: list[Record]) -> list[Finding]:
    return [result for _, result in inspector.findings(records) if isinstance(result, Finding)]


# Fit, save, load


def test_a_saved_model_finds_the_same(inspector: Inspector, products: Path, tmp_path: Path) -> None:
    inspector.save(tmp_path / "m")
    loaded = Inspector.load(tmp_path / "m")
    paths = sorted((products / "gear" / "test").rglob("*.png"))
    assert all(same(inspector.inspect(path), loaded.inspect(path)) for path in paths)  # type: ignore[arg-type]
    assert loaded.split.as_dict() == inspector.split.as_dict()
    assert (loaded.config, loaded.products, loaded.card()) == (inspector.config, inspector.products, inspector.card())
    loaded.save(tmp_path / "n")
    for name in FILES:
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "n" / name).read_bytes()


def test_the_same_seed_learns_the_same(inspector: Inspector, products: Path, cache: FeatureCache) -> None:
    again = Inspector.fit(read_folder(products), CONFIG, cache=cache)
    assert again.calibration.as_dict() == inspector.calibration.as_dict()
    other = Inspector.fit(products, CONFIG | {"seed": 1}, cache=cache)
    assert other.calibration.as_dict() != inspector.calibration.as_dict()


def test_a_defect_scores_higher_than_a_good_image(inspector: Inspector, products: Path) -> None:
    normal = [finding.score for finding in inspector.inspect(products / "gear" / "test" / "good")]  # type: ignore[union-attr]
    assert inspector.inspect(noise(SIDE, SIDE)).score > max(normal)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_model_is_an_error(inspector: Inspector, tmp_path: Path, name: str) -> None:
    inspector.save(tmp_path / "m")
    file = tmp_path / "m" / name
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match=name):
        Inspector.load(tmp_path / "m")
    file.unlink()
    with pytest.raises(StoreError, match=name):
        Inspector.load(tmp_path / "m")


def test_a_model_of_another_version_is_an_error(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"old.{name}": value for name, value in inspector.detector.state_dict().items()}
    with monkeypatch.context() as patched:
        patched.setattr(inspector.detector, "state_dict", lambda: state)
        inspector.save(tmp_path / "m")
    with pytest.raises(StoreError, match=r"saved by another version, fit it again"):
        Inspector.load(tmp_path / "m")


def test_a_model_of_other_weights_is_an_error(inspector: Inspector, tmp_path: Path) -> None:
    facts = {**inspector.facts, "features": "0" * 64}
    other = Inspector(
        inspector.config, inspector.products, inspector.engine, inspector.detector, inspector.aligner, inspector.novelty,
        inspector.versions, inspector.split, facts,
    )  # fmt: skip
    other.save(tmp_path / "m")
    with pytest.raises(StoreError, match=r"not those it learnt with: see `unispect doctor`"):
        Inspector.load(tmp_path / "m")


def test_another_promise_moves_the_threshold_only(inspector: Inspector) -> None:
    lenient = inspector.with_false_alarm_rate(0.5)
    assert lenient.threshold < inspector.threshold
    assert (lenient.false_alarm_rate, inspector.false_alarm_rate) == (0.5, 0.2)
    image = noise(SIDE, SIDE)
    assert lenient.inspect(image).score == inspector.inspect(image).score  # type: ignore[union-attr]
    with pytest.raises(CalibrationError, match="8 calibration images cannot support"):
        inspector.with_false_alarm_rate(0.01)


def test_the_promise_holds_on_the_calibration_images(inspector: Inspector) -> None:
    alarms = sum(finding.anomalous for finding in found(inspector, list(inspector.split.calibration)))
    assert alarms <= 0.2 * (len(inspector.split.calibration) + 1)


# What may be inspected


def test_every_kind_of_source_gives_the_same(inspector: Inspector, products: Path) -> None:
    path = good(products)[0]
    array = np.asarray(Image.open(path))
    expected = inspector.inspect(path)
    assert isinstance(expected, Finding)
    assert same(inspector.inspect(str(path)), expected)  # type: ignore[arg-type]
    for source in (array, Image.fromarray(array)):
        finding = inspector.inspect(source)
        assert isinstance(finding, Finding)
        assert finding.path is None
        assert same(replace(finding, path=str(path)), expected)
    several = inspector.inspect([path, array, Image.fromarray(array)]) + inspector.inspect(np.stack([array, array]))  # type: ignore[operator]
    assert len(several) == 5
    assert all(np.array_equal(finding.map, expected.map) for finding in several)


def test_a_folder_is_inspected_in_order(inspector: Inspector, products: Path) -> None:
    findings = inspector.inspect(products / "gear" / "test")
    assert isinstance(findings, list)
    assert [finding.path for finding in findings] == sorted(
        str(path) for path in (products / "gear" / "test").rglob("*.png")
    )


def test_deep_and_transparent_images(inspector: Inspector) -> None:
    grey = draw("gear", 7, None, SIDE)[0][:, :, 0]
    plain = inspector.inspect(np.repeat(grey[:, :, None], 3, axis=2))
    deep = inspector.inspect(grey.astype(np.uint16) * 256 + 77)
    opaque = inspector.inspect(np.dstack([grey, grey, grey, np.full_like(grey, 255)]))
    assert isinstance(plain, Finding)
    assert same(deep, plain)  # type: ignore[arg-type]
    assert same(opaque, plain)  # type: ignore[arg-type]


@pytest.mark.parametrize("source", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4), np.int64), Path("none.png")])
def test_what_is_no_image_is_an_error(inspector: Inspector, source: Any) -> None:
    with pytest.raises(ImageError):
        inspector.inspect(source)


@pytest.mark.parametrize(("height", "width"), [(40, 200), (333, 57), (64, 64), (5, 9)])
@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_regions_lie_inside_the_image(inspector: Inspector, height: int, width: int, fit: str) -> None:
    config = inspector.config | {"preparation": inspector.config["preparation"] | {"fit": fit}}
    other = Inspector(
        config, inspector.products, inspector.engine, inspector.detector, inspector.aligner, inspector.novelty,
        inspector.versions, inspector.split, inspector.facts,
    )  # fmt: skip
    finding = other.inspect(noise(height, width))
    assert isinstance(finding, Finding)
    assert finding.anomalous
    assert (finding.width, finding.height) == (width, height)
    assert finding.regions
    for region in finding.regions:
        assert 0 <= region.left < region.right <= width
        assert 0 <= region.top < region.bottom <= height


def test_a_region_covers_what_is_wrong(inspector: Inspector) -> None:
    image = draw("gear", 5, None, SIDE)[0].copy()
    image[40:56, 8:24] = noise(16, 16)
    finding = inspector.inspect(image)
    assert isinstance(finding, Finding)
    assert finding.anomalous
    best = max(finding.regions, key=lambda region: region.peak)
    assert best.left < 24
    assert best.right > 8
    assert best.top < 56
    assert best.bottom > 40


def test_regions_have_a_p_value_and_a_size(inspector: Inspector, products: Path, tmp_path: Path) -> None:
    decision = replace(inspector.decision, regions="discovery", discovery_rate=0.3, mm_per_pixel=0.1)
    other = inspector.with_versions(inspector.versions.then("test", "other regions", decision))
    loaded = Inspector.load(other.save(tmp_path / "m"))
    finding = loaded.inspect(noise(SIDE, 2 * SIDE))
    assert isinstance(finding, Finding)
    assert same(finding, other.inspect(noise(SIDE, 2 * SIDE)))  # type: ignore[arg-type]
    assert finding.regions
    for region in finding.regions:
        assert 0 < region.p_value <= 1
        assert region.area <= (region.right - region.left) * (region.bottom - region.top)
        assert region.area_mm2 == pytest.approx(region.area * 0.01)
    assert set(finding.as_dict()["regions"][0]) >= {"p_value", "area_mm2", "promised"}


def test_regions_that_cannot_be_promised_are_refused_before_learning(own: Path, cache: FeatureCache) -> None:
    def fit(**decision: Any) -> None:
        Inspector.fit(own, CONFIG | {"decision": {"false_alarm_rate": 0.2} | decision}, cache=cache, progress=no_step)

    def no_step(stage: str, done: int, total: int, losses: dict[str, float]) -> None:
        raise AssertionError(stage)

    with pytest.raises(CalibrationError, match=r"4 calibration images cannot support discovery_rate=0\.1: at least 9"):
        fit(regions="discovery")
    with pytest.raises(ConfigError, match="unknown product 'gaer': did you mean 'gear'"):
        fit(mm_per_pixel={"gaer": 0.1})
    with pytest.raises(ConfigError, match=r"\[decision\] min_size_mm=2.0 needs mm_per_pixel"):
        fit(min_size_mm=2)


def test_findings_keep_the_order_around_broken_files(inspector: Inspector, products: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    paths = [broken, *good(products)[:9], broken, broken, *good(products)[9:12], broken]
    results = list(inspector.findings([Record(path, None, None) for path in paths]))
    assert [record.path for record, _ in results] == paths
    for path, (_, result) in zip(paths, results, strict=True):
        assert isinstance(result, Failure) is (path == broken)
        assert str(result.path) == str(path)
    with pytest.raises(ImageError, match=r"broken\.png"):
        list(inspector.findings([Record(broken, None, None)], strict=True))


def test_labels_have_no_influence(inspector: Inspector, products: Path) -> None:
    records = [record for record in read_folder(products) if record.split == "test"]
    lies = [
        replace(record, product="nonsense", label=1 - record.label, defect=None, mask=None, group="g")
        for record in records
        if record.label is not None
    ]
    assert all(map(same, found(inspector, records), found(inspector, lies)))


def test_an_image_is_judged_by_itself(inspector: Inspector, products: Path) -> None:
    records = [record for record in read_folder(products) if record.split == "test"]
    together = found(inspector, records)
    backward = found(inspector, records[::-1])[::-1]
    alone = [found(inspector, [record])[0] for record in records]
    assert all(map(close, together, backward))
    assert all(map(close, together, alone))


# What may be learnt from


def test_products_without_names_are_found(products: Path, tmp_path: Path, cache: FeatureCache) -> None:
    for product in ("fabric", "gear"):
        for path in good(products, product):
            (tmp_path / f"{path.stem}-{product}.png").write_bytes(path.read_bytes())
    unnamed = Inspector.fit(tmp_path, CONFIG, cache=cache)
    assert unnamed.facts["clustered"]
    assert "found by clustering" in unnamed.card()
    likeness = {
        product: {finding.product for finding in map(unnamed.inspect, good(products, product))}  # type: ignore[union-attr]
        for product in ("fabric", "gear")
    }
    assert not likeness["fabric"] & likeness["gear"]


def test_a_single_product(own: Path, cache: FeatureCache) -> None:
    one = Inspector.fit(own / "gear", CONFIG, cache=cache)
    assert one.products == ("gear",)
    assert one.inspect(good(own)[0]).product == "gear"  # type: ignore[union-attr]


def test_names_of_some_images_only_are_an_error(products: Path, cache: FeatureCache) -> None:
    records = [
        replace(record, product=None if record.product == "gear" else record.product) for record in read_folder(products)
    ]
    with pytest.raises(DataError, match="name the product of all images, or of none"):
        Inspector.fit(records, CONFIG, cache=cache)


def test_a_product_with_one_image_is_an_error(own: Path, cache: FeatureCache) -> None:
    (own / "lonely").mkdir()
    Image.fromarray(noise(SIDE, SIDE)).save(own / "lonely" / "0.png")
    with pytest.raises(DataError, match=r"'lonely': 1 readable training images: at least 2 are needed"):
        Inspector.fit(own, CONFIG, cache=cache)


def test_fit_never_reads_a_test_image(own: Path, cache: FeatureCache) -> None:
    before = Inspector.fit(own, CONFIG, cache=cache)
    for path in (*(own / "gear" / "test").rglob("*.png"), *(own / "gear" / "ground_truth").rglob("*.png")):
        path.write_bytes(b"garbage")
    after = Inspector.fit(own, CONFIG, cache=cache, strict=True)
    assert after.calibration.as_dict() == before.calibration.as_dict()


def test_too_few_calibration_images(own: Path, cache: FeatureCache) -> None:
    with pytest.raises(CalibrationError, match=r"4 calibration images .*=0\.01: at least 99 are needed"):
        Inspector.fit(own, CONFIG | {"decision": {"false_alarm_rate": 0.01}}, cache=cache)


def test_calibration_images_that_turn_out_broken_do_not_count(own: Path, cache: FeatureCache) -> None:
    broken, records = good(own)[0], [record for record in read_folder(own) if record.split == "train"]
    for number in range(1000):  # the split goes by content: some content makes it a calibration image
        broken.write_bytes(b"no image %d" % number)
        if broken in {record.path for record in split_normals(records, 0.12, 0.14, 0).calibration}:
            break
    with pytest.raises(CalibrationError, match=r"3 readable calibration images cannot support .*at least 4 are needed"):
        Inspector.fit(own, CONFIG, cache=cache)


def test_a_broken_image_is_left_out_and_named(own: Path, cache: FeatureCache) -> None:
    broken = good(own)[3]
    broken.write_bytes(broken.read_bytes()[:200])
    learnt = Inspector.fit(own, CONFIG, cache=cache)
    assert len(learnt.facts["failures"]) == 1
    assert learnt.facts["failures"][0].startswith(f"{broken}: ")
    with pytest.raises(ImageError, match=broken.name):
        Inspector.fit(own, CONFIG, cache=cache, strict=True)


def test_copies_stay_on_one_side_of_the_split(own: Path, cache: FeatureCache) -> None:
    for path in good(own)[:10]:
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    split = Inspector.fit(own, CONFIG, cache=cache).split
    roles = [{split.hashes[record.path] for record in part} for part in (split.train, split.held_out, split.calibration)]
    assert not roles[0] & roles[1]
    assert not roles[0] & roles[2]
    assert not roles[1] & roles[2]


def test_data_without_training_images_is_an_error(products: Path, cache: FeatureCache) -> None:
    records = [record for record in read_folder(products) if record.split == "test"]
    with pytest.raises(DataError, match="none of them to learn from"):
        Inspector.fit(records, CONFIG, cache=cache)


# Settings


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"method": "hgda"}, r"unknown method 'hgda': did you mean 'hgad'\?"),
    ({"decisions": {}}, r"unknown setting 'decisions': did you mean 'decision'\?"),
    ({"hgad": {"blockz": 1}}, r"\[hgad\] unknown setting 'blockz': did you mean 'blocks'\?"),
    ({"seed": -1}, "seed: got -1"),
    ({"training": {"checks": "many"}}, r"training\.checks='many': expected a whole number"),
    ({"preparation": {"fit": "stretch"}}, "unknown fit 'stretch'"),
]


@pytest.mark.parametrize(("table", "message"), WRONG)
def test_a_wrong_setting_is_an_error(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        complete(table)


def test_settings_are_complete_and_stay_so() -> None:
    table = complete({"hgad": {"blocks": 2}})
    assert table["hgad"]["blocks"] == 2
    assert table["decision"]["false_alarm_rate"] == 0.01
    assert complete(table) == table


def test_a_record_without_a_file_is_named_and_left_out(tmp_path: Path) -> None:
    there, gone = tmp_path / "there.png", tmp_path / "gone.png"
    there.write_bytes(b"x")
    records = [Record(there, "a", 0), Record(gone, "a", 0)]
    run = Fit(complete(None), FeatureCache(tmp_path / "cache"), None, False, None)
    assert run._present(records) == records[:1]
    assert [(failure.path, failure.reason) for failure in run.failures] == [(gone, "no such file")]
    with pytest.raises(ImageError, match=r"gone\.png: no such file"):
        Fit(complete(None), FeatureCache(tmp_path / "cache"), None, True, None)._present(records)


# What learning may see


def test_nothing_learnt_depends_on_a_test_image(
    inspector: Inspector, products: Path, cache: FeatureCache, tmp_path: Path
) -> None:
    """Test images that are not there, more of them, or none: the model is the same, bit by bit."""
    records = read_folder(products)
    learnt = [record for record in records if record.split == "train"]
    gone = [replace(record, path=tmp_path / "gone" / record.path.name) for record in records if record.split == "test"]
    for data in (learnt, learnt + gone, [*gone, *learnt, *gone]):
        again = Inspector.fit(data, CONFIG, cache=cache)
        assert again.calibration.as_dict() == inspector.calibration.as_dict()
        assert again.split.as_dict() == inspector.split.as_dict()
        for name, value in inspector.detector.state_dict().items():
            assert torch.equal(value, again.detector.state_dict()[name]), name


def test_the_images_it_has_seen_are_refused_by_evaluate(inspector: Inspector, products: Path, tmp_path: Path) -> None:
    test = [record for record in read_folder(products) if record.split == "test"]
    for role in ROLES:
        learnt = getattr(inspector.split, role)[0]
        leaked = replace(learnt, path=tmp_path / "copy.png", split="test", label=0)
        leaked.path.write_bytes(learnt.path.read_bytes())
        with pytest.raises(LeakError, match=rf"copy\.png = {role.replace('_', '-')} image .*{learnt.path.name}"):
            evaluate(inspector, [*test, leaked])
    inspector.save(tmp_path / "m")
    with pytest.raises(LeakError, match="1 image of"):
        evaluate(Inspector.load(tmp_path / "m"), [*test, leaked])
    assert evaluate(inspector, test).warnings == ()


def test_a_near_copy_of_what_it_has_seen_is_warned_about(inspector: Inspector, products: Path, tmp_path: Path) -> None:
    test = [record for record in read_folder(products) if record.split == "test"]
    learnt = inspector.split.train[0]
    saved = replace(learnt, path=tmp_path / "again.jpg", split="test", label=0)
    Image.open(learnt.path).convert("RGB").save(saved.path, quality=90)
    (warning,) = evaluate(inspector, [*test, saved]).warnings
    assert warning.startswith(f"1 image of {len(test) + 1} in the test set looks nearly the same")
    assert f"again.jpg = train image {learnt.path}" in warning


# The paper's protocol


def test_told_the_product_it_scores_under_it_and_says_the_same_untold(inspector: Inspector, products: Path) -> None:
    records = [record for record in read_folder(products) if record.split == "test"]
    wrong = [replace(record, product="gear") for record in records]
    untold = found(inspector, records)
    named = list(inspector.findings_given(records))
    misled = list(inspector.findings_given(wrong))
    for finding, (_, told, given), (_, still, other) in zip(untold, named, misled, strict=True):
        assert isinstance(told, Finding)
        assert isinstance(still, Finding)
        assert same(finding, told)
        assert same(finding, still)
        assert given is not None
        assert other is not None
        assert other.product in (None, "gear")
        alike = bool(np.isclose(other.score, given.score, rtol=1e-4, atol=1e-5))
        assert alike is (Path(str(finding.path)).parts[-4] == "gear")


def test_a_product_it_does_not_know_cannot_be_given(inspector: Inspector, products: Path) -> None:
    records = [record for record in read_folder(products) if record.split == "test"][:3]
    strange = [replace(records[0], product="bolt"), replace(records[1], product=None), records[2]]
    assert [given is None for _, _, given in inspector.findings_given(strange)] == [True, True, False]


def test_scores_before_alignment_are_kept_beside(inspector: Inspector, products: Path) -> None:
    result = evaluate(inspector, products)
    assert result.unaligned is not None
    assert result.unaligned.shape == result.scores.shape
    assert not np.allclose(result.unaligned, result.scores)


def test_a_section_that_is_no_table_is_told() -> None:
    with pytest.raises(ConfigError, match=r"hgad: got 3, expected a table \[hgad\] of settings"):
        complete({"hgad": 3})
