"""What every detector keeps to, on planted features or images of three products. A new method adds a line to CASES."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from planted import labelled
from unispect.detectors.base import Detector, GradientDetector, Recipe, StatisticalDetector
from unispect.detectors.methods import METHODS, build, sections
from unispect.fit import Labelled, fit, learn
from unispect.inspector import complete
from unispect.types import Features, Scores

SHAPES = [(8, 4, 4), (12, 2, 2), (10, 1, 1)]
IMAGE = (3, 32, 32)
PRODUCTS = 3
SIDE = 16
SHORT = Recipe(steps=12, images=12, places=2, checks=3, learning_rate=1e-3)
LONG = Recipe(steps=100, images=12, places=4, checks=2, learning_rate=1e-2)
VECTORS = Recipe(steps=60, images=12, places=0, vectors=64, checks=2, learning_rate=5e-2)
MAPS = Recipe(steps=40, images=12, checks=2, learning_rate=3e-3)
IMAGES = Recipe(steps=300, images=20, checks=2, learning_rate=5e-3, schedule="drop")
TOKENS = Recipe(steps=60, images=12, checks=2, learning_rate=3e-3, rule="adamw", clip=1.0, schedule="drop")
WHOLE = Recipe(steps=140, images=24, checks=2, learning_rate=3e-3, beta1=0.9, beta2=0.999, decay=0.0, schedule="drop")
BOTH = Recipe(steps=300, images=20, checks=2, learning_rate=5e-3, rule="adamw", schedule="drop")
NOISE = {"features": 1.0, "calm": 0.3}
PUBLISHED = {"covariance": "identity", "lambda2": 100.0, "label_smoothing": 0.02}


@dataclass(frozen=True)
class Case:
    """A method, its options and training, and the defect that it should see: "far" from everything that is normal,
    half-way "between" two products, since HGAD's published score wants what is unlikely and of uncertain product, or as
    far in every level, "large", since SPADE's image score looks at pooled levels only. Its world is one of "features", of
    "calm" features with little noise for what learns to give them back, of "pixels" for what looks at images itself, or of
    "encoded" images, which come after the features of a small encoder."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe = SHORT
    defect: str = "far"
    random: bool = True  # whether the seed has a say
    world: str = "features"


CASES = [
    Case("hgad"),
    Case("hgad", {"covariance": "product", "likelihood": "marginal"}),
    Case("hgad", PUBLISHED | {"score": "gated"}, defect="between"),
    Case("hgad", PUBLISHED | {"score": "product"}, defect="between"),
    Case("hgad", PUBLISHED | {"start": "published", "delta_scale": 1.0}, LONG),
    Case("cflow", recipe=VECTORS),
    Case("cflow", {"position": 0, "mixing": "permutation"}, VECTORS),
    Case("draem", recipe=WHOLE, world="pixels"),
    Case("fastflow", recipe=MAPS),
    Case("fastflow", {"kernels": [3, 1], "ratio": 0.5, "affine": True, "per_dimension": True}, MAPS),
    Case("opca", random=False),
    Case("opca", {"image": "top", "components": "pca", "variance": 0.95}, random=False),
    Case("opca", {"mode": "pooled", "components": "all"}, random=False),
    Case("opca", {"per_product": False, "components": "all"}, random=False),
    Case("padim", {"dimension": 12}),
    Case("patchcore"),
    Case("patchcore", {"distance": "squared", "reweighting": "softmax"}),
    Case("recontrast", recipe=BOTH, world="encoded"),
    Case("recontrast", {"activation": "relu", "joined": "sum", "top": 0.0}, BOTH, world="encoded"),
    Case("revdist", recipe=IMAGES, world="calm"),
    Case("revdist", {"activation": "relu", "joined": "sum", "top": 0.0}, IMAGES, world="calm"),
    Case("spade", defect="large", random=False),
    Case("uniad", recipe=TOKENS),
    Case("uniad", {"map": "mean", "neighbourhood": 0, "jitter_probability": 0.5, "sigma": 1.0}, TOKENS),
    Case("neighbours"),
    Case("neighbours", {"whitening": 1.0, "neighbours": 1}),
    Case("ensemble"),
    Case("ensemble", {"members": ["neighbours", "padim", "spade"], "weights": [1, 1, 1]}),
]
SMALL = {
    "hgad": {"blocks": 2, "position": 8, "centres": 3, "map_side": SIDE, "sigma": 1.0},
    "cflow": {"blocks": 2, "position": 8, "map_side": SIDE},
    "draem": {"width": 6, "segmentation_width": 6, "rotated": 0.0, "map_side": SIDE},
    "fastflow": {"blocks": 2, "map_side": SIDE},
    "opca": {"map_side": SIDE, "sigma": 1.0},
    "padim": {"map_side": SIDE, "sigma": 1.0},
    "patchcore": {"map_side": SIDE, "sigma": 1.0, "dimension": 32, "coreset": 0.5},
    "recontrast": {"map_side": SIDE, "sigma": 1.0, "depths": [1, 1]},
    "revdist": {"map_side": SIDE, "sigma": 1.0, "depths": [1, 1]},
    "spade": {"map_side": SIDE, "sigma": 1.0},
    "uniad": {
        "grid": 4,
        "width": 16,
        "heads": 2,
        "hidden": 32,
        "layers": 2,
        "neighbourhood": 3,
        "image": 4,
        "map_side": SIDE,
    },
    "neighbours": {"map_side": SIDE, "sigma": 1.0, "bank_images": 12.5, "around": 10},
    "ensemble": {"map_side": SIDE, "sigma": 1.0},
}

