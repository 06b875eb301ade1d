"""ShanghaiTech, Real-IAD and the Union, read from tiny trees with their quirks."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import trees
from unispect.data.datasets import DATASETS, deviations, read_dataset
from unispect.data.loader import decode, read_mask
from unispect.data.realiad import read_realiad
from unispect.data.records import Record, split_normals
from unispect.data.stc import read_stc
from unispect.data.union import read_union
from unispect.errors import ConfigError, DataError


def stc(root: Path) -> Path:
    """Two scenes; clips of different length; frame and pixel masks as arrays, of which one clip has no pixel mask."""
    for clip, frames in (("01_001", 6), ("01_002", 4), ("07_001", 5)):
        for number in range(frames):
            trees.image(root / f"training/frames/{clip}/{number:03d}.jpg", (16, 12))
    for clip, frames, masked in (("01_0014", 5, True), ("07_0003", 4, False)):
        labels = np.zeros(frames, np.int8)
        labels[2:4] = 1
        for number in range(frames):
            trees.image(root / f"testing/frames/{clip}/{number:03d}.jpg", (16, 12))
        for folder in ("test_frame_mask", "test_pixel_mask"):
            (root / "testing" / folder).mkdir(parents=True, exist_ok=True)
        np.save(root / f"testing/test_frame_mask/{clip}.npy", labels)
        if masked:
            pixels = np.zeros((frames, 12, 16), np.int8)
            pixels[2, 1:3, 2:5], pixels[3, 4:9, 1:3] = 1, 1
            np.save(root / f"testing/test_pixel_mask/{clip}.npy", pixels)
    return root


def realiad(root: Path, lists: str = "realiad_jsons/realiad_jsons", images: str = "realiad_512") -> Path:
    """Two products of five views a sample, of which one shows nothing of the defect: no mask, and the normal class in one
    product but the name of the defect in the other."""
    for product in ("audiojack", "usb"):
        table: dict[str, object] = {"meta": {"pre_transform": None, "normal_class": "OK", "prefix": f"{product}/"}}
        for split, samples, kinds in (("train", ("S0001", "S0002"), ("OK",)), ("test", ("S0003",), ("OK", "HS"))):
            entries = []
            for kind in kinds:
                for sample in samples:
                    for view in range(1, 6):
                        folder = f"OK/{sample}" if kind == "OK" else f"NG/{kind}/{sample}"
                        name = f"{folder}/{product}_{sample[1:]}_{kind}_C{view}_20230923.jpg"
                        trees.image(root / images / product / name)
                        mask = None if kind == "OK" or view == 5 else name.replace(".jpg", ".png")
                        if mask is not None:
                            trees.mask(root / images / product / mask)
                        shown = "OK" if view == 5 and product == "usb" else kind
                        entry = {"category": product, "anomaly_class": shown, "image_path": name, "mask_path": mask}
                        entries.append(entry)
            table[split] = entries
        trees.text(root / lists / f"{product}.json", json.dumps(table))
    return root


def union(root: Path) -> Path:
    for name in ("mvtec", "visa", "btad", "mvtec3d"):
        getattr(trees, name)(root / name)
    return root


def tally(records: list[Record]) -> Counter[tuple[str | None, str, int | None]]:
    return Counter((record.product, record.split, record.label) for record in records)


# ShanghaiTech


def test_scenes_are_products_and_clips_are_groups(tmp_path: Path) -> None:
    records = read_stc(stc(tmp_path))
    assert tally(records) == {
        ("01", "train", 0): 10,
        ("07", "train", 0): 5,
        ("01", "test", 0): 3,
        ("01", "test", 1): 2,
        ("07", "test", 0): 2,
        ("07", "test", 1): 2,
    }
    assert {record.group for record in records} == {"01_001", "01_002", "07_001", "01_0014", "07_0003"}
    assert all(record.group == record.path.parent.name for record in records)
    assert records == read_dataset("stc", tmp_path)


def test_frames_have_the_slice_of_their_number_as_mask(tmp_path: Path) -> None:
    masked = [record for record in read_stc(stc(tmp_path)) if record.mask is not None]
    assert [(record.path.stem, int(read_mask(record.mask).sum())) for record in masked if record.mask] == [
        ("002", 6),
        ("003", 10),
    ]
    assert all(record.mask is not None and read_mask(record.mask).shape == (12, 16) for record in masked)


def test_every_so_many_training_frames(tmp_path: Path) -> None:
    kept = [record.path.name for record in read_stc(stc(tmp_path), every=5) if record.split == "train"]
    assert kept == ["000.jpg", "005.jpg", "000.jpg", "000.jpg"]
    with pytest.raises(ConfigError, match=r"every=0: expected 1 \(all training frames\) or more"):
        read_stc(tmp_path, every=0)


def test_a_clip_and_masks_of_another_length_are_an_error(tmp_path: Path) -> None:
    (stc(tmp_path) / "testing/frames/01_0014/004.jpg").unlink()
    with pytest.raises(DataError, match=r"01_0014: 4 frames, but .*01_0014\.npy is of shape \(5,\)"):
        read_stc(tmp_path)
    np.save(tmp_path / "testing/test_frame_mask/01_0014.npy", np.zeros(4, np.int8))
    with pytest.raises(DataError, match=r"01_0014: 4 frames, but .*test_pixel_mask/01_0014\.npy is of shape \(5, 12, 16\)"):
        read_stc(tmp_path)


@pytest.mark.parametrize("content", [b"no array", b"", None])
def test_frame_masks_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    file = stc(tmp_path) / "testing/test_frame_mask/07_0003.npy"
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=r"07_0003\.npy: what it says of the frames in .* cannot be read"):
        read_stc(tmp_path)


def test_masks_are_never_unpickled(tmp_path: Path) -> None:
    for folder in ("test_frame_mask", "test_pixel_mask"):
        root = stc(tmp_path / folder)
        np.save(root / "testing" / folder / "01_0014.npy", np.array([{}] * 5, object), allow_pickle=True)
        with pytest.raises(DataError, match="cannot be read"):
            read_stc(root)


def test_frames_past_999_are_in_the_order_of_time(tmp_path: Path) -> None:
    for number in (5, 101, 999, 1000, 1001):
        trees.image(tmp_path / f"testing/frames/03_0031/{number:03d}.jpg")
    (tmp_path / "testing/test_frame_mask").mkdir()
    np.save(tmp_path / "testing/test_frame_mask/03_0031.npy", np.array([0, 0, 0, 1, 1]))
    records = read_stc(tmp_path)
    assert [record.path.stem for record in records] == ["005", "101", "999", "1000", "1001"]
    assert [record.path.stem for record in records if record.label] == ["1000", "1001"]


def test_videos_must_be_cut_first(tmp_path: Path) -> None:
    trees.text(tmp_path / "training/videos/01_001.avi")
    with pytest.raises(DataError, match=r"cut them into frames first, such as with\n.*ffmpeg -i"):
        read_stc(tmp_path)


# Real-IAD


@pytest.mark.parametrize("lists", ["realiad_jsons", "realiad_jsons/realiad_jsons"])
@pytest.mark.parametrize("images", ["realiad_1024", "realiad_256"])
def test_the_json_files_are_the_split(lists: str, images: str, tmp_path: Path) -> None:
    records = read_realiad(realiad(tmp_path, lists, images))
    expected = {(product, *kind): number for product in ("audiojack", "usb") for kind, number in KINDS.items()}
    assert tally(records) == expected
    for record in records:
        assert decode(record.path).shape == (12, 12, 3)
        assert record.mask is None or read_mask(record.mask).any()
    masked = [record for record in records if record.mask is not None]
    assert len(masked) == 8
    assert all(record.label == 1 and record.defect == "HS" for record in masked)


KINDS = {("train", 0): 10, ("test", 0): 6, ("test", 1): 4}


def test_a_noisy_list_trains_on_what_it_lists(tmp_path: Path) -> None:
    """The authors' code takes all training images for good, whatever their class."""
    file = realiad(tmp_path) / "realiad_jsons/realiad_jsons/usb.json"
    table = json.loads(file.read_text("utf-8"))
    table["train"] += [entry for entry in table["test"] if entry["mask_path"]]
    trees.text(file, json.dumps(table))
    train = [record for record in read_realiad(tmp_path) if record.product == "usb" and record.split == "train"]
    assert len(train) == 14
    assert all(record.label == 0 and record.defect is None and record.mask is None for record in train)


