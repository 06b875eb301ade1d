"""What a detector is: learnt on normal images, then a pure function from features to scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from unispect.errors import ConfigError, unknown_name
from unispect.types import Features, Scores

# A pass over the features of a set of images, with the product of each: started anew by every call.
Pass: TypeAlias = Callable[[], Iterable[tuple[Features, Tensor]]]

PRECISIONS = ("f32", "bf16")


def check_choices(known: Mapping[str, Sequence[str]], **chosen: str) -> None:
    """Raises ConfigError for a name that is not among those known for its argument."""
    for name, value in chosen.items():
        if value not in known[name]:
            raise ConfigError(unknown_name(name, value, known[name]))


def check_counts(**counts: int) -> None:
    """Raises ConfigError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name}: got {count}, expected at least 1")


def check_shares(**shares: float) -> None:
    """Raises ConfigError for what is no share above 0 and up to 1."""
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise ConfigError(f"{name}: got {share:g}, expected a share above 0 and up to 1")


def with_places(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Numbers of the levels (C, h, w) that have several places; of all levels where none has."""
    return [number for number, (_, height, width) in enumerate(shapes) if height * width > 1] or list(range(len(shapes)))


def largest_grid(shapes: Sequence[tuple[int, ...]], levels: Sequence[int]) -> tuple[int, int]:
    """(h, w) of the level with most places among some."""
    _, height, width = max((shapes[number] for number in levels), key=lambda shape: shape[1] * shape[2])
    return height, width


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a detector with gradients is trained. Published HGAD: configs/hgad-mvtec.toml.

    steps     number of steps; 0: as many as `passes` over the images need
    images    images that lend vectors to one step
    places    places taken from every cell of each of them, at random; 0: all
    balance   0: images come as often as they are there; 1: as if every product had as many; between, by the power
              1 - balance of their number
    vectors   vectors of one optimizer step: all that are drawn in a step are shuffled and used in parts of so many, what is
              left over dropped, as the published CFLOW-AD does; 0: one optimizer step on all
    precision of the matrix products inside the couplings while training: "f32", or "bf16" with all sums in f32
    compile   compile the losses with torch.compile; worth its start-up on a GPU
    rule      of the optimizer: "adam", whose decay is a part of the gradient, or "adamw"; both read beta1, beta2, epsilon
              and amsgrad
    decay     weight decay
    clip      norm that the gradient of an optimizer step has at the most; 0: any
    schedule  of the learning rate: "cosine", which falls in so many `stairs`, the first two to warm up; or "drop":
              constant, but times `drop` after each of the shares of the steps in `drops`
    optimizer "per_level": each level has its own Adam; "shared": one Adam for all whose momentum keeps moving the levels
              that are not being stepped, as the published code did under torch < 2
    checks    how often the loss on held-out normals is looked at; the best state seen there is kept, the first included.
              0: never, and the last state is kept
    patience  stop after so many checks without a gain
    """

    steps: int = 400
    passes: float = 0.0
    images: int = 32
    places: int = 64
    balance: float = 0.0
    vectors: int = 0
    precision: str = "f32"
    compile: bool = False
    rule: str = "adam"
    learning_rate: float = 1e-3
    beta1: float = 0.95
    beta2: float = 0.99
    epsilon: float = 1e-8
    amsgrad: bool = False
    decay: float = 1e-4
    clip: float = 0.0
    schedule: str = "cosine"
    stairs: int = 25
    drops: tuple[float, ...] = (0.8,)
    drop: float = 0.2
    optimizer: str = "per_level"
    checks: int = 8
    patience: int = 3
    held_out_images: int = 96

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.passes > 0):
            raise ConfigError(f"steps={self.steps}, passes={self.passes}: expected exactly one of the two above 0")
        if self.optimizer not in ("per_level", "shared"):
            raise ConfigError(f"optimizer: got {self.optimizer!r}, expected 'per_level' or 'shared'")
        for name, choices in {"rule": ("adam", "adamw"), "schedule": ("cosine", "drop")}.items():
            if getattr(self, name) not in choices:
                raise ConfigError(unknown_name(name, getattr(self, name), choices))
        if any(not 0 < share < 1 for share in self.drops) or not self.drop > 0:
            raise ConfigError(
                f"drops={list(self.drops)}, drop={self.drop}: expected shares between 0 and 1, and a factor above 0"
            )
        if not self.clip >= 0:
            raise ConfigError(f"clip: got {self.clip}, expected a norm above 0, or 0 for none")
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon: got {self.epsilon}, expected a number above 0")
        if not 0 <= self.balance <= 1:
            raise ConfigError(f"balance: got {self.balance}, expected a number from 0 to 1")
        if self.precision not in PRECISIONS:
            raise ConfigError(unknown_name("precision", self.precision, PRECISIONS))
        counts = {"images": 1, "places": 0, "vectors": 0, "stairs": 3, "checks": 0, "patience": 1, "held_out_images": 1}
        for name, least in counts.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {least}")

    def total(self, images: int) -> int:
        """Number of steps for so many training images."""
        if self.steps:
            return self.steps
        return max(1, round(self.passes * max(1, images // self.images)))


class Detector(nn.Module, ABC):
    """A pure function of features once learnt: scoring changes no state and sees no product label.

    wants   defaults that the method has for other sections of the settings, section by section
    local   whether its map says where a defect is; otherwise an ensemble goes by its image score alone
    spares_held_out  whether it learns nothing from held-out images but when to stop, and a scale for all products; else an
            aligner has to have its scores out of fold
    trains_encoder   whether it is built with a copy of the network that its features come from, as `encoder`, and the
            image is its last level
    """

    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    local: bool = True
    spares_held_out: ClassVar[bool] = True
    trains_encoder: ClassVar[bool] = False

    @abstractmethod
    def forward(self, features: Features) -> Scores:
        """L levels (N, C, h, w) -> scores; higher is more abnormal."""

    def check_exportable(self) -> None:
        """Raises ExportError where its settings cannot be expressed as one graph."""


@runtime_checkable
class TakesProduct(Protocol):
    """A detector that can score an image under a product.

    In inspection that product is the detector's own guess, or that of the ensemble it is in. Only `evaluate` gives it the
    true one, for comparison with papers that do; not deployable.
    """

    def forward_given(self, features: Features, product: Tensor) -> Scores:
        """As forward, under the product (N,) of each image."""


@runtime_checkable
class Quickens(Protocol):
    """A detector whose exported graph can be made quicker at the price of a small error, which it states."""

    def quicken(self) -> None:
        """Have exported graphs take the quick way from now on; scoring in torch stays as it is."""


@runtime_checkable
class DealsFolds(Protocol):
    """A detector that learns from parts of the images in turn."""

    def begin(self, product: Tensor, unit: Tensor) -> None:
        """Be told of all training images, in the order of the passes: products (n,) and units (n,), which stay together."""


@runtime_checkable
class HoldsProducts(Protocol):
    """A detector that knows its products one by one, so that one can join or leave without a change to the others."""

    def add(self, other: Any) -> None:
        """The products of another detector of the same settings, after one's own."""

    def remove(self, product: int) -> None:
        """Forget a product; the numbers of later ones fall by one."""


@runtime_checkable
class HasLikelihoods(Protocol):
    """A detector that has a density of features."""

    def likelihoods(self, features: Features, product: Tensor) -> list[Tensor]:
        """Log-likelihood per dimension, nats, (N, h, w) of each level; under the product (N,) where the prior has some."""


@runtime_checkable
class HasCentres(Protocol):
    """A detector whose prior is a mixture of products, and of centres inside each."""

    def main_centres(self) -> list[Tensor]:
        """Main centre of each product, (K, D) of each level."""

    def responsibilities(self, features: Features, product: Tensor) -> list[Tensor]:
        """Share of each centre inside the product (N,) in each vector, (N, h*w, M) of each level."""


class StatisticalDetector(Detector):
    """Learnt in whole passes over the training images; what it learns adds up over batches.

    A pass is `update` for every batch, then `finish`. Every pass brings the same images in the same order.
    """

    # Nothing is tuned on held-out images, so they are better learnt from.
    wants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"split": {"held_out": 0.0}}

    @abstractmethod
    def update(self, features: Features, product: Tensor) -> None:
        """Take in a batch: L levels (N, C, h, w) and the product of each image, (N,) int64."""

    @abstractmethod
    def finish(self) -> bool:
        """End of a pass; True where one more is wanted, False where all is learnt."""


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that are trained alike.

    decayed   whether weight decay is for them
    pace      their learning rate relative to the recipe's
    """

    parameters: Sequence[nn.Parameter]
    decayed: bool = True
    pace: float = 1.0


class GradientDetector(Detector):
    """Learnt by gradient steps; the loop is `unispect.fit`. What it learns is in `levels`, each learnt independently.

    stages   shares of the training after which the loss is another one
    """

    levels: nn.ModuleList
    stages: tuple[float, ...] = ()

    @abstractmethod
    def prepare(self, train: Pass) -> None:
        """Statistics that the first step needs."""

    @abstractmethod
    def groups(self, level: int) -> list[Group]:
        """Parameters of a level; those that belong to no group stay as they are."""

    @abstractmethod
    def finish(self, train: Pass, held_out: Pass) -> None:
        """Statistics of the learnt detector: on what it was trained on, and on normal images that it was not."""


class VectorDetector(GradientDetector):
    """Learnt from vectors of single levels."""

    @abstractmethod
    def grid(self, level: int) -> Tensor:
        """Places of a level grouped by cell, (c, q) int64: from every cell the loop draws.

        What reads single vectors has one cell of all places, (1, h*w); what reads whole maps has a cell a place, (h*w, 1).
        """

    @abstractmethod
    def loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses of vectors (m, c, q, C) at places (m, c, q) of images of products (m,); "total" is what is minimised.

        progress   0 or, of the `stages` that have begun, the last one
        """

    @abstractmethod
    def held_out_loss(self, level: int, vectors: Tensor, places: Tensor, product: Tensor) -> Tensor:
        """The criterion for keeping a state, a scalar: lower is better."""


class ImageDetector(GradientDetector):
    """Learnt from whole images, all levels of features at once. All that it learns is in `levels[0]`."""

    @abstractmethod
    def loss(self, features: Features, product: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses of L levels (m, C, h, w) of images of products (m,); "total" is what is minimised.

        progress   0 or, of the `stages` that have begun, the last one
        """

    @abstractmethod
    def held_out_loss(self, features: Features, product: Tensor) -> Tensor:
        """The criterion for keeping a state, a scalar, mean over the images: lower is better."""
