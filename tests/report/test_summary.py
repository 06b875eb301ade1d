"""The page of a benchmark: means over seeds, marks on what is not deployable, failures in sight."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from unispect.published.tables import Measured, compare, published
from unispect.report.summary import summaries, write_summary

METRICS = ("image_auroc", "pixel_auroc", "aupro")


def row(value: float | None) -> dict[str, Any]:
    return dict.fromkeys(METRICS, value)


def result(seed: int, value: float, method: str = "hgad", status: str = "done") -> dict[str, Any]:
    """A cell whose image AUROC is `value`, with the label given .05 more."""
    own = {"pooled": row(value), "mean": row(value + 0.01), "worst": row(value - 0.1)}
    given = {name: row(numbers["image_auroc"] + 0.05) for name, numbers in own.items()}
    evaluation = own | {
        "products": {"nut": row(value), "bolt & <co>": row(None)},
        "false_alarm_rate": {"promised": 0.01, "realised": 0.02},
        "detection_rate": 0.8,
        "comparisons": {"label given": given},
    }
    done = status == "done"
    costs = {"fit_s": 61.0, "evaluate_s": 9.5, "images_per_s": 20.5, "peak_gib": 1.8, "model_mib": 65.0}
    return {
        "cell": {"method": method, "data": "line", "backbone": "lite0", "seed": seed},
        "status": status,
        "error": None if done else "no images",
        "costs": costs if done else None,
        "evaluation": evaluation if done else None,
        "report": f"cells/{method}-{seed}/report.html" if done else None,
        "scores": f"cells/{method}-{seed}/scores.csv" if done else None,
        "environment": {"machine": "a box", "versions": "torch 1"},
    }


def test_mean_and_spread_over_the_seeds() -> None:
    (found,) = summaries([result(0, 0.8), result(1, 0.9)])
    assert found.seeds == (0, 1)
    mean, spread = found.values[1] or (0.0, None)
    assert (mean, spread) == (pytest.approx(0.85), pytest.approx(0.0707, abs=1e-4))
    assert found.products == {"nut": (0.8, 0.9)}
    (alone,) = summaries([result(0, 0.8)])
    assert alone.values[1] == (0.8, None)


def test_every_notation_is_written(tmp_path: Path) -> None:
    page = write_summary([result(0, 0.8), result(1, 0.9), result(0, 0.7, "cflow")], tmp_path, "Lines")
    assert page == tmp_path / "index.html"
    text, markdown, latex = ((tmp_path / f"table.{end}").read_text("utf-8") for end in ("txt", "md", "tex"))
    for table in (text, markdown):
        assert "0.850 ± 0.071" in table
        assert "label given" in table
        assert "* Not deployable" in table
        assert "Machine: a box" in table
    assert r"0.850 $\pm$ 0.071" in latex
    content = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert [one["method"] for one in content["summary"]] == ["hgad", "cflow"]
    assert len(content["cells"]) == 3


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    text = write_summary([result(0, 0.8)], tmp_path, "A & <b>").read_text("utf-8")
    assert "<b>A" not in text
    assert "A &amp; &lt;b&gt;" in text
    assert "http" not in text.replace("http-equiv", "")
    assert 'href="cells/hgad-0/report.html"' in text
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "br") and not self.get_starttag_text().endswith("/>"):  # type: ignore[union-attr]
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if opened and opened[-1] == tag:
                opened.pop()

    Checker().feed(text)
    assert opened == []


def test_failures_are_listed_and_count_nowhere(tmp_path: Path) -> None:
    results = [result(0, 0.8), result(1, 0.0, status="failed")]
    write_summary(results, tmp_path, "t")
    assert "hgad on line, lite0, seed 1 failed: no images" in (tmp_path / "table.txt").read_text("utf-8")
    assert summaries(results)[0].seeds == (0,)
    assert "1 failed" in (tmp_path / "index.html").read_text("utf-8")


def test_nothing_measured_is_no_crash(tmp_path: Path) -> None:
    page = write_summary([result(0, 0.0, status="failed")], tmp_path, "t")
    assert "no images" in page.read_text("utf-8")


def test_a_published_table_stands_below(tmp_path: Path) -> None:
    protocol = {"label_given": False, "backbone": "lite0"}
    beside = compare(published("hgad-table-1"), [Measured("hgad", "mvtec", "mean", {"image_auroc": 0.9}, protocol)])
    text = write_summary([result(0, 0.8)], tmp_path, "t", [beside]).read_text("utf-8")
    assert "Beside Yao et al., 2024, Tab. 1" in text
    assert "-8.4" in text
    assert "-8.4" in (tmp_path / "table.md").read_text("utf-8")
