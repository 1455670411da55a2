"""Metrics of classification by scikit-learn, computed from the confusion table.

    Term.confusion, summed over the world --weighted pairs--> scikit-learn --> F1, MCC, precision, recall

scikit-learn takes one label and one guess per example. Here each cell of the table is one pair weighted with its count,
which gives the same figures in C × C memory. C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np

from roots_dist.errors import missing_package


class ClassScore(NamedTuple):
    """Metrics of one class against all others."""

    precision: float
    recall: float
    f1: float
    support: int
    """Number of examples with this label."""


def task_metrics(table: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Metrics of a confusion table, int64 [C, C] (rows: label, columns: guess), under their names in metrics.jsonl.

    f1/validation is the plain mean over the classes that occur as a label or as a guess, as f1_score(labels, guesses,
    average="macro"). With two classes there is also f1/validation/NAME of the second one, which is scikit-learn's
    average="binary" with labels 0 and 1, as GLUE reports it. An empty table has no metrics.
    """
    if not table.any():
        return {}
    metrics = _sklearn()
    truth, guessed, weights = _pairs(table)
    f1 = metrics.f1_score(truth, guessed, sample_weight=weights, average="macro", zero_division=0)
    found = {"f1/validation": float(f1)}
    if len(labels) == 2:
        found[f"f1/validation/{labels[1]}"] = class_scores(table)[1].f1
    return found | {"mcc/validation": float(metrics.matthews_corrcoef(truth, guessed, sample_weight=weights))}


def class_scores(table: np.ndarray) -> list[ClassScore]:
    """Metrics of every class, in order; 0 where the denominator is 0."""
    truth, guessed, weights = _pairs(table)
    columns = _sklearn().precision_recall_fscore_support(
        truth, guessed, sample_weight=weights, labels=np.arange(len(table)), zero_division=0
    )
    return [ClassScore(float(p), float(r), float(f), round(s)) for p, r, f, s in zip(*columns)]


def _pairs(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(label, guess, count) of every pair that occurs."""
    truth, guessed = np.nonzero(table)
    return truth, guessed, table[truth, guessed]


def _sklearn() -> ModuleType:
    try:
        import sklearn.metrics
    except ImportError:
        raise missing_package("scikit-learn", "finetune") from None
    metrics: ModuleType = sklearn.metrics
    return metrics