every_case = pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{case.method}-{n}" for n, case in enumerate(CASES)])


def centres() -> Features:
    """Mean of each product at each place, (K, C, h, w) for each level."""
    world = torch.Generator().manual_seed(0)
    return [
        3 * torch.randn(PRODUCTS, channels, 1, 1, generator=world)
        + 0.2 * torch.randn(PRODUCTS, channels, height, width, generator=world)
        for channels, height, width in SHAPES
    ]


class Encoder(nn.Module):
    """Images (N, 3, 32, 32) -> levels (N, 8, 4, 4) and (N, 12, 2, 2), with weights that are always the same at first."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 12, 2, stride=2)

    def forward(self, images: Tensor) -> Features:
        first = self.first(images).tanh()
        return [first, self.second(first).tanh()]


def encoded(images: Tensor) -> Features:
    """The levels of a frozen encoder, and the images."""
    with torch.no_grad():
        return [*Encoder()(images), images]


def normal(count: int, seed: int, world: str = "features") -> tuple[Features, Tensor]:
    """Normal images of a world, and the product of each."""
    if world in NOISE:
        return normal_features(count, seed, NOISE[world])
    levels, product = pictures(count, seed)
    return encoded(levels[0]) if world == "encoded" else levels, product


def normal_features(count: int, seed: int, spread: float) -> tuple[Features, Tensor]:
    """Each product has means that differ by place and correlations of its own."""
    world, noise = torch.Generator().manual_seed(1), torch.Generator().manual_seed(seed)
    product, levels = torch.arange(count) % PRODUCTS, []
    for mean in centres():
        mixing = torch.eye(mean.shape[1]) + 0.2 * torch.randn(PRODUCTS, mean.shape[1], mean.shape[1], generator=world)
        drawn = torch.randn(count, *mean.shape[1:], generator=noise)
        levels.append(mean[product] + spread * torch.einsum("nde,nehw->ndhw", mixing[product], drawn))
    return levels, product


def defective(count: int, seed: int, kind: str = "far", world: str = "features") -> tuple[Features, Tensor]:
    """Normal images of a world with a defect, and its place on a 4 x 4 grid."""
    if world in NOISE:
        return defective_features(count, seed, kind, NOISE[world])
    levels, place = spotted(count, seed)
    return encoded(levels[0]) if world == "encoded" else levels, place


def defective_features(count: int, seed: int, kind: str, spread: float) -> tuple[Features, Tensor]:
    """Normal images with one bad place in each dense level, and that place of the 4 x 4 grid."""
    levels, product = normal_features(count, seed, spread)
    place = torch.randint(16, (count,), generator=torch.Generator().manual_seed(seed))
    for level, mean in zip(levels[:2], centres(), strict=False):
        stride = 4 // level.shape[2]
        where = (torch.arange(count), slice(None), place // 4 // stride, place % 4 // stride)
        between = (mean + mean.roll(1, 0))[product] / 2
        away = 5 * torch.randn(level.shape[1], generator=torch.Generator().manual_seed(seed))
        level[where] = between[where] if kind == "between" else level[where] + away
    if kind == "large":
        levels[2] = levels[2] + 5
    return levels, place


def pictures(count: int, seed: int) -> tuple[Features, Tensor]:
    """Each product has stripes of its own width, direction and colours, never quite at the same place."""
    noise = torch.Generator().manual_seed(seed)
    product = torch.arange(count) % PRODUCTS
    line = torch.arange(IMAGE[1]) / IMAGE[1]
    along = torch.where((product == 1)[:, None, None], line[:, None], line)
    shift, grain = torch.rand(count, 1, 1, generator=noise), torch.randn(count, *IMAGE, generator=noise)
    wave = torch.sin(2 * torch.pi * ((2 + product)[:, None, None] * along + 0.2 * shift))
    colours = torch.tensor([[0.5, 0.4, 0.3], [0.4, 0.5, 0.5], [0.6, 0.5, 0.4]])[product]
    return [(colours[:, :, None, None] * (1 + 0.2 * wave[:, None]) + 0.02 * grain).clamp(0, 1)], product


def spotted(count: int, seed: int) -> tuple[Features, Tensor]:
    """Normal images with a bright or dark spot in a place of the 4 x 4 grid, and that place."""
    (images,), _ = pictures(count, seed)
    draws = torch.Generator().manual_seed(seed)
    place, bright = (torch.randint(high, (count,), generator=draws) for high in (16, 2))
    for image, where, light in zip(images, place.tolist(), bright.tolist(), strict=True):
        top, left = 8 * (where // 4), 8 * (where % 4)
        image[:, top : top + 8, left : left + 8] = 0.95 * light
    return [images], place


def planted(count: int, seed: int, world: str) -> Labelled:
    levels, product = normal(count, seed, world)
    return labelled(levels, product.numpy())


def empty(case: int, seed: int = 0) -> Detector:
    """The detector before it has learnt; members of an ensemble are small, too."""
    chosen = CASES[case]
    shapes = {"pixels": [IMAGE], "encoded": [*SHAPES[:2], IMAGE]}.get(chosen.world, SHAPES)
    encoder = Encoder() if chosen.world == "encoded" else None
    own = SMALL[chosen.method] | chosen.options
    given = {name: SMALL[name] for name in sections(chosen.method, own)} | {chosen.method: own}
    return build(complete({"method": chosen.method, "seed": seed} | given), shapes, PRODUCTS, encoder)


def learnt(case: int, seed: int = 0, steps: int | None = None) -> Detector:
    # Where the seed of the method alone decides, it is the one that changes; HGAD's start is left as it is.
    detector, world = empty(case, 0 if CASES[case].method == "hgad" else seed), CASES[case].world
    if isinstance(detector, StatisticalDetector):
        learn(detector, planted(60, 1, world))
    else:
        assert isinstance(detector, GradientDetector)
        recipe = CASES[case].recipe if steps is None else replace(CASES[case].recipe, steps=steps)
        fit(detector, planted(60, 1, world), planted(24, 2, world), recipe, seed)
    return detector.eval()


shared = lru_cache(maxsize=None)(learnt)  # for tests that only read


def good(case: int, count: int, seed: int) -> tuple[Features, Tensor]:
    """Normal images of the case's world, and the product of each."""
    return normal(count, seed, CASES[case].world)


