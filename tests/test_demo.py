"""The demo on a few small pictures."""

import json
from pathlib import Path

import pytest

from unispect import cli
from unispect.data.factory import DEFECTS
from unispect.decide.conformal import needed
from unispect.demo import FULL, MARK, Size, demo
from unispect.errors import DataError
from unispect.inspector import Inspector, SplitSettings

TINY = Size(train=8, good=2, bad=1, side=64)


def test_the_full_size_supports_its_promise() -> None:
    of_each = round(SplitSettings().calibration * FULL.train)
    assert len(DEFECTS) * of_each >= needed(0.01)


def test_the_demo_ends_with_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "-o", str(tmp_path / "out"), "--quick", "--false-alarm-rate", "0.1"]
    assert cli.main(arguments) == 0
    told, warned = capsys.readouterr()
    assert told.splitlines()[-1] == f"Report: {tmp_path / 'out' / 'report.html'}"
    assert "promised 10.00%, realised" in told
    assert warned == ""
    given = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(given["products"]) == set(DEFECTS)
    assert given["pooled"]["image_auroc"] > 0.5
    assert "<html" in (tmp_path / "out" / "report.html").read_text()
    assert Inspector.load(tmp_path / "out" / "model").false_alarm_rate == 0.1


def test_a_second_run_replaces_the_first_and_gives_the_same(tmp_path: Path) -> None:
    stages: list[str] = []
    first = demo(tmp_path, 0.2, size=TINY).evaluation.as_dict()
    (tmp_path / "data" / "gear" / "train" / "good" / "left over.png").touch()
    again = demo(tmp_path, 0.2, size=TINY, progress=lambda stage, *_: stages.append(stage))
    assert again.evaluation.as_dict() == first
    assert list(dict.fromkeys(stages)) == ["drawing products", "training", "evaluating"]


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").touch()
    with pytest.raises(DataError, match="choose another -o"):
        demo(tmp_path)
    assert [file.name for file in tmp_path.rglob("*")] == ["data", "thesis.tex"]
    assert not (tmp_path / "data" / MARK).exists()
