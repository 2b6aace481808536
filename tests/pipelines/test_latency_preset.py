"""The preset of the paper's latency, with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark import PAPER, SHAPES
from calling import command, composed, process, read_record, run_folders


def test_the_preset_of_the_papers_latency_runs(tmp_path: Path) -> None:
    small = ["model=random_tiny", "batch_size=1,2", "task.prompt_lengths=[8]", "task.generation_lengths=[3]"]
    small += ["task.repeats=1", "device=cpu", "wandb.mode=disabled", f"output_dir={tmp_path / 'out'}"]
    ended = process(command("experiment=paper_latency", *small), tmp_path, timeout=280)
    assert ended.code == 0, ended.err
    records = [read_record(folder) for folder in run_folders(tmp_path / "out")]
    assert len(records) == 2 * 4
    assert all(record["metrics"]["decode_speedup"] > 0 for record in records)


@pytest.mark.parametrize("shape", PAPER)
def test_the_benchmark_times_the_same_shapes(shape: str) -> None:
    assert composed(f"model=random_{shape}").model.architecture == SHAPES[shape]
