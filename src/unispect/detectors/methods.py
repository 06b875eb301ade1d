"""The methods by name."""

from __future__ import annotations

from unispect.detectors.base import Detector
from unispect.detectors.hgad import HGAD

METHODS: dict[str, type[Detector]] = {"hgad": HGAD}
