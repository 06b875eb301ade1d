"""The page: complete, self-contained, well-formed, harmless."""

from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unispect.data.loader import Failure, Preparation
from unispect.data.records import Record
from unispect.evaluation import Case, Cases, Comparison, Evaluation
from unispect.metrics.calibration import calibrated
from unispect.metrics.protocol import rates, table
from unispect.report.page import write_findings_report, write_report
from unispect.types import Finding, Region

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "img", "br", "link"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and insists that what is opened is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ")

    def values(self, tag: str, name: str) -> list[str]:
        return [value for at, called, value in self.attributes if (at, called) == (tag, name)]


def read(path: Path) -> Reader:
    return Reader(path.read_text(encoding="utf-8"))


def finding(path: Path | None, score: float, product: str | None = "nut") -> Finding:
    scores = np.zeros((8, 8), np.float32)
    scores[2, 3] = score
    regions = (Region(15, 10, 20, 15, score, 25),) if score > 1 else ()
    sure = None if product is None else 0.9
    name = None if path is None else str(path)
    return Finding(name, score, 1.0, 0.02, score > 1, product, sure, regions, scores, 40, 40)


def image(folder: Path, name: str) -> Path:
    Image.new("RGB", (40, 40), (90, 120, 150)).save(folder / name)
    return folder / name


def evaluation(folder: Path, good: list[float], defective: list[float], product: str = "nut") -> Evaluation:
    """An evaluation of one product with these scores and a threshold of 1."""
    scores = np.array(good + defective)
    labels = np.array([0] * len(good) + [1] * len(defective))
    cases = [
        Case(
            Record(
                path=image(folder, f"{number:03}.png"),
                product=product,
                label=int(label),
                defect="hole" if label else None,
                split="test",
            ),
            finding(folder / f"{number:03}.png", float(score), product),
            np.eye(8, dtype=bool) if label else None,
        )
        for number, (score, label) in enumerate(zip(scores, labels, strict=True))
    ]
    tally = rates(labels, scores > 1)
    fine, bad = cases[: len(good)], cases[len(good) :]
    chosen = Cases(
        tuple(sorted(fine, key=lambda case: -case.finding.score)),
        tuple(sorted(bad, key=lambda case: case.finding.score)),
        tuple(case for case in bad if case.finding.anomalous),
        tuple(case for case in fine if not case.finding.anomalous),
    )
    return Evaluation(
        table=table(scores, labels, [product] * len(scores)),
        rates={product: tally},
        total=tally,
        threshold=1.0,
        promised=0.01,
        calibration=calibrated(np.where(scores > 1, 0.005, 0.5)[labels == 0], 0.01, 0.005),
        intervals={},
        comparisons=(),
        pixel_bounds={},
        scores=scores,
        labels=labels,
        products=(product,) * len(scores),
        p_values=np.where(scores > 1, 0.005, 0.5),
        unaligned=None,
        pro=None,
        paths=tuple(str(case.record.path) for case in cases),
        warnings=(),
        cases={product: chosen},
        notes=(f"No masks, so no pixel metrics: {product}.",),
        failures=(),
        preparation=Preparation(size=32),
    )


def test_report_says_what_was_found(tmp_path: Path) -> None:
    result = evaluation(tmp_path, [0.1, 0.2, 0.3, 1.2], [0.5, 2.0, 3.0])
    path = write_report(result, tmp_path / "deep" / "report.html", "Line 4", {"Command": "unispect evaluate m d"})
    assert path == tmp_path / "deep" / "report.html"
    page = read(path)
    assert "Of 4 good images, 1 raised an alarm (25 %; promised at most 1 %)." in page.text
    assert "Of 3 defective images, 2 were found (66.7 %), 1 missed." in page.text
    for words in ("Line 4", "Missed defects", "False alarms", "Right decisions", "unispect evaluate m d", "nut · hole"):
        assert words in page.text
    assert page.tags["img"] == 2 * (1 + 1 + 2 + 3)
    assert page.tags["svg"] == 3  # scores, ROC, calibration


def test_protocols_of_the_papers_are_marked_and_explained(tmp_path: Path) -> None:
    result = evaluation(tmp_path, [0.1, 0.2, 0.3, 1.2], [0.5, 2.0, 3.0])
    assert "Protocols of the papers" not in read(write_report(result, tmp_path / "r.html", "t", {})).text
    told = replace(result, comparisons=(Comparison("label given", "the product is told", result.table),))
    page = read(write_report(told, tmp_path / "r.html", "t", {}))
    assert "Protocols of the papers" in page.text
    assert "not deployable" in page.text
    assert "label given: the product is told" in page.text


def test_warnings_stand_on_top(tmp_path: Path) -> None:
    result = replace(evaluation(tmp_path, [0.1], [2.0]), warnings=("1 image looks the same",))
    text = read(write_report(result, tmp_path / "r.html", "t", {})).text
    assert 0 < text.index("1 image looks the same") < text.index("Results")


def test_alignment_and_overlap_are_drawn_where_they_are_known(tmp_path: Path) -> None:
    result = evaluation(tmp_path, [0.1, 0.2], [2.0, 3.0])
    curve = (np.linspace(0, 0.3, 50), np.linspace(0, 0.9, 50))
    page = read(write_report(replace(result, unaligned=10 * result.scores, pro=curve), tmp_path / "r.html", "t", {}))
    assert page.tags["svg"] == 3 + 2 + 1  # before and after alignment, overlap
    assert "Before alignment" in page.text
    assert "After alignment" in page.text


