"""The notebooks: thin, committed without outputs, and run from top to bottom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from lab import REPOSITORY, Lab
from nbclient import NotebookClient

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def executed(path: Path, source: str, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The outputs of a notebook, run on another source: the one cell that a user changes."""
    for name, value in lab.variables.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in notebook.cells if "SOURCE = " in cell.source]
    cell.source = f"SOURCE = {source!r}"
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(lab.root)}}).execute()
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def shown(outputs: list[Any], kind: str) -> list[str]:
    return [output["data"][kind] for output in outputs if kind in output.get("data", {})]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_thin_and_hold_no_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert sum(len(cell.source.splitlines()) for cell in code) < 50


@pytest.mark.parametrize(
    ("name", "figures", "words"),
    [("results", 7, "griffin 50%"), ("flocking", 10, "Jaccard")],
    ids=["results", "flocking"],
)
def test_notebooks_run_on_run_folders(
    name: str, figures: int, words: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = executed(REPOSITORY / "notebooks" / f"{name}.ipynb", str(lab.out), lab, monkeypatch)
    assert len(shown(outputs, "image/png")) >= figures
    assert words in "".join(shown(outputs, "text/markdown"))


def test_notebooks_run_on_wandb_with_one_cell_changed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = executed(REPOSITORY / "notebooks" / "results.ipynb", lab.project, lab, monkeypatch)
    assert len(shown(outputs, "image/png")) >= 7
    assert "griffin 50%" in "".join(shown(outputs, "text/markdown"))
    outputs = executed(REPOSITORY / "notebooks" / "flocking.ipynb", lab.project, lab, monkeypatch)
    assert len(shown(outputs, "image/png")) == 3  # the curves; the arrays of heatmaps stay in the run folders
