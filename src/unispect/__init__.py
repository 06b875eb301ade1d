"""unispect: one model for every product, no class label, one threshold.

Names are loaded when first used: importing the package computes nothing and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unispect.data.factory import write_products as write_products
    from unispect.data.folder import read_folder as read_folder
    from unispect.data.records import Record as Record
    from unispect.errors import UnispectError as UnispectError
    from unispect.evaluation import Evaluation as Evaluation
    from unispect.evaluation import evaluate as evaluate
    from unispect.inspector import Inspector as Inspector
    from unispect.report.page import write_report as write_report
    from unispect.types import Finding as Finding
    from unispect.types import Region as Region

_HOMES = {
    "Evaluation": "unispect.evaluation",
    "Finding": "unispect.types",
    "Inspector": "unispect.inspector",
    "Record": "unispect.data.records",
    "Region": "unispect.types",
    "UnispectError": "unispect.errors",
    "evaluate": "unispect.evaluation",
    "read_folder": "unispect.data.folder",
    "write_products": "unispect.data.factory",
    "write_report": "unispect.report.page",
}
__all__ = sorted(_HOMES)
__version__ = version("unispect")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unispect' has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "unispect":
            raise
        from unispect.errors import MissingExtraError

        raise MissingExtraError(
            f"unispect.{name} needs the package {error.name}: pip install unispect[fit]; exported models are inspected "
            "without it by unispect.runtime"
        ) from error
    return getattr(home, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
