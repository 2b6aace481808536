"""What the tests of the analysis share: real runs of a tiny model, and runs that no model has run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import SCRIPT, Lab, plain_environment
from loopback import KEY, LoopbackWandb
from made import every_kind, few, write_run

from analysis.contents import make_report
from analysis.output import write_report


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Every kind of table and figure has its runs here. All are in the W&B project griffin, but latency in speed."""
    root = tmp_path_factory.mktemp("lab")
    text = root / "text.txt"
    text.write_text("The ferry was late again, and two otters were seen in the harbour.\n" * 20, encoding="utf-8")
    shared = f"model=random_tiny model.architecture.num_hidden_layers=1 wandb.mode=online output_dir={root}/out"
    calls = [
        f"task=briefs limit=3 task.max_new_tokens=4 grid.statistic=[griffin,magnitude] grid.sparsity=[0,0.5] {shared}",
        f"task=fidelity limit=3 task.max_new_tokens=4 grid.sparsity=[0,0.5] {shared} wandb.mode=offline",
        f"task=perplexity limit=3 task.data_files={text} task.prompt_lengths=[16,32] task.generation_lengths=[8,16] "
        f"grid.sparsity=[0,0.5] {shared}",
        "task=latency task.repeats=2 task.prompt_lengths=[8] task.generation_lengths=[4] "
        f"sparsity=0.5 grid.statistic=[griffin,magnitude] wandb.project=speed {shared}",
        f"task=flocking limit=3 task.sequence_length=64 task.max_new_tokens=4 {shared}",
    ]
    (root / "calls").write_text("\n".join(calls), encoding="utf-8")
    with LoopbackWandb() as server:
        variables = plain_environment(root) | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
        lab = Lab(root, root / "out", server, variables)
        ended = lab.python("-c", SCRIPT, "calls")
        assert ended.returncode == 0, ended.stderr
        offline = [str(path) for path in lab.out.glob("*/wandb/offline-run-*")]
        assert len(offline) == 2
        assert lab.python("-m", "wandb", "sync", *offline).returncode == 0
        yield lab


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folders of a few runs, to be damaged."""
    for record in few():
        write_run(tmp_path / "runs", record)
    return tmp_path / "runs"


@pytest.fixture(scope="session")
def every_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of runs of every kind."""
    root = tmp_path_factory.mktemp("made")
    for record in every_kind():
        write_run(root / "runs", record)
    return root / "runs"


@pytest.fixture(scope="session")
def report(every_run: Path) -> Path:
    """The report of runs of every kind."""
    write_report(make_report(str(every_run)), every_run.with_name("report"))
    return every_run.with_name("report")
