"""HGAD against the numbers of the published code, restatements in numpy and integrals that are one."""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from planted import labelled
from unispect.detectors.base import Recipe
from unispect.detectors.hgad import HGAD, Level, cells, fused
from unispect.errors import ConfigError
from unispect.fit import Labelled, fit
from unispect.nn.coupling import Flow
from unispect.nn.mixture import HierarchicalMixture, MixtureTerms, entropy

PUBLISHED = {
    name: torch.from_numpy(value)
    for name, value in np.load(Path(__file__).parents[1] / "fixtures" / "hgad_published.npz").items()
}
SHAPES = [(12, 5, 6), (12, 3, 3)]
SMALL = [(6, 4, 4), (5, 1, 1)]
TRUE = torch.arange(4)  # image i is of product i
EXACT = {"rtol": 0.0, "atol": 1e-9}
OURS = {
    "scale": "global_scale",
    "offset": "global_offset",
    "rotation": "w_perm",
    "hidden.weight": "subnet.0.weight",
    "hidden.bias": "subnet.0.bias",
    "output.weight": "subnet.2.weight",
    "output.bias": "subnet.2.bias",
}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(count: int, seed: int) -> Labelled:
    """Normal images of two products."""
    product = np.arange(count) % 2
    shift = 3 * torch.from_numpy(product).float()[:, None, None, None]
    levels = [(draw(count, *shape, seed=seed + n) + shift).float() for n, shape in enumerate(SMALL)]
    return labelled(levels, product)


@pytest.fixture
def published() -> HGAD:
    """The network whose numbers are in the fixture."""
    model = HGAD(
        SHAPES,
        products=4,
        blocks=3,
        position=8,
        centres=3,
        start="published",
        covariance="identity",
        lambda2=100.0,
        label_smoothing=0.02,
        score="product",
        map_side=16,
    )
    state = {}
    for number in range(2):
        here, there = f"levels.{number}.", f"level{number}."
        for block in range(3):
            for ours, theirs in OURS.items():
                value = PUBLISHED[f"{there}flow.module_list.{block}.{theirs}"]
                state[f"{here}flow.blocks.{block}.{ours}"] = value[0] if theirs.startswith("global") else value
        state |= {f"{here}mixture.{name}": PUBLISHED[f"{there}{name}"] for name in ("mu", "delta")}
        state[f"{here}mixture.psi"] = PUBLISHED[f"{there}psi_inter"]
        state[f"{here}mixture.psi_intra"] = PUBLISHED[f"{there}psi_intra"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    for number in range(2):  # the published encoding was rounded to single precision
        model.level(number).condition.copy_(PUBLISHED[f"level{number}.position"].flatten(1).T)
    assert not unexpected
    assert not any("blocks" in name or "psi" in name for name in missing)
    return model


@pytest.mark.parametrize("number", [0, 1])
def test_published_encoding(number: int) -> None:
    model = HGAD(SHAPES, 4, position=8)
    expected = PUBLISHED[f"level{number}.position"].flatten(1).T
    torch.testing.assert_close(model.level(number).condition, expected, rtol=0, atol=2**-24)


def given(level: int) -> Tensor:
    return PUBLISHED[f"level{level}.x"]


def terms(model: HGAD, number: int) -> dict[str, Tensor]:
    level = model.level(number)
    z, logdet = level.latent(level.arranged(given(number)), level.everywhere(4))
    found = level.mixture.terms(z, logdet, TRUE, 0.02)
    return {
        "z": z.reshape(-1, 12),
        "logdet": logdet.flatten(),
        "L_g": found.inter,
        "L_mi": -found.information,
        "L_e": found.entropy,
        "L_g_intra": found.intra,
        "L_z": found.sigmoid,
    }


@pytest.mark.parametrize("number", [0, 1])
def test_published_latents_and_losses(published: HGAD, number: int) -> None:
    compared = 0
    for name, value in terms(published, number).items():
        for key in (f"level{number}.{name}", f"level{number}.stage1.{name}", f"level{number}.stage2.{name}"):
            if key in PUBLISHED:
                torch.testing.assert_close(value.detach(), PUBLISHED[key], **EXACT)
                compared += 1
    assert compared == 10  # z, log-determinant, three losses of the first stage, five of the second


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("progress", "stage"), [(0.0, 1), (1.9999 / 25, 1), (2 / 25, 2), (0.99, 2)])
def test_published_total_by_stage(published: HGAD, number: int, progress: float, stage: int) -> None:
    known = {
        name: float(PUBLISHED.get(f"level{number}.stage{stage}.{name}", 0))
        for name in ("L_g", "L_mi", "L_e", "L_g_intra", "L_z")
    }
    level = published.level(number)
    losses = published.loss(number, level.arranged(given(number)), level.everywhere(4), TRUE, progress)
    expected = known["L_g"] - 100 * known["L_mi"] + known["L_e"] + known["L_g_intra"] + known["L_z"]
    assert losses["total"].item() == pytest.approx(expected, abs=1e-7)
    assert losses["information"].item() == pytest.approx(-known["L_mi"], abs=1e-9)


