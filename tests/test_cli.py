"""The command line: every verb on a tiny model, every exit code, and fits that are killed and resumed."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unispect import cli
from unispect.align.aligners import ALIGNERS
from unispect.data.factory import draw, write_products
from unispect.detectors.methods import METHODS
from unispect.inspector import Inspector
from unispect.metrics.protocol import METRICS

SMALL = ["preparation.size=64", "hgad.map_side=64", "training.steps=10", "training.checks=2", "features.engine=torch"]
KEYS = {*METRICS, "images"}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Place:
    data: Path
    model: Path
    cache: Path


def small(*more: str) -> list[str]:
    """Options that make a fit quick."""
    return [part for setting in (*SMALL, *more) for part in ("--set", setting)]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Products and a model that no test changes."""
    folder = tmp_path_factory.mktemp("cli")
    write_products(folder / "data", train=30, good=3, bad=1, size=64, products=["fabric", "gear"])
    made = Place(folder / "data", folder / "model", folder / "cache")
    given = ["fit", made.data, "-o", made.model, *small(), "--false-alarm-rate", "0.2", "--cache", made.cache]
    assert cli.main([str(part) for part in given]) == 0
    return made


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Result:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A good image, a grossly wrong one, and a file that is none."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.fromarray(draw("gear", 999, None, 64)[0]).save(folder / "a good.png")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "b noise.png")
    (folder / "c broken.png").write_bytes(b"no image")
    return folder


def one_line(result: Result) -> bool:
    return result.err.count("\n") == 1 and "Traceback" not in result.err and result.out == ""


# Exit codes and errors


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = "import sys; from unispect.cli import main; code = main(['--help']); "
    code += "print({'torch', 'timm', 'scipy'} & set(sys.modules), code)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set() 0"
    assert "inspect" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["fitt"], "fitt"),
        (["fit"], "Missing"),
        (["inspect", "nowhere", "x", "--json", "--csv"], "choose one"),
        (["demo", "--seed", "-1"], "--seed"),
        (["cite", "hgda"], "unknown method 'hgda': did you mean 'hgad'?"),
        (["check", "nowhere"], "nowhere: no such folder"),
        (["inspect", "nowhere", "."], "nowhere"),
        (["evaluate", "nowhere", "."], "nowhere"),
    ],
)
def test_a_user_error_ends_with_2_and_says_what(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    result = run(*arguments)
    assert result.code == 2
    assert text in result.err
    assert "Traceback" not in result.err
    assert result.out == ""


def test_a_bug_ends_with_3_and_a_hint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_diagnosis", lambda: 1 / 0)
    result = run("doctor")
    assert result.code == 3
    assert one_line(result)
    assert "internal error: ZeroDivisionError" in result.err
    assert "--debug" in result.err
    shown = run("doctor", "--debug")
    assert shown.code == 3
    assert "Traceback" in shown.err


def test_a_file_that_cannot_be_written_is_a_user_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise PermissionError(13, "Permission denied", "/out")

    monkeypatch.setattr(cli, "_diagnosis", refuse)
    result = run("doctor")
    assert (result.code, result.err) == (2, "error: /out: Permission denied\n")


def test_ctrl_c_ends_with_130(run: Run, monkeypatch: pytest.MonkeyPatch, place: Place, tmp_path: Path) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_diagnosis", stop)
    stopped = run("doctor")
    assert (stopped.code, stopped.err) == (130, "stopped\n")
    monkeypatch.setattr(Inspector, "fit", stop)
    stopped = run("fit", place.data, "-o", tmp_path / "m")
    assert stopped.code == 130
    assert one_line(stopped)
    assert "--resume continues" in stopped.err


def test_a_closed_pipe_is_quiet() -> None:
    code = "import sys; from unispect.cli import main; sys.exit(main(['methods', '--json']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# check, methods, cite, doctor, cache


def test_check_speaks_and_gives_json(run: Run, place: Place) -> None:
    spoken = run("check", place.data)
    assert spoken.code == 0
    assert "fabric" in spoken.out
    given = run("check", place.data, "--json", "--strict")
    assert given.code == 0
    assert set(json.loads(given.out)["products"]) == {"fabric", "gear"}
    assert given.err == ""


def test_check_is_strict_when_asked(run: Run, images: Path) -> None:
    assert run("check", images).code == 0
    strict = run("check", images, "--strict")
    assert strict.code == 2
    assert "c broken.png" in strict.out


def test_methods_and_their_papers(run: Run) -> None:
    assert set(cli.PAPERS) == {*METHODS, *ALIGNERS}
    assert "https://arxiv.org/abs/2403.13349" in run("methods").out
    assert set(json.loads(run("methods", "--json").out)) == {*METHODS, *ALIGNERS}
    for name in (*METHODS, *ALIGNERS):
        cited = run("cite", name)
        assert "@software{unispect" in cited.out
        assert cited.out.count("{") == cited.out.count("}")
        assert cited.out.count("@") == 2
    assert "Yao, Xincheng" in run("cite").out


def test_doctor_knows_the_machine(run: Run) -> None:
    facts = json.loads(run("doctor", "--json").out)
    assert facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cores"] >= 1
    assert facts["engine"] in ("openvino on cpu", "torch on cpu")
    lite0 = facts["weights"][0]
    assert (lite0["backbone"], lite0["intact"]) == ("tf_efficientnet_lite0", True)
    spoken = run("doctor")
    assert "torch" in spoken.out
    assert "whole" in spoken.out


def test_cache_is_shown_and_pruned(run: Run, tmp_path: Path) -> None:
    for number in range(3):
        file = tmp_path / "f" / "00" / f"{number}.f16"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(1000))
    assert json.loads(run("cache", "--json", "--cache", tmp_path).out)["features"] == {"f": {"files": 3, "bytes": 3000}}
    assert "3 files  3.0 kB" in run("cache", "--cache", tmp_path).out
    assert "Removed" not in run("cache", "--cache", tmp_path, "--prune-older-than", "1").out
    assert "Removed 1 files" in run("cache", "--cache", tmp_path, "--max-bytes", "2000").out
    assert json.loads(run("cache", "--json", "--clear", "--cache", tmp_path).out)["features"] == {}


