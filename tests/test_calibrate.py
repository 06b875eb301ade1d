"""Deciding anew: what would change is told before it is kept, and nothing that was learnt from calibrates."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from unispect import runtime
from unispect.calibrate import cheaper, keep, recalibrated, reconsidered, redecided, undone
from unispect.data.factory import draw, write_products
from unispect.data.folder import read_folder
from unispect.data.loader import Failure, Preparation
from unispect.data.records import Record, content_hash
from unispect.decide.judge import Calibration, DecisionSettings, Judge, Said
from unispect.decide.operating import Costs
from unispect.decide.versions import Versions
from unispect.errors import CalibrationError, ConfigError, DataError, LeakError, StoreError
from unispect.evaluation import evaluate
from unispect.export.bundle import export
from unispect.features.cache import FeatureCache
from unispect.inspector import Inspector
from unispect.store import read_model


class Toy:
    """A model whose score of an image is the number that is in its file; "broken" cannot be read."""

    products = ("nut", "bolt")

    def __init__(self, versions: Versions, learnt: Sequence[str] = ()) -> None:
        self.versions, self.learnt = versions, frozenset(learnt)
        self.judge = Judge(versions.current.calibration, versions.current.decision, self.products, Preparation(32))

    def said(self, records: Sequence[Record], strict: bool = False) -> Iterator[tuple[Record, Said | Failure]]:
        for record in records:
            text = record.path.read_text().split()[0]
            if text == "broken":
                yield record, Failure(record.path, "not an image")
            else:
                yield record, Said(float(text), np.full((8, 8), float(text)), np.array([-0.1, -2.0]), 0.0)

    def with_versions(self, versions: Versions) -> "Toy":
        return Toy(versions, self.learnt)


def calibration(scores: np.ndarray) -> Calibration:
    one = np.asarray(scores, np.float64)
    names = (("nut",) * len(one), (None,) * len(one), ("nut",) * len(one))
    return Calibration(one, one, one, np.zeros(len(one)), *names)


@pytest.fixture
def toy() -> Toy:
    return Toy(Versions.first(DecisionSettings(0.1, unknown_rate=0), calibration(np.arange(19.0)), {}, "fit", "fitted"))


def written(
    folder: Path, scores: Sequence[Any], label: int | None = 0, groups: int = 0, split: str = "train"
) -> list[Record]:
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, score in enumerate(scores):
        path = folder / f"{number}.png"
        path.write_text(f"{score} {folder.name} {number}")
        group = f"day {number % groups}" if groups else None
        records.append(Record(path, "nut", label, group=group, split=split))
    return records


# Other images.


def test_other_images_take_the_place_of_the_first(toy: Toy, tmp_path: Path) -> None:
    change = recalibrated(toy, written(tmp_path, np.arange(19) + 100.0), command="me")
    assert (toy.judge.threshold, change.after.judge.threshold) == (17, 117)
    now = change.after.versions.current
    assert (now.number, now.command, now.reason) == (2, "me", "calibrated on 19 images")
    assert sorted(now.images) == sorted(content_hash(path) for path in tmp_path.iterdir())
    assert toy.versions.current.number == 1


def test_or_join_them(toy: Toy, tmp_path: Path) -> None:
    records = written(tmp_path, [50.0, 60.0])
    change = recalibrated(toy, records, add=True)
    assert change.after.judge.calibration.scores.tolist() == [*range(19), 50, 60]
    with pytest.raises(DataError, match="2 of 2 images left out: in the calibration already"):
        recalibrated(change.after, records, add=True)


def test_what_it_learnt_from_cannot_calibrate(toy: Toy, tmp_path: Path) -> None:
    records = written(tmp_path, range(30))
    known = Toy(toy.versions, [content_hash(records[3].path)])
    with pytest.raises(CalibrationError, match=r"has learnt from 1 of 30 images \(.*3.png\).*would be too low"):
        recalibrated(known, records)


def test_test_images_and_defective_ones_are_not_taken(toy: Toy, tmp_path: Path) -> None:
    good = written(tmp_path / "good", range(20))
    others = [*written(tmp_path / "test", [999.0] * 5, split="test"), *written(tmp_path / "bad", [999.0] * 5, label=1)]
    assert recalibrated(toy, [*good, *others]).after.judge.calibration.scores.max() == 19
    with pytest.raises(DataError, match="10 images, none of them to calibrate on"):
        recalibrated(toy, others)


def test_what_is_left_out_is_told(toy: Toy, tmp_path: Path) -> None:
    records = written(tmp_path, [*range(20), "broken"])
    twin = tmp_path / "twin.png"
    twin.write_bytes(records[0].path.read_bytes())
    gone = Record(tmp_path / "gone.png", "nut", 0)
    change = recalibrated(toy, [*records, Record(twin, "nut", 0), gone])
    assert len(change.after.judge.calibration) == 20
    assert change.notes == (
        "1 of 23 images left out: no such file",
        "1 of 23 images left out: the same as another, byte for byte",
        f"left out, as they cannot be read: 1 ({records[20].path}: not an image)",
    )
    with pytest.raises(DataError, match="none of 1 images is left to calibrate on"):
        recalibrated(toy, records[20:])


def test_too_few_images_for_the_promise_change_nothing(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"5 calibration images cannot support false_alarm_rate=0.1: at least 9"):
        recalibrated(toy, written(tmp_path, range(5)))


def test_groups_that_differ_are_told_and_held_out(toy: Toy, tmp_path: Path) -> None:
    days = np.random.default_rng(0).normal(size=300) + 4 * (np.arange(300) % 12 == 3)
    records = written(tmp_path, days, groups=12)
    plain = recalibrated(toy, records)
    assert plain.spread is not None
    assert plain.spread.worst is not None
    assert plain.spread.worst.name == "day 3"
    assert any("--guarantee group" in note for note in plain.notes)
    careful = recalibrated(toy, records, {"guarantee": "group"})
    assert careful.after.judge.threshold > plain.after.judge.threshold
    assert not careful.notes
    assert "12 groups" in careful.text()
    with pytest.raises(CalibrationError, match=r"12 groups of calibration images cannot support false_alarm_rate=0.05"):
        recalibrated(toy, records, {"guarantee": "group", "false_alarm_rate": 0.05})


# Other promises.


def test_a_rate_takes_the_place_of_a_fixed_score(toy: Toy) -> None:
    fixed = redecided(toy, {"threshold": 3.5}).after
    assert fixed.judge.threshold == 3.5
    assert redecided(fixed, {"false_alarm_rate": 0.1}).after.judge.threshold == 17
    assert redecided(fixed, {"false_alarm_rate": 0.1, "threshold": 2.0}).after.judge.threshold == 2
    assert redecided(fixed, {"guarantee": "product"}).after.judge.threshold == 3.5


def test_the_cheapest_threshold_and_its_images_are_kept(toy: Toy, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    good, bad = written(tmp_path / "g", random.normal(0, 1, 40)), written(tmp_path / "b", random.normal(5, 1, 40), label=1)
    change = cheaper(toy, [*good, *bad], Costs(10, 1, 0.1))
    assert change.point is not None
    assert change.after.judge.threshold == change.point.threshold
    assert 1 < change.point.threshold < 4
    assert len(change.after.versions.current.images) == 80
    assert "Cheapest threshold" in change.text()
    with pytest.raises(CalibrationError, match="0 defective labelled images"):
        cheaper(toy, good, Costs(10, 1, 0.1))


# Feedback.


def finding(number: int, score: float, **more: Any) -> dict[str, Any]:
    known = {"path": f"{number}.png", "score": score, "peak": score, "median": score, "novelty": 0.0, "nearest": "nut"}
    return known | {"unknown": False} | more


def test_a_drift_that_people_confirmed_as_good_is_told_and_learnt(toy: Toy) -> None:
    findings = [finding(number, 10.0 + number) for number in range(20)]  # 12 above the threshold of 17
    truths = {f"{number}.png": "good" for number in range(8, 18)} | {"19.png": "defective"}
    change = reconsidered(toy, findings, truths)
    assert change.after.judge.calibration.scores.tolist() == [10.0 + number for number in range(19)]
    assert change.after.judge.threshold == 27
    history = change.history
    assert history is not None
    assert (history.findings, history.alarms) == (20, (12, 2))
    assert (history.good, history.good_alarms) == (10, (10, 0))
    assert (history.defective, history.defective_alarms, history.lost) == (1, (1, 1), ())
    assert history.unreviewed == 1
    assert "1 alarms were not reviewed and count as false alarms" in change.notes
    assert "alarms 12 -> 2" in change.text()


def test_defects_that_would_be_lost_are_named(toy: Toy) -> None:
    findings = [finding(number, 10.0 + number) for number in range(20)]
    change = reconsidered(toy, findings, {"9.png": "defective", "19.png": "defective"})
    assert change.history is not None
    assert change.history.lost == ("9.png",)
    assert "no more found: 9.png" in change.text()


def test_history_takes_the_last_finding_and_leaves_errors_and_unknown_products(toy: Toy) -> None:
    findings = [finding(number, float(number)) for number in range(10)]
    findings += [finding(0, 100.0), {"path": "x.png", "error": "broken"}, finding(50, 7.0, unknown=True)]
    change = reconsidered(toy, findings, {"nobody.png": "good"}, add=True)
    assert sorted(change.after.judge.calibration.scores.tolist()) == sorted([*range(19), *range(1, 10), 100])
    assert change.notes[0].startswith("1 verdicts are on images without a finding in the history (nobody.png)")


def test_history_without_numbers_is_refused(toy: Toy) -> None:
    with pytest.raises(DataError, match=r"the finding on a.png has peak=None.*older unispect"):
        reconsidered(toy, [{"path": "a.png", "score": 1.0}], {})
    with pytest.raises(DataError, match="0 findings, none of them"):
        reconsidered(toy, [], {})


# Models in folders.


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), 30, 3, 2, 80, products=["fabric", "gear"])


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    made = write_products(tmp_path_factory.mktemp("more"), 12, 3, 2, 80, seed=7, products=["fabric", "gear"])
    return read_folder(made)


@pytest.fixture(scope="module")
def saved(products: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    settings = {"preparation": {"size": 64}, "features": {"engine": "torch"}, "decision": {"false_alarm_rate": 0.2}}
    known = Inspector.fit(
        products, settings | {"method": "opca", "opca": {"map_side": 64}}, cache=FeatureCache(folder / "c")
    )
    export(known, folder / "exported")
    return {"model": known.save(folder / "model"), "exported": folder / "exported"}


def loaded(path: Path) -> Inspector | runtime.Inspector:
    return Inspector.load(path) if (path / "config.toml").exists() else runtime.Inspector.load(path)


@pytest.mark.parametrize("kind", ["model", "exported"])
def test_kept_changes_are_in_the_folder_and_can_be_undone(
    saved: dict[str, Path], more: list[Record], tmp_path: Path, kind: str
) -> None:
    before = loaded(saved[kind])
    change = recalibrated(before, more, {"false_alarm_rate": 0.1})
    folder = keep(change, saved[kind], tmp_path / "m")
    after = loaded(folder)
    assert after.threshold == change.after.judge.threshold != before.threshold
    assert after.false_alarm_rate == 0.1
    assert len(after.calibration) == 24
    assert f"score > {after.threshold:.6g}" in (folder / "card.md").read_text()
    assert "24 images" in (folder / "card.md").read_text()
    image = more[0].path
    old, new = before.inspect(image), after.inspect(image)
    assert (old.score, old.threshold) != (new.score, new.threshold)  # type: ignore[union-attr]
    assert old.score == new.score  # type: ignore[union-attr]
    keep(undone(after), folder)
    again = loaded(folder)
    assert again.threshold == before.threshold
    assert [version.reason for version in again.versions.all][-1] == "undo: as version 1 again"
    untouched = set(read_model(saved[kind], None, "unispect-model" if kind == "model" else "unispect-export"))
    changing = {"config.toml", "calibration.json", "decision.json", "card.md"}
    for name in untouched - changing:
        assert (folder / name).read_bytes() == (saved[kind] / name).read_bytes()


def test_both_kinds_say_the_same_of_the_same_images(saved: dict[str, Path], more: list[Record]) -> None:
    one, other = (recalibrated(loaded(path), more) for path in saved.values())
    np.testing.assert_allclose(one.after.judge.calibration.scores, other.after.judge.calibration.scores, rtol=1e-3)
    assert one.after.judge.calibration.recognised == other.after.judge.calibration.recognised


@pytest.mark.parametrize("kind", ["model", "exported"])
def test_neither_kind_is_calibrated_on_what_it_learnt_from(saved: dict[str, Path], products: Path, kind: str) -> None:
    with pytest.raises(CalibrationError, match=r"has learnt from 5. of 60 images"):
        recalibrated(loaded(saved[kind]), read_folder(products))


def test_nothing_is_evaluated_that_it_was_calibrated_on_later(saved: dict[str, Path], more: list[Record]) -> None:
    known = Inspector.load(saved["model"])
    labelled = [record for record in more if record.split == "test"]
    assert evaluate(known, labelled, bootstrap=False)
    change = cheaper(known, [*labelled, *more], Costs(1, 1, 0.5))
    with pytest.raises(LeakError, match="calibration image"):
        evaluate(change.after, labelled, bootstrap=False)


def test_a_folder_that_is_no_model_is_left_alone(saved: dict[str, Path], tmp_path: Path) -> None:
    change = redecided(Inspector.load(saved["model"]), {"threshold": 1.0})
    with pytest.raises(StoreError, match="is not a unispect model"):
        keep(change, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(StoreError, match="left alone"):
        keep(change, saved["model"], tmp_path / "out")
    with pytest.raises(ConfigError, match="guarantee 'lots'"):
        redecided(change.before, {"guarantee": "lots"})


def test_json_of_a_change(toy: Toy, tmp_path: Path) -> None:
    told = json.loads(json.dumps(recalibrated(toy, written(tmp_path, range(20), groups=5)).as_dict(), allow_nan=False))
    assert told["after"]["images"] == 20
    assert len(told["spread"]["groups"]) == 5
    assert told["before"]["unknown_threshold"] is None


# Whole days held out at fit.


def by_day(folder: Path, days: int, each: int) -> Path:
    """Two products, each day with pictures of both, in folders below good/."""
    for product in ("fabric", "gear"):
        for number in range(days * each):
            place = folder / product / "train" / "good" / f"day{number // each}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw(product, number, None, 64)[0]).save(place / f"{number}.png")
    return folder


def test_whole_days_are_held_out_across_products(tmp_path: Path) -> None:
    data = by_day(tmp_path / "data", 12, 3)
    settings: dict[str, Any] = {
        "method": "opca",
        "preparation": {"size": 64},
        "features": {"engine": "torch"},
        "split": {"calibration": 0.45},
        "decision": {"guarantee": "group", "false_alarm_rate": 0.2},
        "opca": {"map_side": 64},
    }
    known = Inspector.fit(data, settings, cache=FeatureCache(tmp_path / "cache"))
    own = {record.group for record in known.split.calibration}
    assert len(own) == 5
    assert own.isdisjoint({record.group for record in (*known.split.train, *known.split.held_out)})
    assert {record.product for record in known.split.calibration} == {"fabric", "gear"}
    assert set(known.calibration.groups) == own
    # (1 + shares above) / 6 is at most 0.2: one image of one day may be above, a sixth of it.
    assert known.threshold == np.sort(known.calibration.scores)[-2]
    assert "of a group that was not seen" in known.card()
    with pytest.raises(
        CalibrationError, match=r"5 groups of calibration images cannot support false_alarm_rate=0.05.*19 groups"
    ):
        Inspector.fit(data, settings | {"decision": {"guarantee": "group", "false_alarm_rate": 0.05}})