def likelihoods(model: HGAD) -> tuple[list[Tensor], list[Tensor]]:
    """Log-likelihood per dimension under the true product and negative entropy, (N, h, w) for each level."""
    densities, certain = [], []
    for number in range(2):
        level = model.level(number)
        z, logdet = level.latent(level.arranged(given(number)), level.everywhere(4))
        densities.append(level.as_map(level.density(level.mixture.own(z, TRUE), logdet)).detach())
        certain.append(-level.as_map(entropy(level.mixture.logits(z))).detach())
    return densities, certain


def test_published_likelihoods_and_maps(published: HGAD) -> None:
    factors = []
    for name, parts in zip(("loglik_per_dim", "neg_entropy"), likelihoods(published), strict=True):
        for number, part in enumerate(parts):
            torch.testing.assert_close(part, PUBLISHED[f"level{number}.{name}"], **EXACT)
        relative = [torch.exp(part - part.max()) for part in parts]
        summed = -fused(relative, 0.0, 16, 0.0)
        factors.append(fused(relative, summed.max(), 16, 4.0))
    for name, found in zip(("S_l", "S_e", "S"), (*factors, factors[0] * factors[1]), strict=True):
        torch.testing.assert_close(found, PUBLISHED[f"published.{name}"], **EXACT)


def restated(parts: list[np.ndarray], offset: float | None) -> np.ndarray:
    """offset (the highest sum where None) - sum of the levels, each brought to 16 x 16, blurred."""
    total = np.zeros((len(parts[0]), 16, 16))
    for part in parts:
        for image, grid in enumerate(part):
            rows, columns = (np.linspace(0, side - 1, 16) for side in grid.shape)
            wide = np.stack([np.interp(columns, np.arange(grid.shape[1]), row) for row in grid])
            total[image] += np.stack([np.interp(rows, np.arange(grid.shape[0]), line) for line in wide.T], axis=1)
    value = total.max() if offset is None else offset
    return np.stack([gaussian_filter(value - each, 4.0) for each in total])


def test_scores_with_the_test_maximum_as_ceiling_are_the_published_ones_but_for_constants(published: HGAD) -> None:
    densities, certain = likelihoods(published)
    published.ceilings.copy_(torch.stack([part.max() for part in densities]))
    likely = [(part - part.max()).exp().numpy() for part in densities]
    sure = [part.exp().numpy() for part in certain]
    found = published.forward_given([given(0), given(1)], TRUE)
    torch.testing.assert_close(found.maps, torch.from_numpy(restated(likely, 2.0) * restated(sure, 2.0)), **EXACT)
    torch.testing.assert_close(found.image, found.maps.amax((1, 2)), **EXACT)
    for parts, name in ((likely, "S_l"), ([part / part.max() for part in sure], "S_e")):
        gap = torch.from_numpy(restated(parts, 2.0)) - PUBLISHED[f"published.{name}"]
        torch.testing.assert_close(gap, gap.mean().expand_as(gap), **EXACT)
        torch.testing.assert_close(torch.from_numpy(restated(parts, None)), PUBLISHED[f"published.{name}"], **EXACT)


