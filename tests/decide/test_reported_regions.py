"""Regions: heights by their definition, the selection against scipy's Benjamini-Hochberg, both promises by simulation."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label
from scipy.stats import false_discovery_control

from unispect.data.loader import Preparation
from unispect.decide.conformal import ConformalRule
from unispect.decide.judge import Calibration, DecisionSettings, Judge, Said, normal_regions
from unispect.decide.regions import NormalRegions, candidates, discovered, height
from unispect.errors import CalibrationError, ConfigError, StoreError
from unispect.types import Finding

EIGHT = np.ones((3, 3))
SIDE = 48


def noise(random: np.random.Generator, sigma: float = 3.0, levels: int = 0) -> np.ndarray:
    """A smooth map of a normal image, (SIDE, SIDE) float32; with `levels`, of few values, so with many ties."""
    smooth = gaussian_filter(random.standard_normal((SIDE, SIDE)), sigma, mode="wrap")
    found = smooth / smooth.std()
    return (np.round(found * levels) / levels if levels else found).astype(np.float32)


def height_by_definition(scores: np.ndarray, least: int) -> float:
    for level in np.unique(scores)[::-1]:
        areas = np.bincount(label(scores >= level, EIGHT)[0].ravel())[1:]
        if areas.max() >= least:
            return float(level)
    return -np.inf


# Heights


@pytest.mark.parametrize("least", [1, 2, 5, 40, 400, SIDE**2, SIDE**2 + 1])
@pytest.mark.parametrize("levels", [0, 2], ids=["no ties", "ties"])
def test_height_is_what_it_says(least: int, levels: int) -> None:
    random = np.random.default_rng(least)
    for sigma in (0.5, 2.0):
        scores = noise(random, sigma, levels)[:24] if least <= 400 else noise(random, sigma, levels)
        assert height(scores, least) == height_by_definition(scores, least)


@pytest.mark.parametrize("levels", [0, 2], ids=["no ties", "ties"])
def test_a_part_of_the_size_is_above_a_level_if_and_only_if_its_height_is(levels: int) -> None:
    random = np.random.default_rng(1)
    for least in (1, 3, 30):
        scores = noise(random, 1.0, levels)
        for level in random.choice(np.unique(scores), 5):
            found = candidates(scores, level, least)
            labels, _ = label(scores > level, EIGHT)
            areas = np.bincount(labels.ravel())[1:]
            assert sorted(part.above()[5] for part in found) == sorted(areas[areas >= least])
            assert all(part.height > level for part in found)
            assert bool(found) == (height(scores, least) > level)
            assert not found or found[0].height == height(scores, least)


def test_a_candidate_is_cut_at_a_level() -> None:
    scores = np.zeros((8, 9), np.float32)
    scores[2:6, 1:5] = 1
    scores[3, 2:4] = 3
    scores[6, 5] = 1  # touches by a corner
    scores[0, 8] = 2  # too small
    (part,) = candidates(scores, 0.5, 3)
    assert part.height == 1
    assert part.above() == (1, 2, 6, 7, 3.0, 17)
    assert part.above(2.0) == (2, 3, 4, 4, 3.0, 2)


# False discoveries


def test_the_selection_is_that_of_benjamini_and_hochberg() -> None:
    """On rates C / n a normal image, at the level (q (n + 1) - 1) / n that the image's own regions leave."""
    random = np.random.default_rng(0)
    for _ in range(300):
        n, rate = int(random.integers(5, 200)), float(random.uniform(0.02, 0.6))
        normal = np.sort(random.normal(size=random.poisson(2 * n)).round(int(random.integers(0, 4))))
        heights = np.sort(random.normal(random.uniform(0, 2), 1, random.integers(0, 9)))[::-1].round(3)
        level = (rate * (n + 1) - 1) / n
        if level <= 0:
            assert discovered(heights, normal, n, rate)[0] == 0
            continue
        hypotheses = 5 * n
        p_values = np.ones(hypotheses)
        p_values[: len(heights)] = (len(normal) - np.searchsorted(normal, heights)) / (n * hypotheses)
        rejected = false_discovery_control(p_values) <= level
        count, above = discovered(heights, normal, n, rate)
        assert count == rejected[: len(heights)].sum(), (n, rate)
        if count:
            assert heights[count - 1] > above
            tried = np.concatenate([heights[: count - 1], [above]])  # the lowest of them sunk to the level would not do
            assert discovered(tried, normal, n, rate)[0] < count or above == -np.inf


def busy(random: np.random.Generator, spread: float) -> np.ndarray:
    """Heights of false regions: as many as a Poisson of an image's own mean, which varies by a gamma distribution."""
    mean = 1.5 * (random.gamma(1 / spread, spread) if spread else 1.0)
    return np.asarray(random.normal(size=random.poisson(mean)))


