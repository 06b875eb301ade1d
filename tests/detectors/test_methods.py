"""The methods by name: what a table of settings builds, and that a wrong one is refused before any work."""

from typing import Any

import pytest
import torch

from unispect.detectors.base import DealsFolds, Detector, GradientDetector, StatisticalDetector
from unispect.detectors.ensemble import Ensemble
from unispect.detectors.methods import METHODS, PROVIDED, build, sections
from unispect.errors import ConfigError
from unispect.inspector import complete
from unispect.nn.alignment import finest

SHAPES = [(6, 8, 8), (5, 4, 4), (7, 1, 1)]
IMAGE = (3, 64, 64)
STATISTICAL = [name for name, kind in METHODS.items() if issubclass(kind, StatisticalDetector)]
MEMBERS = [name for name in STATISTICAL if name != "ensemble"]
SMALL = {"hgad": {"blocks": 2, "position": 8, "centres": 3}, "padim": {"dimension": 5}}  # for the shapes above


def built(method: str, products: int = 3, **given: Any) -> Detector:
    own = {method: SMALL[method]} if method in SMALL else {}
    shapes = [IMAGE] if method == "draem" else SHAPES
    return build(complete({"method": method} | own | given), shapes, products)


def joined(members: list[str], **given: Any) -> Ensemble:
    own = {"members": members, "weights": [1.0] * len(members)}
    small = {name: SMALL[name] for name in members if name in SMALL}
    found = build(complete({"method": "ensemble", "ensemble": own} | small | given), SHAPES, 3)
    assert isinstance(found, Ensemble)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_name_builds_its_method(method: str) -> None:
    detector = built(method)
    assert type(detector) is METHODS[method]
    assert isinstance(detector, StatisticalDetector) != isinstance(detector, GradientDetector)
    assert isinstance(detector, DealsFolds) == (method in ("ensemble", "hgad"))


@pytest.mark.parametrize("method", METHODS)
def test_a_complete_table_is_complete(method: str) -> None:
    own = {method: SMALL[method]} if method in SMALL else {}
    table = complete({"method": method, "seed": 4} | own)
    assert complete(table) == table
    assert not set(PROVIDED) & {name for section in sections(method, table[method]) for name in table[section]}


def test_the_seed_of_the_table_reaches_every_part() -> None:
    for method in ("neighbours", "ensemble"):
        assert built(method, seed=7).seed == 7
    ensemble = joined(["neighbours", "patchcore", "padim"], seed=7)
    assert getattr(ensemble.members[0], "seed") == 7  # noqa: B009
    random = [built("padim", seed=seed).state_dict() for seed in (7, 7, 8)]
    inside = ensemble.members[2].state_dict()
    assert all(torch.equal(value, inside[name]) for name, value in random[0].items())
    assert any(not torch.equal(value, random[2][name]) for name, value in random[1].items())


def test_settings_of_a_section_reach_the_method() -> None:
    detector = built("neighbours", neighbours={"neighbours": 5, "top": 0.2, "map_side": 32})
    assert (detector.neighbours, detector.top, detector.map_side) == (5, 0.2, 32)


# Sections


def test_a_method_reads_its_own_section_and_an_ensemble_those_of_its_members() -> None:
    for method in METHODS:
        if method != "ensemble":
            assert sections(method, {"members": ["opca"]}) == [method]
    assert sections("ensemble", {}) == ["ensemble", *Ensemble.MEMBERS]
    assert sections("ensemble", {"members": ["spade", "padim"]}) == ["ensemble", "spade", "padim"]


def test_a_table_has_the_sections_that_are_read() -> None:
    table = complete({"method": "ensemble", "ensemble": {"members": ["spade", "padim"]}})
    assert set(METHODS) & set(table) == {"ensemble", "spade", "padim"}


# Ensembles


def test_members_are_built_in_the_order_of_the_list() -> None:
    names = ["spade", "opca", "neighbours"]
    for order in (names, names[::-1]):
        assert [type(part) for part in joined(order).members] == [METHODS[name] for name in order]


@pytest.mark.parametrize("member", MEMBERS)
def test_members_give_plain_maps_of_the_finest_grid(member: str) -> None:
    blurred = {"map_side": 99, "sigma": 3.0} | SMALL.get(member, {})
    part = joined([member], **{member: blurred}).members[0]
    assert (getattr(part, "map_side"), getattr(part, "sigma")) == (finest(SHAPES), 0.0) == (8, 0.0)  # noqa: B009