# fit


def test_fit_tells_what_it_learnt(run: Run, place: Place, tmp_path: Path) -> None:
    given = ["fit", place.data, "-o", tmp_path / "m", "--false-alarm-rate", "0.2", "--cache", place.cache]
    result = run(*given, *small())
    assert result.code == 0
    assert "fabric, gear" in result.out
    assert "46 to learn from, 6 held out, 8 to calibrate" in result.out
    assert "at most 20.00% of normal images raise an alarm" in result.out
    assert result.out.endswith(f"Model: {tmp_path / 'm'}\n")
    assert result.err == ""
    assert not (tmp_path / "m.work").exists()
    assert Inspector.load(tmp_path / "m").threshold == Inspector.load(place.model).threshold


def test_options_win_over_settings_and_these_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("seed = 1\n[hgad]\nblocks = 1\ncentres = 3\n[decision]\nfalse_alarm_rate = 0.1\n")
    table = cli._settings(file, ["hgad.blocks=2", "decision.false_alarm_rate=0.2"], 0.3, None)
    assert table == {"seed": 1, "hgad": {"blocks": 2, "centres": 3}, "decision": {"false_alarm_rate": 0.3}}
    assert cli._settings(file, [], None, 5)["seed"] == 5


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--set", "hgad.blockz=1"], "did you mean 'blocks'?"),
        (["--set", "hgda.blocks=1"], "did you mean 'hgad'?"),
        (["--set", "nonsense"], "expected section.name=value"),
        (["--config", "none.toml"], "none.toml cannot be read"),
        (["--false-alarm-rate", "1.5"], "expected a number between 0 and 1"),
        (["--false-alarm-rate", "0.001"], "at least 999 are needed"),
    ],
)
def test_a_wrong_setting_is_told_before_any_work(run: Run, place: Place, tmp_path: Path, more: list[str], text: str) -> None:
    result = run("fit", place.data, "-o", tmp_path / "m", "--cache", place.cache, *more)
    assert result.code == 2
    assert one_line(result)
    assert text in result.err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_images_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for verb in (["fit", tmp_path / "empty", "-o", tmp_path / "m"], ["check", tmp_path / "empty"]):
        result = run(*verb)
        assert result.code == 2
        assert "no image found" in result.err


