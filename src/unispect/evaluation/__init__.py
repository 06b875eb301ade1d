"""Inspector + labelled test records -> numbers under both protocols, with intervals, and the cases worth a look."""

from unispect.evaluation.cases import Case, Cases, product_of
from unispect.evaluation.diagnosis import Centres, Check, Diagnosis, Look, diagnose
from unispect.evaluation.result import HEAD, Comparison, Evaluation, cells, percent, share
from unispect.evaluation.run import Inspects, evaluate

__all__ = [
    "HEAD",
    "Case",
    "Cases",
    "Centres",
    "Check",
    "Comparison",
    "Diagnosis",
    "Evaluation",
    "Inspects",
    "Look",
    "cells",
    "diagnose",
    "evaluate",
    "percent",
    "product_of",
    "share",
]