def realised(n: int, rate: float, spread: float, true: int, naive: bool, runs: int = 4000) -> tuple[float, float]:
    """Mean share of false regions among those reported, over images and calibration sets, and its standard error."""
    random = np.random.default_rng(n)
    shares = np.zeros(runs)
    for run in range(runs):
        normal = np.sort(np.concatenate([busy(random, spread) for _ in range(n)]))
        false = busy(random, spread)
        heights = np.concatenate([false, random.normal(2.0, 1.0, true)])
        order = np.argsort(-heights)
        if naive:  # C(t) / n <= q R(t)
            own = np.arange(1, len(order) + 1)
            passes = np.flatnonzero((len(normal) - np.searchsorted(normal, heights[order])) / n <= rate * own)
            count = int(passes[-1]) + 1 if len(passes) else 0
        else:
            count, _ = discovered(heights[order], normal, n, rate)
        shares[run] = (order[:count] < len(false)).sum() / max(1, count)
    return float(shares.mean()), float(shares.std() / runs**0.5)


@pytest.mark.parametrize("true", [0, 3])
@pytest.mark.parametrize("spread", [0.0, 4.0], ids=["even images", "busy and quiet images"])
@pytest.mark.parametrize(("n", "rate"), [(5, 0.2), (19, 0.1), (99, 0.1)])
def test_false_discoveries_keep_to_the_rate(n: int, rate: float, spread: float, true: int) -> None:
    share, error = realised(n, rate, spread, true, naive=False)
    assert share <= rate + 3 * error


def test_without_the_image_itself_the_rate_is_broken() -> None:
    """So the simulation can tell."""
    share, error = realised(5, 0.2, 0.0, 0, naive=True)
    assert share > 0.2 + 3 * error


# Both promises, on maps with planted parts, through the judge


def judge(maps: list[np.ndarray], **settings: Any) -> Judge:
    decision = DecisionSettings(**{"unknown_rate": 0.0, "min_area": 12} | settings)
    count, preparation = len(maps), Preparation(SIDE)
    regions = normal_regions(maps, [None] * count, [(SIDE, SIDE)] * count, decision, preparation)
    peaks, zeros = np.array([one.max() for one in maps], np.float64), np.zeros(count)
    calibration = Calibration(peaks - 1e6, peaks, zeros, zeros, *[(None,) * count] * 3, regions)
    return Judge(calibration, decision, ["a"], preparation)


def said(scores: np.ndarray) -> Said:
    """With an image score that is an alarm, whatever the map."""
    return Said(1e6, scores, None, 0.0)


