"""Grids: what is checked before anything runs, what is run again and what is not, and how a cell may fail."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from unispect.benchmark import Grid, compared, read_grid, run
from unispect.data.factory import write_products
from unispect.errors import ConfigError, DataError
from unispect.published.tables import published

TINY = """
title = "Tiny"
seeds = [0, 1]
[data.tiny]
root = "products"
ignore_masks = ["gear"]
[backbones.small]
preparation = { size = 64 }
features = { engine = "torch" }
[methods.hgad]
hgad = { map_side = 64 }
training = { steps = 3, checks = 1 }
decision = { false_alarm_rate = 0.25 }
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two products beside a grid; no test changes them."""
    folder = tmp_path_factory.mktemp("benchmark")
    write_products(folder / "products", 14, 2, 1, 64, products=["fabric", "gear"])
    return folder


def grid(folder: Path, text: str = TINY, **options: Any) -> Grid:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return read_grid(path, **options)


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    """Both cells measured, each on a core of its own."""
    run(grid(folder), folder / "out", jobs=2)
    return folder / "out"


def written(out: Path) -> dict[str, float]:
    return {file.name: file.stat().st_mtime_ns for file in (out / "cells").glob("*.json")}


# Reading


def test_a_cell_for_each_method_data_backbone_and_seed(folder: Path) -> None:
    text = TINY + "[methods.other]\nmethod = 'hgad'\n[backbones.large]\npreparation = { size = 96 }\n"
    found = grid(folder, text)
    assert len(found.cells) == 2 * 2 * 2
    assert {cell.name for cell in found.cells} >= {"hgad--tiny--small--s0", "other--tiny--large--s1"}
    assert {cell.settings["preparation"]["size"] for cell in found.cells} == {64, 96}
    assert [cell.seed for cell in grid(folder, seeds=[7]).cells] == [7]
    assert found.cells[0].source.root == str(folder / "products")


def test_a_data_set_may_be_elsewhere(folder: Path, tmp_path: Path) -> None:
    assert grid(folder, roots={"tiny": tmp_path}).cells[0].source.root == str(tmp_path)
    with pytest.raises(ConfigError, match=r"--data tinny=.*unknown data set 'tinny': did you mean 'tiny'"):
        grid(folder, roots={"tinny": tmp_path})


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("[methods.hgad]", "[method.hgad]", r"unknown table 'method': did you mean 'methods'"),
        ("hgad = { map_side = 64 }", "hgad = { mapside = 64 }", r"methods\.hgad: .*'mapside': did you mean 'map_side'"),
        ("ignore_masks", "ignore_mask", r"\[data\.tiny\] .*'ignore_mask': did you mean 'ignore_masks'"),
        ('root = "products"', "", r"\[data\.tiny\] expected exactly one of root .* and generate"),
        ('root = "products"', 'root = "products"\ndataset = "mvtek"', "unknown data set 'mvtek': did you mean 'mvtec'"),
        ('root = "products"\nignore_masks = ["gear"]', "generate = { trane = 3 }", "'trane': did you mean 'train'"),
        ("[data.tiny]", "[backbones.none]\n[backbones.tiny]", r"no \[data\.NAME\]"),
    ],
)
def test_what_is_wrong_in_a_grid_is_told_before_anything_runs(folder: Path, old: str, new: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        grid(folder, TINY.replace(old, new))


def test_a_missing_folder_says_how_to_name_it(folder: Path) -> None:
    text = TINY.replace('root = "products"', 'root = "nowhere"\ndataset = "visa"')
    with pytest.raises(DataError, match=r"data\.tiny: .*nowhere: no such folder: name it with --data tiny=FOLDER; https://"):
        grid(folder, text)


# Running


def test_a_result_holds_numbers_costs_and_where_they_are_from(out: Path) -> None:
    result = json.loads((out / "cells" / "hgad--tiny--small--s0.json").read_text("utf-8"))
    assert result["status"] == "done"
    assert set(result["evaluation"]["products"]) == {"fabric", "gear"}
    assert result["evaluation"]["products"]["gear"]["pixel_auroc"] is None
    assert {"label given", "test-normalised", "both"} == set(result["evaluation"]["comparisons"])
    assert all(result["costs"][name] > 0 for name in ("fit_s", "evaluate_s", "peak_gib", "model_mib"))
    assert result["settings"]["seed"] == 0
    assert (out / result["report"]).is_file()
    with (out / result["scores"]).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["evaluation"]["pooled"]["images"]
    assert all(float(row["unaligned"]) > 0 for row in rows)


def test_what_is_done_is_not_done_again(folder: Path, out: Path) -> None:
    before, calls = written(out), []
    results = run(grid(folder), out, progress=lambda done, total: calls.append((done, total)))
    assert [result["status"] for result in results] == ["done", "done"]
    assert written(out) == before
    assert calls == [(2, 2)]


def test_only_what_changed_is_run_again_and_numbers_do_not_depend_on_the_jobs(folder: Path, out: Path) -> None:
    before = written(out)
    first = json.loads((out / "cells" / "hgad--tiny--small--s0.json").read_text("utf-8"))["evaluation"]
    (out / "cells" / "hgad--tiny--small--s0.json").write_text("cut off", encoding="utf-8")
    results = run(grid(folder), out)
    again = results[0]["evaluation"]
    assert again["threshold"] == pytest.approx(first["threshold"], rel=1e-4)  # sums of another number of threads
    for name in ("pooled", "mean"):
        assert again[name]["image_auroc"] == pytest.approx(first[name]["image_auroc"], abs=0.05)
    after = written(out)
    assert after["hgad--tiny--small--s1.json"] == before["hgad--tiny--small--s1.json"]
    assert after["hgad--tiny--small--s0.json"] > before["hgad--tiny--small--s0.json"]


def test_a_changed_image_or_setting_makes_another_key(folder: Path, out: Path) -> None:
    from unispect.benchmark import _keys

    keys = _keys(grid(folder), out)
    assert _keys(grid(folder), out) == keys
    changed = _keys(grid(folder, TINY.replace("steps = 3", "steps = 4")), out)
    assert all(changed[name] != keys[name] for name in keys)
    image = next((folder / "products").rglob("*.png"))
    stamp = image.stat()
    image.write_bytes(image.read_bytes())
    assert all(key != keys[name] for name, key in _keys(grid(folder), out).items())
    import os

    os.utime(image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert _keys(grid(folder), out) == keys


def test_a_cell_that_fails_is_told_and_the_others_go_on(folder: Path, tmp_path: Path) -> None:
    text = TINY.replace("seeds = [0, 1]", "seeds = [0]") + (
        "[methods.broken]\nmethod = 'hgad'\nhgad = { map_side = 64 }\ntraining = { steps = 3 }\n"
        "decision = { false_alarm_rate = 0.001 }\n"
    )
    good, broken = run(grid(folder, text), tmp_path)
    assert good["status"] == "done"
    assert broken["status"] == "failed"
    assert "cannot support false_alarm_rate=0.001" in broken["error"]
    assert "Traceback" not in broken["error"]


def test_a_process_that_dies_is_a_failed_cell(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unispect.benchmark.sys.executable", "/bin/false")
    (result, *_) = run(grid(folder), tmp_path)
    assert result["status"] == "failed"
    assert "ended with code 1" in result["error"]


def test_jobs_must_be_positive(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="jobs=0: expected at least 1"):
        run(grid(folder), tmp_path, jobs=0)


def test_measured_beside_published(folder: Path, out: Path) -> None:
    results = run(grid(folder), out)
    for result in results:
        result["dataset"] = "mvtec"
    found = compared(published("hgad-table-1"), results)
    assert {line.product for line in found.lines} == {"mean"}
    assert {line.how for line in found.lines} == {
        "hgad, tf_efficientnet_lite0",
        "hgad, tf_efficientnet_lite0, label given",
    }
    assert any("image size" in text for text in found.differences)