def bad(case: int, count: int, seed: int) -> tuple[Features, Tensor]:
    """Images with the case's defect, and its place."""
    return defective(count, seed, CASES[case].defect, CASES[case].world)


def fields(scores: Scores) -> dict[str, Tensor]:
    found = {"image": scores.image, "maps": scores.maps, "products": scores.products}
    return {name: value for name, value in found.items() if value is not None}


def same(one: Scores, other: Scores, tolerance: float = 0.0) -> None:
    assert fields(one).keys() == fields(other).keys()
    for name, value in fields(one).items():
        torch.testing.assert_close(value, fields(other)[name], rtol=tolerance, atol=tolerance)


def test_every_method_has_a_case() -> None:
    assert {case.method for case in CASES} == set(METHODS) == set(SMALL)


@every_case
def test_shapes(case: int) -> None:
    scores = shared(case)(good(case, 5, 3)[0])
    assert scores.image.shape == (5,)
    assert scores.maps.shape == (5, SIDE, SIDE)
    assert all(torch.isfinite(value).all() and value.dtype == torch.float32 for value in fields(scores).values())
    assert not any(value.requires_grad for value in fields(scores).values())
    if scores.products is not None:
        torch.testing.assert_close(scores.products.exp().sum(1), torch.ones(5))


@every_case
def test_higher_is_more_abnormal(case: int) -> None:
    low, high = shared(case)(good(case, 60, 4)[0]), shared(case)(bad(case, 60, 5)[0])
    assert roc_auc_score([0] * 60 + [1] * 60, torch.cat([low.image, high.image])) > 0.9