def test_gated_score_is_the_product_and_a_part_of_the_likelihood(published: HGAD) -> None:
    features = [given(0), given(1)]
    plain = published.forward_given(features, TRUE).maps
    published.score = "gated"
    torch.testing.assert_close(published.forward_given(features, TRUE).maps, plain, **EXACT)
    published.gate.fill_(0.3)
    likely = [torch.exp(part.clamp(max=0)) for part in likelihoods(published)[0]]
    more = published.forward_given(features, TRUE).maps
    torch.testing.assert_close(more - plain, 0.3 * fused(likely, 2.0, 16, 4.0), **EXACT)


def test_recognises_by_the_mean_log_posterior(published: HGAD) -> None:
    features = [given(0), given(1)]
    found, evidence = published.recognise(features), torch.zeros(4, 4)
    for number in range(2):
        level = published.level(number)
        z = PUBLISHED[f"level{number}.z"].reshape(4, -1, 12)
        for image in range(4):
            for vector in z[image]:
                logits = -(vector - level.mixture.mu).square().sum(1) / 2 + level.mixture.psi.log_softmax(0)
                evidence[image] += logits.log_softmax(0).detach() / z.shape[1] / 2
    torch.testing.assert_close(found.detach(), evidence.log_softmax(1), **EXACT)
    torch.testing.assert_close(published(features).products, found.detach(), **EXACT)


def test_marginal_likelihood_is_the_sum_over_products(published: HGAD) -> None:
    published.likelihood = "marginal"
    level = published.level(0)
    latent = published._read([given(0), given(1)])[0]
    inside = torch.stack([level.mixture.inside(latent.z, y) for y in range(4)])
    weights = level.mixture.psi.softmax(0)[:, None, None, None]
    torch.testing.assert_close(published._inside(latent, TRUE), (inside.exp() * weights).sum(0).log(), **EXACT)


