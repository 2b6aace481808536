"""A generation run from the call to the record: texts, scores, batches, decoding and what is too long."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import (
    ALPHABET,
    ARTICLES,
    Outcome,
    composed,
    prompts_run,
    read_record,
    read_samples,
    run_folder,
    run_folders,
    texts,
    tiny,
    write_rows,
)
from rouge_score.rouge_scorer import RougeScorer

import griffin
from pipelines import models
from pipelines.tasks.prompts import read_prompts

ROUGE = ("rouge1", "rouge2", "rougeL")
SAMPLED = "task.decoding=reference_sampling"  # random weights repeat themselves greedily, and vary when sampled


def run_of(call: Callable[..., Outcome], out: Path, *overrides: str, **sizes: int) -> Path:
    """The folder of a run that has ended well."""
    assert call(*tiny(out, *overrides, **sizes)).code == 0
    return run_folder(out)


def test_a_sample_says_what_came_out_and_what_it_cost(call: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = run_of(call, tmp_path / "out", rows=2, tokens=8)
    samples = read_samples(folder)
    assert [sample["index"] for sample in samples] == [0, 1]
    fields = {"index", "id", "prompt_tokens", "generated_tokens", "seconds", *ROUGE, "text", "reference"}
    for sample in samples:
        assert set(sample) == fields
        assert sample["reference"] == ALPHABET
        assert sample["seconds"] > 0
        assert sample["generated_tokens"] == 8
    timing = read_record(folder)["timing"]
    assert timing["seconds"] == pytest.approx(sum(sample["seconds"] for sample in samples))


def test_metrics_are_rouge_of_the_texts_times_100(call: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = run_of(call, tmp_path / "out", SAMPLED, rows=5, tokens=60)
    samples, metrics = read_samples(folder), read_record(folder)["metrics"]
    scorer = RougeScorer(ROUGE, use_stemmer=False)
    scores = [scorer.score(sample["reference"], sample["text"]) for sample in samples]
    for name in ROUGE:
        values = [100 * score[name].fmeasure for score in scores]
        assert [sample[name] for sample in samples] == values
        assert metrics[name] == pytest.approx(statistics.fmean(values))
        assert metrics[f"{name}_stderr"] == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
    assert metrics["rouge1"] > 1, "texts that match nothing test nothing"
    assert metrics["samples"] == 5
    for name in ("prompt_tokens", "generated_tokens"):
        assert metrics[name] == sum(sample[name] for sample in samples)


def test_words_are_compared_as_they_are(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without stemming, and whatever their case; random weights write no words, so the text is put in.
    def decode(tokenizer: Any, ids: Any, **_: Any) -> str | list[str]:
        text = "Cities growing quickly"
        return [text] * len(ids) if isinstance(ids[0], list) or getattr(ids, "ndim", 1) > 1 else text

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.decode", decode)
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.batch_decode", decode)
    data = write_rows(tmp_path / "words.jsonl", [{"article": "Rain fell.", "summary": "cities grow quickly"}])
    (sample,) = read_samples(run_of(call, tmp_path / "out", f"task.data_files={data}"))
    assert sample["text"] == "Cities growing quickly"
    assert sample["rouge1"] == pytest.approx(100 * 2 / 3)


def test_the_call_ends_with_a_table_of_the_metrics(call: Callable[..., Outcome], tmp_path: Path) -> None:
    ended = call(*tiny(tmp_path / "out", SAMPLED, "grid.sparsity=[0,0.5]", rows=3, tokens=40))
    for folder in run_folders(tmp_path / "out"):
        metrics = read_record(folder)["metrics"]
        method = "dense" if "dense" in folder.name else "griffin 50%"
        (line,) = [line for line in ended.out.splitlines() if method in line]
        assert f"{metrics['rouge1']:.2f} ± {metrics['rouge1_stderr']:.2f}" in line


@pytest.mark.parametrize(
    "method",
    [
        ["sparsity=0"],
        ["sparsity=0.5"],
        ["statistic=random"],
        ["selection=sample"],
        ["selection=topk_sample"],
        ["compensation=ridge"],
        ["compensation=ridge", "refresh=experts"],
        ["compensation=ridge", "refresh=compensation"],
    ],
)
def test_a_batch_gives_the_texts_of_one_at_a_time(
    method: list[str], call: Callable[..., Outcome], tmp_path: Path
) -> None:
    alone = run_of(call, tmp_path / "alone", *method, rows=6, tokens=24)
    batch = run_of(call, tmp_path / "batch", *method, "batch_size=4", rows=6, tokens=24)
    assert texts(run_of(call, tmp_path / "turns", *method, "batch_size=2", rows=6, tokens=24)) == texts(alone)
    assert texts(batch) == texts(alone)
    assert len(set(texts(alone))) > 1, "rows that all give the same text test nothing"
    assert read_record(batch)["metrics"] == read_record(alone)["metrics"]


def plain_greedy(*overrides: str, tokens: int) -> list[str]:
    """The texts of transformers alone, cut nowhere."""
    config = composed(*overrides)
    loaded = models.load(config.model, "cpu", config.seed)
    found = []
    for prompt in read_prompts(config.task, config.limit):
        ids = torch.tensor([loaded.encode(prompt.text)])
        output = loaded.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=1
        )
        found.append(loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def test_sparsity_zero_is_plain_generation(call: Callable[..., Outcome], tmp_path: Path) -> None:
    folder = run_of(call, tmp_path / "out", "sparsity=0", rows=4, tokens=24)
    assert texts(folder) == plain_greedy(*tiny(tmp_path / "out", rows=4), tokens=24)


def test_pruning_changes_texts(call: Callable[..., Outcome], tmp_path: Path) -> None:
    # Else every test here would pass for a pipeline that never prunes.
    dense = run_of(call, tmp_path / "dense", "sparsity=0", rows=4, tokens=24)
    pruned = run_of(call, tmp_path / "pruned", "sparsity=0.9", rows=4, tokens=24)
    assert texts(pruned) != texts(dense)


def stop_within(whole: list[str]) -> str:
    """A letter that stands within the first text, neither first nor last, and is missing in another text."""
    for letter in whole[0][2:-2]:
        if letter.isascii() and letter.isalpha() and any(letter not in text for text in whole):
            return letter
    raise AssertionError("no letter cuts one text and spares another: take other rows")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_texts_are_cut_at_the_stop_text_and_else_keep_their_last_character(
    batch_size: int, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    sizes = {"rows": 3, "tokens": 24}
    whole = plain_greedy(*tiny(tmp_path / "out", rows=3), "seed=4", tokens=24)
    stop = stop_within(whole)
    options = ["seed=4", "sparsity=0", f"task.stop={stop}", f"batch_size={batch_size}"]
    folder = run_of(call, tmp_path / "out", *options, **sizes)
    assert texts(folder) == [text.partition(stop)[0] for text in whole]
    assert any(stop not in text for text in whole)


@pytest.mark.parametrize("eos", [1, 2])  # 1 is the byte tokenizer's, which pads with it, as Llama 2's does
def test_generation_ends_with_the_stop_text_in_a_batch_too(
    eos: int, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    # What is generated is counted, so a row that ended must not count the padding behind it.
    options = [f"+model.architecture.eos_token_id={eos}", "seed=4", "sparsity=0"]
    whole = plain_greedy(*tiny(tmp_path / "out", *options, rows=3), tokens=24)
    options.append(f"task.stop={stop_within(whole)}")
    alone = run_of(call, tmp_path / "alone", *options, rows=3, tokens=24)
    counts = [sample["generated_tokens"] for sample in read_samples(alone)]
    assert min(counts) < 24
    for size in (2, 3):  # the third takes the place of the one that has ended first; all at once
        batch = run_of(call, tmp_path / f"batch{size}", *options, f"batch_size={size}", rows=3, tokens=24)
        assert [sample["generated_tokens"] for sample in read_samples(batch)] == counts
        assert texts(batch) == texts(alone)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_shots_run_once_and_texts_stay(
    batch_size: int, call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny(tmp_path / "out", rows=6)[1].partition("=")[2]
    options = ["task.shots=1", f"task.shots_file={data}", f"batch_size={batch_size}"]
    shared = run_of(call, tmp_path / "shared", *options, rows=6, tokens=24)
    monkeypatch.setattr("griffin.beginning.WORTH", 0)  # no prompt goes on from the shots
    assert texts(run_of(call, tmp_path / "whole", *options, rows=6, tokens=24)) == texts(shared)


def prompt_lengths(*overrides: str) -> list[int]:
    """Tokens of each prompt: one per byte of its text."""
    config = composed(*overrides)
    return [len(prompt.text.encode()) for prompt in read_prompts(config.task, config.limit)]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_prompts_without_room_for_the_generation_are_skipped_and_counted(
    batch_size: int, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    lengths = prompt_lengths(*tiny(tmp_path / "out", rows=6))
    longest_run = sorted(lengths)[2]  # three fit, the longest of them to the last token
    overrides = [f"model.architecture.max_position_embeddings={longest_run + 8}", f"batch_size={batch_size}"]
    folder = run_of(call, tmp_path / "out", *overrides, rows=6, tokens=8)
    samples, metrics = read_samples(folder), read_record(folder)["metrics"]
    assert [sample["index"] for sample in samples] == list(range(6))
    assert [sample["prompt_tokens"] for sample in samples] == lengths
    assert [("skipped" in sample) for sample in samples] == [length > longest_run for length in lengths]
    assert [sample for sample in samples if "skipped" in sample and "text" in sample] == []
    assert (metrics["samples"], metrics["skipped_prompts"]) == (3, 3)
    assert metrics["prompt_tokens"] == sum(sorted(lengths)[:3])


def test_a_run_may_skip_everything(call: Callable[..., Outcome], tmp_path: Path) -> None:
    ended = call(*tiny(tmp_path / "out", "model.architecture.max_position_embeddings=20"))
    assert ended.code == 0
    metrics = read_record(run_folder(tmp_path / "out"))["metrics"]
    assert (metrics["samples"], metrics["skipped_prompts"]) == (0, 3)
    assert "rouge1" not in metrics, "no text, no score"


def test_sampled_decoding_is_reproducible_and_not_greedy(call: Callable[..., Outcome], tmp_path: Path) -> None:
    first = texts(run_of(call, tmp_path / "first", SAMPLED))
    assert texts(run_of(call, tmp_path / "again", SAMPLED)) == first
    assert texts(run_of(call, tmp_path / "greedy")) != first
    assert len(set(first)) == 3, "every row draws for itself"


def test_sampled_texts_do_not_depend_on_the_samples_before(call: Callable[..., Outcome], tmp_path: Path) -> None:
    undisturbed = run_of(call, tmp_path / "three", SAMPLED, rows=3)
    folder = run_of(call, tmp_path / "resumed", SAMPLED, rows=3)
    (folder / "record.json").unlink()
    first = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)[0]
    (folder / "samples.jsonl").write_bytes(first)
    run_of(call, tmp_path / "resumed", SAMPLED, rows=3)
    assert texts(folder) == texts(undisturbed)
    assert texts(run_of(call, tmp_path / "two", SAMPLED, rows=2)) == texts(undisturbed)[:2]


def test_a_grid_runs_each_prompt_once(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_run(monkeypatch)
    grid = ["grid.statistic=[griffin,wanda,magnitude]", "grid.sparsity=[0,0.25,0.5]", "batch_size=2"]
    assert call(*tiny(tmp_path / "out", *grid, rows=5)).code == 0
    assert len(run_folders(tmp_path / "out")) == 7
    assert prompts == [1, 1, 1, 1, 1]


def test_batches_hold_prompts_of_like_length(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    run_each = griffin.SharedPrompt.run_each

    def noted(shared: griffin.SharedPrompt, prompts: list[torch.Tensor], *arguments: Any) -> torch.Tensor:
        shapes.append([len(prompt) for prompt in prompts])
        return run_each(shared, prompts, *arguments)

    monkeypatch.setattr(griffin.SharedPrompt, "run_each", noted)
    assert call(*tiny(tmp_path / "out", "batch_size=4", rows=6)).code == 0
    lengths = [length for batch in shapes for length in batch]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) > 1


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_shortest_generations(tokens: int, call: Callable[..., Outcome], tmp_path: Path) -> None:
    # The first token is the dense prompt's, whatever is pruned after it.
    options = ["statistic=random", "sparsity=0.9"]
    pruned = run_of(call, tmp_path / "pruned", *options, rows=6, tokens=tokens)
    dense = run_of(call, tmp_path / "dense", "sparsity=0", rows=6, tokens=tokens)
    assert all(sample["generated_tokens"] == tokens for sample in read_samples(pruned))
    assert (texts(pruned) == texts(dense)) == (tokens == 1)


def test_a_grid_gives_the_records_of_its_separate_runs(call: Callable[..., Outcome], tmp_path: Path) -> None:
    def without_place(folder: Path) -> dict[str, Any]:
        record = read_record(folder)
        return {
            "run_id": record["run_id"],
            "metrics": record["metrics"],
            "config": record["config"] | {"output_dir": None},
        }

    assert call(*tiny(tmp_path / "grid", "grid.statistic=[griffin,magnitude]", "grid.sparsity=[0,0.5]")).code == 0
    for method in (["sparsity=0"], ["statistic=griffin"], ["statistic=magnitude"]):
        assert call(*tiny(tmp_path / "alone", *method)).code == 0
    grid, alone = run_folders(tmp_path / "grid"), run_folders(tmp_path / "alone")
    assert len(grid) == 3
    assert [without_place(folder) for folder in grid] == [without_place(folder) for folder in alone]
    assert [texts(folder) for folder in grid] == [texts(folder) for folder in alone]


def test_one_expert_set_for_a_batch_runs(call: Callable[..., Outcome], tmp_path: Path) -> None:
    shared = run_of(call, tmp_path / "shared", "batch_size=3", "shared_experts=true", rows=3, tokens=24)
    own = run_of(call, tmp_path / "own", "batch_size=3", rows=3, tokens=24)
    assert read_record(shared)["config"]["mode"] == "compact"
    assert texts(shared) != texts(own)


def test_articles_differ_in_length() -> None:
    # The tests of batches and of skipped prompts are about nothing without it.
    assert len({len(text) for text in ARTICLES}) == len(ARTICLES)
