"""Rows that run together, of every kind of task that has some: as in separate runs, and each prompt once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import prompts_run, ran, read_record, read_samples, timeless, tiny

EVERYTHING = (
    *("grid.statistic=[griffin,random]", "grid.sparsity=[0,0.5]"),
    *("grid.compensation=[none,ridge]", "grid.refresh=[none,compensation]"),
)
ITEMS = {"classification": 2, "question_answering": 2}  # else 3
SHARED = ("batch_size=4", "shared_experts=true", "selection=topk_sample")


def options(kind: str, out: Path, *more: str) -> list[str]:
    """A call over the first items of a kind."""
    (out.parent / "text.txt").write_text("The tide comes in twice a day, and the harbour fills slowly. " * 30)
    data, lengths = f"task.data_files={out.parent / 'text.txt'}", "task.prompt_lengths=[12,40]"
    plain = ["model=random_tiny", f"limit={ITEMS.get(kind, 3)}", f"output_dir={out}", "wandb.mode=disabled"]
    calls = {
        "generation": tiny(out, tokens=14),
        "fidelity": tiny(out, "task.kind=fidelity", tokens=12),
        "perplexity": ["task=perplexity", data, lengths, "task.generation_lengths=[5,16]", *plain],
        "classification": ["task=briefs_choice", "task.protocol=continuation", *plain],
        "question_answering": ["task=briefs_qa", *plain],
        "question_answering, shared experts": ["task=briefs_qa", *plain, *SHARED],
    }
    return [*calls[kind], *more]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Path]]:
    """The runs of seven methods on the same items, by kind; one row at a time unless experts are shared."""
    return functools.cache(lambda kind: ran(*options(kind, tmp_path_factory.mktemp("grid") / "out", *EVERYTHING)))


KINDS = ("generation", "fidelity", "perplexity", "classification", "question_answering")


@pytest.mark.parametrize("kind", [*KINDS, "question_answering, shared experts"])
def test_a_grid_equals_separate_runs_to_the_bit(kind: str, grid: Callable[[str], list[Path]], tmp_path: Path) -> None:
    together = {folder.name: timeless(folder) for folder in grid(kind)}
    assert len(together) == 7
    assert len({str(samples) for _, samples in together.values()}) > 3, "methods that agree test nothing"
    points = (["sparsity=0"], [], ["compensation=ridge", "refresh=compensation"])
    for method in (*points, ["statistic=random", "compensation=ridge"]):
        (alone,) = ran(*options(kind, tmp_path / "out", *method))
        assert timeless(alone) == together[alone.name]


def same_up_to_rounding(one: Any, other: Any) -> bool:
    """Whether records or samples, nested, have the same keys and the same numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_up_to_rounding(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same_up_to_rounding, one, other))
    return bool(one == pytest.approx(other, rel=1e-3, abs=2e-6) if isinstance(one, float) else one == other)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_runs_each_prompt_once_and_gives_its_rows_up_to_rounding(
    kind: str, grid: Callable[[str], list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, lengths = grid(kind), prompts_run(monkeypatch)
    batch = ran(*options(kind, tmp_path / "out", *EVERYTHING, "batch_size=5"))
    if kind != "classification":  # which batches its prompts
        assert [len(each) for each in lengths] == [1] * ITEMS.get(kind, 3) * (2 if kind == "perplexity" else 1)
    if kind == "generation":
        assert lengths == sorted(lengths, reverse=True), "the longest first"
    pairs = [
        pair
        for one, other in zip(alone, batch, strict=True)
        for pair in zip(timeless(one)[1], timeless(other)[1], strict=True)
    ]
    # A text may differ where two tokens are as good as equal.
    assert sum(not same_up_to_rounding(*pair) for pair in pairs) <= (len(pairs) // 20 if kind == "generation" else 0)
    for folder in batch:
        seconds = [sample["seconds"] for sample in read_samples(folder)]
        assert min(seconds) > 0
        assert read_record(folder)["timing"]["seconds"] == pytest.approx(sum(seconds))


@pytest.mark.parametrize("task", ["perplexity", "classification"])
def test_the_plain_model_has_the_same_likelihoods_up_to_rounding(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onednn = ran(*options(task, tmp_path / "onednn", "grid.sparsity=[0,0.5]"))
    monkeypatch.setattr("griffin.with_onednn", lambda _: pytest.fail("ran by oneDNN"))
    plain = ran(*options(task, tmp_path / "plain", "grid.sparsity=[0,0.5]", "cpu_onednn=false"))
    for one, other in zip(onednn, plain, strict=True):
        assert one.name == other.name, "the same run: results differ by rounding only"
        assert same_up_to_rounding(timeless(one)[1], timeless(other)[1])
