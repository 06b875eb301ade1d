"""Time of training HGAD, a loop as published against ours, change by change: python benchmarks/training.py

The naive loop is written here in our own words, after what the paper's code does: the whole network looks at every image in
every pass, the encoding of the place goes through the subnets with every vector, the centres are gathered for every vector,
and one Adam serves all levels, with gradients of zero for those that are not being stepped. Before anything is timed it is
checked that the naive loop and ours compute the same: losses, and weights after three steps.

Each row of the ladder is one change more. All rows are timed in one process on the same images, in turns; a figure is the
median of the windows. Then: how long each takes to the same negative log-likelihood of held-out normals. On a GPU, where
there is one, vectors/s and the share of its peak in the published setting.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unispect.benchmark import environment
from unispect.data.datasets import read_data
from unispect.data.loader import Loader, Preparation
from unispect.data.records import Record, split_normals
from unispect.detectors.base import Pass, Recipe
from unispect.detectors.hgad import HGAD, Level
from unispect.features.cache import FeatureCache, FeatureSet
from unispect.features.engine import Engine
from unispect.features.weights import empty_network, load_backbone_weights
from unispect.fit import Labelled, fit, learning_rate, set_precision
from unispect.inspector import FeatureSettings
from unispect.nn.coupling import CouplingBlock
from unispect.nn.mixture import LOG_2PI, HierarchicalMixture, smoothed
from unispect.nn.position import positional_encoding
from unispect.types import Batch

PUBLISHED: dict[str, Any] = {
    "blocks": 12,
    "position": 256,
    "centres": 10,
    "start": "published",
    "covariance": "identity",
    "delta_scale": 1.0,
    "lambda2": 100.0,
    "label_smoothing": 0.02,
    "score": "product",
}
OPTIMISED: dict[str, Any] = {"learning_rate": 2e-4, "images": 8, "places": 0, "checks": 0, "optimizer": "shared"}
FAITHFUL = [(200, 64, 64), (200, 32, 32), (200, 16, 16)]  # levels of EfficientNet-B6 at 1024, 512 and 256 px
PRODUCTS = 15  # of MVTec AD
SCALES = (1.0, 0.5, 0.25)
# Dense peaks of the makers' data sheets, FLOP/s; "f32" without tensor cores.
PEAKS = {
    "H100 PCIe": {"bf16": 756e12, "tf32": 378e12, "f32": 51e12},
    "H100": {"bf16": 989e12, "tf32": 494e12, "f32": 67e12},
    "H200": {"bf16": 989e12, "tf32": 494e12, "f32": 67e12},
    "A100": {"bf16": 312e12, "tf32": 156e12, "f32": 19.5e12},
}


@dataclass(frozen=True, slots=True)
class Form:
    """How a step is computed; every form gives the same losses.

    decoded    images are decoded once
    cached     the network looks at every image once
    fused      what the condition adds to a hidden layer is computed once a place, from an encoding that is kept
    products   distances to centres by matrix products
    folded     the global scale is a part of the rotation
    separate   one Adam a level
    """

    decoded: bool = False
    cached: bool = False
    fused: bool = False
    products: bool = False
    folded: bool = False
    separate: bool = False


CHANGES = {
    "images decoded once": "decoded",
    "features kept": "cached",
    "condition once a place": "fused",
    "centres by matrix products": "products",
    "scale folded into the rotation": "folded",
    "one Adam a level": "separate",
}


def ladder() -> dict[str, Form]:
    """The naive form, and after it each form with one change more."""
    form = Form()
    rows = {"naive loop": form}
    for name, change in CHANGES.items():
        form = replace(form, **{change: True})
        rows[f"+ {name}"] = form
    return rows


class Learning(HGAD):
    """HGAD without what follows the loop, which is the same for all."""

    def finish(self, train: Pass, held_out: Pass) -> None:
        """Nothing."""


class WholeNetwork(nn.Module):
    """All stages of a timm EfficientNet on copies of the image; one stage is kept, the later ones run for nothing."""

    def __init__(self, backbone: str, stage: int, scales: Sequence[float] = SCALES, weights: str = "auto") -> None:
        super().__init__()
        network: Any = empty_network(backbone)
        network.load_state_dict(load_backbone_weights(backbone, weights)[0])
        self.network = network
        config = network.pretrained_cfg
        self.mean, self.std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
        self.stage, self.scales = stage, scales
        self.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """(m, 3, H, W) uint8 -> levels (m, h*w, C)."""
        whole, levels = (images.float() / 255 - self.mean) / self.std, []
        for scale in self.scales:
            sides = [round(scale * side) for side in whole.shape[2:]]
            x = F.interpolate(whole, sides, mode="bilinear", align_corners=True) if scale != 1 else whole
            x = self.network.bn1(self.network.conv_stem(x))
            for number, stage in enumerate(self.network.blocks):
                x = stage(x)
                if number == self.stage:
                    levels.append(x.flatten(2).mT)
        return levels


# One step, naive or with some of the changes.


def coupled(block: CouplingBlock, x: Tensor, condition: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """One block: vectors (n, C), their conditions (n, P), or those of the places (p, P) -> (n, C) and (n,)."""
    kept, moved = x.split([block.kept, block.moved], 1)
    if form.fused:
        weight, bias = block.hidden.weight, block.hidden.bias
        term = F.linear(condition, weight[:, block.kept :], bias)
        hidden = F.linear(kept, weight[:, : block.kept]) + term.repeat(len(x) // len(term), 1)
    else:
        hidden = block.hidden(torch.cat([kept, condition], 1))
    raw, shift = (0.1 * block.output(hidden.relu())).split(block.moved, 1)
    log_scale, scale = block.alpha * raw.tanh(), block.global_scale()
    y = torch.cat([kept, moved * log_scale.exp() + shift], 1)
    logdet = log_scale.sum(1) + scale.log().sum()
    if form.folded:
        return F.linear(y, block.rotation * scale, block.rotation @ block.offset), logdet
    return F.linear(y * scale + block.offset, block.rotation), logdet


def latent(level: Level, vectors: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Vectors (m, p, C) of all places in order -> latent vectors (m*p, C) and log-determinants (m*p,)."""
    assert level.condition is not None
    condition = level.condition
    if not form.fused:  # made anew for every step and every vector
        encoding = positional_encoding(condition.shape[1], *level.shape[1:]).float()
        condition = encoding.to(vectors.dtype).flatten(1).T.repeat(len(vectors), 1)
    x, logdet = vectors.flatten(0, 1), vectors.new_zeros(vectors.shape[0] * vectors.shape[1])
    for block in level.flow.blocks:
        assert isinstance(block, CouplingBlock)
        x, part = coupled(block, x, condition, form)
        logdet = logdet + part
    return x, logdet


