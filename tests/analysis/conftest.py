"""What the tests of the analysis share: runs that no model has run, and their report."""

from pathlib import Path

import pytest
from made import every_kind, few, write_run

from analysis.contents import make_report
from analysis.output import write_report


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folders of a few runs, to be damaged."""
    for record in few():
        write_run(tmp_path / "runs", record)
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of runs of every kind."""
    root = tmp_path_factory.mktemp("made")
    for record in every_kind():
        write_run(root / "runs", record)
    write_report(make_report(str(root / "runs")), root / "report")
    return root / "report"
