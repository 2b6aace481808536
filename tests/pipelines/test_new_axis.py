"""An axis is added to the method in one place: the lines that docs/development.md shows, in a copy of the project."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

from calling import REPOSITORY, process, read_record, run_folders, tiny

PACKAGES = ("griffin", "pipelines", "analysis", "conf", "hydra_plugins")
ORDINARY = ["grid.sparsity=[0,0.5]", "limit=2"]


def with_the_axis(folder: Path) -> Path:
    for package in PACKAGES:
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    section = (
        (REPOSITORY / "docs" / "development.md").read_text(encoding="utf-8").partition("## An axis of the method")[2]
    )
    (block,) = re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)
    field, rule, use = (part.partition("\n")[2].rstrip() + "\n" for part in block.split("\n\n"))
    assert len(block.splitlines()) <= 12
    path = folder / "griffin" / "method.py"
    code = path.read_text(encoding="utf-8")
    for before, after in (
        ("\n    def __post_init__(self) -> None:\n", f"{field}\n    def __post_init__(self) -> None:\n{rule}"),
        ("        return kept_per_layer(widths, self.sparsity, self.budget)\n", use),
    ):
        assert code.count(before) == 1
        code = code.replace(before, after)
    path.write_text(code, encoding="utf-8")
    return folder


def test_a_new_axis_is_a_key_a_grid_a_record_and_a_row_of_the_report(tmp_path: Path) -> None:
    project, out = with_the_axis(tmp_path / "project"), tmp_path / "out"
    run = [sys.executable, "-m", "pipelines.run", *tiny(out, *ORDINARY)]
    old = process(run, tmp_path, PYTHONPATH=str(REPOSITORY))
    before = {folder.name for folder in run_folders(out)}
    assert (old.code, len(before)) == (0, 2)
    ended = process([*run, "grid.multiple=[1,24]"], tmp_path, PYTHONPATH=str(project))
    assert ended.code == 0, ended.err
    assert len(ended.lines(str(out))) == 2, "both are the runs that they were"
    (added,) = [folder for folder in run_folders(out) if folder.name not in before]
    record = read_record(added)
    assert (record["method"]["label"], record["method"]["multiple"]) == ("griffin multiple of 24 50%", 24)
    densities = {read_record(folder)["metrics"].get("effective_density") for folder in run_folders(out)}
    assert len(densities) == 3, "it prunes otherwise"
    refused = process([*run, "multiple=0"], tmp_path, PYTHONPATH=str(project))
    assert refused.lines("error: ") == ["error: multiple=0: expected 1 or more"]
    shown = process([sys.executable, "-m", "pipelines.run", "--help"], tmp_path, PYTHONPATH=str(project))
    assert "each layer keeps a multiple of so many neurons (1)" in shown.out
    report = [sys.executable, "-m", "analysis.report", f"runs={out}", f"out={tmp_path / 'report'}"]
    assert process(report, tmp_path, PYTHONPATH=str(project)).code == 0
    assert "griffin multiple of 24 50%" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
