"""The two-minute tour ends with a report of its own runs."""

from __future__ import annotations

from pathlib import Path

from lab import Lab


def test_the_quickstart_writes_a_report_and_says_where(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "out"
    smaller = ["model=random_tiny", "limit=2", "task.max_new_tokens=2", f"output_dir={out}", "wandb.mode=disabled"]
    ended = lab.python("-m", "pipelines.run", "experiment=quickstart", *smaller)
    assert ended.returncode == 0, ended.stderr
    assert f"Report: {out}/report/index.html (4 runs, 3 tables, 11 figures)" in ended.stdout.splitlines()
    page = (out / "report" / "index.html").read_text(encoding="utf-8")
    assert page.count("python -m pipelines.run task=briefs experiment=quickstart") >= 3
    assert page.count("python -m pipelines.run task=flocking experiment=quickstart") >= 1


def test_a_report_that_cannot_be_written_costs_no_run(lab: Lab, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report").touch()
    one = ["task=briefs", "model=random_tiny", "limit=1", "task.max_new_tokens=2", "wandb.mode=disabled"]
    ended = lab.python("-m", "pipelines.run", "experiment=quickstart", *one, "grid.statistic=[]", f"output_dir={out}")
    assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stdout.splitlines() if line.startswith("warning: no report: out=")]
    assert len(list(out.glob("*/record.json"))) == 2
