"""What decides, and how it came about: thresholds lie beside a model, change without it, and can be taken back.

Nothing is overwritten: what is decided anew becomes one more version, and taking one back is a version, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

from unispect.decide.judge import Calibration, DecisionSettings
from unispect.errors import ConfigError, StoreError


@dataclass(frozen=True, eq=False, slots=True)
class Version:
    """One state of what decides.

    number    from 1 on
    made      when, in UTC, ISO 8601
    command   what was run
    reason    in words
    images    content hash -> path of the images that it was calibrated on or chosen with and that came with it
    restores  number of the version that it is again
    """

    number: int
    made: str
    command: str
    reason: str
    decision: DecisionSettings
    calibration: Calibration
    images: Mapping[str, str] = field(default_factory=dict)
    restores: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        plain = {"decision": self.decision.as_dict(), "calibration": self.calibration.as_dict(), "images": dict(self.images)}
        return {one.name: getattr(self, one.name) for one in fields(self)} | plain

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> Version:
        """What `as_dict` gave."""
        decision, calibration = DecisionSettings(**table["decision"]), Calibration.from_dict(table["calibration"])
        return cls(**(dict(table) | {"decision": decision, "calibration": calibration}))


@dataclass(frozen=True, eq=False, slots=True)
class Versions:
    """All versions of a model, the one in force last."""

    all: tuple[Version, ...]

    @classmethod
    def first(
        cls, decision: DecisionSettings, calibration: Calibration, images: Mapping[str, str], command: str, reason: str
    ) -> Versions:
        """Of a model that was just learnt."""
        return cls((Version(1, _now(), command, reason, decision, calibration, images),))

    @property
    def current(self) -> Version:
        """The one in force."""
        return self.all[-1]

    def then(
        self,
        command: str,
        reason: str,
        decision: DecisionSettings | None = None,
        calibration: Calibration | None = None,
        images: Mapping[str, str] | None = None,
        restores: int | None = None,
    ) -> Versions:
        """One more; what is not given stays as it is."""
        last = self.current
        decided, known = decision or last.decision, last.calibration if calibration is None else calibration
        made = Version(last.number + 1, _now(), command, reason, decided, known, images or {}, restores)
        return Versions((*self.all, made))

    def undone(self, command: str) -> Versions:
        """The one before the present one, again; undone twice, the one before that.

        Raises ConfigError where there is none before.
        """
        now = self.current.restores or self.current.number
        if now == 1:
            raise ConfigError("undo: the model is as it was fitted: there is nothing before that")
        back = next(one for one in self.all if one.number == now - 1)
        number = back.restores or back.number
        return self.then(command, f"undo: as version {number} again", back.decision, back.calibration, restores=number)

    @property
    def images(self) -> dict[str, str]:
        """Content hash -> path of all images that came with any version."""
        return {content: path for version in self.all for content, path in version.images.items()}

    def as_list(self) -> list[dict[str, Any]]:
        """Plain values for JSON."""
        return [version.as_dict() for version in self.all]

    @classmethod
    def from_list(cls, table: Sequence[Mapping[str, Any]]) -> Versions:
        """What `as_list` gave. Raises StoreError where it is damaged or of an older unispect."""
        try:
            found = tuple(Version.from_dict(one) for one in table)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"the calibration is damaged or of an older unispect ({error!r}): fit the model again"
            ) from error
        if [version.number for version in found] != list(range(1, len(found) + 1)) or not found:
            raise StoreError("the calibration is damaged: its versions are not numbered from 1 on; fit the model again")
        return cls(found)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
