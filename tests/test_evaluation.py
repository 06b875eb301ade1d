"""Evaluation of a toy inspector that knows the answer from a table of planted scores."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unispect.data.leak import Seen
from unispect.data.loader import Failure, Preparation, decode
from unispect.data.nearness import fingerprint
from unispect.data.records import Record, content_hash
from unispect.errors import DataError, LeakError
from unispect.evaluation import Evaluation, evaluate, percent
from unispect.metrics import ranking, regions
from unispect.metrics.protocol import METRICS, interval
from unispect.types import Finding

SIDE = 16
KEYS = {*METRICS, "images"}
TOP = [
    "pooled",
    "mean",
    "worst",
    "worst_products",
    "products",
    "threshold",
    "false_alarm_rate",
    "detection_rate",
    "calibration",
    "intervals",
    "pixel_bounds",
    "comparisons",
    "warnings",
    "notes",
]


@dataclass
class Toy:
    """Gives each path its planted score and map, and keeps what it was shown.

    given   what is added to the score of a product when the inspector is told it
    """

    planted: dict[Path, tuple[float, np.ndarray]]
    broken: set[Path] = field(default_factory=set)
    preparation: Preparation = field(default_factory=lambda: Preparation(size=32))
    threshold: float = 1.0
    false_alarm_rate: float = 0.1
    smallest_false_alarm_rate: float = 0.05
    seen: Seen = field(default_factory=Seen)
    given: dict[str, float] = field(default_factory=dict)
    shown: list[Record] = field(default_factory=list)

    @property
    def takes_product(self) -> bool:
        return bool(self.given)

    def findings(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure]]:
        self.shown += records
        for record in records:
            if record.path in self.broken:
                yield record, Failure(record.path, "zero bytes")
            else:
                yield record, self.finding(record.path)

    def findings_given(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure, Finding | None]]:
        for record, result in self.findings(records):
            told = isinstance(result, Finding) and record.product in self.given
            yield record, result, self.moved(result, self.given[record.product]) if told else None

    def moved(self, finding: Finding, by: float) -> Finding:
        return replace(finding, score=finding.score + by, map=finding.map + np.float32(by))

    def finding(self, path: Path) -> Finding:
        score, scores = self.planted[path]
        return Finding(str(path), score, self.threshold, 0.5, score > self.threshold, None, None, (), scores, 32, 32)


class Line:
    """A made-up test set: images named in memory only, masks on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[Record] = []
        self.planted: dict[Path, tuple[float, np.ndarray]] = {}
        self.random = np.random.default_rng(0)

    def add(self, product: str | None, label: int | None, score: float, mask: str = "none", split: str = "test") -> Path:
        """One image; its mask is a centred square ("square"), all empty ("empty") or missing ("none")."""
        path = self.folder / f"{product}" / f"{len(self.records):03}.png"
        file = None if mask == "none" else self.mask(len(self.records), mask)
        defect = "hole" if label == 1 else None
        self.records.append(Record(path=path, product=product, label=label, defect=defect, mask=file, split=split))
        scores = self.random.normal(size=(SIDE, SIDE)).astype(np.float32)
        if mask == "square":
            scores[4:12, 4:12] += 1.0
        self.planted[path] = (score, scores)
        return path

    def mask(self, number: int, kind: str) -> Path:
        pixels = np.zeros((32, 32), np.uint8)
        pixels[8:24, 8:24] = 255 if kind == "square" else 0
        path = self.folder / f"mask-{number:03}.png"
        Image.fromarray(pixels).save(path)
        return path

    def evaluate(self, **options: object) -> Evaluation:
        return evaluate(Toy(self.planted), self.records, **options)  # type: ignore[arg-type]


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


def usual(line: Line) -> Line:
    """'a' with masks, 'b' without; 1 of 6 good images of each raises an alarm, 2 of 3 and 1 of 3 defects do."""
    for product, mask, defects in (("a", "square", (2.0, 3.0, 0.5)), ("b", "none", (0.2, 0.3, 4.0))):
        for score in (0.1, 0.2, 0.3, 0.4, 0.5, 1.5):
            line.add(product, 0, score)
        for score in defects:
            line.add(product, 1, score, mask)
    return line


