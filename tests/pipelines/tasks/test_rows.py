"""Rows that run together: as in separate runs, each prompt once; and memory that runs out halves the batch."""

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import Entry, prompts_run, ran, read_record, read_samples, run_folder, texts, timeless, tiny
from transformers import LlamaModel

import griffin
from griffin.kv_cache import KVCache
from pipelines import evaluation, methods

EVERYTHING = (
    *("grid.statistic=[griffin,random]", "grid.sparsity=[0,0.5]"),
    *("grid.compensation=[none,ridge]", "grid.refresh=[none,compensation]"),
)
LENGTHS = ["task.prompt_lengths=[12,40]", "task.generation_lengths=[5,16]"]
TASKS = ("generation", "fidelity", "perplexity", "briefs_choice", "briefs_qa")
OWN = {"perplexity": LENGTHS, "briefs_choice": ["task.protocol=continuation"]}
SHARED = ("batch_size=4", "shared_experts=true", "selection=topk_sample")


def options(task: str, out: Path, *more: str) -> list[str]:
    """A call over the first items of a task, with shared experts or other settings behind the first word."""
    name, *settings = task.split()
    return tiny(out, *OWN.get(name, []), *settings, *more, task=name, tokens=14)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """The runs of seven methods on the same items, by task; one row at a time unless experts are shared."""
    return functools.cache(lambda task: ran(*options(task, tmp_path_factory.mktemp("grid") / "out", *EVERYTHING)))


@pytest.mark.parametrize("task", [*TASKS, "briefs_choice task.protocol=paper", " ".join(["briefs_qa", *SHARED])])
def test_a_grid_equals_separate_runs_to_the_bit(task: str, grid: Callable[[str], list[Path]], tmp_path: Path) -> None:
    together = {folder.name: timeless(folder) for folder in grid(task)}
    assert len(together) == 7
    assert len({str(samples) for _, samples in together.values()}) > 3, "methods that agree test nothing"
    points = (["sparsity=0"], [], ["compensation=ridge", "refresh=compensation"])
    for method in (*points, ["statistic=random", "compensation=ridge"]):
        (alone,) = ran(*options(task, tmp_path / "out", *method))
        assert timeless(alone) == together[alone.name]


def same_up_to_rounding(one: Any, other: Any) -> bool:
    """Whether records or samples, nested, have the same keys and the same numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_up_to_rounding(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_up_to_rounding, one, other))
    return bool(one == pytest.approx(other, rel=1e-3, abs=2e-6) if isinstance(one, float) else one == other)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_runs_each_prompt_once_and_gives_its_rows_up_to_rounding(
    task: str, grid: Callable[[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, lengths = grid(task), prompts_run(monkeypatch)
    batch = ran(*options(task, tmp_path / "out", *EVERYTHING, "batch_size=5"))
    if task != "briefs_choice":  # which batches its prompts
        assert [len(each) for each in lengths] == [1] * 3 * (2 if task == "perplexity" else 1)
    if task == "generation":
        assert lengths == sorted(lengths, reverse=True), "the longest first"
    pairs = [
        pair
        for one, other in zip(alone, batch, strict=True)
        for pair in zip(timeless(one)[1], timeless(other)[1], strict=True)
    ]
    # A text may differ where two tokens are as good as equal.
    assert sum(not same_up_to_rounding(*pair) for pair in pairs) <= (len(pairs) // 20 if task == "generation" else 0)
    for folder in batch:
        seconds = [sample["seconds"] for sample in read_samples(folder)]
        assert min(seconds) > 0
        assert read_record(folder)["timing"]["seconds"] == pytest.approx(sum(seconds))


@pytest.mark.parametrize("task", ["perplexity", "briefs_choice"])
def test_the_plain_model_has_the_same_likelihoods_up_to_rounding(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onednn = ran(*options(task, tmp_path / "onednn", "grid.sparsity=[0,0.5]"))
    monkeypatch.setattr("griffin.with_onednn", lambda _: pytest.fail("ran by oneDNN"))
    plain = ran(*options(task, tmp_path / "plain", "grid.sparsity=[0,0.5]", "cpu_onednn=false"))
    for one, other in zip(onednn, plain, strict=True):
        assert one.name == other.name, "the same run: results differ by rounding only"
        assert same_up_to_rounding(timeless(one)[1], timeless(other)[1])


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


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    ("task", "most", "tries"),
    [
        *(("generation", 64, [8]), ("generation", 5, [8, 4])),
        *((task, 1, [8, 4, 2, 1]) for task in ("generation", "fidelity", "perplexity", "briefs_choice", "briefs_qa")),
    ],
)
def test_the_largest_half_that_fits_has_the_same_results_and_what_failed_is_gone_before(
    task: str,
    most: int,
    tries: list[int],
    tmp_path: Path,
    short_of_memory: Callable[[int], list[int]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Else the memory that was short would be held while half as much is tried.
    alone = ran(*tiny(tmp_path / "alone", *GRID, task=task, rows=4))
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
    rows = short_of_memory(most)
    capsys.readouterr()
    auto = ran(*tiny(tmp_path / "auto", *GRID, "batch_size=auto", task=task, rows=4))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("batch_size=auto")]
    assert told == [f"batch_size=auto: out of memory, goes on with {size}" for size in tries[1:]]
    assert alive == [0] * len(tries)
    assert len(made) > len(tries)
    for one, other in zip(alone, auto, strict=True):
        record = read_record(other)
        assert record["metrics"] == pytest.approx(read_record(one)["metrics"])
        assert (record["config"]["batch_size"], record["environment"]["batch_size"]) == ("auto", tries[-1])
        if task == "generation":
            assert max(row for row in rows if row <= most) == tries[-1], "three methods of four prompts are rows enough"
            assert texts(other) == texts(one)
            assert {sample["batch_size"] for sample in read_samples(other)} == {tries[-1]}


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
    size: str, call: Entry, tmp_path: Path, short_of_memory: Callable[[int], list[int]]
) -> None:
    rows = short_of_memory(0 if size == "auto" else 3)
    call(*tiny(tmp_path / "out", f"batch_size={size}", rows=4)).refused("error: out of memory")
    assert max(rows) <= 4
    assert not (run_folder(tmp_path / "out") / "record.json").exists()


def test_other_errors_are_not_taken_for_memory(call: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("pipelines.tasks.generation._sample", broken)
    ended = call(*tiny(tmp_path / "out", "batch_size=auto"))
    assert ended.code == 1
    assert not ended.lines("batch_size=auto")
