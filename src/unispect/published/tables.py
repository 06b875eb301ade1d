"""The tables of the papers as data with their source, and what was measured beside them.

Each is a TOML file of this folder; docs/published.md lists them. Numbers are as printed, in percent unless a note says so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from unispect.errors import ConfigError, unknown_name

NAMES = {
    "label_given": "the product is given when scoring",
    "test_normalised": "scores are divided by statistics of the test set",
    "checkpoint": "chosen state",
    "image_size": "image size",
    "backbone": "backbone",
    "aupro": "AUPRO routine",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """One number as printed: a method under a setting, on a data set, for a product, "mean" or "pooled"."""

    method: str
    setting: str
    dataset: str
    product: str
    metric: str
    value: float
    deviation: float | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """A table of a paper.

    protocol    how its numbers were obtained, by the keys of NAMES
    misprints   where the paper contradicts itself
    """

    id: str
    table: int
    title: str
    authors: str
    year: int
    link: str
    caption: str
    metrics: tuple[str, ...]
    notes: tuple[str, ...]
    misprints: tuple[str, ...]
    protocol: dict[str, Any]
    entries: tuple[Entry, ...]

    @property
    def source(self) -> str:
        """`Yao et al., 2024, Tab. 1`."""
        return f"{self.authors}, {self.year}, Tab. {self.table}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured here: metrics by name, 0 to 1, of a product of a data set, of their mean or of all pooled."""

    method: str
    dataset: str
    product: str
    values: Mapping[str, float]
    protocol: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """A published number and one that was measured on the same data, in percent."""

    dataset: str
    product: str
    metric: str
    method: str
    setting: str
    published: float
    measured: float
    how: str

    @property
    def difference(self) -> float:
        """Measured - published, points."""
        return self.measured - self.published


