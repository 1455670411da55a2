"""How good guesses of a few classes are: scikit-learn's figures, from the table of how often each was taken for which.

    Term.confusion, summed over the world --pairs with weights--> scikit-learn
        --> F1, Matthews correlation, precision, recall

Its functions take one label and one guess for each example; here each cell of the table is one pair, weighted with its
count, which gives the same figures and needs the memory of C × C. C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from roots_dist.errors import missing_package


class ClassScore(NamedTuple):
    """Of one class against all others."""

    precision: float
    recall: float
    f1: float
    support: int
    """examples that have this label"""


def task_metrics(table: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """table: int64 [C, C], rows = label, columns = guess. By the names under which they are logged.

    f1/validation is the plain mean over the classes that occur as a label or as a guess (average="macro"), as
    f1_score(labels, guesses, average="macro") gives it. Of two classes f1/validation/NAME is also there: of the second
    one, scikit-learn's default average="binary" with labels 0 and 1, which is what GLUE reports. A table of nothing has
    none.
    """
    if not table.any():
        return {}
    metrics = _sklearn()
    given, guessed, weights = _pairs(table)
    f1 = metrics.f1_score(given, guessed, sample_weight=weights, average="macro", zero_division=0)
    found = {"f1/validation": float(f1)}
    if len(labels) == 2:
        found[f"f1/validation/{labels[1]}"] = class_scores(table)[1].f1
    return found | {"mcc/validation": float(metrics.matthews_corrcoef(given, guessed, sample_weight=weights))}


def class_scores(table: np.ndarray) -> list[ClassScore]:
    """Of every class, in order; what cannot be divided is 0."""
    given, guessed, weights = _pairs(table)
    columns = _sklearn().precision_recall_fscore_support(
        given, guessed, sample_weight=weights, labels=np.arange(len(table)), zero_division=0
    )
    return [ClassScore(float(p), float(r), float(f), round(s)) for p, r, f, s in zip(*columns)]


def _pairs(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(label, guess, how often) of every pair that occurs."""
    given, guessed = np.nonzero(table)
    return given, guessed, table[given, guessed]


def _sklearn() -> ModuleType:
    try:
        import sklearn.metrics
    except ImportError:
        raise missing_package("scikit-learn", "finetune") from None
    metrics: ModuleType = sklearn.metrics
    return metrics
