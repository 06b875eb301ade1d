"""An exported model whose convolutions compute with 8-bit whole numbers, where that costs no accuracy.

Ranges of what flows between layers come from images that the model learnt from. The scores of such a model are others, so
its thresholds are calibrated anew, on the same calibration images. Whether it still tells good from defective is measured
before it is written: by AUROC, against the model that it was made from.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unispect.data.loader import decode
from unispect.data.records import Record
from unispect.decide.judge import Calibration, calibration_of
from unispect.errors import ExportError, ImageError, MissingExtraError
from unispect.export.program import Judged
from unispect.inspector import Inspector
from unispect.metrics.ranking import auroc
from unispect.nn.synthesis import with_defects
from unispect.runtime import BETWEEN, Network, said_of

RANGED, PLANTED = 128, 64  # images for the ranges; good images for the check, each also with a planted defect


@dataclass(frozen=True, slots=True)
class Cost:
    """What 8 bits cost: image AUROC of the model in torch and of the quantised one, on the same images.

    planted   the defects were planted into calibration images, for nobody gave labelled images
    """

    before: float
    after: float
    images: int
    planted: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def text(self) -> str:
        """For people."""
        which = "calibration images with and without planted defects" if self.planted else "labelled images"
        return f"8-bit: image AUROC {self.after:.4f}, {self.before:.4f} in torch, on {self.images} {which}"

    def check(self, most: float) -> None:
        """Raises ExportError where more than `most` AUROC is lost."""
        if not self.before - self.after <= most:
            raise ExportError(
                f"8-bit numbers cost {self.before - self.after:.4f} image AUROC ({self.before:.4f} to {self.after:.4f} on "
                f"{self.images} images), allowed are {most:g}: nothing was written; export without them, or raise --max-loss"
            )


def quantised(judged: Any, inspector: Inspector) -> Any:
    """The ONNX model from prepared images on, with its convolutions in 8 bits, by onnxruntime's static quantisation.

    Raises ExportError where no image that the model learnt from is left.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise MissingExtraError("quantising needs the package onnxruntime: pip install unispect[export]")
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    images = _prepared(inspector, _evenly(inspector.split.train, RANGED))
    if not images:
        raise ExportError("8 bits need images that the model learnt from, to see what values occur: none is where it was")
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "quantised.onnx"
        quantize_static(
            judged,
            path,
            _Reader(images),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)


def cost(inspector: Inspector, graph: Network, labelled: Sequence[Record] = ()) -> Cost:
    """What a quantised graph loses on labelled images or, without any, on calibration images and planted defects.

    Raises ExportError where there are not both good and defective images.
    """
    known = [record for record in labelled if record.label is not None]
    images = [(image, bool(record.label)) for record in known for image in _prepared(inspector, [record])]
    if not known:
        images = list(_planted(_prepared(inspector, _evenly(inspector.split.calibration, PLANTED))))
    labels = np.array([defective for _, defective in images], bool)
    if labels.all() or not labels.any():
        raise ExportError(
            f"8 bits are checked on good and on defective images: {int((~labels).sum())} good and {int(labels.sum())} "
            "defective ones could be read; give labelled ones with --check"
        )
    judged = Judged(inspector).eval()
    with torch.no_grad():
        before = [float(judged(torch.from_numpy(image[None]).float())[0][0]) for image, _ in images]
    after = [float(graph.prepared(image)["score"][0]) for image, _ in images]
    return Cost(auroc(np.array(before), labels), auroc(np.array(after), labels), len(images), not known)


def check_recalibration(inspector: Inspector) -> None:
    """Raises ExportError where there are no images to set thresholds of 8 bits by."""
    if not inspector.split.calibration:
        raise ExportError("8 bits need thresholds of their own, and a model with split.cross has no calibration images")
    if set(inspector.versions.images) - {inspector.split.hashes[record.path] for record in inspector.split.calibration}:
        raise ExportError(
            "8 bits need thresholds of their own, and this model was calibrated anew, on other images than it was fitted "
            "with: export the model as it was fitted, then calibrate the export"
        )


def recalibrated(inspector: Inspector, graph: Network) -> Calibration:
    """What the quantised graph says of the calibration images, by which it decides.

    Raises ExportError where one of them is gone: thresholds of other scores would promise nothing.
    """
    records, said = [], []
    for record in inspector.split.calibration:
        try:
            prepared = graph.prepared(inspector.preparation.image(decode(record.path)))
        except ImageError as error:
            if record.path.is_file():
                continue  # it could not be read when the model was learnt, either
            raise ExportError(f"8 bits need thresholds of their own, and a calibration image is gone: {error}") from error
        said.append(said_of(prepared))
        records.append(record)
    return calibration_of(said, records, inspector.products, inspector.decision, inspector.preparation)


class _Reader:
    """Images one by one, as onnxruntime asks for them."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input; None at the end."""
        image = next(self._images, None)
        return None if image is None else {BETWEEN: image[None].astype(np.float32)}


def _planted(images: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, bool]]:
    """Each image as it is and, if that left a trace, with a defect."""
    generator = torch.Generator().manual_seed(0)
    for image in images:
        yield image, False
        planted, masks = with_defects(torch.from_numpy(image)[None].float() / 255, 1.0, generator=generator)
        if bool(masks.any()):
            yield (255 * planted[0]).round().clamp(0, 255).to(torch.uint8).numpy(), True


def _prepared(inspector: Inspector, records: Sequence[Record]) -> list[np.ndarray]:
    """Those that can be read, (3, size, size) uint8 each."""
    found = []
    for record in records:
        with suppress(ImageError):
            found.append(inspector.preparation.image(decode(record.path)))
    return found


def _evenly(records: Sequence[Record], most: int) -> list[Record]:
    return [records[place] for place in np.unique(np.linspace(0, len(records) - 1, min(most, len(records))).astype(int))]


@contextmanager
def _quiet() -> Iterator[None]:
    """What the library says on the root logger is not for users."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)