def test_json_shape_is_stable(line: Line) -> None:
    given = usual(line).evaluate().as_dict()
    assert list(given) == TOP
    assert set(given["pooled"]) == set(given["mean"]) == set(given["worst"]) == KEYS
    assert set(given["products"]["a"]) == KEYS | {"false_alarm_rate", "detection_rate"}
    assert given["products"]["b"]["aupro"] is None
    assert given["threshold"] == 1.0
    low, high = interval(2, 12)
    assert given["false_alarm_rate"] == {"promised": 0.1, "realised": 2 / 12, "low": low, "high": high}
    assert given["products"]["a"]["detection_rate"] == 2 / 3
    assert given["pooled"]["images"] == given["mean"]["images"] == 18
    assert json.loads(json.dumps(given, allow_nan=False)) == given


def test_numbers_are_those_of_the_metrics(line: Line) -> None:
    result = usual(line).evaluate()
    scores = np.array([line.planted[record.path][0] for record in line.records])
    labels = np.array([record.label for record in line.records])
    assert result.table.pooled.image_auroc == ranking.auroc(scores, labels)
    maps = np.array([line.planted[record.path][1] for record in line.records if record.product == "a"])
    masks = np.zeros(maps.shape, bool)
    masks[6:, 4:12, 4:12] = True
    assert result.table.pooled.pixel_auroc == ranking.auroc(maps, masks)
    assert result.table.pooled.aupro == result.table.mean.aupro == regions.aupro(maps, masks)


def test_the_inspector_learns_nothing_but_the_path(line: Line) -> None:
    toy = Toy(usual(line).planted)
    evaluate(toy, line.records, comparisons=False)
    assert [record.path for record in toy.shown] == [record.path for record in line.records]
    for record in toy.shown:
        assert (record.product, record.label, record.defect, record.mask, record.group) == (None,) * 5


def test_only_labelled_test_images_count(line: Line) -> None:
    line.add("a", 0, 9.0, split="train")
    line.add("a", None, 9.0)
    assert usual(line).evaluate().table.pooled.images == 18


def test_without_labelled_test_images_the_layout_is_told(line: Line, tmp_path: Path) -> None:
    line.add("a", 0, 0.0, split="train")
    with pytest.raises(DataError, match=r"the 1 records given: no labelled test images .* <product>/test/good/"):
        line.evaluate()
    (tmp_path / "a" / "train" / "good").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "train" / "good" / "0.png")
    with pytest.raises(DataError, match="no labelled test images"):
        evaluate(Toy({}), tmp_path)


def test_a_folder_is_read(tmp_path: Path) -> None:
    planted = {}
    for kind, score in (("good", 0.0), ("hole", 2.0)):
        path = tmp_path / "nut" / "test" / kind / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path)
        planted[path] = (score, np.zeros((SIDE, SIDE), np.float32))
    result = evaluate(Toy(planted), str(tmp_path))
    assert list(result.table.products) == ["nut"]
    assert result.table.pooled.image_auroc == 1.0


def test_a_product_without_a_name_is_called_all(line: Line) -> None:
    line.add(None, 0, 0.0)
    line.add(None, 1, 2.0)
    assert list(line.evaluate().as_dict()["products"]) == ["all"]


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_only(line: Line, label: int) -> None:
    line.add("a", label, 0.5, "square" if label else "none")
    line.add("a", label, 1.5, "square" if label else "none")
    result = line.evaluate()
    row = result.as_dict()["products"]["a"]
    assert row["image_auroc"] is None
    assert row["false_alarm_rate"] == (None if label else 0.5)
    assert row["detection_rate"] == (0.5 if label else None)
    assert "-" in result.text()
    assert ("No good test images" in result.text()) is bool(label)
    assert ("No defective test images" in result.text()) is not bool(label)


