"""`offset`: the same rows as in a run over all, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from calling import composed, ran, timeless, tiny

from pipelines.errors import UserError
from pipelines.tasks import module_of

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
        "flocking": [
            *PLAIN, "task=flocking", f"task.data_files={text}", "task.sequence_length=16", "task.max_new_tokens=3",
            "limit=3", f"output_dir={folder / 'out'}"
        ],
        "classification": [*PLAIN, "task=briefs_choice", "limit=3", f"output_dir={folder / 'out'}"],
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["generation", "fidelity", "perplexity", "classification", "flocking"])
def test_rows_after_an_offset_are_those_of_a_run_over_all(kind: str, tmp_path: Path) -> None:
    (whole,) = ran(*calls(tmp_path / "all")[kind])
    later = [override for override in calls(tmp_path / "later")[kind] if not override.startswith("limit=")]
    (rest,) = ran(*later, "offset=1", "limit=2")
    assert timeless(rest)[1] == timeless(whole)[1][1:]


@pytest.mark.parametrize("task", ["briefs", "briefs_choice", "flocking"])
def test_an_offset_beyond_the_data_is_told(task: str) -> None:
    config = composed(*PLAIN, f"task={task}", "offset=1000")
    with pytest.raises(UserError, match=r"^offset=1000: expected less than"):
        module_of(config.task.kind).read(config)
