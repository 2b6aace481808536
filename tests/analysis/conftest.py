"""What all tests of the analysis share: one set of real runs of a tiny model, logged online to a loopback server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import SCRIPT, Lab, plain_environment
from loopback import KEY, LoopbackWandb


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Every kind of table and figure has its runs here."""
    root = tmp_path_factory.mktemp("lab")
    text = root / "text.txt"
    text.write_text("The ferry was late again, and two otters were seen in the harbour.\n" * 20, encoding="utf-8")
    shared = f"model=random_tiny wandb.mode=online output_dir={root}/out"
    calls = [
        f"task=briefs limit=3 task.max_new_tokens=4 grid.statistic=[griffin,magnitude] grid.sparsity=[0,0.5] {shared}",
        f"task=fidelity limit=3 task.max_new_tokens=4 grid.sparsity=[0,0.25,0.5] {shared}",
        f"task=perplexity limit=3 task.data_files={text} task.prompt_lengths=[16,32] task.generation_lengths=[8,16] "
        f"grid.sparsity=[0,0.5] {shared}",
        f"task=latency task.repeats=2 task.prompt_lengths=[8] task.generation_lengths=[4] sparsity=0.5 {shared}",
        f"task=flocking limit=3 task.sequence_length=64 task.max_new_tokens=4 {shared}",
    ]
    (root / "calls").write_text("\n".join(calls), encoding="utf-8")
    with LoopbackWandb() as server:
        variables = plain_environment(root) | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        lab = Lab(root, root / "out", server, variables)
        ended = lab.python("-c", SCRIPT, "calls")
        assert ended.returncode == 0, ended.stderr
        yield lab


@pytest.fixture
def runs(lab: Lab, tmp_path: Path) -> Path:
    """A copy of the run folders, to be damaged."""
    copy = tmp_path / "runs"
    shutil.copytree(lab.out, copy, ignore=shutil.ignore_patterns("wandb"))
    return copy


@pytest.fixture
def few_runs(runs: Path) -> Path:
    """Those of two tasks with a figure in all."""
    for folder in runs.iterdir():
        if not folder.name.startswith(("briefs-", "latency-")):
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
    return runs


@pytest.fixture(scope="session")
def report(lab: Lab) -> Path:
    """The report of all runs, written by the command; what it said is in a file."""
    ended = lab.python("-m", "analysis.report", f"runs={lab.out}", f"out={lab.root / 'report'}")
    assert ended.returncode == 0, ended.stderr
    (lab.root / "said").write_text(ended.stdout)
    return lab.root / "report"