def test_masks_of_boxes_can_be_ignored(line: Line) -> None:
    result = usual(line).evaluate(ignore_masks=["a"])
    assert math.isnan(result.table.pooled.pixel_auroc)
    assert any("ignored as asked" in note and "a" in note for note in result.notes)
    with pytest.raises(DataError, match=r"ignore_masks: unknown product 'aa': did you mean 'a'\?"):
        line.evaluate(ignore_masks=["aa"])


def test_defects_without_a_mask_are_left_out_and_told(line: Line) -> None:
    before = usual(line).evaluate().table.products["a"]
    line.add("a", 1, 2.0, "none")
    line.add("a", 1, 2.0, "none")
    result = line.evaluate()
    assert result.table.products["a"].pixel_ap == before.pixel_ap
    assert result.table.products["a"].images == before.images + 2
    assert "a: 2 defective images without a mask left out of the pixel metrics." in result.notes


def test_an_empty_mask_counts_as_normal_pixels_and_is_told(line: Line) -> None:
    usual(line).add("a", 1, 2.0, "empty")
    result = line.evaluate()
    assert any(note.startswith("a: 1 defective image with a mask that is empty") for note in result.notes)
    assert result.rates["a"].defective == 4


def test_broken_files_are_listed_and_count_nowhere(line: Line) -> None:
    usual(line)
    toy = Toy(line.planted, broken={line.records[0].path})
    result = evaluate(toy, line.records)
    assert [failure.path for failure in result.failures] == [line.records[0].path]
    assert result.table.pooled.images == 17
    assert "1 file could not be read" in result.text()
    with pytest.raises(DataError, match="no test image could be read"):
        evaluate(Toy(line.planted, broken=set(line.planted)), line.records)


@pytest.mark.parametrize("where", ["score", "map"])
def test_a_score_that_is_no_number_is_an_error(line: Line, where: str) -> None:
    path = line.add("a", 0, math.nan if where == "score" else 0.0)
    if where == "map":
        line.planted[path][1][3, 4] = np.inf
    with pytest.raises(DataError, match=r"000\.png: .* not a finite number"):
        line.evaluate()


def test_progress_reaches_the_end(line: Line) -> None:
    calls: list[tuple[int, int]] = []
    usual(line).evaluate(progress=lambda done, total: calls.append((done, total)))
    assert calls == [(number, 18) for number in range(1, 19)]


def test_an_inspector_that_loses_images_or_their_order_is_noticed(line: Line) -> None:
    class Reversed(Toy):
        def findings(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure]]:
            return super().findings(records[::-1])

    class Shorter(Toy):
        def findings(self, records: Sequence[Record]) -> Iterator[tuple[Record, Finding | Failure]]:
            return super().findings(records[:-1])

    usual(line)
    with pytest.raises(ValueError, match="keep the order"):
        evaluate(Reversed(line.planted), line.records)
    with pytest.raises(ValueError, match="shorter"):
        evaluate(Shorter(line.planted), line.records)


def test_worst_cases_are_the_worst_whatever_the_order(line: Line) -> None:
    scores = np.random.default_rng(1).permutation(40) / 20.0
    for score in scores:
        line.add("a", 0, float(score))
        line.add("a", 1, float(score), "square")
    cases = line.evaluate().cases["a"]
    assert [case.finding.score for case in cases.highest_good] == sorted(scores)[::-1][:6]
    assert [case.finding.score for case in cases.lowest_defective] == sorted(scores)[:6]
    assert [case.outcome for case in cases.highest_good] == ["false alarm"] * 6
    assert [case.outcome for case in cases.lowest_defective] == ["missed"] * 6
    assert [case.outcome for case in (*cases.detected, *cases.passed)] == ["detected"] * 3 + ["passed"] * 3
    assert cases.lowest_defective[0].truth is not None
    assert cases.lowest_defective[0].truth.sum() == 64
    backward = evaluate(Toy(line.planted), line.records[::-1]).cases["a"]
    for ours, theirs in zip((cases.detected, cases.passed), (backward.detected, backward.passed), strict=True):
        assert [case.record for case in ours] == [case.record for case in theirs]


