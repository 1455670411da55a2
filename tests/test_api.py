"""The public names of docs/api.md exist, and its examples run as they stand."""

from __future__ import annotations

import importlib
import os
import re
import runpy
from collections.abc import Sequence
from pathlib import Path

import pytest
from commands import roots

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = re.findall(r"`(roots_dist\.[\w.]+)`", PAGE)
EXAMPLES = re.findall(r"^## (.*?)\n+```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_exists(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute)


def test_every_example_is_found_and_uses_public_names_alone():
    assert len(EXAMPLES) == PAGE.count("```python")
    imported = [
        f"{module}.{name.strip()}"
        for _, code in EXAMPLES
        for module, names in re.findall(r"^from (roots_dist[\w.]*) import (.*)$", code, re.M)
        for name in names.split(",")
    ]
    assert imported and {*imported} <= {*NAMES}


def as_a_program(words: Sequence[str]) -> None:
    """`python PROGRAM`, in a fork that has imported what it imports; its worlds are forks too."""
    os.chdir(ROOT)
    runpy.run_path(words[0], run_name="__main__")


SLOW = "A whole model in two layouts"


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=title, marks=[pytest.mark.full] * (title == SLOW)) for title, code in EXAMPLES]
)
def test_an_example_runs(code, tmp_path):
    program = tmp_path / "example.py"
    program.write_text(code)
    done = roots(str(program), main=as_a_program)
    assert done.returncode == 0, done.stdout + done.stderr
