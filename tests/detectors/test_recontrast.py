"""ReContrast: its loss and score from their parts, which gradients pass, and what training leaves alone."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planted import labelled
from unispect.data.factory import write_products
from unispect.data.folder import read_folder
from unispect.detectors.base import Recipe
from unispect.detectors.recontrast import ReContrast, hard_only, strictness
from unispect.errors import ConfigError
from unispect.features.cache import FeatureCache
from unispect.fit import fit
from unispect.inspector import Inspector
from unispect.nn.decoder import Decoder, Heads
from unispect.types import Features, Finding

SHAPES = [(6, 8, 8), (10, 4, 4), (3, 16, 16)]
SIDE = 24


class Encoder(nn.Module):
    """Images (N, 3, 16, 16) -> levels of the shapes above."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 2, stride=2), nn.BatchNorm2d(6), nn.Tanh())
        self.second = nn.Conv2d(6, 10, 2, stride=2)

    def forward(self, images: Tensor) -> Features:
        first = self.first(images)
        return [first, self.second(first)]


torch.manual_seed(0)
FROZEN = Encoder().eval().requires_grad_(False)


def draw(images: int, seed: int = 0) -> Features:
    pixels = torch.rand(images, *SHAPES[-1], generator=torch.Generator().manual_seed(seed))
    return [*FROZEN(pixels), pixels]