def test_kept_maps_do_not_hold_their_batch(line: Line) -> None:
    batch = np.zeros((8, SIDE, SIDE), np.float32)
    path = line.add("a", 0, 0.0)
    line.planted[path] = (0.0, batch[3])
    assert line.evaluate().cases["a"].highest_good[0].finding.map.base is None


def test_text_is_aligned_and_says_what_became_of_the_promise(line: Line) -> None:
    text = usual(line).evaluate().text()
    table = text.split("\n\n")[0].splitlines()
    assert len({len(row) for row in table}) == 1
    assert [row.split()[0] for row in table if not row.startswith("-")][1:] == [
        "pooled",
        "mean",
        "worst",
        "test-normalised,",
        "test-normalised,",
        "a",
        "b",
    ]
    assert "Of 12 good images, 2 raised an alarm (16.7 %; promised at most 10 %)." in text
    assert "Of 6 defective images, 3 were found (50 %), 3 missed." in text
    assert "No masks, so no pixel metrics: b." in text


@pytest.mark.parametrize(
    ("rate", "text"), [(0, "0 %"), (1, "100 %"), (0.01, "1 %"), (1 / 60, "1.7 %"), (0.0005, "0.05 %"), (0.1, "10 %")]
)
def test_percent(rate: float, text: str) -> None:
    assert percent(rate) == text


# The papers' own protocols


def two_scales(line: Line) -> Line:
    """Two products that rank perfectly by themselves, 'b' at ten times the scale: pooled, they do not."""
    for product, scale in (("a", 1.0), ("b", 10.0)):
        for score in (1.0, 2.0, 3.0):
            line.add(product, 0, scale * score)
            line.add(product, 1, scale * (score + 3.0), "square")
    return line


def test_the_label_given_runs_beside_and_changes_nothing_deployable(line: Line) -> None:
    two_scales(line)
    alone = evaluate(Toy(line.planted), line.records, comparisons=False)
    beside = evaluate(Toy(line.planted, given={"b": -9.0}), line.records)
    assert beside.table == alone.table
    assert np.array_equal(beside.scores, alone.scores)
    assert [one.name for one in beside.comparisons] == ["label given", "test-normalised", "both"]
    scores = [line.planted[record.path][0] - (9.0 if record.product == "b" else 0.0) for record in line.records]
    labels = [record.label for record in line.records]
    given = beside.comparisons[0].table
    assert given.pooled.image_auroc == ranking.auroc(np.array(scores), np.array(labels))
    assert given.mean == replace(alone.table.mean)
    assert beside.as_dict()["comparisons"]["label given"]["deployable"] is False
    assert "label given, pooled *" in beside.text()
    assert "* Not deployable" in beside.text()


def test_normalising_by_the_test_set_hides_scales_and_only_pooled_numbers_change(line: Line) -> None:
    result = two_scales(line).evaluate()
    (normalised,) = result.comparisons
    assert normalised.name == "test-normalised"
    assert result.table.pooled.image_auroc < 1.0
    assert normalised.table.pooled.image_auroc == 1.0
    assert normalised.table.products == result.table.products
    assert normalised.table.mean == result.table.mean


def test_no_comparison_unless_wanted(line: Line) -> None:
    result = usual(line).evaluate(comparisons=False)
    assert result.comparisons == ()
    assert "*" not in result.text()


def test_labels_are_off_even_where_the_product_is_given(line: Line) -> None:
    toy = Toy(usual(line).planted, given={"a": 0.0})
    evaluate(toy, line.records)
    assert {record.product for record in toy.shown} == {"a", "b"}
    for record in toy.shown:
        assert (record.label, record.defect, record.mask, record.group) == (None,) * 4


# Intervals, calibration, streaming


