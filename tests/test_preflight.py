"""What is predicted of a fit is what the fit takes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unispect import cli, write_products
from unispect.detectors.base import Grows, StatisticalDetector
from unispect.detectors.methods import build
from unispect.errors import CalibrationError, ConfigError, UnispectError
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector, complete
from unispect.nn.memory import Coreset
from unispect.preflight import MIB, Plan, _lowered, mebibytes, plan

RATE = {"decision": {"false_alarm_rate": 0.2}}
SMALL: dict[str, Any] = {"preparation": {"size": 64}, "features": {"engine": "torch"}} | RATE
STEPS = {"training": {"steps": 4, "checks": 2}, "hgad": {"map_side": 64}}
SETTINGS = ["preparation.size=64", "features.engine=torch"]
METHODS = {"patchcore": [], "opca": [], "padim": [], "hgad": ["training.steps=4", "training.checks=2"]}
SHAPES = [(6, 4, 4), (5, 2, 2)]
PRODUCTS, IMAGES = 2, 12


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("preflight")
    write_products(folder / "data", train=30, good=1, bad=1, size=64, products=["fabric", "gear"])
    return folder / "data"


def command(data: Path, out: Path, method: str) -> list[str]:
    settings = [f"method={method}", *SETTINGS, *METHODS[method]]
    sets = [part for setting in settings for part in ("--set", setting)]
    given = ["fit", data, "-o", out / "model", "--cache", out / "cache", "--false-alarm-rate", "0.2", *sets]
    return [sys.executable, "-m", "unispect", *map(str, given)]


LIMITED = """
import os, resource, runpy, sys
limit = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.argv[0] = "unispect"
try:
    runpy.run_module("unispect", run_name="__main__")
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits and units of getrusage are those of Linux")
@pytest.mark.parametrize("method", METHODS)
def test_memory_and_model_are_within_twice_the_prediction_and_a_limit_of_twice_that_suffices(
    data: Path, tmp_path: Path, method: str
) -> None:
    call = command(data, tmp_path, method)
    said = json.loads(subprocess.run([*call, "--dry-run", "--json"], capture_output=True, check=True).stdout)
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "cache").exists()
    memory, disk = said["memory"]["total"], said["disk"]
    limited = [sys.executable, "-c", LIMITED, str(round(2 * memory * MIB)), *call[3:]]
    done = subprocess.run(limited, capture_output=True, text=True, check=True)
    peak = int(done.stdout.split()[-1]) / 1024
    assert memory / 2 < peak < memory * 2
    model = sum(file.stat().st_size for file in (tmp_path / "model").iterdir()) / MIB
    assert disk["model"] / 2 < model < disk["model"] * 2
    features = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.f16")) / MIB
    assert disk["features"] == pytest.approx(features, rel=0.1)


def planned(data: Path, tmp_path: Path, **more: Any) -> Plan:
    return plan(data, SMALL | {"method": "padim"} | more, cache=FeatureCache(tmp_path / "cache"))


def test_a_plan_counts_images_and_asks_the_cache(data: Path, tmp_path: Path) -> None:
    before = planned(data, tmp_path)
    assert dict(before.images) == {"train": 52, "held_out": 0, "calibration": 8, "missing": 60}
    assert before.products == 2
    Inspector.fit(data, SMALL | {"method": "padim"}, cache=FeatureCache(tmp_path / "cache"))
    after = planned(data, tmp_path)
    assert after.images["missing"] == after.disk.features == 0
    assert after.minutes.total > 0
    assert "8 calibration images support it" in after.text()


def test_a_plan_says_in_the_same_words_what_fit_refuses(data: Path, tmp_path: Path) -> None:
    config = SMALL | {"method": "padim", "decision": {"false_alarm_rate": 0.01}}
    with pytest.raises(CalibrationError) as refused:
        Inspector.fit(data, config, cache=FeatureCache(tmp_path / "cache"))
    found = plan(data, config, cache=FeatureCache(tmp_path / "cache"))
    assert found.refusal == str(refused.value)
    assert found.refusal in found.text()
    with pytest.raises(CalibrationError, match="cannot support false_alarm_rate"):
        found.check()


