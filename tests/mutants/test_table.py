"""The table of mutants cannot rot: every bug can still be planted, its test exists, and the page says the same; and a
sample of them dies."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .mutant import ROOT, Mutant
from .systematic import explained, mutants_of
from .table import MUTANTS, SAMPLE

TESTS = ROOT / "tests"


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_every_bug_can_be_planted(mutant: Mutant):
    for edit in mutant.edits:
        source = (ROOT / "roots_dist" / edit.file).read_text(encoding="utf-8")
        compile(edit.applied(source), edit.file, "exec")


def test_every_test_that_should_die_exists(request):
    """Its case too, if this session has collected the whole suite."""
    whole = {Path(str(argument)).resolve() for argument in request.config.args} == {TESTS}
    whole = whole and not request.config.option.keyword
    collected = {item.nodeid.removeprefix("tests/") for item in request.session.items}
    for test in dict.fromkeys(mutant.test for mutant in MUTANTS.values()):
        file, _, named = test.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        assert named.partition("[")[0] in {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}, test
        assert test in collected or not whole, f"{test} has no such case"


def test_the_page_and_the_readme_say_what_the_table_says():
    spec = importlib.util.spec_from_file_location("make_mutants", ROOT / "docs" / "make_mutants.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    assert made.PAGE.read_text(encoding="utf-8") == made.page(), "run: python docs/make_mutants.py"
    assert made.PROOF.read_text(encoding="utf-8") == made.proof_page(), "run: python docs/make_mutants.py"
    assert f"[one of {len(MUTANTS)} bugs](docs/mutants.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_is_said_to_change_nothing_can_be_planted():
    """Else its line has changed, and what was said of it may be true no more."""
    why = explained()
    assert all(why.values())
    places = {file: {mutant.bug for mutant in mutants_of(file)} for file in dict.fromkeys(file for file, _ in why)}
    assert not [f"{file}: {place}" for file, place in why if place not in places[file]]


@pytest.mark.timeout(900)
def test_a_sample_dies():
    """The suite itself sees that their tests pass without a bug. All mutants: `make mutants`."""
    command = [sys.executable, "-m", "tests.mutants.run", "--mutants-only", "--only", *SAMPLE]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