def planted(random: np.random.Generator, normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A map with four defects, and where they are."""
    where = np.zeros((SIDE, SIDE), bool)
    for top in (6, 30):
        for left in (6, 30):
            where[top : top + 8, left : left + 8] = True
    return (normal + gaussian_filter(where.astype(float), 2) * random.uniform(2, 6)).astype(np.float32), where


def wrong(finding: Finding, where: np.ndarray) -> tuple[int, int]:
    """Regions promised, and those of them that touch no defect."""
    boxes = [where[one.top : one.bottom, one.left : one.right] for one in finding.regions if one.promised]
    return len(boxes), sum(not box.any() for box in boxes)


@pytest.fixture(scope="module")
def simulated() -> dict[str, tuple[float, float]]:
    """Means over 30 calibration sets of 49 maps each, and their standard errors."""
    random, rates = np.random.default_rng(0), []
    nowhere = np.zeros((SIDE, SIDE), bool)
    for _ in range(30):
        calibration = [noise(random) for _ in range(49)]
        judges = [
            judge(calibration, regions=rule, false_alarm_rate=0.1, discovery_rate=0.1) for rule in ("family", "discovery")
        ]
        row = np.zeros((20, 6))
        for image in range(20):
            normal = noise(random)
            spoiled, where = planted(random, noise(random))
            for place, one in enumerate(judges):
                row[image, place] = wrong(one.finding(None, said(normal), (SIDE, SIDE)), nowhere)[0] > 0
                found, false = wrong(one.finding(None, said(spoiled), (SIDE, SIDE)), where)
                row[image, 2 + place] = false / max(1, found)
                row[image, 4 + place] = found - false
        rates.append(row.mean(0))
    means, errors = np.mean(rates, 0), np.std(rates, 0) / len(rates) ** 0.5
    names = [f"{what} {rule}" for what in ("alarms", "false", "found") for rule in ("family", "discovery")]
    return {name: (float(mean), float(error)) for name, mean, error in zip(names, means, errors, strict=True)}


def test_normal_maps_have_a_region_no_more_often_than_promised(simulated: dict[str, tuple[float, float]]) -> None:
    for name in ("alarms family", "alarms discovery"):
        mean, error = simulated[name]
        assert mean <= 0.1 + 3 * error, name
        assert mean >= 0.04, name  # and the promise is not bought by silence


def test_the_share_of_false_regions_keeps_to_the_rate(simulated: dict[str, tuple[float, float]]) -> None:
    for name in ("false family", "false discovery"):
        mean, error = simulated[name]
        assert mean <= 0.1 + 3 * error, name


def test_discovery_finds_more_where_there_is_more(simulated: dict[str, tuple[float, float]]) -> None:
    (family, first), (discovery, second) = simulated["found family"], simulated["found discovery"]
    assert discovery > family + 3 * (first**2 + second**2) ** 0.5


# What is said of a region


def test_a_p_value_is_below_the_rate_if_and_only_if_it_is_promised() -> None:
    random = np.random.default_rng(3)
    one = judge([noise(random) for _ in range(49)], false_alarm_rate=0.1)
    flags = set()
    for _ in range(40):
        finding = one.finding(None, said(noise(random) + np.float32(random.uniform(0, 1))), (SIDE, SIDE))
        assert finding.regions
        for region in finding.regions:
            assert region.promised == (region.p_value <= 0.1)
            assert not region.promised or region.area >= 12
            flags.add(region.promised)
    assert flags == {True, False}


def test_a_larger_minimum_lowers_the_threshold_and_keeps_the_promise() -> None:
    random = np.random.default_rng(4)
    maps = [noise(random, 1.0) for _ in range(60)]
    small, large = (judge(maps, min_area=least, false_alarm_rate=0.1) for least in (1, 12))
    assert small.pixel_threshold == ConformalRule(small.calibration.peaks).threshold(0.1)
    assert large.pixel_threshold < small.pixel_threshold


def test_another_minimum_goes_by_peaks_which_are_upper_bounds() -> None:
    random = np.random.default_rng(5)
    known = judge([noise(random) for _ in range(49)], false_alarm_rate=0.1)
    other = Judge(known.calibration, replace(known.decision, min_area=30), ["a"], known.preparation)
    assert other.pixel_threshold == ConformalRule(known.calibration.peaks).threshold(0.1) > known.pixel_threshold
    with pytest.raises(
        CalibrationError, match=r"needs the calibration maps under {'min_area': 30}, and this model has {'m.*12}"
    ):
        Judge(known.calibration, replace(known.decision, min_area=30, regions="discovery"), ["a"], known.preparation)
    bare = replace(known.calibration, regions=None)
    assert Judge(bare, known.decision, ["a"], known.preparation).pixel_threshold == other.pixel_threshold
    with pytest.raises(CalibrationError, match="and this model has none: fit it"):
        Judge(bare, replace(known.decision, regions="discovery"), ["a"], known.preparation)


def test_too_few_images_for_a_discovery_rate() -> None:
    random = np.random.default_rng(6)
    with pytest.raises(CalibrationError, match=r"9 calibration images cannot support discovery_rate=0\.05: at least 19"):
        judge([noise(random) for _ in range(9)], false_alarm_rate=0.1, regions="discovery", discovery_rate=0.05)


def test_areas_are_of_the_original_and_in_millimetres() -> None:
    random = np.random.default_rng(7)
    one = judge([noise(random) for _ in range(49)], false_alarm_rate=0.1, mm_per_pixel=0.5)
    scores = np.zeros((SIDE, SIDE), np.float32)
    scores[10:16, 20:25] = 99
    (region,) = one.finding(None, said(scores), (4 * SIDE, 2 * SIDE)).regions
    assert (region.left, region.top, region.right, region.bottom) == (80, 20, 100, 32)
    assert region.area == 20 * 12
    assert region.area_mm2 == 20 * 12 * 0.25
    plain = judge([noise(random) for _ in range(49)], false_alarm_rate=0.1)
    assert plain.finding(None, said(scores), (SIDE, SIDE)).regions[0].area_mm2 is None


@pytest.mark.parametrize(("factor", "kept"), [(0.99, True), (1.01, False)])
def test_a_minimum_in_millimetres_is_a_diameter(factor: float, kept: bool) -> None:
    """A square of 6 x 6 places of 4 x 2 pixels of 0.5 mm is 72 mm2, as a circle of 9.57 mm is."""
    random = np.random.default_rng(8)
    size = (4 * SIDE, 2 * SIDE)
    decision = DecisionSettings(
        0.1, min_size_mm=factor * (4 * 72 / np.pi) ** 0.5, mm_per_pixel={"a": 0.5, "b": 7.0}, unknown_rate=0
    )
    maps = [noise(random) for _ in range(49)]
    regions = normal_regions(maps, ["a"] * 49, [size] * 49, decision, Preparation(SIDE))
    peaks, zeros = np.array([float(one.max()) for one in maps]), np.zeros(49)
    one = Judge(
        Calibration(zeros, peaks, zeros, zeros, *[("a",) * 49] * 3, regions), decision, ["a", "b"], Preparation(SIDE)
    )
    scores = np.zeros((SIDE, SIDE), np.float32)
    scores[10:16, 20:26] = 99
    finding = one.finding(None, Said(1.0, scores, np.array([-0.1, -2.0]), 0.0), size)
    assert finding.regions[0].promised is kept
    assert finding.regions[0].area_mm2 == pytest.approx(72)


def test_scales_by_product() -> None:
    decision = DecisionSettings(min_size_mm=1.0, mm_per_pixel={"a": 0.1, "b": 0.5})
    assert (decision.scale("a"), decision.scale("b"), decision.scale(None)) == (0.1, 0.5, None)
    assert decision.least("a", 1.0) == 79  # pi / 4 * 10^2
    assert decision.least("b", 1.0) == decision.least(None, 1.0) == 4  # the coarsest loses nothing
    assert DecisionSettings(mm_per_pixel={"a": 0.1, "b": 0.1}).scale(None) == 0.1
    assert DecisionSettings(mm_per_pixel=0.2).scale(None) == 0.2
    assert DecisionSettings().scale("a") is None


# Kept, joined and parted


def test_what_is_kept_comes_back() -> None:
    random = np.random.default_rng(9)
    known = judge([noise(random) for _ in range(30)], false_alarm_rate=0.1).calibration
    assert Calibration.from_dict(known.as_dict()).as_dict() == known.as_dict()
    assert Calibration.from_dict({name: v for name, v in known.as_dict().items() if name != "regions"}).regions is None
    for broken in ({"tops": [1.0]}, {"tops": None}, {"heights": 7}):
        with pytest.raises(StoreError, match="fit the model again"):
            Calibration.from_dict(known.as_dict() | {"regions": known.as_dict()["regions"] | broken})


def test_products_come_and_go() -> None:
    random = np.random.default_rng(10)
    one, other = ([noise(random) for _ in range(30)] for _ in range(2))
    first = NormalRegions.of(one, [9] * 30, {"min_area": 9})
    second = NormalRegions.of(other, [9] * 30, {"min_area": 9}, first.base)
    both = first.with_also(second)
    assert both is not None
    assert both.of_images(np.arange(60) < 30).as_dict() == first.as_dict()
    assert both.of_images(np.arange(60) >= 30).as_dict() == second.as_dict()
    assert first.with_also(None) is None
    assert first.with_also(NormalRegions.of(other, [9] * 30, {"min_area": 9})) is None


# Settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"regions": "discover"}, "unknown regions 'discover': did you mean 'discovery'"),
        ({"discovery_rate": 1.0}, "discovery_rate: got 1.0, expected a share between 0 and 1"),
        ({"min_area": 0}, "min_area: got 0, expected at least 1 pixel of the score map"),
        ({"min_size_mm": -1.0}, "min_size_mm: got -1.0, expected millimetres, or 0"),
        ({"min_size_mm": 0.5}, "min_size_mm=0.5 needs mm_per_pixel"),
        ({"mm_per_pixel": -0.1}, "mm_per_pixel: got -0.1, expected millimetres of a pixel"),
        ({"mm_per_pixel": {"a": "x"}}, "mm_per_pixel: got 'x'"),
        ({"mm_per_pixel": {"a": 0.0}}, "mm_per_pixel: got 0.0"),
    ],
)
def test_what_cannot_be(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        DecisionSettings(**settings)


def test_a_table_names_the_products_of_the_model() -> None:
    decision = DecisionSettings(mm_per_pixel={"gear": 0.1, "wood": 0.2})
    decision.check_products(["gear", "wood"])
    decision.check_products(["gear"], more=True)
    DecisionSettings(mm_per_pixel=0.1).check_products([None])
    for names, text in (
        (["gear"], "unknown product 'wood'"),
        (["gear", "wood", "felt"], "no number for product felt"),
        ([None], "no image has a product's name"),
    ):
        with pytest.raises(ConfigError, match=text):
            decision.check_products(names)  # type: ignore[arg-type]


def test_a_minimum_that_no_map_holds() -> None:
    with pytest.raises(ConfigError, match=r"decision.min_area=3000: that is 3000 pixels of a map of 2304"):
        judge([noise(np.random.default_rng(0))] * 30, min_area=3000)