def test_what_exists_is_not_overwritten(run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inspector, "fit", lambda *_, **__: pytest.fail("learnt in vain"))
    again = run("fit", place.data, "-o", place.model)
    assert again.code == 2
    assert "--overwrite" in again.err
    (tmp_path / "thesis.tex").touch()
    foreign = run("fit", place.data, "-o", tmp_path, "--overwrite")
    assert foreign.code == 2
    assert "left alone" in foreign.err


def test_an_older_state_goes_unless_it_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = cli._checkpoint(tmp_path / "m", resume=True)
    assert "nothing to resume" in capsys.readouterr().err
    state.parent.mkdir()
    state.touch()
    (state.parent / "mine.txt").touch()
    cli._checkpoint(tmp_path / "m", resume=True)
    assert state.exists()
    cli._checkpoint(tmp_path / "m", resume=False)
    assert not state.exists()
    cli._tidy(state)
    assert (state.parent / "mine.txt").exists()
    (state.parent / "mine.txt").unlink()
    cli._tidy(state)
    assert not state.parent.exists()


# inspect


def test_one_finding_a_line(run: Run, place: Place, images: Path) -> None:
    result = run("inspect", place.model, images)
    lines = result.out.splitlines()
    assert result.code == 0
    assert len(lines) == 2
    assert lines[0].startswith(str(images / "a good.png"))
    assert "ANOMALOUS" in lines[1]
    assert " at " in lines[1]
    assert "c broken.png: " in result.err


def test_json_lines_hold_everything_and_nothing_else(run: Run, place: Place, images: Path, tmp_path: Path) -> None:
    result = run("inspect", place.model, images, "--json", "--maps", tmp_path / "maps")
    good, noise, broken = map(json.loads, result.out.splitlines())
    assert noise["anomalous"] is True
    assert noise["score"] > noise["threshold"]
    assert noise["regions"]
    assert broken == {"path": str(images / "c broken.png"), "error": broken["error"]}
    assert good["product"] in ("fabric", "gear")
    assert np.load(good["map"]).shape == (64, 64)
    library = Inspector.load(place.model).inspect(images / "a good.png")
    assert good["score"] == pytest.approx(library.score, rel=1e-4)  # type: ignore[union-attr]


def test_csv_has_a_row_for_every_file(run: Run, place: Place, images: Path) -> None:
    result = run("inspect", place.model, images, "--csv")
    good, noise, broken = csv.DictReader(io.StringIO(result.out))
    assert noise["anomalous"] == "True"
    assert int(noise["left"]) < int(noise["right"]) <= 64
    assert broken["error"]
    assert broken["score"] == ""
    assert float(good["p_value"]) > 0


def test_files_globs_and_stdin_give_the_same(run: Run, place: Place, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [str(images / name) for name in ("a good.png", "b noise.png")]
    plain = run("inspect", place.model, *names, "--json")
    assert plain.out.count("\n") == 2
    assert run("inspect", place.model, images / "[ab]*.png", "--json").out == plain.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(names)))
    one_by_one = run("inspect", place.model, "-", "--json").out.splitlines()
    for ours, theirs in zip(map(json.loads, one_by_one), map(json.loads, plain.out.splitlines()), strict=True):
        assert ours["path"] == theirs["path"]
        assert ours["score"] == pytest.approx(theirs["score"], rel=1e-4)


