"""What the documents show is what the code does."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import unispect
from unispect.align.aligners import NONE
from unispect.align.aligners import build as build_aligner
from unispect.align.base import width
from unispect.config import read_toml
from unispect.detectors.hgad import HGAD
from unispect.detectors.methods import build
from unispect.inspector import FeatureSettings, complete, empty_detector

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs_src" / "ten_lines.py"
MONITORING = ROOT / "docs_src" / "monitor.py"


def test_the_readme_shows_the_example_that_runs() -> None:
    shown = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert shown is not None
    assert shown[1] == EXAMPLE.read_text("utf-8")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On fewer and smaller pictures than it shows, so that the test takes seconds; the lines are the README's."""
    whole, learn = unispect.write_products, unispect.Inspector.fit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNISPECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("unispect.data.factory.write_products", lambda root, train: whole(root, train, 2, 1, 64))
    small = {"preparation": {"size": 64}, "training": {"steps": 4}}
    monkeypatch.setattr(unispect.Inspector, "fit", lambda data, config: learn(data, config | small))
    runpy.run_path(str(EXAMPLE))
    assert "pooled" in capsys.readouterr().out
    assert (tmp_path / "out" / "report.html").stat().st_size > 10_000
    products = unispect.Inspector.load(tmp_path / "out" / "model").products
    assert products == ("blister", "board", "fabric", "gear", "terrazzo", "wood")


def test_the_guide_to_decisions_shows_the_example_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = ROOT / "docs_src" / "decide.py"
    assert example.read_text("utf-8") in (ROOT / "docs" / "decisions.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNISPECT_CACHE", str(tmp_path / "cache"))
    settings = {"method": "opca", "preparation": {"size": 64}, "decision": {"false_alarm_rate": 0.2}}
    data = unispect.write_products("data", 20, 1, 0, 64)
    unispect.Inspector.fit(data, settings | {"opca": {"map_side": 64}}).save("out/model")
    whole = unispect.write_products
    monkeypatch.setattr("unispect.data.factory.write_products", lambda root, train, seed: whole(root, train, 1, 0, 64, seed))
    monkeypatch.setattr("unispect.write_products", unispect.data.factory.write_products)
    runpy.run_path(str(example))
    assert "Version 2: calibrated on 120 images" in capsys.readouterr().out
    now = unispect.Inspector.load("out/model").versions
    assert [version.restores for version in now.all] == [None, None, 1]


@pytest.mark.slow
def test_the_example_of_monitoring_notices_the_dim_lamp(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert MONITORING.read_text("utf-8") in (ROOT / "docs" / "monitor.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNISPECT_CACHE", str(tmp_path / "cache"))
    names = runpy.run_path(str(MONITORING))
    first = names["found"].alarms[0]
    assert first.kind == "shift"
    assert first.at > len(names["good"])
    assert "Check light, lens and camera" in capsys.readouterr().out


def test_the_page_on_regions_shows_the_example_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example, page = ROOT / "docs_src" / "regions.py", (ROOT / "docs" / "regions.md").read_text("utf-8")
    assert f"```python\n{example.read_text('utf-8')}```" in page
    whole, learn = unispect.write_products, unispect.Inspector.fit
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNISPECT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("unispect.data.factory.write_products", lambda root, train: whole(Path(root), train, 2, 1, 64))
    small = {"preparation": {"size": 64}, "training": {"steps": 4}}
    monkeypatch.setattr(unispect.Inspector, "fit", lambda data, config: learn(data, config | small))
    runpy.run_path(str(example))
    assert {line.split()[-1] for line in capsys.readouterr().out.splitlines()} <= {"True", "False"}


def test_the_quick_file_holds_the_defaults() -> None:
    assert read_toml(ROOT / "configs" / "quick.toml") == complete(None)


def test_the_published_file_builds_the_published_model() -> None:
    table = complete(ROOT / "configs" / "hgad-mvtec.toml")
    assert table["features"]["backbone"] == "tf_efficientnet_b6.aa_in1k"
    with torch.device("meta"):
        flow = HGAD([(200, 64, 64)], products=15, **table["hgad"]).level(0).flow
    assert sum(value.numel() for value in flow.parameters()) == pytest.approx(4.766e6, rel=2e-3)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.toml")), ids=lambda file: file.stem)
def test_every_file_of_settings_builds_its_model(file: Path) -> None:
    """With shapes like those of its backbone, on no memory."""
    table = complete(file)
    sides = [2 ** (5 - number) for number in range(len(table["features"]["layers"]))]
    shapes = [(8, side, side) for side in sides] + [(6, 1, 1) for _ in table["features"]["pooled"]]
    if table["features"]["backbone"] == "pixels":
        shapes = []
    if table["features"]["backbone"] == "pixels" or table["features"]["image"]:
        shapes += [(3, table["preparation"]["size"], table["preparation"]["size"])]
    with torch.device("meta"):
        assert build(table, shapes, products=3, encoder=nn.Identity())
        if table["aligner"] != NONE:
            assert build_aligner(table, channels=16, products=3)


PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("name", ["revdist", "recontrast", "uniad"])
def test_the_published_cada_models_run_on_their_backbones(name: str) -> None:
    """With random weights and a smaller image: levels, sizes and aligner fit one another."""
    table = complete(ROOT / "configs" / f"cada-{name}-mvtec.toml")
    settings = FeatureSettings(**table["features"] | {"weights": "random", "engine": "torch"})
    eyes, side = settings.build(), {"revdist": 64, "recontrast": 64, "uniad": 224}[name]
    features = eyes(torch.zeros(1, 3, side, side, dtype=torch.uint8))
    with torch.inference_mode():
        detector = empty_detector(table, [tuple(level.shape[1:]) for level in features], 15, eyes).eval()
        scores = detector(features)
        aligner = build_aligner(table, width(features, scores), 15)
        assert aligner is not None
        aligned = aligner.eval()(features, scores)
    assert aligned.maps.shape == (1, table["preparation"]["size"], table["preparation"]["size"])
    assert scores.context is not None
    assert scores.context.shape[1] == {"revdist": 2048, "recontrast": 2048, "uniad": 256}[name]