def naive_losses(
    mixture: HierarchicalMixture, z: Tensor, logdet: Tensor, product: Tensor, smoothing: float
) -> tuple[Tensor, ...]:
    """L_g, L_mi, L_e, L_in and L_z of vectors (n, D) of products (n,): differences to all centres, vector by vector."""
    weights, channels = mixture.psi.log_softmax(0), mixture.channels
    logits = -(z[:, None] - mixture.mu).square().sum(2) / 2  # (n, Y, D) -> (n, Y)
    inter = -(torch.logsumexp(logits + weights, 1) + logdet).mean() / channels
    posterior = (logits + weights.detach()).log_softmax(1) - weights.detach()
    target = smoothed(product, mixture.products, smoothing).to(z.dtype)
    probability = logits.log_softmax(1)
    entropy = -(probability.exp() * probability).sum(1).mean()
    centres = torch.cat([torch.zeros_like(mixture.mu)[:, None], mixture.delta], 1) + mixture.mu.detach()[:, None]
    squared = (z[:, None] - centres[product]).square().sum(2)  # (n, M, D) -> (n, M)
    inside = torch.logsumexp(-squared / 2 + mixture.psi_intra.log_softmax(1)[product], 1) + logdet
    density = inside / channels - LOG_2PI / 2
    information = -(target * posterior).sum(1).mean()
    return inter, information, entropy, -inside.mean() / channels, -F.logsigmoid(density).mean()


def losses(level: Level, vectors: Tensor, product: Tensor, form: Form, smoothing: float) -> tuple[Tensor, ...]:
    """The five losses of images of products (m,) from all their vectors (m, p, C)."""
    z, logdet = latent(level, vectors, form)
    if not form.products:
        return naive_losses(level.mixture, z, logdet, product.repeat_interleave(vectors.shape[1]), smoothing)
    z, logdet = z.reshape(vectors.shape)[:, None], logdet.reshape(vectors.shape[:2])[:, None]
    terms = level.mixture.terms(z, logdet, product, smoothing)
    return terms.inter, terms.information, terms.entropy, terms.intra, terms.sigmoid