def test_intervals_hold_their_numbers_and_are_deterministic(line: Line) -> None:
    result = usual(line).evaluate()
    assert list(result.intervals) == ["pooled", "mean", "product:a", "product:b"]
    for place, row in (("pooled", result.table.pooled), ("mean", result.table.mean)):
        for metric in ("image_auroc", "image_ap", "pixel_auroc", "aupro"):
            low, high = result.intervals[place][metric]
            assert 0 <= low <= getattr(row, metric) <= high <= 1, (place, metric)
    low, high = result.intervals["pooled"]["false_alarm_rate"]
    assert low <= result.total.false_alarm_rate <= high
    assert result.intervals["pooled"]["image_auroc"][0] < result.intervals["pooled"]["image_auroc"][1]
    assert line.evaluate().intervals == result.intervals
    assert line.evaluate(bootstrap=False).intervals == {}


def test_streamed_pixels_are_within_their_bound(line: Line) -> None:
    exact, streamed = usual(line).evaluate(exact=True), line.evaluate(exact=False)
    for metric in ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro"):
        bound = streamed.pixel_bounds["pooled"][metric]
        assert exact.pixel_bounds["pooled"][metric] == 0
        assert 0 <= bound < 0.02
        gap = abs(getattr(exact.table.pooled, metric) - getattr(streamed.table.pooled, metric))
        assert gap <= bound + 1e-12
    assert streamed.table.pooled.image_auroc == exact.table.pooled.image_auroc
    assert "Pixel metrics were streamed" in streamed.text()
    assert "streamed" not in exact.text()


def test_calibration_counts_p_values_of_good_images(line: Line) -> None:
    result = usual(line).evaluate()
    assert result.calibration.promised == 0.1
    assert result.calibration.good == 12


# The leak guard


def seen_by_a_model(paths: Sequence[Path], role: str = "train") -> Seen:
    contents = {content_hash(path): (role, f"old/{path.name}") for path in paths}
    marks = {(role, f"old/{path.name}"): fingerprint(decode(path)) for path in paths}
    return Seen(contents, marks)


def pictures(line: Line, count: int) -> Line:
    """Test images that are on disk."""
    for number in range(count):
        path = line.add("a", number % 2, float(number))
        path.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC).save(path)
    return line


@pytest.mark.parametrize("role", ["train", "held_out", "calibration"])
def test_a_test_image_that_was_seen_is_refused_by_content(line: Line, role: str) -> None:
    pictures(line, 6)
    toy = Toy(line.planted, seen=seen_by_a_model([line.records[2].path], role))
    with pytest.raises(
        LeakError, match=rf"1 image of 6 in the test set was seen .* = {role.replace('_', '-')} image old/002"
    ):
        evaluate(toy, line.records)
    assert toy.shown == []
    evaluate(toy, [record for record in line.records if record.path.name != "002.png"])


def test_a_copy_under_another_name_is_the_same_content(line: Line, tmp_path: Path) -> None:
    pictures(line, 4)
    copy = tmp_path / "elsewhere.png"
    copy.write_bytes(line.records[1].path.read_bytes())
    with pytest.raises(LeakError, match="elsewhere"):
        evaluate(Toy(line.planted, seen=seen_by_a_model([copy])), line.records)


def test_an_image_saved_again_is_warned_about(line: Line, tmp_path: Path) -> None:
    pictures(line, 8)
    again = [tmp_path / f"again-{number}.jpg" for number in range(8)]
    for record, path in zip(line.records[:1], again, strict=False):
        Image.open(record.path).save(path, quality=90)
    for number in range(1, 8):
        noise = np.random.default_rng(100 + number).integers(0, 256, (64, 64, 3), np.uint8)
        Image.fromarray(noise).resize((128, 128), Image.Resampling.BICUBIC).save(again[number])
    result = evaluate(Toy(line.planted, seen=seen_by_a_model(again)), line.records)
    (warning,) = result.warnings
    assert warning.startswith("1 image of 8 in the test set looks nearly the same")
    assert "000.png = train image" in warning
    assert "Warning: 1 image" in result.text()