def test_the_ensemble_alone_blurs_and_resizes() -> None:
    ensemble = joined(["opca"], opca={"mode": "dense"})
    assert (ensemble.map_side, ensemble.sigma, ensemble.grid) == (256, 4.0, 8)


def test_defaults_that_an_ensemble_has_for_its_members_yield_to_what_is_given() -> None:
    assert complete({"method": "ensemble"})["opca"]["mode"] == "pooled"
    assert complete({"method": "opca"})["opca"]["mode"] == "dense"
    assert joined(["neighbours", "opca"]).mapping == (True, False)
    assert joined(["neighbours", "opca"], opca={"mode": "dense"}).mapping == (True, True)
    assert joined(["opca"], opca={"variance": 0.5}).members[0].mode == "pooled"


def test_the_default_ensemble_is_its_default_members() -> None:
    ensemble = built("ensemble")
    assert isinstance(ensemble, Ensemble)
    assert [type(part) for part in ensemble.members] == [METHODS[name] for name in Ensemble.MEMBERS]
    assert len(ensemble.weights) == len(Ensemble.MEMBERS)


@pytest.mark.parametrize(
    ("name", "near"), [("patchcor", "patchcore"), ("neighbors", "neighbours"), ("Spade", "spade"), ("opcaa", "opca")]
)
def test_an_unknown_member_gets_the_nearest_known_one(name: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown ensemble\.members: method '{name}': did you mean '{near}'\?"):
        complete({"method": "ensemble", "ensemble": {"members": ["opca", name]}})


@pytest.mark.parametrize("name", ["hgad", "ensemble", "zzz", ""])
def test_what_cannot_be_a_member_is_refused_with_the_list_of_those_that_can(name: str) -> None:
    known = ", ".join(sorted(MEMBERS))
    with pytest.raises(ConfigError, match=rf"unknown ensemble\.members: method '{name}': .*known: {known}$"):
        complete({"method": "ensemble", "ensemble": {"members": [name]}})


@pytest.mark.parametrize("members", [["opca", "opca"], ["opca", "spade", "opca"], [], "opca", 3, {"opca": 1}])
def test_members_are_a_list_of_different_methods(members: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"ensemble\.members=.*: expected a list of different methods, of neighbours, opca"
    ):
        complete({"method": "ensemble", "ensemble": {"members": members}})


@pytest.mark.parametrize("members", [[3], [True], [None]])
def test_a_member_that_is_no_text_is_refused(members: Any) -> None:
    with pytest.raises(ConfigError, match=r"ensemble\.members=.*: expected a list of different methods"):
        complete({"method": "ensemble", "ensemble": {"members": members}})


@pytest.mark.parametrize("members", [[["opca"]], [{"name": "opca"}]])
def test_a_list_in_the_list_of_members_is_refused(members: Any) -> None:
    with pytest.raises(ConfigError, match="members"):
        complete({"method": "ensemble", "ensemble": {"members": members}})


def test_weights_are_as_many_as_members() -> None:
    table = complete({"method": "ensemble", "ensemble": {"members": ["opca", "spade", "neighbours"]}})
    with pytest.raises(ConfigError, match=r"\[ensemble\] weights=\[1.0, 0.35\]: expected one above 0 for each of 3 members"):
        build(table, SHAPES, 3)


def test_an_impossible_setting_of_a_member_names_its_section() -> None:
    with pytest.raises(ConfigError, match=r"\[neighbours\] whitening: got 3.0, expected a number from 0 to 1"):
        joined(["neighbours", "opca"], neighbours={"whitening": 3.0})
    with pytest.raises(ConfigError, match="whitning"):
        joined(["neighbours", "opca"], neighbours={"whitning": 0.3})


@pytest.mark.parametrize("name", PROVIDED)
@pytest.mark.parametrize("method", ["ensemble", "neighbours"])
def test_what_the_data_decides_is_no_setting(method: str, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        complete({"method": method, method: {name: 3}})


# Training


@pytest.mark.parametrize("method", STATISTICAL)
def test_methods_that_learn_in_passes_take_no_training_section(method: str) -> None:
    assert "training" not in complete({"method": method, "training": {}})
    text = rf"\[training\]: {method} takes no training steps, it learns in passes: leave the section out"
    with pytest.raises(ConfigError, match=text):
        complete({"method": method, "training": {"steps": 3}})


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_learn_in_passes_learn_from_all_images(method: str) -> None:
    share = complete({"method": method})["split"]["held_out"]
    assert (share == 0) == (method in STATISTICAL)
    assert complete({"method": method, "split": {"held_out": 0.3}})["split"]["held_out"] == 0.3