def total(detector: HGAD, level: int, vectors: Tensor, product: Tensor, form: Form, progress: float) -> Tensor:
    """What is minimised, Eq. 11 and the published code."""
    parts = losses(detector.level(level), vectors, product, form, detector.label_smoothing)
    first = detector.lambda1 * parts[0] + detector.lambda2 * parts[1] + parts[2]
    return first if progress < detector.first_stage else first + parts[3] + parts[4]


class Stepper:
    """A detector and its optimizers, stepped in any form."""

    def __init__(self, detector: HGAD, recipe: Recipe) -> None:
        self.detector, self.recipe = detector, recipe
        groups = [self._groups(level) for level in range(len(detector.levels))]
        self.shared = self._adam([group for level in groups for group in level])
        self.own = [self._adam(level) for level in groups]

    def _groups(self, level: int) -> list[dict[str, Any]]:
        return [
            {"params": list(group.parameters), "weight_decay": self.recipe.decay if group.decayed else 0.0}
            for group in self.detector.groups(level)
        ]

    def _adam(self, groups: list[dict[str, Any]]) -> torch.optim.Adam:
        return torch.optim.Adam(groups, lr=0.0, betas=(self.recipe.beta1, self.recipe.beta2))

    def step(self, levels: Sequence[Tensor], product: Tensor, progress: float, form: Form) -> None:
        """An optimizer step on each level (m, p, C) in turn."""
        for level, vectors in enumerate(levels):
            optimizer = self.own[level] if form.separate else self.shared
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(progress, self.recipe)
            optimizer.zero_grad(set_to_none=form.separate)
            torch.autograd.backward(total(self.detector, level, vectors, product, form, progress))
            optimizer.step()


# The images.


@dataclass(frozen=True, slots=True)
class Material:
    """Training images as each form sees them."""

    records: Sequence[Record]
    product: np.ndarray
    features: FeatureSet
    preparation: Preparation
    network: Callable[[Tensor], list[Tensor]]