def test_report_is_self_contained(tmp_path: Path) -> None:
    path = write_report(evaluation(tmp_path, [0.1], [2.0]), tmp_path / "r.html", "t", {})
    page = read(path)
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.values("img", "src"))
    assert "http" not in path.read_text(encoding="utf-8").replace("http-equiv", "")
    assert "default-src 'none'" in page.values("meta", "content")[2]
    assert [file.name for file in tmp_path.iterdir() if file.suffix != ".png"] == ["r.html"]


def test_report_can_be_read_without_seeing_it(tmp_path: Path) -> None:
    page = read(write_report(evaluation(tmp_path, [0.1], [2.0]), tmp_path / "r.html", "t", {"a": "b"}))
    assert all(page.values("img", "alt"))
    assert len(page.values("img", "alt")) == page.tags["img"]
    assert all(page.values("svg", "aria-label"))
    assert set(page.values("th", "scope")) == {"col", "colgroup", "row"}
    assert page.values("html", "lang") == ["en"]
    assert (page.tags["h1"], page.tags["main"]) == (1, 1)


def test_names_are_harmless(tmp_path: Path) -> None:
    result = evaluation(tmp_path, [0.1, 1.3], [0.5, 2.0], product=EVIL)
    evil = replace(result, failures=(Failure(Path(EVIL), EVIL),))
    page = read(write_report(evil, tmp_path / "r.html", EVIL, {EVIL: EVIL}))
    assert page.tags["script"] == 0
    assert page.text.count(EVIL) > 8
    findings = [replace(finding(None, 2.0, EVIL), path=EVIL), Failure(Path(EVIL), EVIL)]
    page = read(write_findings_report(findings, tmp_path / "f.html", EVIL, {EVIL: EVIL}))
    assert page.tags["script"] == 0
    assert EVIL in page.text


def test_nothing_went_wrong_is_said_so(tmp_path: Path) -> None:
    page = read(write_report(evaluation(tmp_path, [0.1, 0.2], [2.0, 3.0]), tmp_path / "r.html", "t", {}))
    assert "none raised an alarm (0 %" in page.text
    assert "No defect was missed" in page.text
    assert "No false alarm" in page.text
    assert "Missed defects" not in page.text


@pytest.mark.parametrize(("good", "defective"), [([0.1, 2.0], []), ([], [0.5, 2.0])])
def test_one_class_only(tmp_path: Path, good: list[float], defective: list[float]) -> None:
    page = read(write_report(evaluation(tmp_path, good, defective), tmp_path / "r.html", "t", {}))
    assert "nan" not in page.text.lower().split()
    assert page.tags["svg"] == (2 if good else 1)  # scores; calibration only with good images


def test_many_cases_are_folded_away(tmp_path: Path) -> None:
    result = evaluation(tmp_path, [0.1], [0.2] * 20)
    page = read(write_report(result, tmp_path / "r.html", "t", {}))
    assert "Show 8 more" in page.text


def test_findings_without_labels(tmp_path: Path) -> None:
    paths = [image(tmp_path, f"{number}.png") for number in range(3)]
    findings = [finding(path, score) for path, score in zip(paths, (0.1, 2.0, 3.0), strict=True)]
    results = [*findings, Failure(tmp_path / "x.png", "zero bytes")]
    page = read(write_findings_report(results, tmp_path / "f.html", "Inspection", {"Model": "m"}))
    assert "Of 3 images, 2 are anomalous." in page.text
    assert "1 file could not be read." in page.text
    assert "zero bytes" in page.text
    rows = [page.text.index(str(path)) for path in (paths[2], paths[1], paths[0])]
    assert rows == sorted(rows)
    assert page.tags["img"] == 6


def test_findings_without_a_file_or_whose_file_has_gone(tmp_path: Path) -> None:
    findings = [finding(None, 2.0, product=None), finding(tmp_path / "gone.png", 0.5)]
    page = read(write_findings_report(findings, tmp_path / "f.html", "t", {}))
    assert "image without a file" in page.text
    assert page.tags["img"] == 4


def test_no_findings(tmp_path: Path) -> None:
    assert "No image was inspected." in read(write_findings_report([], tmp_path / "f.html", "t", {})).text


def test_what_a_long_report_leaves_out_is_said(tmp_path: Path) -> None:
    findings = [finding(None, 0.001 * number) for number in range(1001)]
    page = read(write_findings_report(findings, tmp_path / "f.html", "t", {}))
    assert "The table stops after the 1000 highest scores of 1001." in page.text
    assert "Pictures are shown for the 100 highest scores only." in page.text
    assert page.tags["img"] == 200
    assert page.values("th", "scope").count("row") == 1000


def test_a_map_of_the_cropped_middle_is_shown_there(tmp_path: Path) -> None:
    wide = tmp_path / "wide.png"
    Image.new("RGB", (80, 40), (90, 120, 150)).save(wide)
    result = replace(finding(wide, 0.5), width=80, height=40, map=np.full((8, 8), 3.0, np.float32))
    whole = write_findings_report([result], tmp_path / "a.html", "t", {}).read_text()
    middle = write_findings_report([result], tmp_path / "b.html", "t", {}, Preparation(32, "crop")).read_text()
    assert whole != middle


def test_an_older_report_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    path.write_text("old" * 10**6)
    write_findings_report([], path, "t", {})
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
