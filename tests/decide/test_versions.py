"""What decides can be taken back: nothing is lost, whatever is done and undone."""

import json

import numpy as np
import pytest

from unispect.decide.judge import Calibration, DecisionSettings
from unispect.decide.versions import Versions
from unispect.errors import ConfigError, StoreError


def calibration(level: float) -> Calibration:
    numbers = [np.full(3, level) for _ in range(4)]
    return Calibration(*numbers, products=("a",) * 3, groups=(None,) * 3, recognised=("a",) * 3)


def three() -> Versions:
    one = Versions.first(DecisionSettings(0.3), calibration(1), {"11": "a.png"}, "unispect fit", "fitted")
    two = one.then("unispect calibrate", "anew", calibration=calibration(2), images={"22": "b.png"})
    return two.then("unispect calibrate", "other rate", DecisionSettings(0.5))


def levels(versions: Versions) -> list[float]:
    return [version.calibration.scores[0] for version in versions.all]


def test_what_is_not_given_stays_as_it_is() -> None:
    versions = three()
    assert [version.number for version in versions.all] == [1, 2, 3]
    assert levels(versions) == [1, 2, 2]
    assert [version.decision.false_alarm_rate for version in versions.all] == [0.3, 0.3, 0.5]
    assert versions.images == {"11": "a.png", "22": "b.png"}


def test_undone_step_by_step_and_nothing_is_lost() -> None:
    versions = three()
    for rate, level, restores in [(0.3, 2, 2), (0.3, 1, 1)]:
        versions = versions.undone("unispect calibrate --undo")
        now = versions.current
        assert (now.decision.false_alarm_rate, now.calibration.scores[0], now.restores) == (rate, level, restores)
    with pytest.raises(ConfigError, match="as it was fitted"):
        versions.undone("")
    assert [version.number for version in versions.all] == [1, 2, 3, 4, 5]
    # What is done after that is undone to what it was done to.
    again = versions.then("", "lower", DecisionSettings(0.1)).undone("")
    assert again.current.decision.false_alarm_rate == 0.3
    assert again.current.restores == 1


def test_json_keeps_all_and_damage_is_told() -> None:
    table = json.loads(json.dumps(three().as_list()))
    assert Versions.from_list(table).as_list() == table
    with pytest.raises(StoreError, match="not numbered from 1 on"):
        Versions.from_list(table[1:])
    with pytest.raises(StoreError, match="not numbered from 1 on"):
        Versions.from_list([])
    with pytest.raises(StoreError, match="of an older unispect"):
        Versions.from_list([{"number": 1}])