@dataclass(frozen=True, slots=True)
class Comparison:
    """A published table beside what was measured.

    differences   where the protocols differ, for each way of measuring
    unmatched     what the table has and nothing was measured on
    """

    table: Published
    lines: tuple[Line, ...]
    differences: tuple[str, ...]
    unmatched: tuple[str, ...]

    def head(self) -> tuple[str, ...]:
        """Columns of `cells`."""
        return ("data", "product", "metric", "published", "of", "measured", "difference", "measured with")

    def cells(self) -> list[tuple[str, ...]]:
        """Rows as text."""
        return [
            (
                line.dataset,
                line.product,
                line.metric,
                f"{line.published:.1f}",
                line.method if line.setting == "unified" else f"{line.method} ({line.setting})",
                f"{line.measured:.1f}",
                f"{line.difference:+.1f}",
                line.how,
            )
            for line in self.lines
        ]

    def sentences(self) -> list[str]:
        """Source, differences and what could not be compared."""
        return [
            f"{self.table.id}: {self.table.source}: {self.table.caption}.",
            *(f"Differs: {text}." for text in self.differences),
            *(f"Nothing was measured on {text}." for text in self.unmatched),
            *(f"Note: {text}" for text in self.table.notes),
            *(f"Misprint: {text}" for text in self.table.misprints),
        ]

    def text(self) -> str:
        """For the terminal."""
        rows = [self.head(), *self.cells()] if self.lines else []
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*self.sentences()[:1], *lines, *self.sentences()[1:]])

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, in percent."""
        return {
            "table": self.table.id,
            "source": self.table.source,
            "lines": [
                {
                    "data": line.dataset,
                    "product": line.product,
                    "metric": line.metric,
                    "method": line.method,
                    "setting": line.setting,
                    "published": line.published,
                    "measured": line.measured,
                    "difference": line.difference,
                    "how": line.how,
                }
                for line in self.lines
            ],
            "differences": list(self.differences),
            "unmatched": list(self.unmatched),
        }


def tables() -> list[str]:
    """Names of all tables."""
    found = [file.name for file in resources.files("unispect.published").iterdir()]
    return sorted(name.removesuffix(".toml") for name in found if name.endswith(".toml"))


def published(name: str) -> Published:
    """A table by its name, such as hgad-table-1.

    Raises ConfigError for an unknown name.
    """
    if name not in tables():
        raise ConfigError(unknown_name("published table", name, tables()))
    content = tomllib.loads(resources.files("unispect.published").joinpath(f"{name}.toml").read_text("utf-8"))
    plain = ("id", "table", "title", "authors", "year", "link", "caption", "protocol")
    kept: dict[str, Any] = {key: content[key] for key in plain}
    lists: dict[str, Any] = {key: tuple(content[key]) for key in ("metrics", "notes", "misprints")}
    return Published(**kept, **lists, entries=tuple(_entries(content)))


def _entries(content: Mapping[str, Any]) -> Iterator[Entry]:
    for block in content["results"]:
        for product, values in block["values"].items():
            deviations = block.get("deviation", {}).get(product, [None] * len(values))
            for metric, value, deviation in zip(content["metrics"], values, deviations, strict=True):
                if value != "-":
                    about = (block["method"], block["setting"], block["dataset"], product, metric)
                    yield Entry(*about, float(value), deviation)


def compare(table: Published, measured: Sequence[Measured]) -> Comparison:
    """Each published number beside those measured on the same data set, product and metric.

    Of several published methods the one that was measured is taken, and where it is not among them, the best; of its
    settings, the best. The line names both.
    """
    places = {(entry.dataset, entry.product, entry.metric): entry for entry in table.entries}
    lines = [line for place in places for one in measured for line in _lines(table, place, one)]
    ways = {_how(one): one for one in measured if any(one.dataset == place[0] for place in places)}
    theirs = {key: value for key, value in table.protocol.items() if key != "aupro" or "aupro" in table.metrics}
    differences = [f"{how}: {text}" for how, one in ways.items() for text in _differences(theirs, one.protocol)]
    return Comparison(table, tuple(lines), tuple(differences), tuple(_unmatched(table, lines)))


def _unmatched(table: Published, lines: Sequence[Line]) -> Iterator[str]:
    """What has no line: a data set, or where it has others, its kind of number. Costs are of no data set."""
    found = {(line.dataset, line.product == "pooled") for line in lines}
    kinds = dict.fromkeys((entry.dataset, entry.product == "pooled") for entry in table.entries if entry.dataset != "none")
    for dataset, pooled in kinds:
        if (dataset, pooled) not in found:
            partly = (dataset, not pooled) in found
            yield f"{dataset} with {'all classes pooled' if pooled else 'each class by itself'}" if partly else dataset


def _lines(table: Published, place: tuple[str, str, str], one: Measured) -> Iterator[Line]:
    dataset, product, metric = place
    if (one.dataset, one.product) != (dataset, product) or metric not in one.values:
        return
    entries = [entry for entry in table.entries if (entry.dataset, entry.product, entry.metric) == place]
    own = [entry for entry in entries if _same(entry.method, one.method)]
    best = max(own or entries, key=lambda entry: entry.value)
    yield Line(*place, best.method, best.setting, best.value, 100 * one.values[metric], _how(one))


def _same(printed: str, name: str) -> bool:
    """Whether a printed method is the one of this name: "CFLOW-AD" is cflow, "RevDist + CADA" is not revdist."""
    return printed.lower() in (name.lower(), f"{name.lower()}-ad", f"{name.lower()}-mvg")


def _how(one: Measured) -> str:
    """A way of measuring in a few words: method, backbone and whether the label was given."""
    given = ", label given" if one.protocol.get("label_given") else ""
    return f"{one.method}, {one.protocol.get('backbone', 'backbone unknown')}{given}"


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[str]:
    for key, name in NAMES.items():
        if key in theirs and key in ours and str(theirs[key]) != str(ours[key]) and theirs[key] != "none":
            if isinstance(theirs[key], bool):
                yield f"{name}: {'yes' if theirs[key] else 'no'} there, {'yes' if ours[key] else 'no'} here"
            else:
                yield f"{name}: {theirs[key]} there, {ours[key]} here"