@pytest.mark.parametrize(("height", "width", "cell", "number"), [(4, 6, 2, 6), (4, 6, 1, 24), (3, 4, 2, 12), (1, 1, 2, 1)])
def test_cells_hold_every_place_once_and_are_square(height: int, width: int, cell: int, number: int) -> None:
    order = cells(height, width, cell)
    assert len(order) == number
    assert sorted(order.flatten().tolist()) == list(range(height * width))
    side = math.isqrt(order.shape[1])
    for group in order.tolist():
        rows, columns = {place // width for place in group}, {place % width for place in group}
        assert len(rows) == len(columns) == side
        assert max(rows) - min(rows) == max(columns) - min(columns) == side - 1


def small_level(channels: int, order: Tensor, height: int, width: int) -> Level:
    """A level with whitening, flow, metrics and offsets that all do something."""
    mixture = HierarchicalMixture(2, channels, 3, 0.7, len(order), seed=2)
    flow = Flow(channels, 4, blocks=2, seed=3)
    level = Level((channels, height, width), order, 4, flow, mixture)
    with torch.no_grad():
        for seed, parameter in enumerate(level.parameters()):
            parameter += 0.4 * draw(*parameter.shape, seed=seed)
        level.shift.copy_(draw(channels, seed=50))
        level.whiten.copy_(torch.eye(channels) + 0.3 * draw(channels, channels, seed=51))
        level.log_whiten.copy_(torch.linalg.slogdet(level.whiten)[1])
        mixture.offset.copy_(0.5 * draw(*mixture.offset.shape, seed=52))
        mixture.metric.copy_(torch.eye(channels) + 0.3 * draw(*mixture.metric.shape, seed=53))
        mixture.log_volume.copy_(torch.linalg.slogdet(mixture.metric)[1])
    return level


def test_the_density_of_features_integrates_to_one_at_every_place() -> None:
    level = small_level(2, cells(2, 4, 2), 2, 4)
    first, second = torch.linspace(-30, 30, 400), torch.linspace(-30, 30, 400)
    places = level.order[:, 1:3]
    vectors = torch.cartesian_prod(first, second)[:, None, None, :].expand(-1, *places.shape, 2)
    area = float((first[1] - first[0]) * (second[1] - second[0]))
    with torch.no_grad():
        z, logdet = level.latent(vectors, places.expand(len(vectors), -1, -1))
        for y in range(2):
            density = 2 * level.density(level.mixture.inside(z, y), logdet)
            mass = density.exp().sum(0) * area
            torch.testing.assert_close(mass, torch.ones(places.shape), rtol=0, atol=1e-3)


def test_latents_by_place_and_maps_keep_their_places() -> None:
    level = small_level(3, cells(4, 6, 2), 4, 6)
    features = draw(2, 3, 4, 6)
    arranged = level.arranged(features)
    z, _ = level.latent(arranged, level.everywhere(len(arranged)))
    torch.testing.assert_close(level.as_map(arranged[..., 1]), features[:, 1], **EXACT)
    for place in range(24):
        alone, _ = level.latent(features.flatten(2)[:, :, place][:, None, None], torch.full((len(features), 1, 1), place))
        torch.testing.assert_close(level.as_map(z[..., 0]).flatten(1)[:, place], alone[:, 0, 0, 0], **EXACT)


# The paper's ablations


def loss_of(options: dict[str, Any], progress: float) -> tuple[float, MixtureTerms]:
    model = HGAD([(6, 2, 2)], 3, blocks=1, position=4, start="published", covariance="identity", map_side=8, **options)
    vectors, product = draw(6, 1, 4, 6, seed=7), torch.arange(6) % 3
    level = model.level(0)
    places = level.everywhere(6)
    with torch.no_grad():
        z, logdet = level.latent(vectors, places)
        terms = level.mixture.terms(z, logdet, product, model.label_smoothing)
        return float(model.loss(0, vectors, places, product, progress)["total"]), terms


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"lambda1": 2.0, "lambda2": 0.0, "entropy": False, "intra": False}, {"inter": 2.0}),
        ({"lambda2": 10.0, "intra": False}, {"inter": 1.0, "information": 10.0, "entropy": 1.0}),
        ({"lambda1": 0.0, "lambda2": 0.0, "entropy": False, "log_sigmoid": False}, {"intra": 1.0}),
        ({}, {"inter": 1.0, "information": 1.0, "entropy": 1.0, "intra": 1.0, "sigmoid": 1.0}),
    ],
)
def test_each_loss_can_be_left_out(options: dict[str, Any], parts: dict[str, float]) -> None:
    total, terms = loss_of(options, 0.5)
    assert total == pytest.approx(sum(weight * float(getattr(terms, name)) for name, weight in parts.items()), rel=1e-12)


def test_a_single_centre_is_a_plain_flow() -> None:
    total, _ = loss_of({"main": "single", "lambda2": 0.0, "entropy": False, "intra": False}, 0.0)
    model = HGAD([(6, 2, 2)], 3, blocks=1, position=4, start="published", covariance="identity", map_side=8)
    z, logdet = model.level(0).latent(draw(6, 1, 4, 6, seed=7), model.level(0).everywhere(6))
    assert total == pytest.approx(float((z.square().sum(-1) / 2 - logdet).mean().detach() / 6), rel=1e-12)


def test_fixed_centres_with_one_inside_are_the_gaussian_of_the_own_product() -> None:
    options = {"main": "fixed", "centres": 1, "lambda1": 0.0, "lambda2": 0.0, "entropy": False, "log_sigmoid": False}
    total, _ = loss_of(options | {"first_stage": 0.0}, 0.0)
    model = HGAD([(6, 2, 2)], 3, blocks=1, position=4, start="published", covariance="identity", map_side=8)
    level, product = model.level(0), torch.arange(6) % 3
    z, logdet = level.latent(draw(6, 1, 4, 6, seed=7), level.everywhere(6))
    gap = (z - level.mixture.mu[product][:, None, None]).square().sum(-1)
    assert total == pytest.approx(float((gap / 2 - logdet).mean().detach() / 6), rel=1e-12)