def test_what_is_not_there_is_told(run: Run, place: Place, tmp_path: Path, images: Path) -> None:
    for path, text in (("*.none", "no file has such a name"), ("none.png", "no such file"), ("", "no image found")):
        result = run("inspect", place.model, tmp_path / "empty" / path if path else _empty(tmp_path))
        assert result.code == 2
        assert one_line(result)
        assert text in result.err
    strict = run("inspect", place.model, images, "--strict")
    assert strict.code == 2
    assert "c broken.png" in strict.err
    alone = run("inspect", place.model, images / "c broken.png")
    assert alone.code == 2
    assert "none of 1 files could be read" in alone.err


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir(exist_ok=True)
    return folder / "empty"


def test_a_gate_fails_on_anomalies_and_on_what_cannot_be_read(run: Run, place: Place, images: Path) -> None:
    gate = ["inspect", place.model, "--fail-on-anomaly", "--false-alarm-rate", "0.15"]
    assert run(*gate, images).code == 1
    good, broken = images / "a good.png", images / "c broken.png"
    calm = run("inspect", place.model, good, "--json")
    expected = 1 if json.loads(calm.out)["anomalous"] else 0
    assert run("inspect", place.model, "--fail-on-anomaly", good).code == expected
    assert run("inspect", place.model, "--fail-on-anomaly", good, broken).code == (expected or 2)


def test_a_report_of_findings(run: Run, place: Place, images: Path, tmp_path: Path) -> None:
    result = run("inspect", place.model, images, "--json", "--report", tmp_path / "r.html")
    assert len([json.loads(line) for line in result.out.splitlines()]) == 3
    assert f"Report: {tmp_path / 'r.html'}" in result.err
    assert "b noise.png" in (tmp_path / "r.html").read_text()


