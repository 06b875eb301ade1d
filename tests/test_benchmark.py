"""Grids: what is checked before anything runs, what is run again and what is not, and how a cell may fail."""

import csv
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unispect.benchmark import Grid, _end_with_parent, _keys, _peak, compared, read_grid, run
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
        ("[methods.hgad]", "[methods]\nhgad = 3\n[x]", r"unknown table 'x'"),
        ("[methods.hgad]", "[methods]\nhgad = 3\n[backbones.x]", r"methods\.hgad=3: expected a table \[methods\.hgad\]"),
        ("[methods.hgad]", "[methods.'a/../b']", "methods 'a/../b': expected a name of letters, digits"),
        ("[backbones.small]", "[backbones.'']", "backbones '': expected a name of letters, digits"),
        ("features = {", "features = { backbon = 'x', ", r"backbones\.small and .*'backbon': did you mean 'backbone'"),
        ("[methods.hgad]", "[methods.hgad]\nconfig = 3", "config=3: expected the path of a TOML file"),
        ("[0, 1]", "3", r"seeds=3: expected a list of different whole numbers"),
        ("[0, 1]", "[1, 1]", r"seeds=\[1, 1\]: expected a list of different whole numbers"),
        ("[0, 1]", "[true]", r"seed: got True, expected a whole number"),
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
    assert all(result["costs"][name] > 0 for name in ("fit_s", "evaluate_s", "images_per_s", "peak_gib", "model_mib"))
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
    assert results[0]["images"]["computed"] == 0  # the features were there
    again = results[0]["evaluation"]
    assert again["threshold"] == pytest.approx(first["threshold"], rel=1e-4)  # sums of another number of threads
    for name in ("pooled", "mean"):
        assert again[name]["image_auroc"] == pytest.approx(first[name]["image_auroc"], abs=0.05)
    after = written(out)
    assert after["hgad--tiny--small--s1.json"] == before["hgad--tiny--small--s1.json"]
    assert after["hgad--tiny--small--s0.json"] > before["hgad--tiny--small--s0.json"]


