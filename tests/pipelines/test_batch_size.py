"""batch_size=auto: memory that runs out halves the batch, and nothing is lost."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import Outcome, ran, read_record, read_samples, run_folder, texts, tiny, tiny_task
from transformers import LlamaModel

import griffin
from griffin.kv_cache import KVCache
from pipelines import evaluation, methods


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


@pytest.mark.parametrize(("most", "chosen"), [(64, 8), (5, 4), (1, 1)])
def test_it_is_the_largest_half_that_fits(
    most: int,
    chosen: int,
    tmp_path: Path,
    short_of_memory: Callable[[int], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    alone = ran(*tiny(tmp_path / "alone", *GRID, rows=4))
    rows = short_of_memory(most)
    capsys.readouterr()
    auto = ran(*tiny(tmp_path / "auto", *GRID, "batch_size=auto", rows=4))
    assert max(row for row in rows if row <= most) == chosen, "three methods of four prompts are rows enough"
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("batch_size=auto")]
    assert told == [
        f"batch_size=auto: out of memory, goes on with {size}" for size in (4, 2, 1) if size >= chosen and chosen < 8
    ]
    for one, other in zip(alone, auto, strict=True):
        assert texts(other) == texts(one)
        record = read_record(other)
        assert record["metrics"] == pytest.approx(read_record(one)["metrics"])
        assert (record["config"]["batch_size"], record["environment"]["batch_size"]) == ("auto", chosen)
        assert {sample["batch_size"] for sample in read_samples(other)} == {chosen}


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("task", ["generation", "fidelity", "perplexity", "briefs_choice", "briefs_qa"])
def test_what_failed_is_gone_before_the_next_try_which_has_the_same_metrics(
    task: str, tmp_path: Path, short_of_memory: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else the memory that was short would be held while half as much is tried.
    alone = ran(*tiny_task(task, tmp_path / "alone", "limit=2", *GRID))
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []
    begin, allocate = KVCache.__init__, methods.engine_for

    def noted(cache: KVCache, *arguments: Any, **options: Any) -> None:
        made.append(weakref.ref(cache))
        begin(cache, *arguments, **options)

    def engine_for(*arguments: Any) -> griffin.Engine:
        alive.append(sum(reference() is not None for reference in made))
        engine = allocate(*arguments)
        made.append(weakref.ref(engine))
        return engine

    monkeypatch.setattr(KVCache, "__init__", noted)
    monkeypatch.setattr("pipelines.tasks.prompts.engine_for", engine_for)
    short_of_memory(1)
    auto = ran(*tiny_task(task, tmp_path / "auto", "limit=2", *GRID, "batch_size=auto"))
    for one, other in zip(alone, auto, strict=True):
        assert read_record(other)["metrics"] == pytest.approx(read_record(one)["metrics"])
        assert read_record(other)["environment"]["batch_size"] == 1
    assert alive == [0, 0, 0, 0], "tries with 8, 4, 2 and 1"
    assert len(made) > 4


def test_what_is_written_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Memory runs out at the fifth prompt, under the second method: that is run again, and nothing before it.
    from pipelines.tasks import generation

    scored: list[int] = []
    original = generation._sample

    def failing(prompt: Any, *arguments: Any) -> Any:
        scored.append(prompt.index)
        if len(scored) == 10:  # two groups of two prompts under two methods, and one row
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(prompt, *arguments)

    monkeypatch.setattr(evaluation, "ROWS_CPU", 2)
    monkeypatch.setattr(generation, "_sample", failing)
    monkeypatch.setattr(generation, "BATCHES", 2)
    dense, pruned = ran(*tiny(tmp_path / "auto", "grid.sparsity=[0,0.5]", "batch_size=auto", rows=6))
    assert len(scored) == 12 + 1
    assert sorted(sample["batch_size"] for sample in read_samples(dense)) == [1, 2, 2, 2, 2, 2]
    assert sorted(sample["batch_size"] for sample in read_samples(pruned)) == [1, 1, 2, 2, 2, 2]
    assert [read_record(folder)["environment"]["batch_size"] for folder in (dense, pruned)] == [1, 1]


@pytest.mark.parametrize("size", ["auto", "4"])
def test_where_no_row_fits_or_the_size_is_given_the_run_fails_in_one_line(
    size: str, call: Callable[..., Outcome], tmp_path: Path, short_of_memory: Callable[[int], list[int]]
) -> None:
    rows = short_of_memory(0 if size == "auto" else 3)
    call(*tiny(tmp_path / "out", f"batch_size={size}", rows=4)).refused("error: out of memory")
    assert max(rows) <= 4
    assert not (run_folder(tmp_path / "out") / "record.json").exists()


def test_other_errors_are_not_taken_for_memory(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("pipelines.tasks.generation._sample", broken)
    ended = call(*tiny(tmp_path / "out", "batch_size=auto"))
    assert ended.code == 1
    assert not ended.lines("batch_size=auto")