def test_a_report_keeps_few_maps(place: Place, monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    monkeypatch.setattr(cli, "PICTURED", 2)
    finding = Inspector.load(place.model).inspect(images / "a good.png")
    kept = cli._Kept(wanted=True)
    for number in range(20):
        kept.add(cli.replace(finding, score=float(number)))  # type: ignore[arg-type, type-var]
    assert len(kept.results) == 20
    mapped = [one for one in kept.results if one.map.size > 1]
    assert len(mapped) <= 4
    assert {one.score for one in mapped} >= {18.0, 19.0}  # type: ignore[union-attr]


# evaluate


def test_evaluate_gives_the_stable_json(run: Run, place: Place, tmp_path: Path) -> None:
    result = run("evaluate", place.model, place.data, "--json", "-o", tmp_path / "out", "--ignore-masks", "gear")
    given = json.loads(result.out)
    assert result.code == 0
    assert list(given)[:5] == ["pooled", "mean", "worst", "worst_products", "products"]
    assert set(given["pooled"]) == KEYS
    assert given["products"]["gear"]["pixel_auroc"] is None
    assert given["false_alarm_rate"]["promised"] == 0.2
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == given
    assert "pooled" in (tmp_path / "out" / "table.txt").read_text()
    assert "<html" in (tmp_path / "out" / "report.html").read_text()


def test_evaluate_speaks_and_keeps_another_promise(run: Run, place: Place) -> None:
    result = run("evaluate", place.model, place.data, "--false-alarm-rate", "0.5")
    assert "promised at most 50 %" in result.out
    impossible = run("evaluate", place.model, place.data, "--false-alarm-rate", "0.01")
    assert impossible.code == 2
    assert "at least 99 are needed" in impossible.err


def test_report_is_the_page_of_evaluate(run: Run, place: Place, tmp_path: Path) -> None:
    result = run("report", place.model, place.data, "-o", tmp_path / "out")
    assert result.code == 0
    assert result.err == f"Report: {tmp_path / 'out' / 'report.html'}\n"
    assert "pooled" in result.out


def test_report_looks_inside_a_flow(run: Run, place: Place, tmp_path: Path) -> None:
    given = ["report", place.model, place.data, "-o", tmp_path / "out", "--diagnose", "--cache", place.cache]
    result = run(*given, "--json")
    assert result.code == 0
    numbers = json.loads(result.out)
    assert numbers == json.loads((tmp_path / "out" / "diagnosis.json").read_text())
    assert numbers["same"] is True
    assert numbers["training"][0]["step"] == 0
    assert "<svg" in (tmp_path / "out" / "diagnosis.html").read_text()
    short = run(*given, "--no-training")
    assert short.out.startswith("By likelihood alone ")
    assert json.loads((tmp_path / "out" / "diagnosis.json").read_text())["training"] is None


# Killed and resumed


@pytest.fixture(scope="session")
def uninterrupted(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The model of a fit that nobody killed, from an empty cache of its own."""
    folder = tmp_path_factory.mktemp("whole")
    given = ["fit", place.data, "-o", folder / "m", *long(folder / "cache")]
    assert cli.main([str(part) for part in given]) == 0
    return learnt(folder / "m")


def long(cache: Path) -> list[str]:
    """Enough steps to be killed between two checks."""
    steps = small("training.steps=60", "training.checks=6", "training.patience=99")
    return [*steps, "--false-alarm-rate", "0.2", "--cache", str(cache)]


def learnt(model: Path) -> list[object]:
    """All but when it was learnt, and by which command."""
    versions = json.loads((model / "calibration.json").read_bytes())
    return [(model / "weights.safetensors").read_bytes(), *(version["calibration"] for version in versions)]


# Runs the command line in a process that ends itself, with kill -9, right after the n-th call of a function.
KILLED = """
import importlib, os, signal, sys
from unispect.cli import main

module, path, left = sys.argv[1], sys.argv[2].split("."), int(sys.argv[3])
owner = importlib.import_module(module)
for name in path[:-1]:
    owner = getattr(owner, name)
original = getattr(owner, path[-1])

def counted(*given, **named):
    global left
    result, left = original(*given, **named), left - 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, path[-1], counted)
main(sys.argv[4:])
"""
MOMENTS = {
    "among the features": ("unispect.features.cache", "_write", 10),
    "after the first state": ("unispect.fit", "write_checkpoint", 1),
    "between two states": ("unispect.fit", "_Loop._advance", 50),
    "while a state is written": ("unispect.store", "_write_files", 3),
    "before the model is saved": ("unispect.inspector", "Inspector.card", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_fit_resumes_to_the_same_bytes(
    place: Place, tmp_path: Path, uninterrupted: dict[str, bytes], run: Run, moment: str
) -> None:
    given = ["fit", str(place.data), "-o", str(tmp_path / "m"), *long(tmp_path / "cache")]
    command = [sys.executable, "-c", KILLED, *map(str, MOMENTS[moment]), *given]
    killed = subprocess.run(command, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
    resumed = run(*given, "--resume")
    assert resumed.code == 0
    assert ("nothing to resume" in resumed.err) is (moment == "among the features")
    assert learnt(tmp_path / "m") == uninterrupted
    assert not (tmp_path / "m.work").exists()


# datasets, manifest, benchmark


def test_data_sets_are_listed_with_where_to_get_them(run: Run) -> None:
    told = run("datasets").out
    given = json.loads(run("datasets", "--json").out)
    assert {"mvtec", "visa", "btad", "mvtec3d", "loco", "union", "stc", "realiad"} == set(given)
    assert all(one["source"] in told and one["licence"] in told for one in given.values())


def test_a_data_set_that_is_not_there_or_not_whole_is_told(run: Run, place: Place, tmp_path: Path) -> None:
    missing = run("fit", tmp_path / "visa", "--dataset", "visa", "-o", tmp_path / "m")
    assert missing.code == 2
    assert "VisA is not downloaded by unispect: get" in missing.err
    unknown = run("evaluate", place.model, place.data, "--dataset", "vissa")
    assert unknown.code == 2
    assert "unknown data set 'vissa': did you mean 'visa'" in unknown.err


def test_a_manifest_is_data_like_any_other(run: Run, place: Place, tmp_path: Path) -> None:
    listed = run("manifest", place.data, "-o", tmp_path / "list.csv")
    assert listed.code == 0
    assert str(tmp_path / "list.csv") in listed.out
    by_folder, by_list = (run("evaluate", place.model, source, "--json") for source in (place.data, tmp_path / "list.csv"))
    assert by_list.code == 0
    assert json.loads(by_list.out)["pooled"] == json.loads(by_folder.out)["pooled"]


def test_evaluate_refuses_what_the_model_has_seen(run: Run, place: Place, tmp_path: Path) -> None:
    rows = (run("manifest", place.data, "-o", tmp_path / "list.csv"), (tmp_path / "list.csv").read_text().splitlines())[1]
    leaked = [row.replace(",train", ",test") for row in rows]
    (tmp_path / "leaked.csv").write_text("\n".join(leaked) + "\n")
    refused = run("evaluate", place.model, tmp_path / "leaked.csv")
    assert refused.code == 2
    assert one_line(refused)
    assert "seen in learning, byte for byte" in refused.err


def test_evaluate_without_what_takes_time(run: Run, place: Place) -> None:
    short = run("evaluate", place.model, place.data, "--json", "--no-comparisons", "--no-bootstrap", "--no-exact")
    given = json.loads(short.out)
    assert (given["comparisons"], given["intervals"]) == ({}, {})
    assert max(given["pixel_bounds"]["pooled"].values()) > 0


def test_benchmark_ends_with_a_table_and_says_what_failed(run: Run, place: Place, tmp_path: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f'title = "Grid"\n[data.line]\nroot = "{place.data}"\n[methods.hgad]\npreparation = {{ size = 64 }}\n'
        'features = { engine = "torch" }\ntraining = { steps = 3 }\nhgad = { map_side = 64 }\n'
        "decision = { false_alarm_rate = 0.001 }\n"
    )
    failed = run("benchmark", grid, "-o", tmp_path / "out", "--compare", "hgad-table-1")
    assert failed.code == 2
    assert "1 of 1 cells failed" in failed.err
    assert "hgad-table-1: Yao et al., 2024, Tab. 1" in failed.out
    assert (tmp_path / "out" / "index.html").is_file()
    for wrong, told in (
        (["--compare", "hgad-table-9"], "unknown published table 'hgad-table-9'"),
        (["--seeds", "one"], "expected whole numbers"),
        (["--data", "line"], "expected NAME=FOLDER"),
    ):
        result = run("benchmark", grid, "-o", tmp_path / "other", *wrong)
        assert result.code == 2
        assert told in result.err
        assert not (tmp_path / "other").exists()


# Exported models


@pytest.fixture(scope="session")
def exported(place: Place) -> Path:
    out = place.model.with_name("exported")
    assert cli.main(["export", str(place.model), "-o", str(out)]) == 0
    return out


def test_an_exported_model_inspects_as_the_model_does(run: Run, place: Place, exported: Path, images: Path) -> None:
    model, other = (run("inspect", which, images, "--json") for which in (place.model, exported))
    assert other.code == model.code == 0
    for one, two in zip(map(json.loads, model.out.splitlines()), map(json.loads, other.out.splitlines()), strict=True):
        assert one.keys() == two.keys()
        assert one.get("error") == two.get("error")
        assert one.get("anomalous") == two.get("anomalous")
    assert "--fail-on-anomaly" not in other.err
    assert run("inspect", exported, images, "--fail-on-anomaly").code == 1
    assert run("inspect", exported, images, "--report", images / "r.html").code == 0
    assert "Exported" in (images / "r.html").read_text("utf-8")


def test_export_says_how_well_it_agrees_and_replaces_nothing(run: Run, place: Place, exported: Path) -> None:
    again = run("export", place.model, "-o", exported)
    assert again.code == 2
    assert "--overwrite" in again.err
    done = run("export", place.model, "-o", exported, "--overwrite", "--json")
    assert done.code == 0
    told = json.loads(done.out)
    assert told["prepared"]["score"] < told["tolerance"]["prepared"]
    assert "unknown export format 'tflite'" in run("export", place.model, "-o", exported, "--to", "tflite").err


def test_an_exported_model_can_only_inspect(run: Run, place: Place, exported: Path) -> None:
    for verb in ("evaluate", "report"):
        refused = run(verb, exported, place.data, *(["-o", exported.with_name("r")] if verb == "report" else []))
        assert refused.code == 2
        assert "exported model, which can only inspect" in refused.err


def test_watch_and_stream(run: Run, exported: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = run("watch", exported, images, "--out", tmp_path / "out", "--once", "--settle", "0", "--json")
    assert watched.code == 0
    assert len(watched.out.splitlines()) == 3
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"{name}.json" for name in ("a good.png", "b noise.png", "c broken.png")
    ]
    assert run("watch", exported, images, "--out", tmp_path / "out", "--once", "--settle", "0").out == ""
    assert "no such folder" in run("watch", exported, images / "no", "--out", tmp_path / "o").err
    asked = [{"path": str(images / "a good.png"), "id": 1}, {"path": str(images / "c broken.png"), "id": 2}]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{json.dumps(one)}\n" for one in asked)))
    first, second = map(json.loads, run("stream", exported).out.splitlines())
    assert (first["id"], first["anomalous"]) == (1, False)
    assert (second["id"], "error" in second) == (2, True)


def test_monitor(run: Run, place: Place, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second image is noise: first findings of a good image, then those of both."""
    said = run("inspect", place.model, images, "--json").out.splitlines(keepends=True)
    assert len(said) == 3  # a good one, noise, and an error
    log, state = tmp_path / "log.jsonl", tmp_path / "state"
    log.write_text(said[0] * 20)
    calm = run("monitor", place.model, log, "--run-length", 1000, "--state", state, "--fail-on-change")
    assert (calm.code, calm.out) == (0, "20 images, 0 alarms\n")
    log.write_text(said[0] * 20 + "".join(said) * 60)
    found = run("monitor", place.model, log, "--run-length", 1000, "--state", state, "--fail-on-change", "--json")
    *alarms, summary = map(json.loads, found.out.splitlines())
    assert (found.code, summary) == (
        1,
        {"images": 120, "errors": 60, "foreign": 0, "late": 0, "alarms": len(alarms)},
    )
    assert alarms[0]["path"].endswith(".png")
    assert {alarm["kind"] for alarm in alarms} <= {"shift", "tail", "unknown"}
    monkeypatch.setattr("sys.stdin", io.StringIO(log.read_text()))
    streamed = run("monitor", place.model, "-", "--run-length", 1000)
    assert streamed.code == 0
    assert streamed.out.splitlines()[:-1] == [alarm["text"] for alarm in alarms]
    log.write_text("{\n")
    assert one_line(run("monitor", place.model, log))


def test_methods_say_what_can_be_exported(run: Run) -> None:
    assert "exported to: onnx, openvino" in run("methods").out
    assert json.loads(run("methods", "--json").out)["hgad"]["exported_to"] == ["onnx", "openvino"]


# calibrate, feedback


@pytest.fixture
def copied(place: Place, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place.model, tmp_path / "copied"))