@pytest.mark.parametrize("aligner", ["cada", "cada-b"])
def test_an_aligner_costs_its_folds(data: Path, tmp_path: Path, aligner: str) -> None:
    found = planned(data, tmp_path, aligner=aligner, **{aligner: {"steps": 10}})
    assert found.minutes.aligner > found.minutes.learning


def test_a_fit_above_max_ram_does_not_start(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*command(data, tmp_path, "patchcore")[3:], "--max-ram", "50MiB"]
    assert cli.main(given) == 2
    said = capsys.readouterr().err
    assert "max_ram: patchcore on 52 images is predicted to take" in said
    assert "more than the 50 MiB allowed: lower" in said
    assert not (tmp_path / "model").exists()


def test_max_ram_of_a_method_falls_to_what_fits() -> None:
    config = complete({"method": "patchcore"})
    table, lowered = _lowered(config, ["patchcore"], lambda table: table["patchcore"]["max_ram"] < 500)
    assert table["patchcore"]["max_ram"] == 384
    assert lowered == {"patchcore.max_ram": (1024.0, 384.0)}
    assert _lowered(config, ["patchcore"], lambda table: False) == (config, {})


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4096), ("512 MiB", 512), ("2G", 2048), ("1.5gb", 1536), (str(2**20), 1), ("1TiB", 2**20)]
)
def test_sizes_are_read_as_people_write_them(text: str, size: float) -> None:
    assert mebibytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "4GG"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"max_ram: got .* such as 4GiB"):
        mebibytes(text)


def test_too_little_memory_is_no_error_of_the_plan_itself(data: Path, tmp_path: Path) -> None:
    found = planned(data, tmp_path)
    found.check(found.memory.total + 1)
    with pytest.raises(UnispectError, match="more than the 1 MiB allowed"):
        found.check(1)


# What a method says of its growth is what grows.


def features(count: int, seed: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(count, *shape, generator=random) for shape in SHAPES]


def state(detector: torch.nn.Module) -> int:
    return sum(value.nbytes for value in detector.state_dict().values())


@pytest.mark.parametrize("method", ["patchcore", "neighbours", "spade"])
def test_what_is_learnt_has_the_size_that_was_said(method: str) -> None:
    config = complete({"method": method})
    detector, product = build(config, SHAPES, PRODUCTS), torch.arange(IMAGES) % PRODUCTS
    assert isinstance(detector, StatisticalDetector)
    before = state(detector)
    assert isinstance(detector, Grows)
    said = detector.growth([IMAGES // PRODUCTS] * PRODUCTS)
    more = True
    while more:
        detector.update(features(IMAGES, 0), product)
        more = detector.finish()
    assert state(detector) - before == said.learnt
    assert said.held >= said.learnt


@pytest.mark.parametrize(("count", "max_ram"), [(50, 1.0), (20_000, 1.0)])
def test_a_coreset_holds_no_more_than_it_said(count: int, max_ram: float) -> None:
    coreset = Coreset(8, share=0.1, most=500, max_ram=max_ram)
    said = coreset.growth(count)
    vectors = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    for part in vectors.split(1000):
        coreset.add(part, torch.zeros(len(part), dtype=torch.int64))
        assert coreset.held_bytes <= said.held <= 1.01 * max_ram * MIB
    assert coreset.chosen()[0].nbytes == said.learnt


def test_hgad_says_more_for_more_images_and_no_more_than_its_centres() -> None:
    detector = build(complete({"method": "hgad", "hgad": {"crowd": 2.0}}), SHAPES, PRODUCTS)
    assert isinstance(detector, Grows)
    few, many, most = (detector.growth([count] * PRODUCTS) for count in (1, 2, 200))
    assert few.learnt < many.learnt == most.learnt
    assert few.held < many.held < most.held
