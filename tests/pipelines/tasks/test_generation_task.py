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
    ran,
    read_record,
    read_samples,
    run_folders,
    texts,
    timeless,
    tiny,
    write_rows,
)
from rouge_score.rouge_scorer import RougeScorer

from pipelines import models
from pipelines.tasks.prompts import read_prompts

ROUGE = ("rouge1", "rouge2", "rougeL")
SAMPLED = "task.decoding=reference_sampling"  # random weights repeat themselves greedily, and vary when sampled


def run_of(out: Path, *overrides: str, **sizes: int) -> Path:
    """The folder of a run that has ended well."""
    (folder,) = ran(*tiny(out, *overrides, **sizes))
    return folder


SCORED = (SAMPLED, "grid.sparsity=[0,0.5]")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a dense and a pruned run whose texts match their references now and then."""
    out = tmp_path_factory.mktemp("scored") / "out"
    ran(*tiny(out, *SCORED, rows=5, tokens=60))
    return out


def test_a_sample_says_what_came_out_and_what_it_cost(scored: Path) -> None:
    for folder in run_folders(scored):
        samples = read_samples(folder)
        assert [sample["index"] for sample in samples] == [0, 1, 2, 3, 4]
        fields = {"index", "id", "prompt_tokens", "generated_tokens", "seconds", *ROUGE, "text", "reference"}
        dense = read_record(folder)["method"]["family"] == "dense"
        for sample in samples:
            assert set(sample) == fields | (set() if dense else {"weight_bytes"})
            assert sample["reference"] == ALPHABET
            assert sample["seconds"] > 0
            assert 0 < sample["generated_tokens"] <= 60
        timing = read_record(folder)["timing"]
        assert timing["seconds"] == pytest.approx(sum(sample["seconds"] for sample in samples))


def test_metrics_are_rouge_of_the_texts_times_100(scored: Path) -> None:
    scorer = RougeScorer(ROUGE, use_stemmer=False)
    for folder in run_folders(scored):
        samples, metrics = read_samples(folder), read_record(folder)["metrics"]
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


def test_the_call_ends_with_a_table_of_the_metrics(scored: Path, call: Callable[..., Outcome]) -> None:
    ended = call(*tiny(scored, *SCORED, rows=5, tokens=60))  # finished runs are shown too
    for folder in run_folders(scored):
        metrics = read_record(folder)["metrics"]
        method = "dense" if "dense" in folder.name else "griffin 50%"
        (line,) = [line for line in ended.out.splitlines() if method in line]
        assert f"{metrics['rouge1']:.2f} ± {metrics['rouge1_stderr']:.2f}" in line


def test_words_are_compared_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without stemming, and whatever their case; random weights write no words, so the text is put in.
    def decode(tokenizer: Any, ids: Any, **_: Any) -> str:
        return "Cities growing quickly"

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.decode", decode)
    data = write_rows(tmp_path / "words.jsonl", [{"article": "Rain fell.", "summary": "cities grow quickly"}])
    (sample,) = read_samples(run_of(tmp_path / "out", f"task.data_files={data}"))
    assert sample["text"] == "Cities growing quickly"
    assert sample["rouge1"] == pytest.approx(100 * 2 / 3)


EVERYTHING = (
    *("grid.statistic=[griffin,random]", "grid.sparsity=[0,0.5]"),
    *("grid.compensation=[none,ridge]", "grid.refresh=[none,compensation]"),
)


@pytest.mark.parametrize(
    ("methods", "count"), [(EVERYTHING, 7), (["selection=sample"], 1), (["selection=topk_sample"], 1)]
)
def test_a_batch_gives_the_texts_of_one_row_at_a_time(methods: list[str], count: int, tmp_path: Path) -> None:
    # Up to rounding, so a text may differ where two tokens are as good as equal.
    sizes = {"rows": 4, "tokens": 20}
    alone = ran(*tiny(tmp_path / "alone", *methods, **sizes))
    batch = ran(*tiny(tmp_path / "batch", *methods, "batch_size=5", **sizes))
    assert len(alone) == len(batch) == count
    pairs = [
        pair for one, other in zip(alone, batch, strict=True) for pair in zip(texts(one), texts(other), strict=True)
    ]
    assert sum(one != other for one, other in pairs) <= len(pairs) // 20
    assert len({str(texts(folder)) for folder in alone}) >= count - 3, "methods that all agree test nothing"
    assert all(len(set(texts(folder))) > 1 for folder in alone), "and so do rows"


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


@pytest.mark.parametrize("onednn", ["true", "false"])
def test_sparsity_zero_is_plain_generation_and_pruning_changes_it(onednn: str, tmp_path: Path) -> None:
    options = tiny(tmp_path / "out", "grid.sparsity=[0,0.9]", f"cpu_onednn={onednn}", rows=3, tokens=20)
    dense, pruned = ran(*options)
    assert texts(dense) == plain_greedy(*options, tokens=20)
    assert texts(pruned) != texts(dense)


def stop_within(whole: list[str]) -> str:
    """A letter that stands within the first text, neither first nor last, and is missing in another text."""
    for letter in whole[0][2:-2]:
        if letter.isascii() and letter.isalpha() and any(letter not in text for text in whole):
            return letter
    raise AssertionError("no letter cuts one text and spares another: take other rows")


@pytest.mark.parametrize("eos", [1, 2])  # 1 is the byte tokenizer's, which pads with it, as Llama 2's does
def test_texts_end_with_the_stop_text_and_else_keep_their_last_character(eos: int, tmp_path: Path) -> None:
    # What is generated is counted, so a row that ended must not count what others of its batch go on with.
    options = [f"+model.architecture.eos_token_id={eos}", "seed=4", "sparsity=0"]
    whole = plain_greedy(*tiny(tmp_path / "out", *options, rows=3), tokens=24)
    stop = stop_within(whole)
    counts = {}
    for size in (1, 2, 3):  # one by one; the third takes the place of the one that has ended first; all at once
        out = tmp_path / str(size)
        folder = run_of(out, *options, f"task.stop={stop}", f"batch_size={size}", rows=3, tokens=24)
        assert texts(folder) == [text.partition(stop)[0] for text in whole]
        counts[size] = [sample["generated_tokens"] for sample in read_samples(folder)]
    assert any(stop not in text for text in whole)
    assert min(counts[1]) < 24
    assert counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_shots_run_once_and_texts_stay(batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = prompts_run(monkeypatch)
    data = tiny(tmp_path / "out", rows=6)[1].partition("=")[2]
    options = ["task.shots=1", f"task.shots_file={data}", f"batch_size={batch_size}"]
    shared = run_of(tmp_path / "shared", *options, rows=4, tokens=12)
    assert len(lengths) == 1 + 4
    assert max(lengths[0]) < min(max(each) for each in lengths[1:])
    monkeypatch.setattr("pipelines.tasks.generation.WORTH", 0)  # no prompt goes on from the shots
    assert texts(run_of(tmp_path / "whole", *options, rows=4, tokens=12)) == texts(shared)


def prompt_lengths(*overrides: str) -> list[int]:
    """Tokens of each prompt: one per byte of its text."""
    config = composed(*overrides)
    return [len(prompt.text.encode()) for prompt in read_prompts(config.task, config.limit)]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_prompts_without_room_for_the_generation_are_skipped_and_counted(batch_size: int, tmp_path: Path) -> None:
    lengths = prompt_lengths(*tiny(tmp_path / "out", rows=6))
    longest_run = sorted(lengths)[2]  # three fit, the longest of them to the last token
    overrides = [f"model.architecture.max_position_embeddings={longest_run + 8}", f"batch_size={batch_size}"]
    folder = run_of(tmp_path / "out", *overrides, rows=6, tokens=8)
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
    assert len(ended.lines("warning: ")) == 1
    (folder,) = run_folders(tmp_path / "out")
    metrics = read_record(folder)["metrics"]
    assert (metrics["samples"], metrics["skipped_prompts"]) == (0, 3)
    assert "rouge1" not in metrics, "no text, no score"


def test_sampled_texts_depend_on_seed_and_prompt_only(tmp_path: Path) -> None:
    def sampled(name: str, *overrides: str, rows: int = 4) -> list[str]:
        return texts(run_of(tmp_path / name, SAMPLED, *overrides, rows=rows))

    alone = sampled("alone")
    assert sampled("again") == alone
    assert sampled("batch", "batch_size=4") == alone, "not on the rows beside it"
    assert sampled("turns", "batch_size=3") == alone
    assert sampled("two", rows=2) == alone[:2]
    assert sampled("other", "seed=1") != alone
    assert len(set(alone)) == 4, "every row draws for itself"
    assert texts(run_of(tmp_path / "greedy", rows=4)) != alone
    both = ran(*tiny(tmp_path / "both", SAMPLED, "batch_size=4", "grid.sparsity=[0,0.5]", rows=4))
    assert texts(both[1]) == alone, "nor on the methods beside it"


def test_a_grid_runs_each_prompt_once_the_longest_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = prompts_run(monkeypatch)
    grid = ["grid.statistic=[griffin,wanda,magnitude]", "grid.sparsity=[0,0.25,0.5]", "batch_size=4"]
    options = tiny(tmp_path / "out", *grid, rows=5, tokens=4)
    assert len(ran(*options)) == 7
    assert lengths == [[length] for length in sorted(prompt_lengths(*options), reverse=True)]
    assert len({length for (length,) in lengths}) > 1


def test_the_first_token_is_dense(tmp_path: Path) -> None:
    # It is the dense prompt's, whatever is pruned after it.
    for tokens in (1, 2):
        options = tiny(tmp_path / str(tokens), "statistic=random", "grid.sparsity=[0,0.9]", rows=6, tokens=tokens)
        dense, pruned = ran(*options)
        assert all(sample["generated_tokens"] == tokens for sample in read_samples(pruned))
        assert (texts(pruned) == texts(dense)) == (tokens == 1)


def test_a_grid_gives_the_records_of_its_separate_runs_to_the_bit(tmp_path: Path) -> None:
    refreshing = ["compensation=ridge", "grid.refresh=[none,compensation]"]
    grid = ran(*tiny(tmp_path / "grid", "grid.statistic=[griffin,magnitude]", "grid.sparsity=[0,0.5]"))
    grid += ran(*tiny(tmp_path / "grid", *refreshing, tokens=14))
    alone = [run_of(tmp_path / "alone", one) for one in ("sparsity=0", "statistic=griffin", "statistic=magnitude")]
    alone += [
        run_of(tmp_path / "alone", "compensation=ridge", f"refresh={one}", tokens=14)
        for one in ("none", "compensation")
    ]
    assert [folder.name for folder in grid] == [folder.name for folder in alone]
    assert [timeless(folder) for folder in grid] == [timeless(folder) for folder in alone]


def test_one_expert_set_for_a_batch_runs(tmp_path: Path) -> None:
    shared = run_of(tmp_path / "shared", "batch_size=3", "shared_experts=true", rows=3, tokens=24)
    own = run_of(tmp_path / "own", "batch_size=3", rows=3, tokens=24)
    assert read_record(shared)["config"]["mode"] == "compact"
    assert texts(shared) != texts(own)


def test_articles_differ_in_length() -> None:
    # The tests of batches and of skipped prompts are about nothing without it.
    assert len({len(text) for text in ARTICLES}) == len(ARTICLES)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_density_is_that_of_the_weights_whatever_runs_beside(batch_size: int, tmp_path: Path) -> None:
    """Compact weights are in place while texts are written; they are not what is counted."""
    (folder,) = ran(*tiny(tmp_path / "out", f"batch_size={batch_size}"))
    assert read_record(folder)["metrics"]["effective_density"] == pytest.approx(0.6884, abs=1e-3)
