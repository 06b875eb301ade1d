"""An evaluation as files: JSON, text and a report, and where its numbers come from."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path

from unispect.evaluation import Evaluation
from unispect.features.engine import available_cores
from unispect.inspector import Inspector
from unispect.report.page import write_report


def write_results(evaluation: Evaluation, folder: Path, title: str, facts: dict[str, str]) -> Path:
    """Write evaluation.json, table.txt and report.html into a folder; returns the path of the report."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(evaluation.as_dict(), indent=1, allow_nan=False)
    (folder / "evaluation.json").write_text(numbers + "\n", encoding="utf-8")
    (folder / "table.txt").write_text(evaluation.text() + "\n", encoding="utf-8")
    return write_report(evaluation, folder / "report.html", title, facts)


def provenance(inspector: Inspector, command: str) -> dict[str, str]:
    """Where numbers come from, for the foot of a report."""
    config, split = inspector.config, inspector.split
    return {
        "Command": command,
        "Method": config["method"],
        "Backbone": f"{config['features']['backbone']}, {config['preparation']['size']} px, {inspector.engine.name}",
        "Images": f"{len(split.train)} to learn from, {len(split.held_out)} held out, {len(split.calibration)} to calibrate",
        "Seed": str(config["seed"]),
        "Versions": ", ".join(f"{name} {version(name)}" for name in ("unispect", "torch", "timm")),
        "Machine": f"{platform.system()} {platform.machine()}, {available_cores()} cores",
    }