def orders(steps: int, count: int, images: int, seed: int) -> np.ndarray:
    """Images of each step, (steps, m), as fit.Sampler draws them: without replacement within a pass, the rest dropped."""
    per_pass = max(1, count // images)
    rows = []
    for step in range(steps):
        turn, place = divmod(step, per_pass)
        rows.append(np.random.default_rng((seed, turn)).permutation(count)[place * images : (place + 1) * images])
    return np.stack(rows)


def decoded(material: Material, order: np.ndarray) -> Iterator[Tensor]:
    """Images (m, 3, H, W) uint8 of each step, read from their files."""
    records = [material.records[image] for image in order.flatten()]
    for batch in Loader(records, material.preparation, batch_size=order.shape[1], strict=True):
        yield batch.images


def read(features: Any, images: np.ndarray) -> list[Tensor]:
    """All vectors of some images, levels (m, p, C)."""
    levels = []
    for level, (channels, height, width) in enumerate(features.shapes):
        places = np.broadcast_to(np.arange(height * width), (len(images), height * width))
        levels.append(features.gather(level, images, places).reshape(len(images), height * width, channels))
    return levels


def steps_of(
    material: Material, order: np.ndarray, form: Form, pixels: Sequence[Tensor] = ()
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Levels (m, p, C) and products (m,) of each step; `pixels` are the images of the steps where they are decoded."""
    source = iter(pixels) if form.decoded else decoded(material, order)
    for images in order:
        levels = read(material.features, images) if form.cached else material.network(next(source))
        yield levels, torch.from_numpy(material.product[images])


def gather_material(data: Path, chosen: argparse.Namespace, cache: FeatureCache) -> tuple[Material, Labelled, float]:
    """Training images, held-out features and the seconds that it took to fill the empty cache."""
    normal = [record for record in read_data(data) if record.split == "train"]
    split = split_normals(_thinned(normal, chosen.images), 0.1, 0.14, 0)
    names = sorted({str(record.product) for record in normal})
    preparation = Preparation(size=chosen.size)
    layer = FeatureSettings(chosen.backbone, (f"blocks.{chosen.stage}",), scales=SCALES, pooled=(), weights=chosen.weights)
    start = time.perf_counter()
    eyes = layer.build()
    sets = [cached(records, split.hashes, preparation, eyes, cache) for records in (split.train, split.held_out)]
    seconds = time.perf_counter() - start
    products = [np.array([names.index(str(record.product)) for record in part]) for part in (split.train, split.held_out)]
    network = WholeNetwork(chosen.backbone, chosen.stage, SCALES, chosen.weights)
    material = Material(split.train, products[0], sets[0], preparation, network)
    return material, Labelled(sets[1], products[1]), seconds


def _thinned(records: Sequence[Record], images: int) -> list[Record]:
    """At most so many of each product; 0: all."""
    seen: dict[str | None, int] = {}
    kept = []
    for record in records:
        seen[record.product] = seen.get(record.product, 0) + 1
        if not images or seen[record.product] <= images:
            kept.append(record)
    return kept


def cached(
    records: Sequence[Record], hashes: Mapping[Path, str], preparation: Preparation, eyes: Engine, cache: FeatureCache
) -> FeatureSet:
    """Features of all records."""

    def batches(wanted: list[int]) -> Iterator[Batch]:
        places = torch.tensor(wanted)
        for batch in Loader([records[place] for place in wanted], preparation, strict=True):
            yield Batch(batch.images, places[batch.index])

    paths = [record.path for record in records]
    key = json.dumps(asdict(preparation), sort_keys=True)
    return cache.features(paths, [hashes[path] for path in paths], batches, eyes, key)


# That both loops compute the same.


class Doubled:
    """Some images of a FeatureSet in double precision, for comparisons that rounding must not decide."""

    def __init__(self, features: FeatureSet, images: int) -> None:
        self.features, self.count, self.shapes = features, min(images, len(features)), features.shapes

    def __len__(self) -> int:
        return self.count

    def gather(self, level: int, images: np.ndarray, places: np.ndarray) -> Tensor:
        """As a FeatureSet."""
        return self.features.gather(level, images, places).double()

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        """None: the published start looks at no features, and nothing follows the loop."""
        yield from ()


def same_losses(detector: HGAD, features: Any, product: np.ndarray) -> float:
    """Largest difference of a loss between any form and ours, same weights, over the largest loss of the level."""
    images = np.arange(min(8, len(features)))
    levels, y, worst = read(features, images), torch.from_numpy(product[images]), 0.0
    for number, vectors in enumerate(levels):
        level = detector.level(number)
        with torch.no_grad():
            z, logdet = level.latent(vectors[:, None], level.everywhere(len(images)))
            terms = level.mixture.terms(z, logdet, y, detector.label_smoothing)
            ours = torch.stack([terms.inter, terms.information, terms.entropy, terms.intra, terms.sigmoid])
            for form in ladder().values():
                other = torch.stack(losses(level, vectors, y, form, detector.label_smoothing))
                worst = max(worst, float((other - ours).abs().max() / ours.abs().max()))
    return worst


def same_weights(detector: HGAD, features: Any, product: np.ndarray, recipe: Recipe) -> float:
    """Largest difference of a weight after the recipe's few steps by the naive loop and by fit, same images, same Adam."""
    ours, theirs = copy.deepcopy(detector), copy.deepcopy(detector)
    data = Labelled(features, product)
    fit(ours, data, data, recipe, seed=0)
    stepper = Stepper(theirs, recipe)
    for step, images in enumerate(orders(recipe.steps, len(features), recipe.images, 0)):
        stepper.step(read(features, images), torch.from_numpy(product[images]), step / recipe.steps, Form())
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    return max(float((one - other).detach().abs().max()) for one, other in pairs)


def checked(detector: HGAD, material: Material) -> list[str]:
    """Sentences for the page; an error where the loops disagree."""
    wide, double = copy.deepcopy(detector).double(), Doubled(material.features, 24)
    recipe = Recipe(**OPTIMISED | {"steps": 3, "images": min(8, len(double))})
    single = same_losses(detector, material.features, material.product)
    exact = same_losses(wide, double, material.product)
    drift = same_weights(wide, double, material.product[: len(double)], recipe)
    if single > 1e-5 or exact > 1e-12 or drift > 1e-9:
        raise SystemExit(f"the loops differ: losses by {single:.1e} ({exact:.1e} in double), weights by {drift:.1e}")
    return [
        f"Same losses from the same weights in every form: largest relative difference {single:.0e}, {exact:.0e} in double.",
        f"Same weights after 3 steps of 2e-4 in double precision, one shared Adam: largest difference {drift:.0e}.",
        f"Features kept in half precision against the whole network: {100 * feature_gap(material):.2f} % of their spread.",
    ]


def feature_gap(material: Material) -> float:
    """Root mean square difference between cached features and those of the whole network, over the features' spread."""
    images = np.arange(min(8, len(material.features)))
    fresh = material.network(next(decoded(material, images[None])))
    pairs = list(zip(read(material.features, images), fresh, strict=True))
    return max(float((one - other).square().mean().sqrt() / other.std()) for one, other in pairs)


# The ladder.


@dataclass(frozen=True, slots=True)
class Windows:
    """Seconds a step, window by window."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def window(material: Material, stepper: Stepper, form: Form, order: np.ndarray) -> float:
    """Seconds a step of one window, in the second stage, where all losses are in."""
    pixels = list(decoded(material, order)) if form.decoded and not form.cached else []
    start = time.perf_counter()
    for levels, product in steps_of(material, order, form, pixels):
        stepper.step(levels, product, 0.5, form)
    return (time.perf_counter() - start) / len(order)


def our_window(detector: HGAD, train: Labelled, recipe: Recipe, first_stage: float = 0.0) -> float:
    """Seconds a step of `fit` itself, the first one left out as it makes the optimizers' state."""
    marks: list[float] = []
    detector.first_stage = first_stage
    longer = replace(recipe, steps=recipe.steps + 1, optimizer="per_level")
    fit(detector, train, train, longer, seed=0, progress=lambda *_: marks.append(time.perf_counter()))
    return (marks[-1] - marks[0]) / recipe.steps


def measure_ladder(material: Material, detector: HGAD, recipe: Recipe, repeats: int) -> list[Windows]:
    """A row for every form and for `fit`, in turns, so that a slow minute of the machine falls on all."""
    detector, train = copy.deepcopy(detector), Labelled(material.features, material.product)
    order = orders(recipe.steps, len(material.features), recipe.images, 0)
    stepper = Stepper(detector, recipe)
    works: dict[str, Callable[[], float]] = {
        name: lambda form=form: window(material, stepper, form, order)  # type: ignore[misc]
        for name, form in ladder().items()
    }
    works["our loop (fit)"] = lambda: our_window(detector, train, recipe)
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(repeats + 1):
        for name, work in works.items():
            seconds = work()
            if turn:  # the first turn warms up
                found[name].append(seconds)
    return [Windows(name, seconds) for name, seconds in found.items()]


# Time to the same likelihood.


@dataclass(frozen=True, slots=True)
class Reached:
    """How a loop came to the likelihood: seconds and steps until then, the loss there, and all of them."""

    name: str
    seconds: float
    steps: int
    loss: float
    reached: bool


@torch.no_grad()
def held_out_loss(detector: HGAD, held_out: Labelled) -> float:
    """Negative log-likelihood per dimension of all held-out images, nats, mean over the levels."""
    sums = np.zeros(len(detector.levels))
    for start in range(0, len(held_out.features), 16):
        images = np.arange(start, min(start + 16, len(held_out.features)))
        product = torch.from_numpy(held_out.product[images])
        for number, vectors in enumerate(read(held_out.features, images)):
            places = detector.level(number).everywhere(len(images))
            sums[number] += len(images) * float(detector.held_out_loss(number, vectors[:, None], places, product))
    return float(sums.mean() / len(held_out.features))


def naive_run(material: Material, held_out: Labelled, detector: HGAD, recipe: Recipe) -> Reached:
    """The whole naive loop; looking at held-out images is not in its time."""
    stepper, form = Stepper(detector, recipe), Form()
    order = orders(recipe.steps, len(material.features), recipe.images, 0)
    start = time.perf_counter()
    for step, (levels, product) in enumerate(steps_of(material, order, form)):
        stepper.step(levels, product, step / recipe.steps, form)
    seconds = time.perf_counter() - start
    return Reached("naive loop", seconds, recipe.steps, held_out_loss(detector, held_out), True)


def our_run(
    name: str, material: Material, held_out: Labelled, detector: HGAD, recipe: Recipe, target: float, before: float
) -> Reached:
    """`fit` up to the first check at the target, or to its end; the checks, statistics and `before` are in its time."""
    marks: list[tuple[float, int]] = []
    start = time.perf_counter() - before
    history = fit(
        detector,
        Labelled(material.features, material.product),
        held_out,
        recipe,
        seed=0,
        watch=lambda step, _: marks.append((time.perf_counter() - start, step)),
    )
    found = np.mean(history.held_out, axis=0)
    first = next((number for number, loss in enumerate(found) if loss <= target), len(found) - 1)
    return Reached(name, *marks[first], float(found[first]), bool(found[first] <= target))


def measure_likelihood(
    material: Material, held_out: Labelled, settings: dict[str, Any], recipe: Recipe, fill: float, steps: int
) -> tuple[list[Reached], float]:
    """Rows of the naive loop and ours; the loss before any step of the published start."""
    shapes, products = material.features.shapes, int(material.product.max()) + 1
    raw = Learning(shapes, products, **settings)
    start = held_out_loss(raw, held_out)
    naive = naive_run(material, held_out, copy.deepcopy(raw), recipe)
    looked: dict[str, Any] = {"held_out_images": len(held_out.features), "patience": 10**6}
    # The same arithmetic ends within rounding of the same loss.
    near = naive.loss + 1e-3 * abs(naive.loss)
    rows = [naive]
    same = replace(recipe, checks=1, **looked)
    rows.append(our_run("ours, same start, same Adam", material, held_out, raw, same, near, fill))
    own = Recipe(steps=steps, checks=min(8, steps), **looked)
    size = {name: settings[name] for name in ("blocks", "position")}
    gaussian = Learning(shapes, products, **size)
    rows.append(our_run("ours, Gaussian start, same flow", material, held_out, gaussian, own, naive.loss, fill))
    default = Learning(shapes, products)
    rows.append(our_run("ours, default", material, held_out, default, own, naive.loss, fill))
    return rows, start


# The share of the peak.


def step_flops(
    shapes: Sequence[tuple[int, int, int]],
    images: int,
    products: int,
    blocks: int = 12,
    position: int = 256,
    centres: int = 10,
    fused: bool = True,
) -> tuple[float, float]:
    """Floating point operations of the matrix products of a step, forward and backward, all levels; an add is one of two.

    Backward takes two products for each of forward, but for what needs no gradient: the input of the first block and, as
    published, the rotations; with the condition once a place (`fused`) its encoding, which otherwise goes through the
    subnets with every vector.
    """
    forward = idle = 0.0
    for channels, height, width in shapes:
        moved, kept = channels // 2, channels - channels // 2
        hidden, vectors = 2 * (kept + position), images * height * width
        encoded = (height * width if fused else vectors) * position * hidden
        vector = blocks * (kept * hidden + hidden * 2 * moved + channels**2) + channels * (products + centres)
        forward += vectors * vector + blocks * encoded
        idle += vectors * kept * hidden + (blocks if fused else 1) * encoded
        idle += 0 if fused else vectors * blocks * channels**2
    return 2 * forward, 4 * forward - 2 * idle


@dataclass(frozen=True, slots=True)
class Rate:
    """Speed of the published setting in one precision; peak in FLOP/s, None where it is not known."""

    precision: str
    compiled: bool
    seconds: float
    vectors: float
    flops: float
    peak: float | None


def measure_rate(
    device: str,
    precision: str,
    compiled: bool,
    peak: float | None,
    shapes: Sequence[tuple[int, int, int]] = FAITHFUL,
    images: int = 8,
    repeats: int = 5,
    steps: int = 4,
    settings: dict[str, Any] = PUBLISHED,
) -> Rate:
    """Median of windows of steps on drawn features that lie on the device."""
    detector = Learning(shapes, PRODUCTS, **settings).to(device)
    random = torch.Generator().manual_seed(0)
    levels = [torch.randn(images, 1, h * w, c, generator=random).to(device) for c, h, w in shapes]
    product = torch.arange(images, device=device) % PRODUCTS
    loss = torch.compile(detector.loss, dynamic=False) if compiled else detector.loss
    adams = [torch.optim.Adam(detector.level(number).parameters(), lr=2e-4) for number in range(len(levels))]

    def step() -> None:
        for number, vectors in enumerate(levels):
            adams[number].zero_grad()
            places = detector.level(number).everywhere(images)
            torch.autograd.backward(loss(number, vectors, places, product, 0.5)["total"])
            adams[number].step()

    set_precision(detector, "bf16" if precision == "bf16" else "f32")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    seconds = statistics.median(_windows(step, device, repeats, steps))
    torch.set_float32_matmul_precision(before)
    counted = {name: settings[name] for name in ("blocks", "position", "centres")}
    flops = sum(step_flops(shapes, images, PRODUCTS, **counted))
    vectors = images * sum(h * w for _, h, w in shapes)
    return Rate(precision, compiled, seconds, vectors / seconds, flops / seconds, peak)


def _windows(step: Callable[[], None], device: str, repeats: int, steps: int) -> list[float]:
    """Seconds a step of each window, after one that warms up and compiles."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    found = []
    for _ in range(repeats + 1):
        wait()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        found.append((time.perf_counter() - start) / steps)
    return found[1:]


def measure_rates(device: str, given: float | None) -> list[Rate]:
    """In all precisions, compiled and not; a peak that is given is that of bf16."""
    name = torch.cuda.get_device_name(device)
    known = next((peaks for part, peaks in PEAKS.items() if part in name), {"bf16": given} if given else {})
    return [
        measure_rate(device, precision, compiled, known.get(precision))
        for precision in ("f32", "tf32", "bf16")
        for compiled in (False, True)
    ]


# The page.


def ladder_page(rows: Sequence[Windows], recipe: Recipe) -> list[str]:
    """Table of the ladder."""
    lines = [
        f"## What each change gives to a step of {recipe.images} images",
        "",
        f"Median of {len(rows[0].seconds)} windows of {recipe.steps} steps (fastest to slowest), all rows in turns.",
        "",
        "| | s a step | windows | times faster than the row before | than the naive loop |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    before = rows[0]
    for row in rows:
        spread = f"{min(row.seconds):.3f} to {max(row.seconds):.3f}"
        gains = f"{before.median / row.median:.2f} | {rows[0].median / row.median:.1f}"
        lines.append(f"| {row.name} | {row.median:.3f} | {spread} | {gains} |")
        before = row
    return lines


def likelihood_page(rows: Sequence[Reached], start: float, fill: float, passes: float, images: int) -> list[str]:
    """Table of the times to the same likelihood."""
    naive = rows[0]
    lines = [
        "",
        f"## Time to the held-out likelihood of the naive loop after {passes:g} passes over {images} images",
        "",
        "Negative log-likelihood per dimension of held-out normals under their own product, nats, mean over the levels;",
        f"the log-determinant of the whitening is counted. Published start before any step: {start:.4f}. Our times include",
        "filling the cache, the statistics of the start and the looks at held-out images; those of the naive loop none.",
        "With the same start and the same Adam the arithmetic is the same, and so is the number of steps.",
        "",
        "| | s in all | s without filling the cache | steps | loss there | times faster |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        f"| filling the cache, once for all later runs | {fill:.1f} | | | | |",
    ]
    for row in rows:
        without = row.seconds - (0 if row is naive else fill)
        gain = f"{naive.seconds / row.seconds:.1f}" if row.reached else "not reached"
        lines.append(f"| {row.name} | {row.seconds:.1f} | {without:.1f} | {row.steps} | {row.loss:.4f} | {gain} |")
    return lines


def rate_page(rates: Sequence[Rate], device: str) -> list[str]:
    """What the published setting costs, and the speed of a GPU at it."""
    ours, naive = (sum(step_flops(FAITHFUL, 8, PRODUCTS, fused=fused)) for fused in (True, False))
    vectors = 8 * sum(h * w for _, h, w in FAITHFUL)
    lines = [
        "",
        "## The published setting: three levels of 200 channels at 1024 px, 12 blocks, 8 images a step",
        "",
        f"{vectors:,} vectors a step. Matrix products of the flow and the centres, forward and backward: {naive / 1e12:.2f}",
        f"TFLOP as published, {ours / 1e12:.2f} with the condition once a place.",
        "",
    ]
    if not rates:
        return [*lines, "No GPU at hand: vectors/s and the share of the peak were not measured."]
    lines += [f"{device}, features on the device:", ""]
    lines += ["| precision | compiled | ms a step | vectors/s | TFLOP/s | share of the dense peak |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: |"]
    for rate in rates:
        share = f"{100 * rate.flops / rate.peak:.1f} %" if rate.peak else "peak not known: give --peak"
        speed = f"{1e3 * rate.seconds:.1f} | {rate.vectors:,.0f} | {rate.flops / 1e12:.1f}"
        lines.append(f"| {rate.precision} | {'yes' if rate.compiled else 'no'} | {speed} | {share} |")
    return lines


def options() -> argparse.ArgumentParser:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/realdata"), help="folder of products")
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="an EfficientNet of timm")
    parser.add_argument("--weights", default="auto", help="as features.weights")
    parser.add_argument("--stage", type=int, default=4, help="the stage whose output is used")
    parser.add_argument("--size", type=int, default=256, help="side of the image, pixels")
    parser.add_argument("--images", type=int, default=0, help="at most so many normal images of a product; 0: all")
    parser.add_argument("--blocks", type=int, default=PUBLISHED["blocks"])
    parser.add_argument("--position", type=int, default=PUBLISHED["position"])
    parser.add_argument("--passes", type=float, default=4.0, help="of the naive loop")
    parser.add_argument("--steps", type=int, default=20, help="of our loop with a Gaussian start")
    parser.add_argument("--window", type=int, default=4, help="steps of a timed window")
    parser.add_argument("--repeats", type=int, default=5, help="windows of a row")
    parser.add_argument("--peak", type=float, help="dense bf16 peak of a GPU that is not in the table, FLOP/s")
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parent / "results" / "training.md")
    return parser


def page(chosen: argparse.Namespace) -> list[str]:
    """Everything measured, as Markdown."""
    settings = PUBLISHED | {"blocks": chosen.blocks, "position": chosen.position}
    with tempfile.TemporaryDirectory() as folder:
        material, held_out, fill = gather_material(chosen.data, chosen, FeatureCache(Path(folder)))
        count, size = len(material.features), min(OPTIMISED["images"], len(material.features))
        steps = max(1, round(chosen.passes * (count // size)))
        recipe = Recipe(**OPTIMISED | {"steps": steps, "images": size})
        detector = Learning(material.features.shapes, int(material.product.max()) + 1, **settings)
        same = checked(detector, material)
        print("\n".join(same), flush=True)
        timed = replace(recipe, steps=chosen.window)
        rungs = measure_ladder(material, detector, timed, chosen.repeats)
        print("\n".join(ladder_page(rungs, timed)), flush=True)
        reached, start = measure_likelihood(material, held_out, settings, recipe, fill, chosen.steps)
    passes = steps / (count // size)
    lines = [f"{line}  " for line in same] + [""] + ladder_page(rungs, timed)
    return lines + likelihood_page(reached, start, fill, passes, count)


def heading(chosen: argparse.Namespace) -> list[str]:
    """What was run, where and on what."""
    about = environment()
    given = " ".join(sys.argv[1:])
    size = f"{chosen.backbone}, blocks.{chosen.stage}, {chosen.size} px at scales {', '.join(map(str, SCALES))}"
    flow = f"{chosen.blocks} blocks, {chosen.position} channels of position, {PUBLISHED['centres']} centres"
    return [
        "# Time of training HGAD: a loop as published against ours",
        "",
        f"Command: `{' '.join(['python benchmarks/training.py', given]).strip()}`",
        "",
        f"{about['machine']}, {torch.get_num_threads()} threads of torch; {about['versions']}",
        "",
        f"{chosen.data.name}: {size}; {flow}; published start, learning rate {OPTIMISED['learning_rate']}, its schedule",
        "over the steps that are run. The naive loop is in our own words, after the published code.",
        "",
    ]


def main() -> None:
    """Measure and write the page."""
    chosen = options().parse_args()
    lines = heading(chosen) + page(chosen)
    gpu = torch.cuda.is_available()
    rates = measure_rates("cuda", chosen.peak) if gpu else []
    lines += rate_page(rates, torch.cuda.get_device_name() if gpu else "")
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text("\n".join(lines) + "\n", "utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
