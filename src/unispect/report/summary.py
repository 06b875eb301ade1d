"""The results of a benchmark as text, Markdown, LaTeX, JSON, and an HTML page that links to the report of every cell."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unispect.published.tables import Comparison
from unispect.report import plots, tables

Result = Mapping[str, Any]
Reader = Callable[[Result], float | None]
Key = tuple[str, str, str]  # data, method, backbone
MARK = "*"  # of columns that no deployed model could have scored
FOOTNOTE = (
    f"{MARK} Not deployable: the product of each test image is given, or scores are scaled by the extremes of a "
    "product's whole test set."
)


def _of(*path: str) -> Reader:
    """Reads a number of the evaluation; None where it is missing."""

    def read(result: Result) -> float | None:
        value: Any = result["evaluation"]
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return None if value is None else float(value)

    return read


def _cost(name: str) -> Reader:
    return lambda result: result["costs"].get(name)


# Name, how it is read, whether it is a share
Column = tuple[str, Reader, bool]
RESULTS: tuple[Column, ...] = (
    ("image AUROC, mean", _of("mean", "image_auroc"), True),
    ("pooled", _of("pooled", "image_auroc"), True),
    ("worst product", _of("worst", "image_auroc"), True),
    ("image AP, mean", _of("mean", "image_ap"), True),
    ("pooled", _of("pooled", "image_ap"), True),
    ("pixel AUROC, mean", _of("mean", "pixel_auroc"), True),
    ("pooled", _of("pooled", "pixel_auroc"), True),
    ("pixel AP, mean", _of("mean", "pixel_ap"), True),
    ("pooled", _of("pooled", "pixel_ap"), True),
    ("AUPRO, mean", _of("mean", "aupro"), True),
    ("false alarms promised", _of("false_alarm_rate", "promised"), True),
    ("realised", _of("false_alarm_rate", "realised"), True),
    ("found", _of("detection_rate"), True),
)
NOT_DEPLOYABLE: tuple[Column, ...] = (
    (f"image AUROC, label given, mean{MARK}", _of("comparisons", "label given", "mean", "image_auroc"), True),
    (f"pooled{MARK}", _of("comparisons", "label given", "pooled", "image_auroc"), True),
    (f"test-normalised, pooled{MARK}", _of("comparisons", "test-normalised", "pooled", "image_auroc"), True),
    (f"both, pooled{MARK}", _of("comparisons", "both", "pooled", "image_auroc"), True),
)
COSTS: tuple[Column, ...] = (
    ("fit, s", _cost("fit_s"), False),
    ("evaluate, s", _cost("evaluate_s"), False),
    ("images/s", _cost("images_per_s"), False),
    ("peak, GiB", _cost("peak_gib"), False),
    ("model, MiB", _cost("model_mib"), False),
)
COLUMNS = (*RESULTS, *NOT_DEPLOYABLE, *COSTS)
Sheet = tuple[str, list[str], list[list[str]]]  # heading, head, rows


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and spread over the seeds of one method, data set and backbone.

    values   for each of COLUMNS: mean and standard deviation (None for one seed), or None where nothing was measured
    """

    key: Key
    seeds: tuple[int, ...]
    values: tuple[tuple[float, float | None] | None, ...]
    products: dict[str, tuple[float, ...]]


def summaries(results: Sequence[Result]) -> list[Summary]:
    """One for each data set, method and backbone that has a result, in the order of the results."""
    groups: dict[Key, list[Result]] = defaultdict(list)
    for result in results:
        if result["status"] == "done":
            cell = result["cell"]
            groups[cell["data"], cell["method"], cell["backbone"]].append(result)
    return [
        Summary(
            key,
            tuple(result["cell"]["seed"] for result in group),
            tuple(_spread([read(result) for result in group]) for _, read, _ in COLUMNS),
            _products(group),
        )
        for key, group in groups.items()
    ]