@pytest.mark.parametrize("main", ["fixed", "single"])
def test_centres_that_are_not_learnt_stay(main: str) -> None:
    model = HGAD([(6, 2, 2)], 3, blocks=1, position=4, start="published", covariance="identity", main=main, map_side=8)
    level = model.level(0)
    model.loss(0, draw(6, 1, 4, 6), level.everywhere(6), torch.arange(6) % 3, 1.0)["total"].backward()
    assert level.mixture.mu.grad is None
    assert bool((level.mixture.mu == 0).all()) == (main == "single")


def test_criteria_are_the_factors_of_the_product(published: HGAD) -> None:
    features = [given(0), given(1)]
    for name, expected in (("likelihood", 0), ("entropy", 1)):
        published.criterion = name
        maps = published.forward_given(features, TRUE).maps
        factors = [
            [
                torch.exp((density - published.ceilings[n]).clamp(max=0))
                for n, density in enumerate(likelihoods(published)[0])
            ],
            [torch.exp(value) for value in likelihoods(published)[1]],
        ]
        torch.testing.assert_close(maps, fused(factors[expected], 2.0, 16, 4.0), **EXACT)


def test_k_means_finds_the_kinds_of_a_product() -> None:
    torch.set_default_dtype(torch.float32)
    model = HGAD([(6, 4, 4)], 1, blocks=1, position=4, centres=3, inner_start="kmeans", score="aligned", map_side=8)
    kinds = torch.tensor([[8.0, 0, 0, 0, 0, 0], [-8, 0, 0, 0, 0, 0]]).double()
    share = torch.arange(16) % 4 == 0  # a quarter of the places is of the second kind
    level = draw(40, 6, 4, 4, seed=3) + kinds[share.long()].T.reshape(1, 6, 4, 4)
    model.prepare(lambda: iter([([level.float()], torch.zeros(40, dtype=torch.int64))]))
    mixture = model.level(0).mixture
    part = model.level(0)
    z, _ = part.latent(part.arranged(level.float()), part.everywhere(40))
    residual = mixture.residual(z, 0, mixture.mu[0]).detach().reshape(-1, 6)
    expected = torch.stack([residual[~share.repeat(40)].mean(0), residual[share.repeat(40)].mean(0)])
    order = mixture.psi_intra[0, 1:].argsort(descending=True)
    torch.testing.assert_close(mixture.delta[0][order].detach(), expected, rtol=0, atol=0.05)
    weights = mixture.psi_intra[0].softmax(0).detach()
    torch.testing.assert_close(weights, torch.tensor([1 / 3, *(weights[1:].tolist())]))
    assert sorted(weights[1:].tolist()) == pytest.approx([1 / 6, 1 / 2], abs=0.01)


def test_noise_is_of_the_loss_alone() -> None:
    quiet, loud = (HGAD(SMALL, 2, blocks=1, position=4, noise=noise, map_side=8) for noise in (0.0, 0.5))
    loud.load_state_dict(quiet.state_dict())
    vectors, product = draw(4, 1, 16, 6), torch.arange(4) % 2
    places = quiet.level(0).everywhere(4)
    values = [part.held_out_loss(0, vectors, places, product).detach() for part in (quiet, loud)]
    assert torch.equal(*values)
    losses = [part.loss(0, vectors, places, product, 1.0)["intra"].detach() for part in (quiet, loud)]
    assert float(losses[1]) > float(losses[0])


# Many centres


