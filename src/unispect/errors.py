"""Every error a user can cause, in one tree.

    UnispectError
    ├── DataError            a folder, file, label or mask is not what was expected (also a ValueError)
    │   ├── ImageError       one image cannot be read; names the file and the reason
    │   └── LeakError        a test image was learnt from, held out or used to calibrate
    ├── ConfigError          a setting has an unknown name or an impossible value (also a ValueError)
    ├── WeightsError         backbone weights are missing or are not the ones expected
    ├── StoreError           a saved model is damaged, foreign or from another version
    ├── CalibrationError     too few calibration images for the promise asked (also a ValueError)
    ├── ExportError          a model cannot be exported, or its exported form does not agree with it
    └── MissingExtraError    an optional package is needed; says which to install (also an ImportError)

The command line prints these as one line and ends with exit code 2; anything else is a bug and ends with 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UnispectError(Exception):
    """Base of all errors that the user can mend."""


class DataError(UnispectError, ValueError):
    """A folder, file, label or mask is not what was expected."""


class ImageError(DataError):
    """One image cannot be read."""


class LeakError(DataError):
    """A test image was learnt from, held out or used to calibrate: numbers measured on it would flatter the model."""


class ConfigError(UnispectError, ValueError):
    """A setting has an unknown name or an impossible value."""


class WeightsError(UnispectError):
    """Backbone weights are missing or are not the ones expected."""


class StoreError(UnispectError):
    """A saved model is damaged, foreign or from another version."""


class CalibrationError(UnispectError, ValueError):
    """Too few calibration images for the promise asked."""


class ExportError(UnispectError):
    """A model that cannot be exported, or whose exported form does not agree with it."""


class MissingExtraError(UnispectError, ImportError):
    """An optional package is needed."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Text for an unknown name, with the nearest known one: `unknown method 'hgda': did you mean 'hgad'? ...`."""
    choices = sorted(known)
    near = get_close_matches(name, choices, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {name!r}: {hint}known: {', '.join(choices)}"
