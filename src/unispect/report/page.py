"""Findings -> one self-contained HTML file: no network, no script, light and dark, for a screen or a phone.

What is said is decided here, as plain values; page.html only lays it out and escapes every text.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unispect.data.loader import Failure, Preparation, decode
from unispect.errors import ImageError
from unispect.evaluation import Case, Cases, Evaluation, cells, percent
from unispect.report import overlay, plots
from unispect.types import Finding

SHOWN = 12  # cards of a group in sight; the others are one click away
MOST = 100  # findings with pictures in a report without labels
LISTED = 1000  # findings in its table


@dataclass(frozen=True, slots=True)
class Picture:
    """An image with the text for those who cannot see it, and its caption."""

    uri: str
    alt: str
    caption: str


@dataclass(frozen=True, slots=True)
class Card:
    """One inspected image. The tone says how it ended: good, bad or plain."""

    title: str
    outcome: str
    tone: str
    facts: tuple[str, ...]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Cards that belong together; those after the first few start folded away."""

    heading: str
    note: str
    cards: tuple[Card, ...]
    more: tuple[Card, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table: spans (text, columns) above the head, rows above a rule, rows below it; the first cell names the row.

    words   how many columns, from the left, hold text rather than figures
    """

    caption: str
    words: int
    spans: tuple[tuple[str, int], ...]
    head: tuple[str, ...]
    summary: tuple[tuple[str, ...], ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """A drawing with its caption and the numbers of good and defective images in it."""

    name: str
    svg: Markup
    good: int
    defective: int


@dataclass(frozen=True, slots=True)
class Page:
    """All that a report says, from top to bottom."""

    title: str
    lead: str
    sentences: tuple[str, ...]
    warnings: tuple[str, ...]
    tiles: tuple[tuple[str, str], ...]
    sheet: Sheet
    notes: tuple[str, ...]
    comparison: Sheet | None
    plots: tuple[Plot, ...]
    curves: tuple[tuple[Markup, str], ...]
    alignment: tuple[tuple[str, Markup], ...]
    groups: tuple[Group, ...]
    failures: tuple[tuple[str, str], ...]
    facts: dict[str, str]
    legend: str


def write_report(evaluation: Evaluation, path: Path | str, title: str, facts: dict[str, str]) -> Path:
    """Write what an evaluation found to an HTML file and return its path.

    facts   where the numbers come from, such as the command, the model and the versions
    """
    lead, *sentences = evaluation.sentences()
    page = Page(
        title=title,
        lead=lead,
        sentences=(*sentences, *_ranking_sentence(evaluation)),
        warnings=evaluation.warnings,
        tiles=_tiles(evaluation),
        sheet=_results(evaluation),
        notes=evaluation.notes,
        comparison=_comparison(evaluation),
        plots=_histograms(evaluation),
        curves=tuple(_curves(evaluation)),
        alignment=tuple(_alignment(evaluation)),
        groups=tuple(_case_groups(evaluation)),
        failures=_failed(evaluation.failures),
        facts=facts,
        legend=overlay.legend(),
    )
    return _write(page, Path(path))


def write_findings_report(
    findings: Iterable[Finding | Failure],
    path: Path | str,
    title: str,
    facts: dict[str, str],
    preparation: Preparation | None = None,
) -> Path:
    """Write findings without labels to an HTML file, the most abnormal first, and return its path.

    preparation   the inspector's, where its maps may cover a part of the image only
    """
    results = list(findings)
    failures = [result for result in results if isinstance(result, Failure)]
    ranked = sorted((result for result in results if isinstance(result, Finding)), key=lambda one: -one.score)
    lead, *sentences = _findings_sentences(ranked, failures)
    page = Page(
        title=title,
        lead=lead,
        sentences=tuple(sentences),
        warnings=(),
        tiles=(),
        sheet=_findings_sheet(ranked),
        notes=_shortened(ranked),
        comparison=None,
        plots=(),
        curves=(),
        alignment=(),
        groups=tuple(_finding_groups(ranked, preparation)),
        failures=_failed(failures),
        facts=facts,
        legend=overlay.legend(),
    )
    return _write(page, Path(path))


def _write(page: Page, path: Path) -> Path:
    """Fill in the template; the file appears whole or not at all."""
    source = resources.files("unispect.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    text = environment.from_string(source).render(page=page)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    # Names of files may hold bytes that are no text; a replacement mark beats a lost report.
    draft.write_text(text, encoding="utf-8", errors="replace")
    draft.replace(path)
    return path


def _tiles(evaluation: Evaluation) -> tuple[tuple[str, str], ...]:
    """The few numbers that are asked for first."""
    pooled, total = evaluation.table.pooled, evaluation.total
    return (
        ("False alarms", percent(total.false_alarm_rate) if total.good else "–"),
        ("Defects found", percent(total.detection_rate) if total.defective else "–"),
        ("Image AUROC, pooled", _figure(pooled.image_auroc)),
        ("Pixel AUROC, pooled", _figure(pooled.pixel_auroc)),
    )


def _figure(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def _ranking_sentence(evaluation: Evaluation) -> tuple[str, ...]:
    """Image AUROC in plain words; nothing where it cannot be measured."""
    value = evaluation.table.pooled.image_auroc
    if np.isnan(value):
        return ()
    return (f"A defective image scores higher than a good one in {percent(value)} of all pairs, whatever the product.",)


def _results(evaluation: Evaluation) -> Sheet:
    """Both protocols and every product."""
    table = evaluation.table
    rows = [
        _with_interval(cells("Pooled, one ranking", table.pooled, evaluation.total), evaluation, "pooled"),
        _with_interval(cells("Mean over products", table.mean, None), evaluation, "mean"),
        _with_interval(cells("Worst product", table.worst, None), evaluation, ""),
        *(
            _with_interval(cells(name, row, evaluation.rates[name]), evaluation, f"product:{name}")
            for name, row in table.products.items()
        ),
    ]
    neat = [tuple("–" if cell == "-" else cell for cell in row) for row in rows]
    return Sheet(
        caption="Pooled: all products in one ranking, one threshold. Mean: each product ranked alone, then averaged. "
        "95 %: bootstrap interval of the number before it, by image.",
        words=1,
        spans=(("", 2), ("Images", 5), ("Pixels", 5), ("At the threshold", 2)),
        head=(
            "Product",
            "Images",
            "AUROC",
            "95 %",
            "AP",
            "F1 max",
            "Found at 1 %",
            "AUROC",
            "95 %",
            "AP",
            "F1 max",
            "AUPRO",
            "False alarms",
            "Found",
        ),
        summary=tuple(neat[:3]),
        rows=tuple(neat[3:]),
    )


def _with_interval(row: Sequence[str], evaluation: Evaluation, place: str) -> list[str]:
    """The row with the bootstrap intervals of its two AUROCs beside them."""
    known = evaluation.intervals.get(place, {})
    told = [f"{pair[0]:.2f}–{pair[1]:.2f}" if (pair := known.get(name)) else "-" for name in ("image_auroc", "pixel_auroc")]
    return [*row[:3], told[0], *row[3:7], told[1], *row[7:]]


def _comparison(evaluation: Evaluation) -> Sheet | None:
    """The papers' own protocols beside ours; None where there are none."""
    if not evaluation.comparisons:
        return None
    kinds = [("ours, no label, one threshold", "deployable", evaluation.table)]
    kinds += [(one.name, "not deployable", one.table) for one in evaluation.comparisons]
    values = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro")
    rows = [
        (name, use, *(_figure(getattr(row, metric)) for row in (table.pooled, table.mean) for metric in values))
        for name, use, table in kinds
    ]
    head = ("Protocol", "Use", *("AUROC", "AP", "Pixel AUROC", "Pixel AP", "AUPRO") * 2)
    told = "; ".join(f"{one.name}: {one.why}" for one in evaluation.comparisons)
    caption = f"What the protocols of the papers would show of the same model. Not deployable: {told}."
    return Sheet(caption, 2, (("", 2), ("Pooled", 5), ("Mean over products", 5)), head, (rows[0],), tuple(rows[1:]))


def _curves(evaluation: Evaluation) -> Iterator[tuple[Markup, str]]:
    """ROC, per-region overlap and calibration, as far as they can be measured."""
    roc = plots.roc_curve(evaluation.scores, evaluation.labels, evaluation.threshold)
    if roc is not None:
        yield roc, "All images pooled; the dot is the threshold."
    if evaluation.pro is not None:
        yield plots.pro_curve(*evaluation.pro), "Defect regions of all products, up to the limit of AUPRO."
    found = evaluation.calibration
    if found.realised is not None and found.curve:
        drawn = plots.calibration_curve(found.curve, found.promised, found.realised)
        yield drawn, "False alarms promised and realised; above the diagonal is too many. The dot is this model's promise."


def _alignment(evaluation: Evaluation) -> Iterator[tuple[str, Markup]]:
    """Scores per product before and after they were brought to one scale, as CADA's Figure 5 shows them."""
    if evaluation.unaligned is None:
        return
    names, labels = np.array(evaluation.products), evaluation.labels
    for title, scores, threshold in (
        ("Before alignment", evaluation.unaligned, None),
        ("After alignment", evaluation.scores, evaluation.threshold),
    ):
        rows = [
            (name, scores[(names == name) & (labels == 0)], scores[(names == name) & (labels == 1)])
            for name in evaluation.table.products
        ]
        yield title, plots.ridges(f"{title}: scores of {len(rows)} products on one axis", rows, threshold)


def _histograms(evaluation: Evaluation) -> tuple[Plot, ...]:
    """One histogram a product, on one axis."""
    shared = plots.axis(evaluation.scores, evaluation.threshold)
    names = np.array(evaluation.products)
    drawn = []
    for name in evaluation.table.products:
        good = evaluation.scores[(names == name) & (evaluation.labels == 0)]
        defective = evaluation.scores[(names == name) & (evaluation.labels == 1)]
        drawn.append(Plot(name, plots.histogram(name, good, defective, shared), len(good), len(defective)))
    return tuple(drawn)


def _case_groups(evaluation: Evaluation) -> Iterator[Group]:
    """Misses, false alarms, then right decisions; where nothing went wrong, what came closest to it."""
    every = list(evaluation.cases.values())
    low = _sorted(every, "lowest_defective", 1.0)
    high = _sorted(every, "highest_good", -1.0)
    missed = [case for case in low if not case.finding.anomalous]
    alarms = [case for case in high if case.finding.anomalous]
    if missed:
        yield _group("Missed defects", "Lowest scores first, at most six a product.", missed, evaluation)
    elif low:
        yield _group("No defect was missed", "These came closest to it.", low[:6], evaluation)
    if alarms:
        yield _group("False alarms", "Highest scores first, at most six a product.", alarms, evaluation)
    elif high:
        yield _group("No false alarm", "These good images came closest to one.", high[:6], evaluation)
    told = {case.record.path for case in (missed or low[:6]) + (alarms or high[:6])}
    right = [case for case in _in_turn(every) if case.record.path not in told]
    if right:
        yield _group("Right decisions", "Chosen by chance, up to six a product.", right, evaluation)


def _in_turn(every: Sequence[Cases]) -> Iterator[Case]:
    """A right decision of each kind from each product, then the second ones, and so on."""
    columns = [column for cases in every for column in (cases.detected, cases.passed)]
    for rank in zip_longest(*columns):
        yield from (case for case in rank if case is not None)


def _sorted(every: Sequence[Cases], kind: str, sign: float) -> list[Case]:
    chosen = [case for cases in every for case in getattr(cases, kind)]
    return sorted(chosen, key=lambda case: sign * case.finding.score)


def _group(heading: str, note: str, cases: Sequence[Case], evaluation: Evaluation) -> Group:
    cards = tuple(_case_card(case, evaluation.preparation) for case in cases)
    return Group(heading, note, cards[:SHOWN], cards[SHOWN:])


def _case_card(case: Case, preparation: Preparation) -> Card:
    """A labelled image: what it is, what was found, how that compares."""
    record, finding = case.record, case.finding
    name = record.product or record.path.parent.name
    kind = (record.defect or "defective") if record.label == 1 else "good"
    tone = {"missed": "bad", "false alarm": "bad"}.get(case.outcome, "good")
    pictures = _pictures(record.path, finding, case.truth, preparation, f"{name}, {kind}")
    return Card(f"{name} · {kind}", case.outcome, tone, (record.path.name, *_facts(finding)), pictures)


def _finding_card(finding: Finding, preparation: Preparation | None) -> Card:
    """An image without a label."""
    path = Path(finding.path) if finding.path else None
    name = "/".join(path.parts[-2:]) if path else "image without a file"
    pictures = _pictures(path, finding, None, preparation, name)
    tone = "plain" if finding.verdict == "normal" else "bad"
    return Card(name, finding.verdict, tone, _facts(finding), pictures)


def _facts(finding: Finding) -> tuple[str, ...]:
    """Score, p-value, likeness and regions in words."""
    told = [f"score {finding.score:.4g}, threshold {finding.threshold:.4g}, p = {finding.p_value:.3g}"]
    if finding.unknown:
        told.append(f"resembles no known product, p = {finding.unknown_p_value:.3g}")
    if finding.product is not None:
        sure = "" if finding.product_probability is None else f" ({percent(finding.product_probability)})"
        told.append(f"looks like {finding.product}{sure}")
    if finding.regions:
        peak = max(region.peak for region in finding.regions)
        count = "1 region" if len(finding.regions) == 1 else f"{len(finding.regions)} regions"
        told.append(f"{count}, peak {peak:.2f}")
    return tuple(told)


def _pictures(
    path: Path | None, finding: Finding, truth: np.ndarray | None, preparation: Preparation | None, name: str
) -> tuple[Picture, ...]:
    """The image, with the known defect traced, and the heatmap with the regions found."""
    image = _decoded(path, finding)
    box = _covered(finding, preparation)
    plain = overlay.thumbnail(image)
    first = plain if truth is None else overlay.traced(plain, truth, box)
    painted = overlay.heatmap(plain, finding.map, box)
    second = overlay.boxed(painted, finding.regions, finding.width, finding.height)
    marked = "image" if truth is None else "image, defect traced"
    regions = f"regions framed: {len(finding.regions)}, highest score {float(finding.map.max()):.2f}"
    return (
        Picture(overlay.data_uri(first), f"{name}: {marked}", marked),
        Picture(overlay.data_uri(second), f"{name}: anomaly map, {regions}", "anomaly map"),
    )


def _decoded(path: Path | None, finding: Finding) -> np.ndarray:
    """The image, or an even grey of its shape where there is no file or it has gone since."""
    try:
        if path is not None:
            return decode(path)
    except ImageError:
        pass
    return np.full((max(1, finding.height), max(1, finding.width), 3), 128, dtype=np.uint8)


def _covered(finding: Finding, preparation: Preparation | None) -> overlay.Box:
    """The part of the image that the map covers, in shares of its width and height."""
    if preparation is None:
        return (0.0, 0.0, 1.0, 1.0)
    side, width, height = finding.map.shape[0], finding.width, finding.height
    left, top, right, bottom = preparation.box_to_original(0, 0, side, side, side, width, height)
    return (left / width, top / height, right / width, bottom / height)


def _findings_sentences(ranked: Sequence[Finding], failures: Sequence[Failure]) -> list[str]:
    """What was found, in plain words."""
    count = sum(finding.verdict == "anomalous" for finding in ranked)
    strange = sum(finding.unknown for finding in ranked)
    images = "1 image" if len(ranked) == 1 else f"{len(ranked)} images"
    verb = "is" if count == 1 else "are"
    told = [f"Of {images}, {count or 'none'} {verb} anomalous." if ranked else "No image was inspected."]
    if strange:
        told.append(f"{strange} {'shows' if strange == 1 else 'show'} a product that the model has never seen.")
    if failures:
        files = "1 file" if len(failures) == 1 else f"{len(failures)} files"
        told.append(f"{files} could not be read.")
    return told


def _findings_sheet(ranked: Sequence[Finding]) -> Sheet:
    rows = tuple(
        (
            finding.path or "–",
            finding.verdict,
            finding.product or "–",
            f"{finding.score:.4g}",
            f"{finding.p_value:.3g}",
            str(len(finding.regions)),
        )
        for finding in ranked[:LISTED]
    )
    head = ("Image", "Decision", "Looks like", "Score", "p-value", "Regions")
    return Sheet(f"{len(rows)} images, highest scores first.", 3, (), head, (), rows)


def _shortened(ranked: Sequence[Finding]) -> tuple[str, ...]:
    """What the page leaves out, so that nobody takes it for everything."""
    notes = []
    if len(ranked) > LISTED:
        notes.append(f"The table stops after the {LISTED} highest scores of {len(ranked)}.")
    if len(ranked) > MOST:
        notes.append(f"Pictures are shown for the {MOST} highest scores only.")
    return tuple(notes)


def _finding_groups(ranked: Sequence[Finding], preparation: Preparation | None) -> Iterator[Group]:
    """Anomalous images, those of unknown products, then the others."""
    headings = {"anomalous": "Anomalous images", "unknown product": "Unknown products", "normal": "Normal images"}
    for verdict, heading in headings.items():
        cards = tuple(_finding_card(one, preparation) for one in ranked[:MOST] if one.verdict == verdict)
        if cards:
            yield Group(heading, "Highest scores first.", cards[:SHOWN], cards[SHOWN:])


def _failed(failures: Sequence[Failure]) -> tuple[tuple[str, str], ...]:
    return tuple((str(failure.path), failure.reason) for failure in failures)
