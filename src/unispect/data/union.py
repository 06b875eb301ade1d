"""The Union of HGAD's Table 2: 40 classes of four data sets in one model, named so that none collide."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from unispect.data.btad import BTAD
from unispect.data.dataset import DataSet, check_root, how_to_get
from unispect.data.mvtec import MVTEC
from unispect.data.mvtec3d import MVTEC3D
from unispect.data.records import Record
from unispect.data.visa import VISA
from unispect.errors import DataError

PARTS = (MVTEC, VISA, BTAD, MVTEC3D)


def read_union(root: Path) -> list[Record]:
    """Records of all four data sets, each in a folder of its name; products and groups are "<set>/<name>".

    The published code gave MVTec AD and VisA the same class numbers, so its Union cannot be reproduced; here no two
    classes share a name.
    """
    check_root(UNION, root, [part.name for part in PARTS])
    missing = [part for part in PARTS if not (root / part.name).is_dir()]
    if missing:
        told = "\n".join(how_to_get(part, root / part.name) for part in missing)
        raise DataError(f"{root}: no {', '.join(part.name for part in missing)} in it. {told}")
    return [_named(record, part) for part in PARTS for record in _ours(part, root / part.name)]


def _ours(part: DataSet, root: Path) -> list[Record]:
    return [record for record in part.read(root) if record.product in part.counts]


def _named(record: Record, part: DataSet) -> Record:
    group = None if record.group is None else f"{part.name}/{record.group}"
    return replace(record, product=f"{part.name}/{record.product}", group=group)


UNION = DataSet(
    name="union",
    title="the Union of MVTec AD, VisA, BTAD and MVTec 3D-AD",
    read=read_union,
    layout="\n".join(f"  ROOT/{part.name}/          {part.title}, as `--dataset {part.name}` reads it" for part in PARTS),
    source="the sources of its four parts",
    licence="those of its four parts",
    counts={f"{part.name}/{product}": counts for part in PARTS for product, counts in part.counts.items()},
    archives={},
    notes=("40 classes: 15 + 12 + 3 + 10 (HGAD, Tab. 2).",),
)
