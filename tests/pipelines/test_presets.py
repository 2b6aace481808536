"""Presets from the command line: critical sparsities, to the report, and the paper's latency with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmark import PAPER, SHAPES
from calling import command, composed, process, read_record, run_folders, write_rows

from analysis.contents import make_report

# One file serves all tasks: each reads its own fields.
ROW = {
    "question": "A boat carries 4 crates and 3 more are loaded. How many crates are on it?",
    "answer": "4 + 3 = 7\n#### 7",
    "document": "The ferry was late again on Monday.",
    "summary": "A late ferry.",
    "prompt": 'def half(number):\n    """Half of an even number."""\n',
    "entry_point": "half",
    "canonical_solution": "    return number // 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}
METHODS = 1 + 9 * 4  # dense; six of prompts and three of tokens at four sparsities


def test_the_preset_runs_and_its_report_says_how_far_each_method_goes(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [ROW | {"id": str(number)} for number in range(4)])
    shared = ["experiment=critical_sparsity", "limit=4", "wandb.mode=disabled", f"output_dir={tmp_path / 'out'}"]
    shared += [f"task.data_files={data}", "task.chat_template=true", "task.max_new_tokens=4"]
    both = process(command(*shared, f"task.shots_file={data}"), tmp_path, timeout=280, HF_HUB_OFFLINE="1")
    assert both.code == 0, both.err
    code = ["task=humaneval", "grid.sparsity=[0,0.5]"]
    refused = process(command(*shared, *code), tmp_path)
    refused.refused("error: task.allow_code_execution=false")
    allowed = process(command(*shared, *code, "task.allow_code_execution=true"), tmp_path, timeout=280)
    assert allowed.code == 0, allowed.err

    folders = run_folders(tmp_path / "out")
    assert len(folders) == 2 * METHODS + 1 + 9
    assert {read_record(folder)["metrics"]["samples"] for folder in folders} == {4}
    report = make_report(str(tmp_path / "out"))
    (table,) = [table for table in report.tables if table.name == "critical_sparsity"]
    assert len(table.rows) == 3 * 9
    (group,) = [group for group in report.groups if group.title == "Quality against bytes of weights per token"]
    assert len(group.drawings) == 3


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
