"""A folder of arriving images: each has one finding, whatever happens in between."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unispect.data.loader import Failure
from unispect.data.records import Record
from unispect.errors import ConfigError, DataError
from unispect.types import Finding
from unispect.watch import CHUNK, watch

PLAIN = np.zeros((1, 1), np.float32)


class Toy:
    """Says the size of a file; files that begin with b are broken."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def findings(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure]]:
        for record in records:
            self.seen.append(record.path.name)
            if record.path.name.startswith("b") or not record.path.exists():
                yield record, Failure(record.path, "damaged")
            else:
                size = float(record.path.stat().st_size)
                yield record, Finding(str(record.path), size, 1.0, 0.5, False, None, None, (), PLAIN, 1, 1)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("a.png", "b.png", "deep/c.png"):
        put(tmp_path / "in" / name)
    return tmp_path


def put(path: Path, side: int = 4, age: float = 100.0) -> None:
    """An image that was written some seconds ago."""
    Image.new("RGB", (side, side)).save(path)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))


def run(place: Path, toy: Toy | None = None) -> list[str]:
    return [path.name for path, _ in watch(toy or Toy(), place / "in", place / "out", once=True, sleep=never)]


def never(seconds: float) -> None:
    raise AssertionError("nothing is to be waited for")


def written(place: Path) -> list[str]:
    return sorted(str(path.relative_to(place / "out")) for path in (place / "out").rglob("*") if path.is_file())


def test_every_image_has_its_finding(place: Path) -> None:
    assert sorted(run(place)) == ["a.png", "b.png", "c.png"]
    assert written(place) == ["a.png.json", "b.png.json", "deep/c.png.json"]
    said = json.loads((place / "out" / "a.png.json").read_text())
    assert said["score"] == (place / "in" / "a.png").stat().st_size
    assert json.loads((place / "out" / "b.png.json").read_text()) == {
        "path": str(place / "in" / "b.png"),
        "error": "damaged",
    }


def test_what_is_done_is_not_done_again(place: Path) -> None:
    run(place)
    put(place / "in" / "d.png")
    toy = Toy()
    assert run(place, toy) == ["d.png"]
    assert toy.seen == ["d.png"]


def test_a_changed_image_is_inspected_anew(place: Path) -> None:
    run(place)
    before = (place / "out" / "a.png.json").read_text()
    put(place / "in" / "a.png", side=40, age=50)
    assert run(place) == ["a.png"]
    assert (place / "out" / "a.png.json").read_text() != before
    assert run(place) == []


def test_a_file_that_may_still_be_written_waits(place: Path) -> None:
    put(place / "in" / "young.png", age=0)
    slept: list[float] = []
    changed = (place / "in" / "young.png").stat().st_mtime
    times = iter([changed + 0.5] * 4 + [changed + 5.0] * 9)
    found = watch(
        Toy(), place / "in", place / "out", settle=1, poll=3, once=True, clock=lambda: next(times), sleep=slept.append
    )
    assert [path.name for path, _ in found][-1] == "young.png"
    assert slept == [3]


def test_a_file_from_the_future_is_not_waited_for(place: Path) -> None:
    put(place / "in" / "z.png", age=-1e6)
    assert "z.png" in run(place)


def test_what_changes_while_it_is_inspected_is_for_the_next_look(place: Path) -> None:
    class Slow(Toy):
        def findings(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure]]:
            if not self.seen:
                put(place / "in" / "a.png", side=9, age=200)
                (place / "in" / "deep" / "c.png").unlink()
            yield from super().findings(records)

    found = watch(Slow(), place / "in", place / "out")
    assert [next(found)[0].name, next(found)[0].name] == ["b.png", "a.png"]
    found.close()  # type: ignore[attr-defined]
    assert written(place) == ["a.png.json", "b.png.json"]


def test_more_images_than_are_handed_over_at_once(place: Path) -> None:
    for number in range(2 * CHUNK + 3):
        put(place / "in" / f"{number}.png")
    assert len(run(place)) == 2 * CHUNK + 6


def test_two_cannot_write_to_one_folder(place: Path) -> None:
    first = watch(Toy(), place / "in", place / "out")
    next(first)
    with pytest.raises(ConfigError, match="another watch writes to this folder"):
        run(place)
    first.close()  # type: ignore[attr-defined]
    assert len(run(place)) == 2


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        next(watch(Toy(), tmp_path / "in", tmp_path / "out"))
    with pytest.raises(ConfigError, match="settle: got -1"):
        next(watch(Toy(), tmp_path, tmp_path / "out", settle=-1))


def test_an_empty_folder_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert run(tmp_path) == []


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_watch import Toy
from unispect.watch import watch
for path, _ in watch(Toy(), Path({folder!r}), Path({out!r}), once=True):
    print(path.name, flush=True)
"""


def test_killed_again_and_again_nothing_is_lost_and_nothing_repeated(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = {f"{number:03}.png" for number in range(150)}
    for name in names:
        put(tmp_path / "in" / name)
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "in"), out=str(tmp_path / "out"))
    states: dict[str, tuple[int, int]] = {}
    for stop in (1, 7, 40, 65, 1000):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _, _ in zip(range(stop), process.stdout, strict=False):
                pass
            process.send_signal(signal.SIGKILL)
        now = {path.name: (path.stat().st_ino, path.stat().st_size) for path in (tmp_path / "out").glob("*.json")}
        assert all(now[name] == state for name, state in states.items()), "a finding was written twice"
        assert all(json.loads((tmp_path / "out" / name).read_text()) for name in now)
        states = now
    assert set(states) == {f"{name}.json" for name in names}
