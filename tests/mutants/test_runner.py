"""The runner calls a mutant dead only if its test has failed by a comparison of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import json
from tests.mutants.mutant import Mutant
from tests.mutants.runner import Job, preload, run

FILE, TEST = "parallel/pipeline/partition.py", "unit/test_partition.py::{}"
EQUAL = TEST.format("test_equal_layers_tie_whatever_their_cost")
ASSERTED = "assert len(costs) == len(required) and num_stages >= 1"

def job(name, before, after, test=EQUAL):
    return Job(Mutant(name=name, bug="", file=FILE, before=before, after=after, test=test), (test,))

preload(("pytest", "hypothesis"))
jobs = [
    Job(None, (EQUAL,)),
    job("a wrong cut", "begins[end] = min(scores)", "begins[end] = max(scores)"),
    job("another word", "Partition the model's pieces", "Cut the model's pieces"),
    job("nothing to import", "import math", "import mathematics as math"),
    job("an assertion of the package", ASSERTED, "assert num_stages < 0"),
    job("an exception", ASSERTED, "assert {}[0]"),
    job("no such test", ASSERTED, "assert {}[0]", TEST.format("test_nothing")),
]
hanging = [job("a hang", ASSERTED, "__import__('time').sleep(1000)")]
found = []
for result in (*run(jobs), *run(hanging, limit_s=3.0)):
    (ending,) = result.endings.values()
    found.append((result.job.mutant and result.job.mutant.name, ending.outcome, result.as_it_should))
print(json.dumps(found))
"""


def test_only_a_comparison_kills():
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [tuple(row) for row in json.loads(ran.stdout)] == [
        (None, "passed", True),
        ("a wrong cut", "failed", True),
        ("another word", "passed", False),
        ("nothing to import", "missing", False),
        ("an assertion of the package", "error", False),
        ("an exception", "error", False),
        ("no such test", "missing", False),
        ("a hang", "hung", False),
    ]
