"""The methods by name, and how one is built from settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from unispect.config import construct
from unispect.detectors.base import Detector, StatisticalDetector
from unispect.detectors.cflow import CFLOW
from unispect.detectors.draem import DRAEM
from unispect.detectors.ensemble import Ensemble
from unispect.detectors.fastflow import FastFlow
from unispect.detectors.hgad import HGAD
from unispect.detectors.neighbours import Neighbours
from unispect.detectors.opca import OPCA
from unispect.detectors.padim import PaDiM
from unispect.detectors.patchcore import PatchCore
from unispect.detectors.recontrast import ReContrast
from unispect.detectors.revdist import RevDist
from unispect.detectors.spade import SPADE
from unispect.detectors.uniad import UniAD
from unispect.errors import ConfigError, unknown_name
from unispect.nn.alignment import finest

METHODS: dict[str, type[Detector]] = {
    "hgad": HGAD,
    "cflow": CFLOW,
    "draem": DRAEM,
    "ensemble": Ensemble,
    "fastflow": FastFlow,
    "neighbours": Neighbours,
    "opca": OPCA,
    "padim": PaDiM,
    "patchcore": PatchCore,
    "recontrast": ReContrast,
    "revdist": RevDist,
    "spade": SPADE,
    "uniad": UniAD,
}
PROVIDED = ("shapes", "products", "parts", "encoder", "seed")  # constructor arguments that are no settings


def sections(method: str, own: Mapping[str, Any]) -> list[str]:
    """The sections of settings that a method reads: its own and, of an ensemble, those of its members."""
    return [method, *(_members(own) if method == "ensemble" else ())]


def build(
    config: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], products: int, encoder: nn.Module | None = None
) -> Detector:
    """The detector that a complete table of settings describes, before it has learnt anything.

    encoder   a copy of the network that the features come from, for a method that trains one
    """
    method = config["method"]
    if METHODS[method].trains_encoder:
        return _single(config, method, shapes, products, encoder=encoder)
    if method != "ensemble":
        return _single(config, method, shapes, products)
    plain = {"map_side": finest(shapes), "sigma": 0.0}
    parts = {
        name: _single({**config, name: {**config[name], **plain}}, name, shapes, products)
        for name in _members(config[method])
    }
    provided = {"shapes": tuple(shapes), "products": products, "seed": config["seed"]}
    return construct(Ensemble, config[method], method, parts=parts, **provided)


def _single(config: Mapping[str, Any], name: str, shapes: Sequence[tuple[int, ...]], products: int, **more: Any) -> Detector:
    provided = {"shapes": tuple(shapes), "products": products, "seed": config["seed"]} | more
    return construct(METHODS[name], config[name], name, **provided)


def _members(own: Mapping[str, Any]) -> Sequence[str]:
    """Names of an ensemble's members, checked."""
    possible = [name for name, kind in METHODS.items() if issubclass(kind, StatisticalDetector) and name != "ensemble"]
    members = own.get("members", Ensemble.MEMBERS)
    named = isinstance(members, list | tuple) and all(isinstance(name, str) for name in members)
    if not named or not members or len(set(members)) < len(members):
        raise ConfigError(f"ensemble.members={members!r}: expected a list of different methods, of {', '.join(possible)}")
    for name in members:
        if name not in possible:
            raise ConfigError(unknown_name("ensemble.members: method", str(name), possible))
    return list(members)