@every_case
def test_the_map_reacts_where_the_defect_is(case: int) -> None:
    levels, place = bad(case, 60, 5)
    change = shared(case)(levels).maps - shared(case)(good(case, 60, 5)[0]).maps
    # Aligned corners put the places of a 4 x 4 grid at 0, 5, 10 and 15 of 16.
    near = torch.arange(SIDE).sub(5 * (place // 4)[:, None]).abs()[:, :, None] <= 5
    near = near & (torch.arange(SIDE).sub(5 * (place % 4)[:, None]).abs()[:, None, :] <= 5)
    inside = change.masked_fill(~near, 0).sum((1, 2)) / near.sum((1, 2))
    outside = change.masked_fill(near, 0).sum((1, 2)) / (~near).sum((1, 2))
    assert (inside > outside).float().mean() > 0.9


@every_case
def test_an_image_scores_the_same_alone_and_among_others(case: int) -> None:
    levels = [torch.cat(pair) for pair in zip(good(case, 6, 3)[0], defective(6, 3, world=CASES[case].world)[0], strict=True)]
    whole = shared(case)(levels)
    rows = [shared(case)([level[image : image + 1] for level in levels]) for image in range(12)]
    joined = {name: torch.cat([fields(row)[name] for row in rows]) for name in fields(whole)}
    same(whole, Scores(joined["image"], joined["maps"], joined.get("products")), 1e-5)


@every_case
def test_scoring_changes_nothing(case: int) -> None:
    detector = shared(case)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    levels, _ = defective(6, 3, world=CASES[case].world)
    copies = [level.clone() for level in levels]
    first = detector(levels)
    same(first, detector(levels))
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert all(torch.equal(level, copy) for level, copy in zip(levels, copies, strict=True))


@every_case
def test_state_goes_round(case: int) -> None:
    other = empty(case)
    other.load_state_dict(shared(case).state_dict())
    levels, _ = defective(6, 3, world=CASES[case].world)
    same(shared(case)(levels), other.eval()(levels))


@every_case
def test_the_seed_decides(case: int) -> None:
    """By a few steps, which is enough to tell."""
    again = learnt(case, steps=8).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in learnt(case, steps=8).state_dict().items())
    different = learnt(case, seed=1, steps=8).state_dict()
    changed = any(
        value.shape != again[name].shape or not torch.equal(value, again[name]) for name, value in different.items()
    )
    assert changed == CASES[case].random


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_product_is_asked_for_when_scoring(method: Callable[..., Detector]) -> None:
    forward = inspect.signature(getattr(method, "forward"))  # noqa: B009
    assert list(forward.parameters) == ["self", "features"]


@every_case
def test_held_out_images_score_like_new_ones_where_an_aligner_relies_on_it(case: int) -> None:
    detector = shared(case)
    if isinstance(detector, StatisticalDetector) or not detector.spares_held_out:
        pytest.skip("an aligner has its scores out of fold")
    held_out, new = detector(good(case, 24, 2)[0]).image, detector(good(case, 60, 7)[0]).image
    auroc = roc_auc_score([0] * 24 + [1] * 60, torch.cat([held_out, new]))
    assert auroc == pytest.approx(0.5, abs=0.2)


@every_case
def test_products_are_recognised_where_the_method_knows_them(case: int) -> None:
    levels, product = good(case, 60, 6)
    scores = shared(case)(levels)
    if scores.products is not None:
        assert (scores.products.argmax(1) == product).float().mean() > 0.9
