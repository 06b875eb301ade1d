"""Whether an exported model says what the model in torch says: a condition of every export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from unispect.data.loader import decode
from unispect.errors import ExportError, ImageError
from unispect.export.program import Judged
from unispect.inspector import Inspector

Run = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # images (N, H, W, 3) uint8 -> what the exported graph gives
PREPARED, RAW = 2e-3, 0.2  # largest difference allowed: on images of the model's own size, and of any other size
QUICK = 0.5  # of both, where the graph takes a quick way that is known to err
TRIED = 8  # calibration images looked at
SIDES = ((1.0, 1.0), (1.4, 0.8), (0.5, 2.3))  # of the drawn images, relative to the model's size


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest differences between an exported model and eager torch.

    Units: of scores and of novelty, the standard deviation of the calibration images' or, of an image further than that
    from their mean, its distance to it; of maps alike, with what lies between 0 and 1 of a finding's map in place of the
    deviation and 0 in place of the mean; of products, probability.

    prepared   on images of the model's size, one at a time and several at once
    raw        on images of other sizes, which the graph resizes and torch has resized by Pillow
    images     number of images compared, and of those that are real ones
    """

    prepared: dict[str, float]
    raw: dict[str, float]
    images: int
    real: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"tolerance": {"prepared": PREPARED, "raw": RAW}}

    def text(self) -> str:
        """For people."""
        lines = [f"Compared with torch on {self.images} images, {self.real} of them real ones; largest differences:"]
        for output in self.prepared:
            lines.append(
                f"  {output:8} {self.prepared[output]:.1e}   {self.raw[output]:.1e} where the graph resizes the image"
            )
        return "\n".join([*lines, f"Allowed: {PREPARED:g} and {RAW:g}, in units of what normal images differ by."])

    @property
    def worst(self) -> float:
        """The largest difference on prepared images."""
        return max(self.prepared.values())

    def check(self, quick: bool = False) -> None:
        """Raises ExportError where a difference is larger than allowed; `quick` where the graph is known to err."""
        allowed = (QUICK, QUICK) if quick else (PREPARED, RAW)
        for name, differences, most in zip(("prepared", "raw"), (self.prepared, self.raw), allowed, strict=True):
            for output, value in differences.items():
                if not value <= most:  # nan is no agreement
                    raise ExportError(
                        f"the exported model disagrees with torch: {output} on {name} images differs by {value:.3g}, "
                        f"allowed are {most:g} (see export.parity for the units); nothing was written: please report it"
                    )


def compare(inspector: Inspector, run: Run, images: Sequence[np.ndarray] = ()) -> Parity:
    """Compare on some images (H, W, 3) uint8, beside calibration images that are still there and drawn ones."""
    real = [*images, *_calibration_images(inspector)]
    chosen = [*real, *_drawn(inspector.preparation.size)]
    squares = np.stack([inspector.preparation.image(image) for image in chosen])
    judged = Judged(inspector).eval()
    with torch.no_grad():
        expected = [
            {
                name: value.numpy()
                for name, value in zip(judged.names, judged(torch.from_numpy(one[None]).float()), strict=True)
            }
            for one in squares
        ]
    scales = _scales(inspector)
    as_given = squares.transpose(0, 2, 3, 1)
    alone = [run(np.ascontiguousarray(one[None])) for one in as_given]
    together = _rows(run(np.ascontiguousarray(as_given)), len(squares))
    raw = [run(np.ascontiguousarray(image[None])) for image in chosen]
    prepared = _largest([*zip(alone, expected, strict=True), *zip(together, expected, strict=True)], scales)
    return Parity(prepared, _largest(list(zip(raw, expected, strict=True)), scales), len(chosen), len(real))


def _largest(
    pairs: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]], scales: Mapping[str, tuple[float, float]]
) -> dict[str, float]:
    """Largest difference of each output, in its units."""
    return {name: max(_apart(name, one[name], other[name], *scales[name]) for one, other in pairs) for name in pairs[0][1]}


def _apart(name: str, one: np.ndarray, other: np.ndarray, middle: float, unit: float) -> float:
    one, other = one.astype(np.float64), other.astype(np.float64)
    if name == "product":
        one, other = np.exp(one), np.exp(other)
    return float((np.abs(one - other) / np.maximum(np.abs(other - middle), unit)).max())


def _scales(inspector: Inspector) -> dict[str, tuple[float, float]]:
    """Middle of what normal images give, and what a difference of 1 stands for near it, output by output."""
    known, judge = inspector.calibration, inspector.judge
    return {
        "score": (float(known.scores.mean()), _spread(known.scores)),
        "map": (known.median, max(judge.pixel_threshold - known.median, 1e-9)),
        "product": (0.0, 1.0),
        "novelty": (float(known.novelty.mean()), _spread(known.novelty)),
    }


def _spread(values: np.ndarray) -> float:
    return max(float(values.std()), 1e-6 * float(np.abs(values).mean()), 1e-9)


def _rows(said: Mapping[str, np.ndarray], count: int) -> Iterator[dict[str, np.ndarray]]:
    for place in range(count):
        yield {name: value[place : place + 1] for name, value in said.items()}


def _calibration_images(inspector: Inspector) -> Iterator[np.ndarray]:
    """Some of those that are still where they were."""
    records = inspector.split.calibration
    for place in np.unique(np.linspace(0, len(records) - 1, min(TRIED, len(records))).astype(int)):
        try:
            yield decode(records[place].path)
        except ImageError:
            continue


def _drawn(size: int) -> Iterator[np.ndarray]:
    """Smooth noise of several sizes: no one's images, so that every export has some."""
    random = np.random.default_rng(0)
    for down, across in SIDES:
        height, width = max(2, round(down * size)), max(2, round(across * size))
        rows, columns = np.linspace(0, 9, height)[:, None, None], np.linspace(0, 7, width)[None, :, None]
        waves = np.sin(rows + 2 * np.sin(columns) + np.arange(3)) + 0.3 * random.standard_normal((height, width, 3))
        yield (127 + 60 * waves).clip(0, 255).astype(np.uint8)
