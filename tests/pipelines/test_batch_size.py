"""batch_size=auto: memory that runs out halves the batch, and nothing is lost."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import Outcome, composed, ran, read_record, read_samples, run_folder, texts, tiny
from transformers import LlamaModel

import griffin
from griffin.kv_cache import KVCache
from pipelines import batch_size, methods


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
@pytest.mark.parametrize(
    ("task", "module"),
    [
        ("task=briefs", "generation"),
        ("task=fidelity", "fidelity"),
        ("task=perplexity", "perplexity"),
        ("task=briefs_choice", "classification_and_qa"),
        ("task=briefs_qa", "classification_and_qa"),
    ],
)
def test_what_failed_is_gone_before_the_next_try(
    task: str, module: str, tmp_path: Path, short_of_memory: Callable[[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else the memory that was short would be held while half as much is tried.
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
    monkeypatch.setattr(f"pipelines.tasks.{module}.engine_for", engine_for)
    short_of_memory(1)
    text = tmp_path / "text.txt"
    text.write_text("The tide comes in twice a day. " * 20)
    own = ["task.prompt_lengths=[12]", "task.generation_lengths=[5]", f"task.data_files={text}"]
    options = ["model=random_tiny", task, "limit=2", f"output_dir={tmp_path / 'out'}", "wandb.mode=disabled"]
    options += own if module == "perplexity" else ["task.max_new_tokens=4"] if module != "classification_and_qa" else []
    ran(*options, *GRID, "batch_size=auto")
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

    monkeypatch.setattr(batch_size, "ROWS_CPU", 2)
    monkeypatch.setattr(generation, "_sample", failing)
    monkeypatch.setattr(generation, "BATCHES", 2)
    dense, pruned = ran(*tiny(tmp_path / "auto", "grid.sparsity=[0,0.5]", "batch_size=auto", rows=6))
    assert len(scored) == 12 + 1
    assert sorted(sample["batch_size"] for sample in read_samples(dense)) == [1, 2, 2, 2, 2, 2]
    assert sorted(sample["batch_size"] for sample in read_samples(pruned)) == [1, 1, 2, 2, 2, 2]
    assert [read_record(folder)["environment"]["batch_size"] for folder in (dense, pruned)] == [1, 1]


@pytest.mark.parametrize("task", ["briefs_choice", "briefs_qa"])
def test_tasks_of_lm_eval_too(task: str, tmp_path: Path, short_of_memory: Callable[[int], list[int]]) -> None:
    options = ["model=random_tiny", f"task={task}", "limit=4", "wandb.mode=disabled", "grid.sparsity=[0,0.5]"]
    two = ran(*options, f"output_dir={tmp_path / 'two'}", "batch_size=2")
    short_of_memory(3)
    auto = ran(*options, f"output_dir={tmp_path / 'auto'}", "batch_size=auto")
    for one, other in zip(two, auto, strict=True):
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

    monkeypatch.setattr("pipelines.tasks.generation._sample", broken)
    ended = call(*tiny(tmp_path / "out", "batch_size=auto"))
    assert ended.code == 1
    assert not ended.lines("batch_size=auto")


@pytest.mark.parametrize(
    ("overrides", "settled"),
    [
        *(([one], (1, "compact")) for one in ("mode=compact", "offload_dense=true", "task=latency", "task=flocking")),
        *(([one], ("auto", "masked")) for one in ("task=briefs", "task.decoding=reference_sampling", "task=fidelity")),
        (["task=perplexity", "task.data_files=README.md"], ("auto", "masked")),
    ],
)
def test_it_is_1_where_rows_run_one_by_one(overrides: list[str], settled: tuple[object, str]) -> None:
    config = composed("batch_size=auto", *overrides)
    assert (config.batch_size, config.mode) == settled