def test_the_five_views_of_a_sample_stay_together(tmp_path: Path) -> None:
    train = [record for record in read_realiad(realiad(tmp_path)) if record.split == "train"]
    assert Counter(record.group for record in train if record.product == "usb") == {"OK/S0001": 5, "OK/S0002": 5}
    split = split_normals(train, 0.2, 0.2, 0)
    for product in ("audiojack", "usb"):
        for role in (split.train, split.held_out, split.calibration):
            assert len([record for record in role if record.product == product]) % 5 == 0


def test_a_list_of_another_form_is_an_error(tmp_path: Path) -> None:
    trees.text(realiad(tmp_path) / "realiad_jsons/realiad_jsons/usb.json", '{"meta": {}}')
    with pytest.raises(DataError, match=r"usb\.json: not a list of Real-IAD \(KeyError: 'normal_class'\)"):
        read_realiad(tmp_path)


def test_lists_without_images(tmp_path: Path) -> None:
    trees.text(tmp_path / "realiad_jsons" / "usb.json", "{}")
    with pytest.raises(DataError, match="no realiad_1024 or realiad_512"):
        read_realiad(tmp_path)


# The Union


def test_no_two_classes_share_a_name(tmp_path: Path) -> None:
    records = read_union(union(tmp_path))
    products = {record.product for record in records}
    assert {"mvtec/bottle", "visa/pcb1", "btad/01", "mvtec3d/bagel"} <= products
    parts = {name: DATASETS[name].read(tmp_path / name) for name in ("mvtec", "visa", "btad", "mvtec3d")}
    assert len(records) == sum(len(part) for part in parts.values())
    assert len(products) == sum(len({record.product for record in part}) for part in parts.values())


