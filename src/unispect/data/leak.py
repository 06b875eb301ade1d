"""The guard between what a model has seen and what it is tested on: the same content is refused, the alike is told."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from unispect.data.loader import ahead, decode
from unispect.data.nearness import Nearness, fingerprint
from unispect.data.records import ROLES, Record, Split, content_hash
from unispect.errors import ImageError, LeakError

NAMED = 3  # pairs in a message
Origin: TypeAlias = tuple[str, str]  # role and path of an image that the model has seen


@dataclass(frozen=True, slots=True)
class Seen:
    """The images that a model has learnt from, held out or was calibrated on; their files need not be there any more.

    contents       content hash -> role and path
    fingerprints   role and path -> fingerprint (see data.nearness); those without one are not compared for likeness
    """

    contents: Mapping[str, Origin] = field(default_factory=dict)
    fingerprints: Mapping[Origin, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, split: Split, fingerprints: Mapping[str, bytes]) -> Seen:
        """From a split and fingerprints by content hash."""
        origins = {
            split.hashes.get(record.path) or content_hash(record.path): (role, str(record.path))
            for role in ROLES
            for record in getattr(split, role)
        }
        return cls(origins, {origins[content]: mark for content, mark in fingerprints.items() if content in origins})

    def with_also(self, calibrated: Mapping[str, str]) -> Seen:
        """These and images that it was calibrated on later, content hash -> path."""
        later = {content: ("calibration", path) for content, path in calibrated.items()}
        return Seen(later | dict(self.contents), self.fingerprints)

    def refuse(self, records: Sequence[Record]) -> list[str]:
        """Warnings about test images that are nearly the same as one that was seen.

        Raises LeakError where one is the same, byte for byte. Files that cannot be read are left to the loader.
        """
        same = [(record, self.contents[content]) for record, content in _contents(records) if content in self.contents]
        if same:
            raise LeakError(
                f"{_images(len(same))} of {len(records)} in the test set {'was' if len(same) == 1 else 'were'} seen in "
                f"learning, byte for byte: {_pairs(same)}: take them out of the test set, or fit without them"
            )
        near = list(self._near(records)) if self.fingerprints else []
        if not near:
            return []
        return [
            f"{_images(len(near))} of {len(records)} in the test set {'looks' if len(near) == 1 else 'look'} nearly the "
            f"same as one seen in learning, which would flatter the model: {_pairs(near)}"
        ]

    def _near(self, records: Sequence[Record]) -> Iterator[tuple[Record, Origin]]:
        origins, known = list(self.fingerprints), Nearness(list(self.fingerprints.values()))
        marks = zip(records, ahead(_mark, records, 2, 16), strict=True)
        marked = [(record, mark) for record, mark in marks if mark is not None]
        for (record, _), near in zip(marked, known.each([mark for _, mark in marked]), strict=True):
            if near.suspicious:
                yield record, origins[near.index]


def _contents(records: Iterable[Record]) -> Iterator[tuple[Record, str]]:
    for record in records:
        if record.path.is_file():
            yield record, content_hash(record.path)


def _mark(record: Record) -> bytes | None:
    try:
        return fingerprint(decode(record.path))
    except ImageError:
        return None


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def _pairs(found: Sequence[tuple[Record, Origin]]) -> str:
    """`a/test/good/1.png = train image a/train/good/7.png, ... and 4 more`."""
    named = ", ".join(f"{record.path} = {role.replace('_', '-')} image {path}" for record, (role, path) in found[:NAMED])
    return named + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")
