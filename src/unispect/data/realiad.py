"""Real-IAD: 30 objects, each sample seen by five cameras, with splits in JSON files.

*Real-IAD: A Real-World Multi-View Dataset for Benchmarking Versatile Industrial Anomaly Detection (Wang et al., 2024)*,
https://arxiv.org/abs/2403.12580
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unispect.data.dataset import DataSet, check_root
from unispect.data.records import Record
from unispect.errors import DataError

LISTS = ("realiad_jsons/realiad_jsons", "realiad_jsons")  # the archive holds a folder of its own name
IMAGES = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")  # the largest that is there is read


def read_realiad(root: Path) -> list[Record]:
    """Records that the JSON files list, product by product, train before test; the sample is the capture group.

    As in the authors' code, all training images count as good, and a test image is defective if it has a mask: a defective
    sample may look good from some sides.

    Only the JSON files are opened. Raises DataError where one is not of the published form.
    """
    check_root(REALIAD, root, ("realiad_jsons",))
    lists = next((root / name for name in LISTS if any((root / name).glob("*.json"))), None)
    images = next((root / name for name in IMAGES if (root / name).is_dir()), None)
    if lists is None or images is None:
        what = "realiad_jsons/*.json" if lists is None else " or ".join(IMAGES)
        raise DataError(f"{root}: no {what}: it should hold\n{REALIAD.layout}\nGet it from {REALIAD.source}")
    return [record for file in sorted(lists.glob("*.json")) for record in _product(file, images)]


def _product(file: Path, images: Path) -> list[Record]:
    try:
        table = json.loads(file.read_text("utf-8"))
        normal, folder = table["meta"]["normal_class"], images / table["meta"]["prefix"]
        found = [_record(entry, split, normal, folder) for split in ("train", "test") for entry in table[split]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not a list of Real-IAD ({type(error).__name__}: {error}): get the file again") from error
    return sorted(found, key=lambda record: (record.split == "test", record.label, record.path))


def _record(entry: dict[str, Any], split: str, normal: str, folder: Path) -> Record:
    path, kind = folder / entry["image_path"], entry["anomaly_class"]
    if split == "train" or kind == normal or entry["mask_path"] is None:
        return Record(path, entry["category"], 0, group=_sample(path), split=split)
    return Record(path, entry["category"], 1, kind, folder / entry["mask_path"], _sample(path), split)


def _sample(path: Path) -> str:
    """The folder that holds the five views of one sample, told apart from that of another kind of defect."""
    return "/".join(path.parts[-3:-1])


REALIAD = DataSet(
    name="realiad",
    title="Real-IAD",
    read=read_realiad,
    layout="""\
  ROOT/realiad_jsons/<product>.json (or realiad_jsons/realiad_jsons/)
  ROOT/realiad_1024/<product>/OK/<sample>/*.jpg, NG/<defect>/<sample>/*.jpg and .png (or realiad_512, realiad_256)
with 30 products""",
    source="https://realiad4ad.github.io/Real-IAD (access is granted on request)",
    licence="CC BY-NC-SA 4.0, on request",
    counts={},
    archives={},
    notes=(
        "151,050 images of 30 products, 99,721 good and 51,329 defective; 36,465 of the good ones are for "
        "training. The JSON files are the split; numbers for each product are not checked.",
        "The five views of a sample are one capture group. Each view has its own label: one without a mask is good, "
        "even of a defective sample.",
        "The lists of the noisy variants (realiad_jsons_fuiad_0.1 and so on) have the same form: put them in the place of "
        "realiad_jsons. Their defective training images are records with label 0, as in the authors' code.",
    ),
)