def test_groups_do_not_collide_and_other_products_are_left_out(tmp_path: Path) -> None:
    trees.image(union(tmp_path) / "mvtec/bottle/train/good/monday/x.png")
    trees.image(tmp_path / "mvtec/ours/train/good/x.png")
    records = read_union(tmp_path)
    assert {record.group for record in records} == {None, "mvtec/monday"}
    assert "mvtec/ours" not in {record.product for record in records}


def test_forty_classes_are_published() -> None:
    counts = DATASETS["union"].counts
    assert len(counts) == 40
    assert [sum(column) for column in zip(*counts.values(), strict=True)] == [
        3629 + 8659 + 1799 + 2950,
        467 + 962 + 451 + 249,
        1258 + 1200 + 290 + 948,
    ]


def test_an_incomplete_union_is_told_part_by_part(tmp_path: Path) -> None:
    trees.mvtec(tmp_path / "mvtec")
    with pytest.raises(DataError, match=r"no visa, btad, mvtec3d in it\. VisA is not downloaded"):
        read_union(tmp_path)
    records = read_union(union(tmp_path / "whole"))
    assert any(
        text.startswith("mvtec/bottle: 5 training images where 209") for text in deviations(DATASETS["union"], records)
    )


@pytest.mark.parametrize("name", DATASETS)
def test_each_data_set_says_what_it_is(name: str, tmp_path: Path) -> None:
    about = DATASETS[name]
    assert about.text().startswith(f"{name}: {about.title}")
    assert about.source in about.text()
    assert json.loads(json.dumps(about.as_dict()))["licence"] == about.licence
    with pytest.raises(DataError, match="is not downloaded by unispect: get"):
        read_dataset(name, tmp_path / "nowhere")
