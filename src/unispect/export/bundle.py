"""An exported model as a folder: the graph, what decides beside it, and how well it agrees with torch."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from unispect.data.records import Record
from unispect.decide.versions import Versions
from unispect.detectors.base import Quickens
from unispect.errors import ExportError, unknown_name
from unispect.export.onnx import onnx_model
from unispect.export.openvino import openvino_model
from unispect.export.parity import Parity, compare
from unispect.export.quantised import Cost, check_recalibration, cost, recalibrated
from unispect.inspector import Inspector
from unispect.runtime import network
from unispect.store import EXPORT, check_free, pack_json, write_folder

Files = dict[str, bytes]
EXPORTERS: dict[str, Callable[[Inspector, bool], Files]] = {
    "onnx": lambda inspector, int8: {"model.onnx": onnx_model(inspector, int8=int8)},
    "openvino": lambda inspector, int8: dict(zip(("model.xml", "model.bin"), openvino_model(inspector, int8), strict=True)),
}
MOST = 0.01  # image AUROC that 8 bits may cost


@dataclass(frozen=True, slots=True)
class Exported:
    """What was found about an export before it was written.

    cost   of 8 bits, where they were asked for: then `parity` is for information, and this is the condition
    """

    parity: Parity
    cost: Cost | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return self.parity.as_dict() | {"int8": None if self.cost is None else self.cost.as_dict()}

    def text(self) -> str:
        """For people."""
        return self.parity.text() if self.cost is None else self.cost.text()


def export(
    inspector: Inspector,
    out: Path | str,
    to: str = "onnx",
    overwrite: bool = False,
    images: Sequence[np.ndarray] = (),
    int8: bool = False,
    check: Sequence[Record] = (),
    max_loss: float = MOST,
    quick: bool = False,
) -> Exported:
    """Write a model as a folder that `unispect.runtime` reads without torch.

    to         "onnx" or "openvino"
    images     more images (H, W, 3) uint8 to compare on
    int8       convolutions in 8 bits, with thresholds of their own
    check      labelled images on which 8 bits may cost at most `max_loss` of image AUROC; without any, defects are planted
               into calibration images
    quick      search a bank by a short list of candidates, which errs now and then (PatchCore): differences up to
               `parity.QUICK` are allowed then

    Raises ExportError where the model cannot be one graph, or the graph disagrees with torch: then nothing is written.
    """
    if to not in EXPORTERS:
        raise ExportError(unknown_name("export format", to, EXPORTERS))
    if inspector.config["features"]["precision"] != "f32":
        raise ExportError(
            f"features.precision={inspector.config['features']['precision']!r}: expected 'f32'; an exported graph has one "
            "precision for all of its parts, and only networks bear less"
        )
    check_free(Path(out), overwrite, EXPORT)
    if int8:
        check_recalibration(inspector)
    files = EXPORTERS[to](_quickened(inspector) if quick else inspector, int8)
    graph = network(files)
    found = Exported(compare(inspector, graph.whole, images), cost(inspector, graph, check) if int8 else None)
    if found.cost is None:
        found.parity.check(quick)
    else:
        found.cost.check(max_loss)
    versions = inspector.versions
    if int8:
        versions = versions.then("export", "scores of 8 bits", calibration=recalibrated(inspector, graph))
    beside = {
        "decision.json": pack_json(_decision(inspector, versions)),
        "parity.json": pack_json(found.as_dict()),
        "about.json": pack_json(_about(inspector, to, int8) | {"files": sorted(files), "quick": quick}),
        "card.md": inspector.card().encode(),
    }
    write_folder(Path(out), {**files, **beside}, overwrite, EXPORT)
    return found


def _quickened(inspector: Inspector) -> Inspector:
    """The same model, whose graph takes the quick way."""
    if not isinstance(inspector.detector, Quickens):
        raise ExportError(f"quick: method {inspector.config['method']!r} has no quick way to search: export it without")
    other = copy(inspector)
    other.detector = deepcopy(inspector.detector)
    other.detector.quicken()
    return other


def _about(inspector: Inspector, to: str, int8: bool) -> dict[str, Any]:
    """What the graph is and where it comes from."""
    packages = ("unispect", "torch", "timm", "onnx", "openvino" if to == "openvino" else "onnxruntime")
    return {
        "to": to,
        "method": inspector.config["method"],
        "aligner": inspector.config["aligner"],
        "backbone": inspector.config["features"]["backbone"],
        "features": inspector.facts["features"],
        "precision": "int8" if int8 else "f32",
        "exported": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _decision(inspector: Inspector, versions: Versions) -> dict[str, Any]:
    """All that turns scores into findings. It may change while the graph stays."""
    return {
        "products": list(inspector.products),
        "preparation": asdict(inspector.preparation),
        "versions": versions.as_list(),
        "learnt": sorted(inspector.learnt),
    }
