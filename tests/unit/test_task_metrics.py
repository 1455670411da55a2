"""Figures of a task with classes: from the table they are what scikit-learn says of the labels and guesses
themselves."""

import builtins

import numpy as np
import pytest

from roots_dist.errors import EnvironmentProblem
from roots_dist.runs.evaluate.task_metrics import class_scores, task_metrics


def examples(classes: int, seed: int, absent: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, guesses, and the table of both; some classes occur in neither."""
    rng = np.random.default_rng(seed)
    there = [c for c in range(classes) if c not in absent]
    given, guessed = rng.choice(there, 200), rng.choice(there, 200)
    guessed = np.where(rng.random(200) < 0.5, given, guessed)
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (given, guessed), 1)
    return given, guessed, table


@pytest.mark.parametrize("classes, absent", [(2, ()), (3, ()), (7, ()), (5, (1, 4))])
def test_figures_are_those_of_the_examples(classes, absent):
    from sklearn import metrics  # takes more than a second, in every process that collects tests

    for seed in range(5):
        given, guessed, table = examples(classes, seed, absent)
        names = [f"label {n}" for n in range(classes)]
        found = task_metrics(table, names)
        wanted = {"f1/validation": metrics.f1_score(given, guessed, average="macro")}
        wanted["mcc/validation"] = metrics.matthews_corrcoef(given, guessed)
        if classes == 2:
            wanted["f1/validation/label 1"] = metrics.f1_score(given, guessed)
        assert found == pytest.approx(wanted, rel=1e-12)
        columns = metrics.precision_recall_fscore_support(given, guessed, labels=range(classes), zero_division=0)
        assert np.allclose([tuple(one) for one in class_scores(table)], np.transpose(columns), rtol=1e-12)


def test_a_class_that_is_never_guessed_counts_as_nothing_right():
    table = np.array([[5, 0], [3, 0]])
    wanted = {"f1/validation": 5 / 13, "f1/validation/yes": 0.0, "mcc/validation": 0.0}
    assert task_metrics(table, ["no", "yes"]) == pytest.approx(wanted)
    assert class_scores(table)[1] == (0.0, 0.0, 0.0, 3)


def test_a_table_of_nothing_has_no_figures():
    assert task_metrics(np.zeros((3, 3), np.int64), ["a", "b", "c"]) == {}


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def gone(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", gone)
    with pytest.raises(
        EnvironmentProblem, match=r"scikit-learn: expected .* Fix: pip install 'roots_dist\[finetune\]'"
    ):
        task_metrics(np.eye(2, dtype=np.int64), ["a", "b"])
