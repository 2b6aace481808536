"""batch_size=auto: memory that runs out halves the batch, and nothing is lost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import Outcome, composed, read_record, read_samples, run_folder, run_folders, texts, tiny
from transformers import LlamaModel

from pipelines import batch_size


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Forward calls of more rows than given run out of memory; the row counts of all calls come in a list."""

    def limit(most: int) -> list[int]:
        rows: list[int] = []
        forward = LlamaModel.forward

        @functools.wraps(forward)
        def limited(model: Any, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            rows.append(len(input_ids))
            if len(input_ids) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
            return forward(model, input_ids, *arguments, **options)

        monkeypatch.setattr(LlamaModel, "forward", limited)
        return rows

    return limit


GRID = ["grid.sparsity=[0,0.5]", "grid.statistic=[griffin,wanda]"]


@pytest.mark.parametrize(("most", "chosen"), [(64, 8), (6, 8), (5, 4), (3, 2), (1, 1)])
def test_it_is_the_largest_half_that_fits(
    most: int, chosen: int, call: Callable[..., Outcome], tmp_path: Path, short_of_memory: Callable[[int], list[int]]
) -> None:
    assert call(*tiny(tmp_path / "alone", *GRID, "mode=masked", rows=6)).code == 0
    rows = short_of_memory(most)
    ended = call(*tiny(tmp_path / "auto", *GRID, "batch_size=auto", rows=6))
    assert ended.code == 0
    # Six rows are a batch of six where eight fit.
    assert max(row for row in rows if row <= most) == min(chosen, 6)
    told = [
        f"batch_size=auto: out of memory, goes on with {size}" for size in (4, 2, 1) if size >= chosen and chosen < 8
    ]
    assert ended.lines("batch_size=auto") == told
    for one, other in zip(run_folders(tmp_path / "alone"), run_folders(tmp_path / "auto"), strict=True):
        assert texts(other) == texts(one)
        record = read_record(other)
        assert record["metrics"] == read_record(one)["metrics"]
        assert (record["config"]["batch_size"], record["environment"]["batch_size"]) == ("auto", chosen)
        assert {sample["batch_size"] for sample in read_samples(other)} == {chosen}


def test_what_is_written_stays(call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory runs out at the last prompt of the second group, under the second method: that alone is run again.
    monkeypatch.setattr(batch_size, "ROWS_CPU", 2)
    from pipelines.tasks import generation

    scored: list[int] = []
    original = generation._scored

    def failing(prompt: Any, *arguments: Any) -> Any:
        scored.append(prompt.index)
        if len(scored) == 12:  # a group of four under each method, one of two under the first, and the second of two
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(prompt, *arguments)

    monkeypatch.setattr(generation, "_scored", failing)
    monkeypatch.setattr(generation, "_BATCHES", 2)
    assert call(*tiny(tmp_path / "auto", "grid.sparsity=[0,0.5]", "batch_size=auto", rows=6)).code == 0
    assert len(scored) == 12 + 1
    dense, pruned = run_folders(tmp_path / "auto")
    assert {sample["batch_size"] for sample in read_samples(dense)} == {2}
    assert sorted(sample["batch_size"] for sample in read_samples(pruned)) == [1, 2, 2, 2, 2, 2]
    assert [read_record(folder)["environment"]["batch_size"] for folder in (dense, pruned)] == [2, 1]


@pytest.mark.parametrize("task", ["briefs_choice", "briefs_qa"])
def test_tasks_of_lm_eval_too(
    task: str, call: Callable[..., Outcome], tmp_path: Path, short_of_memory: Callable[[int], list[int]]
) -> None:
    options = ["model=random_tiny", f"task={task}", "limit=6", "wandb.mode=disabled", "grid.sparsity=[0,0.5]"]
    assert call(*options, f"output_dir={tmp_path / 'two'}", "batch_size=2").code == 0
    short_of_memory(3)
    assert call(*options, f"output_dir={tmp_path / 'auto'}", "batch_size=auto").code == 0
    for one, other in zip(run_folders(tmp_path / "two"), run_folders(tmp_path / "auto"), strict=True):
        assert read_record(other)["metrics"] == read_record(one)["metrics"]
        assert read_record(other)["environment"]["batch_size"] == 2


@pytest.mark.parametrize("size", ["auto", "4"])
def test_where_no_row_fits_or_the_size_is_given_the_run_fails_in_one_line(
    size: str, call: Callable[..., Outcome], tmp_path: Path, short_of_memory: Callable[[int], list[int]]
) -> None:
    rows = short_of_memory(0 if size == "auto" else 3)
    ended = call(*tiny(tmp_path / "out", f"batch_size={size}", rows=4))
    assert ended.code == 1
    (error,) = ended.lines("error: ")
    assert error.startswith("error: out of memory")
    assert "Traceback" not in ended.err
    assert max(rows) <= 4
    assert not (run_folder(tmp_path / "out") / "record.json").exists()


def test_other_errors_are_not_taken_for_memory(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("pipelines.tasks.generation._scored", broken)
    ended = call(*tiny(tmp_path / "out", "batch_size=auto"))
    assert ended.code == 1
    assert not ended.lines("batch_size=auto")


@pytest.mark.parametrize(
    "overrides",
    [
        *(["mode=compact"], ["offload_dense=true"], ["task.decoding=reference_sampling"]),
        *(["task=latency"], ["task=perplexity", "task.data_files=README.md"], ["task=fidelity"], ["task=flocking"]),
    ],
)
def test_it_is_1_where_rows_run_one_by_one(overrides: list[str]) -> None:
    config = composed("batch_size=auto", *overrides)
    assert (config.batch_size, config.mode) == (1, "compact")


def test_it_is_masked_where_rows_run_together() -> None:
    config = composed("batch_size=auto")
    assert (config.batch_size, config.mode) == ("auto", "masked")
