"""What a detector is: learnt on normal images, then a pure function from features to scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from unispect.errors import ConfigError
from unispect.types import Features, Scores

# A pass over the features of a set of images, with the product of each: started anew by every call.
Pass: TypeAlias = Callable[[], Iterable[tuple[Features, Tensor]]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a detector with gradients is trained. Published HGAD: configs/hgad-mvtec.toml.

    steps     number of steps; 0: as many as `passes` over the images need
    images    images that lend vectors to one step
    places    places taken from every cell of each of them, at random; 0: all
    decay     L2 weight decay on the flow
    stairs    the cosine schedule falls in so many steps; the first two warm up
    optimizer "per_level": each level has its own Adam; "shared": one Adam for all whose momentum keeps moving the levels
              that are not being stepped, as the published code did under torch < 2
    checks    how often the loss on held-out normals is looked at; the best state seen there is kept, the first included.
              0: never, and the last state is kept
    patience  stop after so many checks without a gain
    """

    steps: int = 200
    passes: float = 0.0
    images: int = 32
    places: int = 1
    learning_rate: float = 2e-4
    beta1: float = 0.95
    beta2: float = 0.99
    decay: float = 1e-4
    stairs: int = 25
    optimizer: str = "per_level"
    checks: int = 10
    patience: int = 3
    held_out_images: int = 96

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.passes > 0):
            raise ConfigError(f"steps={self.steps}, passes={self.passes}: expected exactly one of the two above 0")
        if self.optimizer not in ("per_level", "shared"):
            raise ConfigError(f"optimizer: got {self.optimizer!r}, expected 'per_level' or 'shared'")
        for name, least in {"images": 1, "places": 0, "stairs": 3, "checks": 0, "patience": 1, "held_out_images": 1}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {least}")

    def total(self, images: int) -> int:
        """Number of steps for so many training images."""
        if self.steps:
            return self.steps
        return max(1, round(self.passes * max(1, images // self.images)))


class Detector(nn.Module, ABC):
    """A pure function of features once learnt: scoring changes no state and sees no product label."""

    @abstractmethod
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores; higher is more abnormal."""


@runtime_checkable
class TakesProduct(Protocol):
    """A detector whose paper scores an image under its true product. For comparison in `evaluate`; not deployable."""

    def forward_given(self, features: Features, product: Tensor) -> Scores:
        """As forward, told the product (N,) of each image; never called in inspection."""


class GradientDetector(Detector):
    """Learnt by gradient steps on vectors; the loop is `unispect.fit`. Levels are learnt independently."""

    levels: nn.ModuleList

    @abstractmethod
    def grid(self, level: int) -> Tensor:
        """Places of a level grouped by cell, (c, q) int64: what the loop samples from."""

    @abstractmethod
    def prepare(self, train: Pass) -> None:
        """Statistics that the first step needs."""

    @abstractmethod
    def loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses of vectors (m, c, q, C) at places (c, q) of images of products (m,); "total" is what is minimised."""

    @abstractmethod
    def held_out_loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor) -> Tensor:
        """The criterion for keeping a state, a scalar: lower is better."""

    @abstractmethod
    def parameter_groups(self, level: int) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of a level with and without weight decay."""

    @abstractmethod
    def finish(self, held_out: Pass) -> None:
        """Statistics of the learnt detector on normal images that it was not trained on."""
