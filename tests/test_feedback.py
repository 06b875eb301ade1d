"""A log of verdicts loses none and says the last."""

import json
from pathlib import Path

import pytest

from unispect.errors import ConfigError, DataError
from unispect.feedback import append, truths, verdicts


def test_the_last_verdict_counts_and_all_stay(tmp_path: Path) -> None:
    log = tmp_path / "new" / "log.jsonl"
    append(log, ["a.png", "b.png"], "good", by="eve")
    append(log, ["a.png"], "defective", note="crack")
    append(log, ["b.png"], None)
    assert truths(log) == {"a.png": "defective"}
    assert [(one.path, one.truth, one.by, one.note) for one in verdicts(log)] == [
        ("a.png", "good", "eve", None),
        ("b.png", "good", "eve", None),
        ("a.png", "defective", None, "crack"),
        ("b.png", None, None, None),
    ]


def test_a_line_that_a_killed_writer_left_open_spoils_no_other(tmp_path: Path) -> None:
    log = tmp_path / "log"
    append(log, ["a"], "good")
    whole = log.read_bytes()
    log.write_bytes(whole[:-1])
    append(log, ["b"], "good")
    assert truths(log) == {"a": "good", "b": "good"}


def test_names_that_are_no_text_come_back(tmp_path: Path) -> None:
    name = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    append(tmp_path / "log", [name], "good")
    assert truths(tmp_path / "log") == {name: "good"}


def test_bad_input_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="truth: got 'bad', expected 'good'"):
        append(tmp_path / "log", ["a"], "bad")
    with pytest.raises(ConfigError, match="paths: none given"):
        append(tmp_path / "log", [], "good")
    with pytest.raises(DataError, match="no such file: expected a log"):
        truths(tmp_path / "none")
    for line in ("x", "[]", json.dumps({"path": "a"}), json.dumps({"path": 1, "truth": "good", "made": ""})):
        (tmp_path / "log").write_text(line + "\n")
        with pytest.raises(DataError, match=r"log:1: "):
            truths(tmp_path / "log")
    with pytest.raises(DataError, match="cannot be written"):
        append(tmp_path, ["a"], "good")
