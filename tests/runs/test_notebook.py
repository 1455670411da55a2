"""The notebook of the documentation runs from top to bottom, in a folder of its own."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from commands import environ
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def test_the_notebook_is_kept_without_output():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5 and not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.full
def test_every_cell_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environ() | {"OMP_NUM_THREADS": "1"})
    outputs = "".join(str(output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs)
    assert "step 60/60" in outputs and "surprise" in outputs and "ZB-H1" in outputs
    assert (tmp_path / "notebook-run/run/checkpoints").is_dir()