def fresh(folder: Path, count: int = 20) -> Path:
    return write_products(folder, train=count // 2, good=4, bad=4, size=64, seed=9, products=["fabric", "gear"])


def test_calibrate_changes_thresholds_in_place_and_takes_them_back(run: Run, copied: Path, tmp_path: Path) -> None:
    before = Inspector.load(copied)
    result = run("calibrate", copied, fresh(tmp_path / "new"), "--false-alarm-rate", "0.1")
    assert result.code == 0
    assert "Version 2: calibrated on 20 images" in result.out
    assert "at most 10.00% of normal images raise an alarm" in result.out
    after = Inspector.load(copied)
    assert (len(after.calibration), after.false_alarm_rate) == (20, 0.1)
    assert after.versions.current.command.startswith(f"unispect calibrate {copied}")
    assert after.learnt == before.learnt
    assert run("calibrate", copied, "--undo").code == 0
    assert Inspector.load(copied).threshold == before.threshold
    listed = run("calibrate", copied, "--versions", "--json")
    assert [row["reason"] for row in json.loads(listed.out)] == [
        "fitted",
        "calibrated on 20 images",
        "undo: as version 1 again",
    ]
    assert "unispect fit" in run("calibrate", copied, "--versions").out


def test_calibrate_by_cost_and_by_a_fixed_score(run: Run, copied: Path, tmp_path: Path) -> None:
    data = write_products(tmp_path / "new", train=1, good=12, bad=4, size=64, seed=9, products=["fabric", "gear"])
    given = ["--labelled", data, "--cost-miss", "50", "--cost-false-alarm", "1", "--defect-rate", "0.05"]
    result = run("calibrate", copied, *given, "--json", "-o", tmp_path / "cheap")
    assert result.code == 0
    told = json.loads(result.out)
    assert told["point"]["low"] <= told["point"]["threshold"] <= told["point"]["high"]
    assert Inspector.load(tmp_path / "cheap").threshold == told["point"]["threshold"] == told["after"]["threshold"]
    leak = run("evaluate", tmp_path / "cheap", data)
    assert leak.code == 2
    assert "calibration image" in leak.err
    assert run("calibrate", copied, "--threshold", "1.25").code == 0
    assert Inspector.load(copied).threshold == 1.25
    assert run("calibrate", copied, "--false-alarm-rate", "0.2").code == 0
    assert Inspector.load(copied).threshold != 1.25


def test_feedback_shows_first_and_changes_when_told(run: Run, copied: Path, tmp_path: Path) -> None:
    data = fresh(tmp_path / "new", 40)
    found = run("inspect", copied, data, "--json")
    (tmp_path / "log.jsonl").write_text(found.out)
    rows = [json.loads(line) for line in found.out.splitlines()]
    alarms = [row["path"] for row in rows if row["anomalous"]]
    bad = [row["path"] for row in rows if "/test/" in row["path"] and "/good/" not in row["path"]]
    verdicts = tmp_path / "verdicts.jsonl"
    assert run("feedback", verdicts, *bad, "--defective", "--by", "eve").code == 0
    assert run("feedback", verdicts, *(path for path in alarms if path not in bad), "--good").code in (0, 2)
    given = ["calibrate", copied, "--history", tmp_path / "log.jsonl", "--feedback", verdicts]
    untouched = (copied / "calibration.json").read_bytes()
    shown = run(*given)
    assert shown.code == 0
    assert f"On {len(rows)} findings: alarms {len(alarms)} -> " in shown.out
    assert "look at it, then pass --apply" in shown.err
    assert (copied / "calibration.json").read_bytes() == untouched
    assert run(*given, "--apply").code == 0
    assert len(Inspector.load(copied).calibration) == len(rows) - len(bad)
    assert "defective" in run("feedback", verdicts).out
    assert len(json.loads(run("feedback", verdicts, "--json").out)) >= len(bad)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "nothing to do: expected DATA"),
        (["--undo"], "as it was fitted"),
        (["--undo", "--versions"], "--undo and --versions: choose one"),
        (["--feedback", "x"], "expected --history with them"),
        (["--history", "nowhere"], "nowhere: no such file or folder"),
        (["--guarantee", "group"], "no calibration image has a group"),
        (["--false-alarm-rate", "0.001"], "at least 999 are needed"),
        (["--labelled", "."], "no image found"),
    ],
)
def test_calibrate_says_what_is_wrong_and_changes_nothing(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (place.model / "calibration.json").read_bytes()
    result = run("calibrate", place.model, *arguments)
    assert result.code == 2
    assert text in result.err
    assert result.out == ""
    assert (place.model / "calibration.json").read_bytes() == before


def test_feedback_says_what_is_wrong(run: Run, tmp_path: Path) -> None:
    for arguments, text in [
        (["a.png"], "got no verdict, expected --good, --defective or --withdraw"),
        (["a.png", "--good", "--defective"], "got good and defective"),
        (["--good"], "--good: expected the images it is said of"),
        ([], "no such file: expected a log"),
    ]:
        result = run("feedback", tmp_path / "log", *arguments)
        assert result.code == 2
        assert text in result.err
