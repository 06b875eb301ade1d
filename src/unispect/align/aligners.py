"""The aligners by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unispect.align.base import Aligner
from unispect.align.cada import CADA
from unispect.align.perclass import PerClass
from unispect.config import construct

ALIGNERS: dict[str, type[Aligner]] = {"cada": CADA, "cada-b": PerClass}
NONE = "none"
PROVIDED = ("channels", "products", "seed")  # constructor arguments that are no settings


def build(config: Mapping[str, Any], channels: int, products: int) -> Aligner | None:
    """The aligner that a complete table of settings describes, before it has learnt anything; None for "none"."""
    name = config["aligner"]
    if name == NONE:
        return None
    return construct(ALIGNERS[name], config[name], name, channels=channels, products=products, seed=config["seed"])
