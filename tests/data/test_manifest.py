"""Tables of images: what comes in goes out, and what is wrong is told with its row."""

import builtins
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trees
from unispect.data.datasets import read_data
from unispect.data.folder import read_folder
from unispect.data.manifest import read_manifest, write_manifest
from unispect.data.records import Record
from unispect.errors import DataError, MissingExtraError

KINDS = (".csv", ".parquet")


def table(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def drawn(folder: Path, seed: int) -> list[Record]:
    """Records with everything a table must not lose: commas, quotes, umlauts, spaces, paths beside and elsewhere."""
    random = np.random.default_rng(seed)
    names = ["a,b", 'quo"te', "Schräge Größe", " led by a space", "plain", "semi;colon", "line\nbreak", "a\rb", "\t"]
    records = []
    for number in range(12):
        label = [0, 1, None][random.integers(3)]
        where = folder if random.random() < 0.7 else Path("/elsewhere")
        name = names[random.integers(len(names))]
        masks = (where / "masks" / f"{number}.png", where / "masks" / "clip.npy#3", where / f"masks{number}", None)
        mask = masks[random.integers(len(masks))] if label == 1 else None
        split = "test" if label == 1 or random.random() < 0.5 else "train"
        product, group = (names[random.integers(5)] if random.random() < 0.8 else None for _ in range(2))
        defect = "hole" if label == 1 and random.random() < 0.5 else None
        records.append(Record(where / name / f"{number}.png", product, label, defect, mask, group, split))
    return records


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_is_read(kind: str, seed: int, tmp_path: Path) -> None:
    records = drawn(tmp_path, seed)
    path = write_manifest(records, tmp_path / f"list{kind}")
    assert read_manifest(path) == records
    assert read_data(path) == records


@pytest.mark.parametrize("kind", KINDS)
def test_paths_below_the_table_move_with_it(kind: str, tmp_path: Path) -> None:
    path = write_manifest([Record(tmp_path / "a" / "x.png", None, 0)], tmp_path / f"list{kind}")
    moved = tmp_path / "other" / path.name
    moved.parent.mkdir()
    path.rename(moved)
    assert read_manifest(moved)[0].path == tmp_path / "other" / "a" / "x.png"


@pytest.mark.parametrize(("separator", "mark"), list(itertools.product(",;\t", ["", "\ufeff"])))
def test_separators_and_the_mark_of_excel(separator: str, mark: str, tmp_path: Path) -> None:
    rows = [("path", " label ", "product"), ("x.png", "good", "nut"), ("y.png", "ng", "nut")]
    path = table(tmp_path / "l.csv", mark + "\r\n".join(separator.join(row) for row in rows) + "\r\n")
    good, bad = read_manifest(path)
    assert (good.label, good.split, good.product) == (0, "train", "nut")
    assert (bad.label, bad.split) == (1, "test")


@pytest.mark.parametrize(
    ("text", "label"),
    [("0", 0), ("Good", 0), ("OK", 0), ("1", 1), ("1.0", 1), ("Anomaly", 1), ("ng", 1), ("", None), ("NaN", None)],
)
def test_labels_in_the_words_people_use(text: str, label: int | None, tmp_path: Path) -> None:
    assert read_manifest(table(tmp_path / "l.csv", f"path,label,split\nx.png,{text},test\n"))[0].label == label


def test_only_the_path_is_needed(tmp_path: Path) -> None:
    assert read_manifest(table(tmp_path / "l.csv", "path\nx.png\n")) == [Record(tmp_path / "x.png", None, None)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,lable\nx,0\n", "unknown column 'lable': did you mean 'label'"),
        ("file\nx\n", "unknown column 'file'"),
        ("label\n0\n", "no column 'path'"),
        ("path,path\nx,y\n", "a column comes twice"),
        ("", "no column 'path'"),
        ("path,label\n", "holds no row"),
        ("path,label\nx.png,perhaps\n", "row 2: label 'perhaps': expected 0, good or normal"),
        ("path,split\nx.png,valid\n", "row 2: split 'valid': expected train or test"),
        ("path,label\nx.png,0\n,0\n", "row 3: no path"),
        ("path,label\nx.png,0\nx.png,0\n", r"row 3: .*x\.png is in row 2 already"),
        ("path,label,defect\nx.png,0,hole\n", "row 2: .* defect 'hole' with label 0"),
        ("path,label\nx.png,0,1\n", "row 2: more cells than columns"),
        ("path,label\na,b.png,0\nx.png,perhaps\n", "row 2: more cells .*; row 3: label 'perhaps'"),
        ("path,label,split\nx.png,0,\ny.png,ng,train\n", "row 3: a defective image with split train"),
    ],
)
def test_what_is_wrong_is_told(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        read_manifest(table(tmp_path / "l.csv", text))


def test_empty_rows_at_the_end_are_no_images(tmp_path: Path) -> None:
    assert len(read_manifest(table(tmp_path / "l.csv", "path;label\nx.png;0\n;\n\n;\n"))) == 1


def test_a_table_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    for number, (text, encoding) in enumerate([("path,product\nx.png,Größe\n", "cp1252"), ("path\nx.png\n", "utf-16")]):
        path = tmp_path / f"{number}.csv"
        path.write_bytes(text.encode(encoding))
        with pytest.raises(DataError, match="is not UTF-8: save the table as 'CSV UTF-8'"):
            read_manifest(path)


def test_paths_of_any_bytes(tmp_path: Path) -> None:
    records = [Record(Path(os.fsdecode(os.fsencode(tmp_path) + b"/Gr\xf6\xdfe/x.png")), "nut", 0)]
    assert read_manifest(write_manifest(records, tmp_path / "l.csv")) == records
    with pytest.raises(DataError, match=r"is not UTF-8, as Parquet asks: write a \.csv"):
        write_manifest(records, tmp_path / "l.parquet")


def test_a_folder_becomes_a_table_unless_it_would_teach_defects(tmp_path: Path) -> None:
    for place in ("train/good/a.png", "test/good/b.png", "test/hole/c.png", "ground_truth/hole/c_mask.png"):
        trees.image(tmp_path / "nut" / place)
    records = read_folder(tmp_path)
    assert read_manifest(write_manifest(records, tmp_path / "l.csv")) == records
    trees.image(tmp_path / "nut/train/broken/d.png")
    with pytest.raises(DataError, match=r"train/broken/d\.png: a defective image with split train: .* make its split test"):
        write_manifest(read_folder(tmp_path), tmp_path / "other.csv")
    assert not (tmp_path / "other.csv").exists()


def test_many_bad_rows_are_one_error(tmp_path: Path) -> None:
    rows = "".join(f"{number}.png,perhaps\n" for number in range(9))
    with pytest.raises(DataError, match=r"row 2: .*row 6: .*; and 4 more$"):
        read_manifest(table(tmp_path / "l.csv", "path,label\n" + rows))


def test_columns_of_the_owner_are_not_read(tmp_path: Path) -> None:
    assert read_manifest(table(tmp_path / "l.csv", "path,_note\nx.png,seen by Anna\n"))[0].product is None


@pytest.mark.parametrize("name", ["none.csv", "none.parquet"])
def test_a_file_that_is_not_there_or_not_a_table(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file: expected a manifest"):
        read_manifest(tmp_path / name)
    with pytest.raises(DataError):
        read_manifest(table(tmp_path / name, "no table at all"))
    with pytest.raises(DataError, match=r"ends with \.csv or \.parquet"):
        write_manifest([], tmp_path / "list.txt")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_manifest([Record(tmp_path / "x.png", None, 0)], tmp_path / "l.parquet")
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr("importlib.import_module", lambda name: without(name))
    with pytest.raises(MissingExtraError, match=r"unispect\[parquet\]"):
        read_manifest(path)


def test_a_long_table_takes_seconds(tmp_path: Path) -> None:
    """A hundred thousand rows; not timed, but a quadratic reader would never end."""
    rows = "".join(f"images/{number}.png,nut,0\n" for number in range(100_000))
    assert len(read_manifest(table(tmp_path / "l.csv", "path,product,label\n" + rows))) == 100_000
