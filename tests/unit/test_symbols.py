"""A plan is counted without what torch imports for symbols, to the same numbers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CODE = """
import sys
from models import config
from roots_dist.layout import Layout
from roots_dist.runs.plan.predict import predict
from roots_dist.runs.plan.symbols import ANSWERS, DYNAMO

CASES = [
    ("gpt", {"parallel__tp": 2, "parallel__pp": 2, "parallel__schedule": "zb-h1"}),
    ("gemma", {"parallel__tp": 2, "parallel__sequence_parallel": True}),
    ("olmo", {"parallel__cp": 2, "train__recompute": "full"}),
    ("electra", {}),
    ("t5", {"train__recompute": "selective"}),
    ("qwen-moe", {}),
]

def plans():
    for name, changes in CASES if "all" in sys.argv else (CASES[0], CASES[-1]):
        made = config(name, **changes)
        p = made.parallel
        yield predict(made, Layout(tp=p.tp, pp=p.pp, cp=p.cp)).ranks

slow = {*ANSWERS, DYNAMO}
assert not slow & {*sys.modules}, "torch itself imports them now: the substitutes can go"
before = {*sys.modules}
found = [*plans()]
assert not slow & {*sys.modules}, slow & {*sys.modules}
new = {name for name in {*sys.modules} - before if name.startswith("torch")} - {"torch.utils._device"}
assert not new, f"imported while torch saw substitutes: {new}"
for name in slow:
    __import__(name)
assert sys.modules["sympy"].Basic.__module__ == "sympy.core.basic"
assert found == [*plans()]
"""


@pytest.mark.parametrize("models", ["two", pytest.param("all", marks=pytest.mark.full)])
def test_a_plan_takes_no_time_to_import_what_torch_needs_for_symbols_and_counts_the_same(models):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS / "parity")])
    environ = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CODE, models], env=environ, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