def detector(**options: object) -> ReContrast:
    """One whose encoder has moved away from the frozen one."""
    encoder = deepcopy(FROZEN).requires_grad_()
    with torch.no_grad():
        for number, parameter in enumerate(encoder.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    given: dict[str, Any] = {"depths": (1, 1), "map_side": SIDE, "sigma": 0.0} | options
    return ReContrast(SHAPES, 2, encoder, **given).eval()


def parts(made: ReContrast, features: Features) -> list[tuple[Tensor, Tensor]]:
    """Goals and predictions, each half of the batch by itself: in evaluation no image knows of another."""
    networks = made.networks
    trained = networks.encoder(features[-1])
    of_frozen = networks.heads[0](networks.decoder(networks.bottleneck(trained)))
    of_trained = networks.heads[1](networks.decoder(networks.bottleneck(features[:2])))
    return list(zip([*features[:2], *trained], [*of_frozen, *of_trained], strict=True))


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Of two vectors, by its definition."""
    return one.flatten() @ other.flatten() / (one.norm() * other.norm())


@pytest.mark.parametrize(("joined", "top"), [("sum", 0.0), ("mean", 0.1)])
def test_score_and_map_from_their_parts(joined: str, top: float) -> None:
    features, made = draw(3), detector(joined=joined, top=top)
    with torch.no_grad():
        maps = []
        for goal, said in parts(made, features):
            flat = torch.stack(
                [
                    torch.stack([1 - cosine(a, b) for a, b in zip(one.flatten(1).T, other.flatten(1).T, strict=True)])
                    for one, other in zip(goal, said, strict=True)
                ]
            ).unflatten(1, goal.shape[2:])
            maps.append(F.interpolate(flat[:, None], (SIDE, SIDE), mode="bilinear", align_corners=True)[:, 0])
    expected = torch.stack(maps).sum(0) / (len(maps) if joined == "mean" else 1)
    assert len(maps) == 4
    scores = made(features)
    torch.testing.assert_close(scores.maps, expected, rtol=1e-4, atol=1e-5)
    places = expected.flatten(1).sort(descending=True).values
    torch.testing.assert_close(scores.image, places[:, : {0.0: 1, 0.1: 57}[top]].mean(1), rtol=1e-4, atol=1e-5)


def test_the_context_is_the_bottleneck_of_the_frozen_half() -> None:
    features, made = draw(3), detector()
    with torch.no_grad():
        expected = made.networks.bottleneck(features[:2])
    context = made(features).context
    assert context is not None
    torch.testing.assert_close(context, expected)


def test_the_loss_from_its_parts() -> None:
    features, made = draw(3), detector()
    pairs = [(goal, said) for goal, said in parts(made, features)]
    by_level = [sum(1 - cosine(one, other) for one, other in zip(*pair, strict=True)) / 3 for pair in pairs]
    expected = (by_level[0] + by_level[1]) / 2 + (by_level[2] + by_level[3]) / 2
    torch.testing.assert_close(made.loss(features, torch.zeros(3), 0.0)["total"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(made.held_out_loss(features, torch.zeros(3)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strict", [-3.0, -0.5, 1.0])
def test_easy_places_lend_no_gradient_and_hard_ones_all_of_it(strict: float) -> None:
    generator = torch.Generator().manual_seed(0)
    goal, start = (torch.randn(4, 5, 3, 3, generator=generator) for _ in range(2))
    said, plain = start.clone().requires_grad_(), start.clone().requires_grad_()
    kept = hard_only(goal, said, strict)
    assert torch.equal(kept, start)
    loss = sum(1 - cosine(one, other) for one, other in zip(goal, kept, strict=True))
    full = sum(1 - cosine(one, other) for one, other in zip(goal, plain, strict=True))
    torch.autograd.backward([torch.as_tensor(loss), torch.as_tensor(full)])
    assert said.grad is not None
    assert plain.grad is not None
    distances = [
        1 - float(cosine(goal[n, :, i, j], start[n, :, i, j])) for n in range(4) for i in range(3) for j in range(3)
    ]
    mean = sum(distances) / 36
    spread = (sum((value - mean) ** 2 for value in distances) / 35) ** 0.5
    easy = torch.tensor([value < mean + strict * spread for value in distances]).view(4, 1, 3, 3)
    assert easy.float().mean() == pytest.approx({-3.0: 0.0, -0.5: 0.3, 1.0: 0.85}[strict], abs=0.12)
    torch.testing.assert_close(said.grad, plain.grad.masked_fill(easy, 0.0))


def test_the_trained_encoder_learns_through_the_bottleneck_alone() -> None:
    """Its gradient is that of a loss whose goals come from a copy of it."""
    features, made = draw(3), detector()
    copy = deepcopy(made.networks.encoder)
    torch.autograd.backward(made.loss(features, torch.zeros(3), 0.0)["total"])  # at -3 nothing is easy
    found = [parameter.grad for parameter in made.networks.encoder.parameters()]
    made.zero_grad()
    with torch.no_grad():
        goals = [*features[:2], *copy(features[-1])]
    said = [prediction for _, prediction in parts(made, features)]
    losses = [1 - cosine(*pair) for goal, one in zip(goals, said, strict=True) for pair in zip(goal, one, strict=True)]
    torch.autograd.backward(torch.stack(losses).sum() / 6)
    for gradient, parameter in zip(found, made.networks.encoder.parameters(), strict=True):
        assert gradient is not None
        assert parameter.grad is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_more_places_become_easy_over_a_tenth_of_the_training() -> None:
    assert [strictness(share) for share in (0.0, 0.05, 0.1, 0.5)] == pytest.approx([-3, -1, 1, 1])
    assert ReContrast.stages[0] == pytest.approx(0.005)
    assert ReContrast.stages[-1] == pytest.approx(0.1)
    assert strictness(ReContrast.stages[-1]) == pytest.approx(1)


def test_training_moves_the_encoder_slowly_and_not_its_statistics() -> None:
    features = draw(8)
    made = detector(encoder_pace=0.01)
    before = {name: value.clone() for name, value in made.networks.state_dict().items()}
    data = labelled(features, torch.zeros(8, dtype=torch.long).numpy())
    fit(made, data, data, Recipe(steps=1, images=8, checks=0, learning_rate=1e-2, decay=0.0, schedule="drop"), 0)
    moved = {name: (value - before[name]).abs().max().item() for name, value in made.networks.state_dict().items()}
    weights = {name for name, _ in made.networks.named_parameters()}
    of_encoder = {name for name in moved if name.startswith("encoder.")}
    assert all(moved[name] <= 1.001e-4 for name in of_encoder & weights)  # Adam's first step is the rate
    assert max(moved[name] for name in of_encoder & weights) > 0.9e-4
    assert max(moved[name] for name in weights - of_encoder) > 0.9e-2
    assert not any(moved[name] for name in of_encoder - weights)
    assert made.train().networks.decoder.training
    assert not any(module.training for module in made.networks.encoder.modules())


def test_size_of_the_published_decoder_with_both_sets_of_heads() -> None:
    wide = [(256, 64, 64), (512, 32, 32), (1024, 16, 16)]
    with torch.device("meta"):
        parts = [Decoder(wide, (3, 4, 6)), Heads(wide), Heads(wide)]
    heads = [sum(value.numel() for value in part.parameters()) for part in parts]
    assert heads[1] == heads[2] == 65_792 + 262_656 + 1_049_600
    assert sum(heads) / 1e6 == pytest.approx(27.67, abs=0.01)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"joined": "product"}, "joined"),
        ({"activation": "tanh"}, "activation"),
        ({"top": -0.1}, "top"),
        ({"encoder_pace": -1.0}, "encoder_pace: got -1.0, expected at least 0"),
        ({"map_side": 0}, "map_side"),
    ],
)
def test_impossible_settings(option: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        detector(**option)


# On images.


CONFIG: dict[str, Any] = {
    "method": "recontrast",
    "preparation": {"size": 64},
    "recontrast": {"depths": [1, 1, 1], "map_side": 64},
    "training": {"steps": 3, "images": 4, "checks": 1, "learning_rate": 1e-2},
    "decision": {"false_alarm_rate": 0.2},
}


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_products(tmp_path_factory.mktemp("products"), 30, 2, 1, 64, products=["fabric", "gear"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> FeatureCache:
    return FeatureCache(tmp_path_factory.mktemp("cache"))


def test_a_model_comes_back_bit_by_bit_with_its_encoder(products: Path, cache: FeatureCache, tmp_path: Path) -> None:
    model = Inspector.fit(products, CONFIG, cache=cache)
    again = Inspector.load(model.save(tmp_path / "model"))
    assert isinstance(again.detector, ReContrast)
    trained, frozen = again.detector.networks.encoder.state_dict(), again.engine.extractor.state_dict()
    assert {name.removeprefix("extractor.") for name in trained} == set(frozen)
    assert any(not torch.equal(value, frozen[name.removeprefix("extractor.")]) for name, value in trained.items())
    test = [record for record in read_folder(products) if record.split == "test"]
    for (_, one), (_, other) in zip(model.findings(test), again.findings(test), strict=True):
        assert isinstance(one, Finding)
        assert isinstance(other, Finding)
        assert one.score == other.score


def test_without_training_both_encoders_see_the_same(products: Path, cache: FeatureCache) -> None:
    """To the half precision in which the cache keeps the features."""
    still = CONFIG | {"recontrast": {**CONFIG["recontrast"], "encoder_pace": 0.0}, "features": {"engine": "torch"}}
    model = Inspector.fit(products, {**still, "training": {**CONFIG["training"], "decay": 0.0}}, cache=cache)
    assert isinstance(model.detector, ReContrast)
    found, _ = model.features([record for record in read_folder(products) if record.split == "test"], cache=cache)
    *levels, image = found.stacked([0, 1, 2])
    with torch.no_grad():
        seen = model.detector.networks.encoder(image)
    for level, other in zip(levels, seen, strict=True):
        torch.testing.assert_close(other.half().float(), level, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("features", [{"image": False}, {"backbone": "pixels", "layers": [], "image": False}])
def test_without_image_or_network_there_is_nothing_to_train(
    products: Path, cache: FeatureCache, features: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="recontrast trains a copy of the backbone and needs the image"):
        Inspector.fit(products, CONFIG | {"features": features}, cache=cache)
