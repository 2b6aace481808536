"""The two-minute tour ends with a report of its own runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab import python
from omegaconf import OmegaConf

from analysis import callback
from analysis.callback import WriteReport


def test_the_quickstart_writes_a_report_and_says_where(tmp_path: Path) -> None:
    out = tmp_path / "out"
    smaller = [
        "model=random_tiny",
        "model.architecture.num_hidden_layers=1",
        "limit=2",
        "task.max_new_tokens=2",
        f"output_dir={out}",
        "wandb.mode=disabled",
    ]
    ended = python(tmp_path, "-m", "pipelines.run", "experiment=quickstart", *smaller)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == f"Report: {out}/report/index.html (4 runs, 5 tables, 7 figures)"
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("python -m pipelines.run task=briefs experiment=quickstart") >= 3
    assert page.count("python -m pipelines.run task=flocking experiment=quickstart") >= 1


def test_a_report_that_cannot_be_written_is_one_line(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closing: list[str] = []
    monkeypatch.setattr(callback, "CLOSING", closing)
    (runs / "report").touch()
    WriteReport().on_run_end(OmegaConf.create({"output_dir": str(runs)}))
    (line,) = closing
    assert line.startswith(f"warning: no report: out={runs}/report: cannot write")
