"""A generation run from the call to the record: texts, scores, batches, decoding and what is too long."""

import math
import statistics
from pathlib import Path

import pytest
import torch
from calling import (
    ALPHABET,
    Entry,
    composed,
    prompts_run,
    ran,
    read_record,
    read_samples,
    run_folders,
    texts,
    tiny,
    write_rows,
)
from rouge_score.rouge_scorer import RougeScorer

from pipelines import models
from pipelines.tasks.prompts import read

ROUGE = ("rouge1", "rouge2", "rougeL")
SAMPLED = "task.decoding=reference_sampling"  # random weights repeat themselves greedily, and vary when sampled


def run_of(out: Path, *overrides: str, **sizes: int) -> Path:
    """The folder of a run that has ended well."""
    (folder,) = ran(*tiny(out, *overrides, **sizes))
    return folder


# Of the model's weights: compact ones are in place while texts are written, and are not what is counted.
DENSITY = pytest.approx(0.6884, abs=1e-3)
SCORED = (SAMPLED, "grid.sparsity=[0,0.5]")


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a dense and a pruned run whose texts match their references now and then."""
    out = tmp_path_factory.mktemp("scored") / "out"
    ran(*tiny(out, *SCORED, rows=5, tokens=60))
    return out


def test_samples_say_what_came_out_and_metrics_are_rouge_of_the_texts_times_100(scored: Path) -> None:
    scorer = RougeScorer(ROUGE, use_stemmer=False)
    for folder in run_folders(scored):
        samples, record = read_samples(folder), read_record(folder)
        metrics, dense = record["metrics"], record["method"]["family"] == "dense"
        assert [sample["index"] for sample in samples] == [0, 1, 2, 3, 4]
        fields = {"index", "id", "prompt", "prompt_tokens", "generated_tokens", "seconds", *ROUGE, "text", "reference"}
        for sample in samples:
            assert set(sample) == fields | (set() if dense else {"weight_bytes"})
            assert sample["reference"] == ALPHABET
            assert sample["seconds"] > 0
            assert 0 < sample["generated_tokens"] <= 60
        assert metrics.get("effective_density") == (None if dense else DENSITY)
        assert record["timing"]["seconds"] == pytest.approx(sum(sample["seconds"] for sample in samples))
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


def test_the_call_ends_with_a_table_of_the_metrics(scored: Path, call: Entry) -> None:
    ended = call(*tiny(scored, *SCORED, rows=5, tokens=60))  # finished runs are shown too
    for folder in run_folders(scored):
        metrics = read_record(folder)["metrics"]
        method = "dense" if "dense" in folder.name else "griffin 50%"
        (line,) = [line for line in ended.out.splitlines() if method in line]
        assert f"{metrics['rouge1']:.2f} ± {metrics['rouge1_stderr']:.2f}" in line


def test_words_are_compared_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Without stemming, and whatever their case; random weights write no words, so the text is put in.
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.decode", lambda *_, **__: "Cities growing quickly")
    data = write_rows(tmp_path / "words.jsonl", [{"article": "Rain fell.", "summary": "cities grow quickly"}])
    (sample,) = read_samples(run_of(tmp_path / "out", f"task.data_files={data}"))
    assert sample["text"] == "Cities growing quickly"
    assert sample["rouge1"] == pytest.approx(100 * 2 / 3)


def plain_greedy(*overrides: str, tokens: int) -> list[str]:
    """The texts of transformers alone, cut nowhere."""
    config = composed(*overrides)
    loaded = models.load(config.model, "cpu", config.seed)
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 1}
    found = []
    for prompt in read(config):
        ids = torch.tensor([loaded.encode(prompt.text)])
        output = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        found.append(loaded.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("onednn", ["true", "false"])
def test_sparsity_zero_is_plain_generation_and_pruning_changes_it(onednn: str, tmp_path: Path) -> None:
    options = tiny(tmp_path / "out", "grid.sparsity=[0,0.9]", f"cpu_onednn={onednn}", rows=3, tokens=20)
    dense, pruned = ran(*options)
    assert texts(dense) == plain_greedy(*options, tokens=20)
    assert texts(pruned) != texts(dense)


@pytest.mark.parametrize("eos", [1, 2])  # 1 is the byte tokenizer's, which pads with it, as Llama 2's does
def test_texts_end_with_the_stop_text_and_else_keep_their_last_character(eos: int, tmp_path: Path) -> None:
    # What is generated is counted, so a row that ended must not count what others of its batch go on with.
    options = [f"+model.architecture.eos_token_id={eos}", "seed=4", "sparsity=0"]
    whole = plain_greedy(*tiny(tmp_path / "out", *options, rows=3), tokens=24)
    # A letter that stands within the first text, neither first nor last, and is missing in another text.
    letters = (letter for letter in whole[0][2:-2] if letter.isascii() and letter.isalpha())
    stop = next(letter for letter in letters if any(letter not in text for text in whole))
    counts = {}
    for size in (1, 2, 3):  # one by one; the third takes the place of the one that has ended first; all at once
        out = tmp_path / str(size)
        folder = run_of(out, *options, f"task.stop={stop}", f"batch_size={size}", rows=3, tokens=24)
        assert texts(folder) == [text.partition(stop)[0] for text in whole]
        counts[size] = [sample["generated_tokens"] for sample in read_samples(folder)]
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


@pytest.mark.parametrize(("batch_size", "fitting"), [(1, 3), (4, 3), (1, 0)])
def test_prompts_without_room_for_the_generation_are_skipped_and_counted(
    batch_size: int, fitting: int, tmp_path: Path
) -> None:
    prompts = read(composed(*tiny(tmp_path / "out", rows=6)))
    lengths = [len(prompt.text.encode()) for prompt in prompts]  # bytes are tokens
    longest_run = sorted([12, *lengths])[fitting]  # the longest of those that fit, to the last token
    overrides = [f"model.architecture.max_position_embeddings={longest_run + 8}", f"batch_size={batch_size}"]
    folder = run_of(tmp_path / "out", *overrides, rows=6, tokens=8)
    samples, metrics = read_samples(folder), read_record(folder)["metrics"]
    assert [(sample["index"], sample["prompt_tokens"]) for sample in samples] == list(enumerate(lengths))
    assert [("skipped" in sample) for sample in samples] == [length > longest_run for length in lengths]
    assert [sample for sample in samples if "skipped" in sample and "text" in sample] == []
    assert (metrics["samples"], metrics["skipped_prompts"]) == (fitting, 6 - fitting)
    assert metrics["prompt_tokens"] == sum(sorted(lengths)[:fitting])
    assert ("rouge1" in metrics) == (fitting > 0), "no text, no score"


@pytest.mark.parametrize("verification", ["none", "exact"])
def test_sampled_texts_depend_on_seed_and_prompt_only(verification: str, tmp_path: Path) -> None:
    def sampled(name: str, *overrides: str, rows: int = 4) -> list[str]:
        return texts(run_of(tmp_path / name, SAMPLED, f"verification={verification}", *overrides, rows=rows))

    alone = sampled("alone")
    assert sampled("again") == alone
    assert sampled("two", rows=2) == alone[:2]
    assert sampled("other", "seed=1") != alone
    assert len(set(alone)) == 4, "every row draws for itself"
    if verification == "exact":  # which runs no batches
        return
    assert sampled("batch", "batch_size=4") == alone, "not on the rows beside it"
    assert sampled("turns", "batch_size=3") == alone
    assert texts(run_of(tmp_path / "greedy", rows=4)) != alone
    both = ran(*tiny(tmp_path / "both", SAMPLED, "batch_size=4", "grid.sparsity=[0,0.5]", rows=4))
    assert texts(both[1]) == alone, "nor on the methods beside it"


def test_the_first_token_is_dense(tmp_path: Path) -> None:
    # It is the dense prompt's, whatever is pruned after it.
    for tokens in (1, 2):
        options = tiny(tmp_path / str(tokens), "statistic=random", "grid.sparsity=[0,0.9]", rows=6, tokens=tokens)
        dense, pruned = ran(*options)
        assert all(sample["generated_tokens"] == tokens for sample in read_samples(pruned))
        assert (texts(pruned) == texts(dense)) == (tokens == 1)


def test_one_expert_set_for_a_batch_runs(tmp_path: Path) -> None:
    own, shared = (
        run_of(tmp_path / shared, "batch_size=3", f"shared_experts={shared}", rows=3, tokens=24)
        for shared in ("false", "true")
    )
    assert read_record(shared)["config"]["mode"] == "compact"
    assert texts(shared) != texts(own)
    for folder in (own, shared):
        assert read_record(folder)["metrics"]["effective_density"] == DENSITY