def crowded(**options: Any) -> tuple[HGAD, Labelled, Labelled]:
    torch.set_default_dtype(torch.float32)
    model = HGAD(SMALL, 2, blocks=1, position=4, map_side=8, sigma=0.5, top=0.1, **options)
    return model, planted(24, 1), planted(8, 2)


def test_nearest_scores_of_images_out_of_fold_have_their_tail_at_zero() -> None:
    model, train, held_out = crowded()
    fit(model, train, held_out, Recipe(steps=1), 0)
    fresh = torch.cat([model(levels).image for levels, _ in planted(200, 3).batches()()])
    assert 0.85 < float((fresh < 0).float().mean()) < 1  # 95 % of few images
    learnt = torch.cat([model(levels).image for levels, _ in train.batches()()])
    assert float(learnt.median()) < float(fresh.median()) - 0.5  # so scales from learnt images would have been wrong


def test_many_products_share_the_room_for_centres() -> None:
    model, train, held_out = crowded(crowd=4.0, max_centres=50)
    fit(model, train, held_out, Recipe(steps=1), 0)
    assert model.nearest is not None
    assert [len(model.nearest._crowds()[0].product(y).bank) for y in range(2)] == [25, 25]


def test_units_stay_in_one_fold() -> None:
    model, train, held_out = crowded()
    unit = np.arange(24) // 6
    model.begin(torch.cat([torch.from_numpy(part.product) for part in (train, held_out)]), torch.arange(32))
    alone = model._dealt
    fit(model, replace(train, unit=unit), held_out, Recipe(steps=1), 0)
    assert model._dealt is not None
    assert alone is not None
    for group in range(4):
        for y in range(2):
            own = (unit == group) & (train.product == y)
            assert len(set(model._dealt[:24][torch.from_numpy(own)].tolist())) == 1
    assert not torch.equal(alone, model._dealt)


def test_a_defect_is_far_from_all_centres_and_shows_where_it_is() -> None:
    model, train, held_out = crowded()
    fit(model, train, held_out, Recipe(steps=1), 0)
    levels, _ = next(iter(planted(8, 4).batches()()))
    spoilt = [level.clone() for level in levels]
    spoilt[0][:, :, 1, 2] += 6
    before, after = model(levels), model(spoilt)
    assert (after.image > before.image + 3).all()
    change = (after.maps - before.maps).flatten(1).argmax(1)
    assert ((change // 8 - 3).abs() <= 2).all()
    assert ((change % 8 - 5).abs() <= 2).all()


def test_weight_decay_is_for_the_flow_alone(published: HGAD) -> None:
    (decayed, free), flags = zip(*((group.parameters, group.decayed) for group in published.groups(0)), strict=True)
    assert flags == (True, False)
    level = published.level(0)
    assert {id(each) for each in free} == {id(getattr(level.mixture, name)) for name in ("mu", "delta", "psi", "psi_intra")}
    assert {id(each) for each in decayed} == {id(each) for each in level.flow.parameters()}
    assert len(decayed) + len(free) == len(list(level.parameters()))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"score": "alined"}, "unknown score 'alined': did you mean 'aligned'"),
        ({"criterion": "entropie"}, "unknown criterion 'entropie': did you mean 'entropy'"),
        ({"main": "first"}, "unknown main 'first'"),
        ({"start": "published"}, "covariance='product' is measured from data: expected start='gaussian'"),
        ({"start": "published", "covariance": "identity", "inner_start": "kmeans"}, "expected start='gaussian' with it"),
        ({"products": 0}, "products: got 0, expected at least 1"),
        ({"max_centres": 1}, "max_centres: got 1, expected one for each of 2 products"),
        ({"folds": 1}, "folds: got 1, expected at least 2"),
        ({"crowd": 0.0}, "crowd=0.0, place_prior=10.0: expected a number above 0"),
        ({"noise": -1.0}, "noise: got -1.0, expected a number from 0 on"),
        ({"dropout": 1.0}, "dropout: got 1.0, expected a share from 0 to below 1"),
    ],
)
def test_errors(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        HGAD(SHAPES, **({"products": 2} | options))
