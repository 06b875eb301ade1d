"""An exported model as a folder: the graph, what decides beside it, and how well it agrees with torch."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from unispect.errors import ExportError, unknown_name
from unispect.export.onnx import onnx_model
from unispect.export.openvino import openvino_model
from unispect.export.parity import Parity, compare
from unispect.inspector import Inspector
from unispect.runtime import Network, network
from unispect.store import EXPORT, write_folder

Files = dict[str, bytes]
EXPORTERS: dict[str, Callable[[Inspector], Files]] = {
    "onnx": lambda inspector: {"model.onnx": onnx_model(inspector)},
    "openvino": lambda inspector: dict(zip(("model.xml", "model.bin"), openvino_model(inspector), strict=True)),
}


def export(
    inspector: Inspector, out: Path | str, to: str = "onnx", overwrite: bool = False, images: Sequence[np.ndarray] = ()
) -> Parity:
    """Write a model as a folder that `unispect.runtime` reads without torch.

    to       "onnx" or "openvino"
    images   more images (H, W, 3) uint8 to compare on

    Raises ExportError where the model cannot be one graph, or the graph disagrees with torch: then nothing is written.
    """
    if to not in EXPORTERS:
        raise ExportError(unknown_name("export format", to, EXPORTERS))
    if inspector.config["features"]["precision"] != "f32":
        raise ExportError(
            f"features.precision={inspector.config['features']['precision']!r}: expected 'f32'; an exported graph has one "
            "precision for all of its parts, and only networks bear less"
        )
    files = EXPORTERS[to](inspector)
    found = compare(inspector, _run(network(files)), images)
    found.check()
    about = _json(_about(inspector, to) | {"files": sorted(files)})
    beside = {"decision.json": _json(_decision(inspector)), "parity.json": _json(found.as_dict()), "about.json": about}
    write_folder(Path(out), {**files, **beside, "card.md": inspector.card().encode()}, overwrite, EXPORT)
    return found


def _run(graph: Network) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    """The whole graph, its own resizing included."""
    return graph.whole


def _about(inspector: Inspector, to: str) -> dict[str, Any]:
    """What the graph is and where it comes from."""
    packages = ("unispect", "torch", "timm", "onnx", "openvino" if to == "openvino" else "onnxruntime")
    return {
        "to": to,
        "method": inspector.config["method"],
        "aligner": inspector.config["aligner"],
        "backbone": inspector.config["features"]["backbone"],
        "features": inspector.facts["features"],
        "precision": inspector.config["features"]["precision"],
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _decision(inspector: Inspector) -> dict[str, Any]:
    """All that turns scores into findings. It may change while the graph stays."""
    return {
        "products": list(inspector.products),
        "preparation": asdict(inspector.preparation),
        "decision": asdict(inspector.decision),
        "calibration": inspector.calibration.as_dict(),
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()
