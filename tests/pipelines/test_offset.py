"""`offset`: the same rows as in a run over all, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import Outcome, read_samples, run_folder, tiny

PLAIN = ["model=random_tiny", "wandb.mode=disabled"]


def calls(folder: Path) -> dict[str, list[str]]:
    """One call for each kind of task, over its first three rows."""
    folder.mkdir(exist_ok=True)
    text = folder / "text.txt"
    text.write_text("The tide comes in twice a day, and the harbour fills slowly. " * 10)
    lengths = ["task.prompt_lengths=[12]", "task.generation_lengths=[5]", "limit=3"]
    return {
        "generation": tiny(folder / "out"),
        "fidelity": tiny(folder / "out", "task.kind=fidelity"),
        "perplexity": [
            *PLAIN, "task=perplexity", f"task.data_files={text}", *lengths, f"output_dir={folder / 'out'}"
        ],
        "classification": [*PLAIN, "task=briefs_choice", "limit=3", f"output_dir={folder / 'out'}"],
    }  # fmt: skip


def timeless(folder: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in sample.items() if key != "seconds"} for sample in read_samples(folder)]


@pytest.mark.parametrize("kind", ["generation", "fidelity", "perplexity", "classification"])
def test_rows_after_an_offset_are_those_of_a_run_over_all(
    kind: str, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert call(*calls(tmp_path / "all")[kind]).code == 0
    later = [override for override in calls(tmp_path / "later")[kind] if not override.startswith("limit=")]
    assert call(*later, "offset=1", "limit=2").code == 0
    assert timeless(run_folder(tmp_path / "later" / "out")) == timeless(run_folder(tmp_path / "all" / "out"))[1:]


@pytest.mark.parametrize("task", ["briefs", "briefs_choice"])
def test_an_offset_beyond_the_data_is_one_line(task: str, call: Callable[..., Outcome], tmp_path: Path) -> None:
    ended = call(*PLAIN, f"task={task}", "offset=1000", f"output_dir={tmp_path}")
    assert ended.code == 1
    (line,) = ended.lines("error: ")
    assert line.startswith("error: offset=1000: expected less than")