def test_a_changed_image_or_setting_makes_another_key(folder: Path, out: Path) -> None:
    keys = _keys(grid(folder), out)
    assert _keys(grid(folder), out) == keys
    changed = _keys(grid(folder, TINY.replace("steps = 3", "steps = 4")), out)
    assert all(changed[name] != keys[name] for name in keys)
    image = next((folder / "products").rglob("*.png"))
    stamp = image.stat()
    image.write_bytes(image.read_bytes())
    assert all(key != keys[name] for name, key in _keys(grid(folder), out).items())
    os.utime(image, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert _keys(grid(folder), out) == keys


def test_a_cell_that_fails_is_told_and_the_others_go_on(folder: Path, out: Path) -> None:
    text = TINY.replace("seeds = [0, 1]", "seeds = [0]") + (
        "[methods.broken]\nmethod = 'hgad'\nhgad = { map_side = 64 }\ntraining = { steps = 3 }\n"
        "decision = { false_alarm_rate = 0.001 }\n"
    )
    good, broken = run(grid(folder, text), out)
    assert good["status"] == "done"
    assert broken["status"] == "failed"
    assert "cannot support false_alarm_rate=0.001" in broken["error"]
    assert "Traceback" not in broken["error"]
    assert "\n" not in broken["error"]


def test_a_process_that_dies_is_a_failed_cell(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unispect.benchmark.sys.executable", "/bin/false")
    results = run(grid(folder), tmp_path, jobs=2)
    assert [result["status"] for result in results] == ["failed", "failed"]
    assert all("ended with code 1" in result["error"] for result in results)
    kept = json.loads((tmp_path / "cells" / "hgad--tiny--small--s0.json").read_text("utf-8"))
    assert kept["error"] == results[0]["error"]


# Running, with a quick process in place of Python

STANDS_IN = """#!/usr/bin/python3
import json, pathlib, signal, sys
job = json.loads(pathlib.Path(sys.argv[-1]).read_text())
cell = job["cell"]
name = "{method}--{data}--{backbone}--s{seed}".format(**cell)
if cell["method"] == "hangs":
    signal.pause()
result = {"status": "done", "key": job["key"], "cores": job["cores"]}
(pathlib.Path(job["out"]) / "cells" / (name + ".json")).write_text(json.dumps(result))
"""


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell is done at once; one of the method "hangs" never."""
    script = tmp_path / "python"
    script.write_text(STANDS_IN.replace("/usr/bin/python3", sys.executable), encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr("unispect.benchmark.sys.executable", str(script))


@pytest.mark.usefixtures("quick")
def test_only_the_cell_whose_setting_changed_is_run_again(folder: Path, tmp_path: Path) -> None:
    text = TINY + "[methods.other]\nmethod = 'hgad'\ntraining = { steps = 5 }\n"
    run(grid(folder, text), tmp_path / "out")
    before = written(tmp_path / "out")
    run(grid(folder, text.replace("steps = 5", "steps = 6")), tmp_path / "out")
    after = written(tmp_path / "out")
    assert {name for name in after if after[name] != before[name]} == {
        f"other--tiny--small--s{seed}.json" for seed in (0, 1)
    }


@pytest.mark.usefixtures("quick")
def test_stopped_in_the_middle_it_goes_on_where_it_was(folder: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    text = TINY.replace("[0, 1]", "[0]") + "[methods.hangs]\nmethod = 'hgad'\n"
    with pytest.raises(KeyboardInterrupt):
        run(grid(folder, text), tmp_path / "out", jobs=2, progress=stop)
    before = written(tmp_path / "out")
    assert set(before) == {"hgad--tiny--small--s0.json"}
    calls: list[int] = []
    results = run(
        grid(folder, text.replace("hangs", "other")), tmp_path / "out", progress=lambda done, total: calls.append(done)
    )
    assert [result["status"] for result in results] == ["done", "done"]
    assert calls == [1, 2]
    assert written(tmp_path / "out")["hgad--tiny--small--s0.json"] == before["hgad--tiny--small--s0.json"]


@pytest.mark.usefixtures("quick")
def test_jobs_share_the_cores(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unispect.benchmark.os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    results = run(grid(folder, seeds=[0, 1, 2, 3]), tmp_path / "out", jobs=2)
    assert {tuple(result["cores"]) for result in results} <= {(0, 2, 4), (1, 3)}
    results = run(grid(folder, seeds=[4]), tmp_path / "out")
    assert results[0]["cores"] == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("quick")
def test_products_are_drawn_once_for_all_cells(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(
        "unispect.benchmark.write_products",
        lambda root, *_: drawn.append(root) or write_products(root, 1, 1, 0, 64, products=["gear"]),
    )
    text = TINY.replace('root = "products"', "generate = { train = 1, good = 1, bad = 0, side = 64 }")
    for _ in range(2):
        run(grid(folder, text), tmp_path / "out", jobs=2)
    assert len(drawn) == 1


def test_the_key_does_not_hold_where_the_data_are(folder: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(folder / "products", target_is_directory=True)
    assert _keys(grid(folder, roots={"tiny": moved}), tmp_path) == _keys(grid(folder), tmp_path)


def test_a_cell_ends_when_what_started_it_is_killed() -> None:
    read, write = os.pipe()
    if (starter := os.fork()) == 0:
        own = os.getpid()
        if os.fork() == 0:
            _end_with_parent(own, every=0.01)
        os._exit(0)
    os.close(write)
    os.waitpid(starter, 0)
    ended, _, _ = select.select([read], [], [], 20)
    assert ended
    assert os.read(read, 1) == b""
    os.close(read)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_peak_memory_is_that_of_the_process_alone(tmp_path: Path) -> None:
    status = subprocess.run(["cat", "/proc/self/status"], capture_output=True, check=True).stdout
    (tmp_path / "status").write_bytes(status)
    own, child = _peak(), _peak(tmp_path / "status")
    assert own is not None
    assert child is not None
    assert own > 0.2  # torch is in it
    assert child < 0.05
    assert _peak(Path("/proc/self/comm")) is None


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
