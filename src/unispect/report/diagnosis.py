"""A diagnosis as one self-contained HTML file and as JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from unispect.evaluation import Centres, Diagnosis
from unispect.report import plots
from unispect.report.summary import page_style

Section = tuple[str, list[str], list[tuple[str, Markup]]]


def write_diagnosis(found: Diagnosis, folder: Path, title: str, facts: dict[str, str]) -> Path:
    """Write diagnosis.json and diagnosis.html into a folder; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(found.as_dict(), indent=1, allow_nan=False)
    (folder / "diagnosis.json").write_text(numbers + "\n", encoding="utf-8")
    source = resources.files("unispect.report").joinpath("diagnosis.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(source).render(
        title=title, style=page_style(), lead=lead(found), sections=sections(found), facts=facts
    )
    path = folder / "diagnosis.html"
    path.write_text(text, encoding="utf-8", errors="replace")
    return path


def lead(found: Diagnosis) -> str:
    """What was seen, in one sentence."""
    good = sum(not look.defective for look in found.looks)
    images = f"{good} good and {len(found.looks) - good} defective images"
    if found.auroc is None:
        return f"{images}: an AUROC needs both."
    return f"By likelihood alone {images} are told apart with a pooled image AUROC of {found.auroc:.3f}."


def sections(found: Diagnosis) -> list[Section]:
    """All parts of the page."""
    return [_likelihoods(found), _training(found), *(_mixture(found, centres) for centres in found.centres)]


def _likelihoods(found: Diagnosis) -> Section:
    parts: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for look in found.looks:
        parts[look.product][look.defective].append(look.unlikely)
    rows = [(name, np.array(good), np.array(bad)) for name, (good, bad) in parts.items()]
    told = "Negative log-likelihood of the least likely places, product by product"
    sentences = [
        "How unlikely the least likely 1 % of the places of an image are: negative log-likelihood per dimension, nats, "
        "mean over the levels. Good images above each line, defective ones below. Where the two lie over one another the "
        "flow maps both alike; where products lie apart, one threshold cannot serve them.",
    ]
    return "Likelihoods", sentences, [(told, plots.ridges(told, rows, None))]


def _training(found: Diagnosis) -> Section:
    heading = "Loss and AUROC over the training"
    if found.training is None:
        return heading, [f"Not drawn. {found.missing or 'Training was not to be run again (--no-training).'}"], []
    first, last = found.training[0], found.training[-1]
    sentences = [
        "The model was trained again on its own images with its own seed, and looked at whenever it looked at its held-out "
        "normals. The labelled images had no part in it. Loss: negative log-likelihood per dimension on held-out normals. "
        "AUROC: by likelihood alone, all products pooled.",
        f"From step {first.step} to {last.step} the loss goes from {first.held_out:.4f} to {last.held_out:.4f}"
        + (f" and the AUROC from {first.auroc:.3f} to {last.auroc:.3f}." if first.auroc and last.auroc else "."),
        f"Kept steps, by level: {', '.join(map(str, found.kept))}. "
        + (
            "The weights are the model's own, bit by bit."
            if found.same
            else "Its weights are NOT the model's: see docs/flows.md."
        ),
    ]
    steps = [check.step for check in found.training]
    losses = [check.held_out for check in found.training]
    drawings = [("Loss on held-out normals", plots.course("loss over steps", steps, losses))]
    ranked = [(check.step, check.auroc) for check in found.training if check.auroc is not None]
    if ranked:
        course = plots.course("AUROC over steps", [step for step, _ in ranked], [value for _, value in ranked])
        drawings.append(("Pooled image AUROC", course))
    return heading, sentences, drawings


def _mixture(found: Diagnosis, centres: Centres) -> Section:
    alive = {name: centres.alive(number) for number, name in enumerate(found.products)}
    known = {name: value for name, value in alive.items() if value is not None}
    width = len(next((share for share in centres.shares if share is not None), []))
    sentences = [
        "How far the main centres of the products lie apart, and which share of a product's normal vectors each of "
        "its centres takes."
    ]
    if known:
        least, most = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        sentences.append(
            f"Of {width} centres inside a product {known[least]:.1f} ({least}) to {known[most]:.1f} ({most}) are in use: "
            "the effective number, exp of the entropy of the shares. The centre that has most of a vector has "
            f"{np.mean([value for value in centres.sharp if value is not None]):.0%} of it on average: "
            f"{1 / width:.0%} would be centres that lie as one, 100 % centres that lie apart."
        )
    drawings = []
    if len(found.products) > 1:
        drawings.append(("Distances of main centres", plots.heatmap("distances", found.products, None, centres.distances)))
    rows: Sequence[Sequence[float]] = [share if share is not None else [0.0] * width for share in centres.shares]
    if width > 1:
        names = [f"{number + 1}" for number in range(width)]
        drawings.append(("Shares of the centres", plots.heatmap("shares", found.products, names, rows)))
    return f"Mixture: {centres.level}", sentences, drawings
