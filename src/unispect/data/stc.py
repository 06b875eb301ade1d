"""ShanghaiTech Campus: surveillance frames of 13 scenes, normal clips to learn from, clips with marked anomalies to test.

*Future Frame Prediction for Anomaly Detection: A New Baseline (Liu et al., 2018)*, https://arxiv.org/abs/1712.09867
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from unispect.data.dataset import DataSet, check_root, folders_in, images_in
from unispect.data.records import Record
from unispect.errors import ConfigError, DataError

VIDEOS = Path("training", "videos")
TRAIN, TEST = Path("training", "frames"), Path("testing", "frames")
LABELS, MASKS = Path("testing", "test_frame_mask"), Path("testing", "test_pixel_mask")
DEFECT = "abnormal event"


def read_stc(root: Path, every: int = 1) -> list[Record]:
    """Records of the frames, clip by clip, train before test: the scene is the product, the clip the capture group.

    every   keep one of so many training frames, for neighbours hardly differ; the published code of CFLOW-AD takes all

    Of files, only the masks are opened, those of pixels no further than their shape. Raises DataError where training videos
    were not cut into frames, and where a clip and its masks differ in length.
    """
    if every < 1:
        raise ConfigError(f"every={every}: expected 1 (all training frames) or more")
    check_root(STC, root, ("training", "testing"))
    if not folders_in(root / TRAIN) and (root / VIDEOS).is_dir():
        raise DataError(
            f"{root / VIDEOS}: the training clips are videos: cut them into frames first, such as with\n"
            f"  for v in '{root / VIDEOS}'/*.avi; do d='{root / TRAIN}'/$(basename \"$v\" .avi); mkdir -p \"$d\"; "
            'ffmpeg -i "$v" -start_number 0 "$d/%03d.jpg"; done'
        )
    train = [record for clip in folders_in(root / TRAIN) for record in _normal(clip, every)]
    test = [record for clip in folders_in(root / TEST) for record in _judged(root, clip)]
    return sorted(train + test, key=lambda record: (record.product, record.split == "test"))


def _scene(clip: Path) -> str:
    """`01` of the clip `01_0014`."""
    return clip.name.split("_")[0]


def _frames(clip: Path) -> list[Path]:
    """In the order of time: names of three digits grow to four after frame 999."""
    return sorted(images_in(clip), key=lambda path: (len(path.stem), path.stem))


def _normal(clip: Path, every: int) -> Iterator[Record]:
    for path in _frames(clip)[::every]:
        yield Record(path, _scene(clip), 0, group=clip.name)


def _judged(root: Path, clip: Path) -> Iterator[Record]:
    """Frames of a test clip by its frame mask; those that are abnormal have a slice of the pixel mask."""
    frames, pixels = _frames(clip), root / MASKS / f"{clip.name}.npy"
    labels = _array(root / LABELS / f"{clip.name}.npy", clip, len(frames), 1)
    if masked := pixels.is_file():
        _array(pixels, clip, len(frames), 3)
    for number, (path, label) in enumerate(zip(frames, labels.tolist(), strict=True)):
        if label:
            mask = Path(f"{pixels}#{number}") if masked else None
            yield Record(path, _scene(clip), 1, DEFECT, mask, clip.name, "test")
        else:
            yield Record(path, _scene(clip), 0, group=clip.name, split="test")


def _array(file: Path, clip: Path, frames: int, axes: int) -> np.ndarray:
    """A mapped array whose first axis is time."""
    try:
        array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: what it says of the frames in {clip} cannot be read: {error}") from error
    if array.ndim != axes or len(array) != frames:
        raise DataError(f"{clip}: {frames} frames, but {file} is of shape {array.shape}: get both again")
    return array


STC = DataSet(
    name="stc",
    title="ShanghaiTech Campus",
    read=read_stc,
    layout="""\
  ROOT/training/frames/<scene>_<clip>/*.jpg     cut from training/videos/*.avi with ffmpeg
  ROOT/testing/frames/<scene>_<clip>/*.jpg
  ROOT/testing/test_frame_mask/<scene>_<clip>.npy, testing/test_pixel_mask/<scene>_<clip>.npy""",
    source="https://svip-lab.github.io/dataset/campus_dataset.html",
    licence="research only",
    counts={},
    archives={},
    notes=(
        "The scene is the product; the clip is the capture group, so that frames of a clip stay on one side of a split.",
        "274,515 training and 42,883 test frames of 13 scenes (CFLOW-AD, Sec. 5.1); those of each scene are not published, "
        "so none are checked. Scene 13 has no ground truth.",
        "All training frames are read, as in the published code of CFLOW-AD. Neighbours hardly differ: "
        "write_manifest(read_stc(root, every=5), file) keeps every fifth.",
        "An anomaly is an event over time; a detector of single frames sees only part of it.",
    ),
)
