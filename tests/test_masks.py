"""Masks from a file of settings to a finding: what lies where nobody looks changes nothing, bit by bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unispect import runtime
from unispect.cli import _settings
from unispect.data.factory import write_products
from unispect.data.folder import read_folder
from unispect.data.loader import decode
from unispect.data.records import Record
from unispect.errors import ConfigError
from unispect.evaluation import evaluate
from unispect.export.bundle import export
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector, complete
from unispect.types import Finding

SIDE, DRAWN = 64, 80
SMALL: dict[str, Any] = {
    "method": "opca",
    "preparation": {"size": SIDE},
    "features": {"engine": "torch"},
    "decision": {"false_alarm_rate": 0.2, "min_area": 4},
    "opca": {"map_side": SIDE},
}


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), 30, 3, 1, DRAWN, products=["fabric", "gear"])


@pytest.fixture(scope="module")
def mask(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The right half of a gear is not looked at."""
    path = tmp_path_factory.mktemp("masks") / "gear.png"
    white = np.zeros((DRAWN, DRAWN), np.uint8)
    white[:, DRAWN // 2 :] = 255
    Image.fromarray(white).save(path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def plain(products: Path, cache: FeatureCache) -> Inspector:
    return Inspector.fit(products, SMALL, cache=cache)


@pytest.fixture(scope="module")
def masked(products: Path, mask: Path, cache: FeatureCache) -> Inspector:
    return Inspector.fit(products, SMALL | {"masks": {"ignore": {"gear": str(mask)}}}, cache=cache)


def images(products: Path, name: str) -> list[Path]:
    return sorted((products / name / "test").rglob("*.png"))


def spoiled(image: np.ndarray, left: int, right: int) -> np.ndarray:
    """With a patch of noise between two columns."""
    image = image.copy()
    image[20:60, left:right] = np.random.default_rng(0).integers(0, 256, (40, right - left, 3))
    return image


def finding(inspector: Any, image: Any) -> Finding:
    found = inspector.inspect(image)
    assert isinstance(found, Finding)
    return found


def same(one: Finding, other: Finding) -> bool:
    """In all but the path, and in the map."""
    return np.array_equal(one.map, other.map) and one.as_dict() | {"path": None} == other.as_dict() | {"path": None}


def good(products: Path) -> list[np.ndarray]:
    return [decode(path) for path in images(products, "gear") if path.parent.name == "good"]


def test_a_defect_where_nobody_looks_changes_nothing(plain: Inspector, masked: Inspector, products: Path) -> None:
    for image in good(products):
        for left, right in ((56, 72), (DRAWN // 2, DRAWN)):  # well inside, and up to the edge
            bad = spoiled(image, left, right)
            assert finding(masked, bad).product == "gear"
            assert same(finding(masked, bad), finding(masked, image))
            assert finding(plain, bad).anomalous
            assert finding(plain, bad).score > 1.5 * finding(plain, image).score


def test_a_defect_beside_the_mask_is_found(masked: Inspector, products: Path) -> None:
    for image in good(products):
        found = finding(masked, spoiled(image, 8, 24))
        assert found.anomalous
        assert all(region.left < DRAWN // 2 + 2 for region in found.regions)
        assert any(region.left < 24 and region.right > 8 for region in found.regions)


def test_no_region_lies_where_nobody_looks(masked: Inspector, products: Path) -> None:
    """Nor of a defect across the edge, of which the one half counts."""
    for image in good(products):
        found = finding(masked, spoiled(image, 30, 50))
        assert found.anomalous
        assert all(region.right <= DRAWN // 2 + 2 for region in found.regions)
        assert (found.map[:, SIDE // 2 + 1 :] == found.map.min()).all()


def test_products_without_a_mask_are_looked_at_everywhere(plain: Inspector, masked: Inspector, products: Path) -> None:
    for path in images(products, "fabric"):
        one, other = finding(plain, path), finding(masked, path)
        assert one.score == other.score
        image = decode(path)
        assert finding(masked, spoiled(image, 56, 72)).score > one.score


def test_calibration_images_are_scored_as_others_are(masked: Inspector) -> None:
    found = [result for _, result in masked.findings(list(masked.split.calibration)) if isinstance(result, Finding)]
    scores = [one.score for one in found]
    np.testing.assert_allclose(scores, masked.calibration.scores, rtol=2e-2)  # features in half precision there
    assert sum(one.anomalous for one in found) <= 0.2 * (len(found) + 1)


def test_a_saved_model_needs_no_mask_file(masked: Inspector, products: Path, mask: Path, tmp_path: Path) -> None:
    loaded = Inspector.load(masked.save(tmp_path / "m"))
    assert loaded.config["masks"] == {"ignore": {"gear": str(mask)}}
    assert all(same(finding(masked, path), finding(loaded, path)) for path in images(products, "gear"))
    assert loaded.with_false_alarm_rate(0.5).blank is loaded.blank
    assert "- Not looked at: 51.6% of images of gear, by its mask." in loaded.card()
    hidden = mask.rename(tmp_path / "gone.png")
    try:
        assert same(
            finding(Inspector.load(tmp_path / "m"), images(products, "gear")[0]),
            finding(masked, images(products, "gear")[0]),
        )
    finally:
        hidden.rename(mask)


def test_without_masks_nothing_changes(plain: Inspector, products: Path, cache: FeatureCache, tmp_path: Path) -> None:
    again = Inspector.fit(products, SMALL | {"masks": {"ignore": {}}}, cache=cache)
    assert again.blank is None
    assert again.config == plain.config
    assert again.calibration.as_dict() == plain.calibration.as_dict()
    assert again.save(tmp_path / "a").joinpath("weights.safetensors").read_bytes() == (
        plain.save(tmp_path / "b").joinpath("weights.safetensors").read_bytes()
    )


@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_an_exported_model_looks_where_it_did(masked: Inspector, products: Path, tmp_path: Path, to: str) -> None:
    export(masked, tmp_path / "out", to)
    loaded = runtime.Inspector.load(tmp_path / "out")
    for path in [*images(products, "gear"), *images(products, "fabric")[:3]]:
        one, other = finding(loaded, path), finding(masked, path)
        assert one.score == pytest.approx(other.score, abs=1e-3)
        assert one.anomalous == other.anomalous
        np.testing.assert_allclose(one.map, other.map, atol=2e-3)
    for image in good(products):
        assert finding(loaded, spoiled(image, 56, 72)).score == pytest.approx(finding(loaded, image).score, rel=1e-5)


@pytest.mark.parametrize("method", ["hgad", "draem"])
def test_other_kinds_of_methods_do_not_look_either(method: str, products: Path, mask: Path, cache: FeatureCache) -> None:
    """Trained by gradients, on vectors and on whole images."""
    config = {name: value for name, value in SMALL.items() if name != "opca"} | {
        "method": method,
        "training": {"steps": 4, "checks": 2},
        method: {"map_side": SIDE} if method == "hgad" else {},
        "masks": {"ignore": {"gear": str(mask)}},
    }
    inspector = Inspector.fit(products, config, cache=cache)
    image = good(products)[0]
    one, other = finding(inspector, image), finding(inspector, spoiled(image, 56, 72))
    assert one.score == other.score
    assert np.array_equal(one.map, other.map)
    if method == "hgad":  # and a training that is run again reads the same
        again, _ = inspector.train_again(lambda step, detector: None, cache=cache)
        for name, value in inspector.detector.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name


def test_one_product_needs_no_second_look(products: Path, mask: Path, cache: FeatureCache, tmp_path: Path) -> None:
    given = SMALL | {"masks": {"ignore": {"gear": str(mask)}}}
    one = Inspector.fit([record for record in read_folder(products) if record.product == "gear"], given, cache=cache)
    assert one.blank is not None
    assert one.blank.known is None
    loaded = Inspector.load(one.save(tmp_path / "m"))
    for image in good(products):
        assert same(finding(one, spoiled(image, 56, 72)), finding(one, image))
        assert same(finding(loaded, image), finding(one, image))


def test_images_are_scored_alone_as_together(masked: Inspector, products: Path) -> None:
    paths = [*images(products, "gear")[:3], *images(products, "fabric")[:3]]
    together = [found for _, found in masked.findings([Record(path, None, None) for path in paths])]
    for path, found in zip(paths, together, strict=True):
        assert isinstance(found, Finding)
        assert found.score == pytest.approx(finding(masked, path).score, rel=1e-4)


def test_evaluation_takes_a_model_with_masks(masked: Inspector, products: Path) -> None:
    assert evaluate(masked, products, bootstrap=False).total.false_alarm_rate <= 1


def test_features_are_those_of_masked_images(masked: Inspector, products: Path, cache: FeatureCache) -> None:
    records = [record for record in masked.split.calibration if record.product == "gear"]
    found, readable = masked.features(records, cache=cache)
    image = decode(readable[0].path)
    prepared = masked.preparation.image(spoiled(image, 56, 72))
    filled = masked.blank(torch.from_numpy(prepared)[None], torch.tensor([1]))  # type: ignore[misc]
    for level, expected in zip(found.stacked([0]), masked.engine(filled), strict=True):
        torch.testing.assert_close(level, expected, rtol=2e-3, atol=2e-3)


def test_products_do_not_come_or_go_alone(masked: Inspector) -> None:
    with pytest.raises(ConfigError, match="the model has masks"):
        masked.without_product("gear")


def test_a_wrong_mask_is_told_before_anything_is_learnt(products: Path, mask: Path, tmp_path: Path) -> None:
    def no_step(stage: str, done: int, total: int, losses: dict[str, float]) -> None:
        raise AssertionError(stage)

    with pytest.raises(ConfigError, match="unknown product 'gaer': did you mean 'gear'"):
        Inspector.fit(products, SMALL | {"masks": {"ignore": {"gaer": str(mask)}}}, progress=no_step)
    Image.new("L", (40, 80), 255).save(tmp_path / "narrow.png")
    with pytest.raises(ConfigError, match=r"narrow\.png has 40 x 80 pixels and .* has 80 x 80"):
        Inspector.fit(products, SMALL | {"masks": {"ignore": {"gear": str(tmp_path / "narrow.png")}}}, progress=no_step)


def test_a_file_of_settings_names_masks_beside_it(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('[masks.ignore]\ngear = "m/gear.png"\n')
    expected = {"ignore": {"gear": str(tmp_path / "m" / "gear.png")}}
    assert complete(tmp_path / "own.toml")["masks"] == expected
    assert complete(_settings(tmp_path / "own.toml", [], None, None))["masks"] == expected
    both = _settings(tmp_path / "own.toml", ["masks.ignore.wood=wood.png"], None, None)
    assert complete(both)["masks"]["ignore"] == expected["ignore"] | {"wood": "wood.png"}
    assert "masks" not in complete(None)
