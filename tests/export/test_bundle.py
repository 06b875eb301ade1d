"""Models as graphs: what is exported says what torch says, or nothing is exported."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from unispect import runtime
from unispect.data.factory import write_products
from unispect.data.folder import images_below, read_folder
from unispect.data.loader import Failure, decode
from unispect.data.records import Record
from unispect.errors import CalibrationError, ConfigError, ExportError, ImageError, MissingExtraError, StoreError
from unispect.export.bundle import EXPORTERS, export
from unispect.export.parity import PREPARED, RAW, Parity
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector
from unispect.store import EXPORT, MODEL, kind_of
from unispect.types import Finding

SIDE = 64
SMALL: dict[str, Any] = {
    "preparation": {"size": SIDE},
    "features": {"engine": "torch"},
    "decision": {
        "false_alarm_rate": 0.2,
        "regions": "discovery",
        "discovery_rate": 0.3,
        "min_size_mm": 0.5,
        "mm_per_pixel": {"fabric": 0.1, "gear": 0.05},
    },
    "opca": {"map_side": SIDE},
}


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), 30, 3, 2, 80, products=["fabric", "gear"])


@pytest.fixture(scope="module")
def inspector(products: Path, tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    cache = FeatureCache(tmp_path_factory.mktemp("cache"))
    return Inspector.fit(products, SMALL | {"method": "opca", "aligner": "cada", "cada": {"steps": 5}}, cache=cache)


@pytest.fixture(scope="module")
def exported(inspector: Inspector, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for to in EXPORTERS:
        export(inspector, folder / to, to)
    return {to: folder / to for to in EXPORTERS}


@pytest.fixture(params=["onnx", "openvino", "onnx in openvino"])
def loaded(request: pytest.FixtureRequest, exported: dict[str, Path]) -> runtime.Inspector:
    to, _, engine = request.param.partition(" in ")
    return runtime.Inspector.load(exported[to], engine or "auto")


def test_findings_are_those_of_the_model(loaded: runtime.Inspector, inspector: Inspector, products: Path) -> None:
    paths = [path for path in images_below(products) if "test" in path.parts]
    for one, other in zip(loaded.inspect(paths), inspector.inspect(paths), strict=True):  # type: ignore[arg-type]
        assert isinstance(one, Finding)
        assert one.score == pytest.approx(other.score, abs=1e-3)
        np.testing.assert_allclose(one.map, other.map, atol=2e-3)
        for name in ("path", "anomalous", "p_value", "product", "unknown", "width", "height", "threshold"):
            assert getattr(one, name) == getattr(other, name), name
        assert len(one.regions) == len(other.regions)
        for part, same in zip(one.regions, other.regions, strict=True):
            assert part.p_value == same.p_value
            assert part.promised == same.promised
            assert part.area == pytest.approx(same.area, rel=0.05)
            assert part.area_mm2 == pytest.approx(part.area * {"fabric": 0.01, "gear": 0.0025}[str(one.product)], rel=0.05)


def test_every_kind_of_source(loaded: runtime.Inspector, products: Path) -> None:
    path = next(images_below(products / "gear" / "test"))
    array = decode(path)
    found = [loaded.inspect(source) for source in (path, str(path), path.read_bytes(), array, Image.fromarray(array))]
    assert len({one.score for one in found if isinstance(one, Finding)}) == 1
    several = loaded.inspect([array, path])
    assert isinstance(several, list)
    assert {one.score for one in several} == {found[0].score}  # type: ignore[union-attr]
    assert len(loaded.inspect(np.stack([array] * 3))) == 3  # type: ignore[arg-type]
    assert len(loaded.inspect(path.parent)) == sum(1 for _ in images_below(path.parent))  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"no.png: no such file"):
        loaded.inspect("no.png")


def test_records_come_in_order_and_broken_ones_are_named(loaded: runtime.Inspector, products: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"nothing")
    paths = [*list(images_below(products / "gear" / "test"))[:20], tmp_path / "broken.png", tmp_path / "gone.png"]
    found = list(loaded.findings([Record(path, None, None, split="test") for path in paths]))
    assert [record.path for record, _ in found] == paths
    assert [isinstance(one, Failure) for _, one in found] == [False] * (len(paths) - 2) + [True] * 2
    with pytest.raises(ImageError, match="broken"):
        list(loaded.findings([Record(tmp_path / "broken.png", None, None, split="test")], strict=True))


def test_the_whole_graph_takes_images_of_any_size_and_number(
    loaded: runtime.Inspector, inspector: Inspector, products: Path
) -> None:
    image = decode(next(images_below(products / "fabric" / "test")))
    assert image.shape[0] != SIDE
    said = loaded.network.whole(np.stack([image, image[::-1], image]))
    assert said["score"].shape == (3,)
    assert said["map"].shape[0] == 3
    if "model.xml" not in loaded.about["files"] and loaded.network.name.startswith("openvino"):
        return  # its reader of ONNX resizes without antialias, so the runtime does not let it
    expected = inspector.inspect(image)
    assert isinstance(expected, Finding)
    assert said["score"][[0, 2]] == pytest.approx([expected.score] * 2, abs=0.05)


def test_the_promise_can_be_changed_without_the_model(loaded: runtime.Inspector, inspector: Inspector) -> None:
    assert loaded.threshold == inspector.threshold
    assert loaded.false_alarm_rate == 0.2
    assert loaded.with_false_alarm_rate(0.5).threshold == inspector.with_false_alarm_rate(0.5).threshold
    with pytest.raises(CalibrationError, match="cannot support"):
        loaded.with_false_alarm_rate(0.001)


def test_the_bundle_tells_how_well_it_agrees(exported: dict[str, Path]) -> None:
    for to, folder in exported.items():
        assert kind_of(folder) == EXPORT
        told = json.loads((folder / "parity.json").read_text())
        assert set(told["prepared"]) == {"score", "map", "product", "novelty"}
        assert 0 < max(told["prepared"].values()) < PREPARED
        assert max(told["raw"].values()) < RAW
        assert told["real"] > 0
        about = json.loads((folder / "about.json").read_text())
        assert about["to"] == to
        assert about["aligner"] == "cada"


def test_a_graph_that_disagrees_is_not_written(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(given: Inspector, int8: bool) -> dict[str, bytes]:
        bias = next(part.bias for part in given.engine.extractor.modules() if getattr(part, "bias", None) is not None)
        with torch.no_grad():
            bias += 0.05
            try:
                return EXPORTERS["onnx"](given, int8)
            finally:
                bias -= 0.05

    monkeypatch.setitem(EXPORTERS, "wrong", wrong)
    with pytest.raises(ExportError, match=r"disagrees with torch: .* nothing was written"):
        export(inspector, tmp_path / "out", "wrong")
    assert not (tmp_path / "out").exists()


def test_no_number_is_no_agreement() -> None:
    with pytest.raises(ExportError, match="score on prepared images differs by nan"):
        Parity({"score": float("nan")}, {}, 1, 1).check()
    Parity({"score": PREPARED}, {"map": RAW}, 1, 1).check()
    with pytest.raises(ExportError, match="map on raw images"):
        Parity({}, {"map": 1.01 * RAW}, 1, 1).check()


def test_what_cannot_be(inspector: Inspector, exported: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="unknown export format 'onxx': did you mean 'onnx'"):
        export(inspector, tmp_path / "out", "onxx")
    with pytest.raises(StoreError, match="--overwrite"):
        export(inspector, exported["onnx"], "onnx")
    inspector.save(tmp_path / "model")
    assert kind_of(tmp_path / "model") == MODEL
    with pytest.raises(StoreError, match=r"not a unispect exported model: .* has format 'unispect-model'"):
        runtime.Inspector.load(tmp_path / "model")
    with pytest.raises(StoreError, match="not a unispect model"):
        Inspector.load(exported["onnx"])
    with pytest.raises(ConfigError, match="expected 'auto' or 'openvino'"):
        runtime.Inspector.load(exported["openvino"], "onnxruntime")
    with pytest.raises(ConfigError, match="unknown hint 'speed'"):
        runtime.Inspector.load(exported["onnx"], hint="speed")


def test_a_quick_way_only_where_there_is_one(inspector: Inspector, products: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="method 'opca' has no quick way"):
        export(inspector, tmp_path / "out", quick=True)
    shared = {name: value for name, value in SMALL.items() if name != "opca"}
    own = shared | {"method": "patchcore", "patchcore": {"max_bank_vectors": 200, "map_side": SIDE}}
    fitted = Inspector.fit(products, own, cache=FeatureCache(tmp_path / "cache"))
    found = export(fitted, tmp_path / "out", quick=True)
    assert found.parity.worst < 0.5
    assert json.loads((tmp_path / "out" / "about.json").read_text())["quick"]


def test_half_precision_is_refused(inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = inspector.config | {"features": inspector.config["features"] | {"precision": "bf16"}}
    monkeypatch.setattr(inspector, "config", config)
    with pytest.raises(ExportError, match=r"features.precision='bf16': expected 'f32'"):
        export(inspector, tmp_path / "out")


def test_damage_is_found(exported: dict[str, Path], tmp_path: Path) -> None:
    for name in ("model.onnx", "decision.json"):
        folder = tmp_path / name
        folder.mkdir()
        for file in exported["onnx"].iterdir():
            (folder / file.name).write_bytes(file.read_bytes() if file.name != name else file.read_bytes() + b" ")
        with pytest.raises(StoreError, match=f"{name} is damaged"):
            runtime.Inspector.load(folder)


def test_without_the_library_it_says_which(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"pip install unispect\[runtime\]"):
        runtime.Inspector.load(exported["onnx"], "onnxruntime")
    assert runtime.Inspector.load(exported["onnx"]).network.name.startswith("openvino")


@pytest.mark.parametrize("hint", runtime.HINTS)
def test_hints_change_no_number(exported: dict[str, Path], products: Path, hint: str) -> None:
    path = next(images_below(products / "gear" / "test"))
    scores = [runtime.Inspector.load(folder, hint=hint, threads=1).inspect(path).score for folder in exported.values()]  # type: ignore[union-attr]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


# 8 bits


def test_eight_bits_where_they_cost_nothing(inspector: Inspector, exported: dict[str, Path], tmp_path: Path) -> None:
    found = export(inspector, tmp_path / "int8", int8=True, max_loss=0.2)
    assert found.cost is not None
    assert found.cost.planted
    assert found.cost.before > 0.6
    assert "image AUROC" in found.text()
    small, large = ((folder / "model.onnx").stat().st_size for folder in (tmp_path / "int8", exported["onnx"]))
    assert small < 0.6 * large
    loaded = runtime.Inspector.load(tmp_path / "int8")
    assert loaded.about["precision"] == "int8"
    assert loaded.threshold != inspector.threshold  # of its own scores
    calibrated = [loaded.inspect(record.path) for record in inspector.split.calibration]
    scores = sorted(one.score for one in calibrated if isinstance(one, Finding))
    assert scores == pytest.approx(sorted(loaded.calibration.scores.tolist()), rel=1e-5)


def test_eight_bits_are_refused_where_they_cost_too_much(inspector: Inspector, products: Path, tmp_path: Path) -> None:
    labelled = [record for record in read_folder(products) if record.split == "test"]
    with pytest.raises(ExportError, match=r"8-bit numbers cost .* image AUROC .* allowed are -0.9: nothing was written"):
        export(inspector, tmp_path / "out", int8=True, check=labelled, max_loss=-0.9)
    good = [record for record in labelled if record.label == 0]
    with pytest.raises(ExportError, match="6 good and 0 defective"):
        export(inspector, tmp_path / "out", int8=True, check=good)
    assert not (tmp_path / "out").exists()
