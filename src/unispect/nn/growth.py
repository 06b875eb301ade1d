"""What learning takes that grows with the number of images: bytes held, and vectors compared with one another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

COVER, SEARCH, AROUND = "cover", "search", "around"


@dataclass(frozen=True, slots=True)
class Work:
    """Vectors compared with centres, in so many channels.

    kind   "cover": the centres are chosen among the vectors (nn.memory.greedy); "search": the nearest are looked up;
           "around": the nearest others of a bank's own vectors are (nn.memory.gaps)
    """

    kind: str
    vectors: int
    centres: int
    channels: int

    @property
    def pairs(self) -> int:
        """Distances that are measured."""
        return self.vectors * self.centres

    def times(self, count: int) -> Work:
        """For so many times the vectors."""
        return Work(self.kind, self.vectors * count, self.centres, self.channels)


@dataclass(frozen=True, slots=True)
class Growth:
    """What a detector needs beyond one look at each image in each pass.

    held       bytes held at the most while learning, what is learnt included
    learnt     bytes of what is learnt
    learning   comparisons made while learning
    scoring    comparisons made for one image
    """

    held: int = 0
    learnt: int = 0
    learning: tuple[Work, ...] = ()
    scoring: tuple[Work, ...] = ()


def together(parts: Iterable[Growth]) -> Growth:
    """Of parts that are held at the same time and all asked for each image."""
    parts = list(parts)
    return Growth(
        sum(part.held for part in parts),
        sum(part.learnt for part in parts),
        tuple(work for part in parts for work in part.learning),
        tuple(work for part in parts for work in part.scoring),
    )