def write_summary(results: Sequence[Result], folder: Path, title: str, comparisons: Sequence[Comparison] = ()) -> Path:
    """Write table.txt, table.md, table.tex, table.json and index.html; returns the path of the page.

    results   of `unispect.benchmark.run`; what failed is listed
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = summaries(results)
    sheets = _sheets(found)
    product_head, product_rows = _product_table(found)
    broken = [(_name(result), str(result["error"])) for result in results if result["status"] != "done"]
    told = [FOOTNOTE, *_environment(results), *(f"{name} failed: {error}" for name, error in broken)]
    text, page, latex = [title, ""], [f"# {title}", ""], []
    for heading, head, rows in sheets:
        text += [heading, tables.text(head, rows, 3), ""]
        page += [f"{heading}:", "", tables.markdown(head, rows, 3), ""]
        latex += [f"% {heading}", tables.latex(head, rows, 3), ""]
    text += ["Image AUROC of each product", tables.text(product_head, product_rows), "", *told, ""]
    page += ["Image AUROC of each product:", ""]
    page += [tables.markdown(product_head, product_rows), "", *(f"{line}  " for line in told), ""]
    for one in comparisons:
        page += [tables.markdown(one.head(), one.cells(), 8), "", *(f"{line}  " for line in one.sentences()), ""]
    (folder / "table.txt").write_text("\n".join(text), encoding="utf-8")
    (folder / "table.md").write_text("\n".join(page), encoding="utf-8")
    (folder / "table.tex").write_text("\n".join(latex), encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(_plain(results, found, comparisons), indent=1) + "\n", encoding="utf-8")
    return _write_page(folder / "index.html", results, found, title, told, comparisons)


def _spread(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None


def _products(group: Sequence[Result]) -> dict[str, tuple[float, ...]]:
    """Image AUROC of each product, one for each seed where it can be measured."""
    found: dict[str, list[float]] = defaultdict(list)
    for result in group:
        for name, row in result["evaluation"]["products"].items():
            if row["image_auroc"] is not None:
                found[name].append(row["image_auroc"])
    return {name: tuple(values) for name, values in sorted(found.items())}


def _sheets(found: Sequence[Summary]) -> list[Sheet]:
    """The summary in three tables: what counts, what no line could have, what it costs."""
    sheets, start = [], 0
    for heading, columns in (
        ("Results", RESULTS),
        ("Not deployable: protocols of the papers", NOT_DEPLOYABLE),
        ("Costs", COSTS),
    ):
        head = ["data", "method", "backbone", "seeds", *(name for name, _, _ in columns)]
        rows = [
            [*one.key, str(len(one.seeds)), *map(_cell, one.values[start : start + len(columns)], (c[2] for c in columns))]
            for one in found
        ]
        sheets.append((heading, head, rows))
        start += len(columns)
    return sheets


def _product_table(found: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Image AUROC: a row a product, a column a summary."""
    names = list(dict.fromkeys(name for one in found for name in one.products))
    head = ["product", *(" ".join(one.key) for one in found)]
    return head, [[name, *(_cell(_spread(one.products.get(name, ())), True) for one in found)] for name in names]


def _cell(value: tuple[float, float | None] | None, share: bool) -> str:
    """`.857 ± .004`, `61 ± 2` or a dash."""
    if value is None:
        return "–"
    mean, spread = value
    shown = f"{mean:.3f}" if share else f"{mean:.3g}"
    return shown if spread is None else f"{shown} ± {spread:.3f}" if share else f"{shown} ± {spread:.2g}"


def _name(result: Result) -> str:
    cell = result["cell"]
    return f"{cell['method']} on {cell['data']}, {cell['backbone']}, seed {cell['seed']}"


def _environment(results: Sequence[Result]) -> list[str]:
    """Machines and versions, once each."""
    places = [result["environment"] for result in results if result.get("environment")]
    pairs = [(f"Machine: {place['machine']}", f"Versions: {place['versions']}") for place in places]
    return list(dict.fromkeys(text for pair in pairs for text in pair))


def _plain(results: Sequence[Result], found: Sequence[Summary], comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """For JSON: the summary, and each cell without its path on this machine."""
    names = [name for name, _, _ in COLUMNS]
    rows = [
        {
            "data": one.key[0],
            "method": one.key[1],
            "backbone": one.key[2],
            "seeds": list(one.seeds),
            "columns": [{"name": name, "value": value} for name, value in zip(names, one.values, strict=True)],
            "products": {name: list(values) for name, values in one.products.items()},
        }
        for one in found
    ]
    kept = ("cell", "status", "error", "costs", "images", "evaluation", "environment")
    cells = [{name: result[name] for name in kept if name in result} for result in results]
    return {"summary": rows, "cells": cells, "comparisons": [one.as_dict() for one in comparisons]}


def page_style() -> Markup:
    """The look that all pages share."""
    style = resources.files("unispect.report").joinpath("page.html").read_text(encoding="utf-8")
    return Markup(style[style.index("<style>") + 7 : style.index("</style>")].replace("{{ page.legend | safe }}", "none"))


def _write_page(
    path: Path,
    results: Sequence[Result],
    found: Sequence[Summary],
    title: str,
    told: Sequence[str],
    comparisons: Sequence[Comparison],
) -> Path:
    source = resources.files("unispect.report").joinpath("summary.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    product_head, product_rows = _product_table(found)
    links = [(_name(result), result["report"], result["scores"]) for result in results if result.get("report")]
    text = environment.from_string(source).render(
        title=title,
        style=page_style(),
        lead=_lead(results, found),
        sheets=_sheets(found),
        product_head=product_head,
        product_rows=product_rows,
        drawings=tuple(_drawings(found)),
        told=told,
        comparisons=comparisons,
        links=links,
    )
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def _lead(results: Sequence[Result], found: Sequence[Summary]) -> str:
    done = sum(result["status"] == "done" for result in results)
    failed = f", {len(results) - done} failed" if done < len(results) else ""
    rows = "1 row" if len(found) == 1 else f"{len(found)} rows"
    return f"{done} of {len(results)} cells measured{failed}: {rows} of method, data and backbone, each over its seeds."


def _drawings(found: Sequence[Summary]) -> Iterator[tuple[str, Markup]]:
    """Image AUROC of every product, a dot a seed."""
    for one in found:
        rows = list(one.products.items())
        if rows:
            low = min(0.5, *(value for _, values in rows for value in values))
            told = "Image AUROC: " + ", ".join(f"{name} {np.mean(values):.3f}" for name, values in rows)
            yield " · ".join(one.key), plots.dots(told, rows, low)
