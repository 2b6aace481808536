"""Perplexity and fidelity: a given text read with experts, against plain forward calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calling import Outcome, composed, read_record, read_samples, run_folder, run_folders, tiny

import griffin
from pipelines.models import load
from pipelines.tasks.fidelity import compare
from pipelines.tasks.prompts import read_prompts

TEXT = "The tide comes in twice a day, and the harbour fills slowly. " * 30


def perplexity(tmp_path: Path, *more: str) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    return [
        "model=random_tiny",
        "task=perplexity",
        f"task.data_files={tmp_path / 'text.txt'}",
        "task.prompt_lengths=[12,40]",
        "task.generation_lengths=[5,16]",
        "limit=3",
        "wandb.mode=disabled",
        *more,
    ]


def test_perplexity_of_every_cell_is_that_of_plain_calls(call: Callable[..., Outcome], tmp_path: Path) -> None:
    options = perplexity(tmp_path, f"output_dir={tmp_path / 'out'}", "statistic=wanda")
    assert call(*options).code == 0
    metrics = read_record(run_folder(tmp_path / "out"))["metrics"]
    assert metrics["samples"] == 3

    config = composed(*options)
    loaded = load(config.model, "cpu", 0)
    ids = loaded.encode(TEXT)
    for prompt in (12, 40):
        for generation in (5, 16):
            losses = []
            for window in range(3):
                tokens = ids[window * 56 : (window + 1) * 56]
                whole = torch.tensor([tokens[40 - prompt : 40 + generation]])
                with griffin.prune(loaded.model, 0.5, "wanda", mode="masked"):
                    first = loaded.model(whole[:, :prompt], use_cache=True)
                    rest = loaded.model(whole[:, prompt:-1], past_key_values=first.past_key_values)
                logits = torch.cat([first.logits[0, -1:], rest.logits[0]])
                losses.append(float(torch.nn.functional.cross_entropy(logits, whole[0, prompt:])))
            expected = math.exp(sum(losses) / 3)
            assert metrics[f"perplexity_p{prompt}_g{generation}"] == pytest.approx(expected, rel=1e-5)
            assert metrics[f"perplexity_p{prompt}_g{generation}_stderr"] > 0


def test_a_text_too_short_and_a_window_too_long_are_told(call: Callable[..., Outcome], tmp_path: Path) -> None:
    for override in ("task.prompt_lengths=[3000]", "task.prompt_lengths=[8000]"):
        ended = call(*perplexity(tmp_path, f"output_dir={tmp_path / 'out'}", override))
        assert ended.code == 1
        assert len(ended.lines("error: ")) == 1
        assert "Traceback" not in ended.err


def test_fidelity_is_the_kl_of_plain_calls(call: Callable[..., Outcome], tmp_path: Path) -> None:
    options = tiny(tmp_path / "out", "task.kind=fidelity", rows=2, tokens=6)
    assert call(*options).code == 0
    samples = read_samples(run_folder(tmp_path / "out"))
    config = composed(*options)
    loaded = load(config.model, "cpu", 0)
    for sample, prompt in zip(samples, read_prompts(config.task, 2), strict=True):
        ids = torch.tensor([loaded.encode(prompt.text)])
        greedy = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        continuation = greedy[:, ids.shape[1] :]
        dense = loaded.model(greedy).logits[0, ids.shape[1] :].log_softmax(dim=-1)
        with griffin.prune(loaded.model, 0.5):
            cache = loaded.model(ids, use_cache=True).past_key_values
            pruned = loaded.model(continuation, past_key_values=cache).logits[0].log_softmax(dim=-1)
        kl = torch.nn.functional.kl_div(pruned, dense, log_target=True, reduction="batchmean")
        assert sample["kl"] == pytest.approx(float(kl), rel=1e-3)
        assert sample["top1_agreement"] == pytest.approx(
            float((dense.argmax(dim=-1) == pruned.argmax(dim=-1)).float().mean())
        )


def test_dense_fidelity_is_perfect_and_a_grid_equals_separate_runs(
    call: Callable[..., Outcome], tmp_path: Path
) -> None:
    kind = "task.kind=fidelity"
    call(*tiny(tmp_path / "grid", kind, "grid.statistic=[griffin,random]", "grid.sparsity=[0,0.5]"))
    for method in ("sparsity=0", "statistic=griffin", "statistic=random"):
        call(*tiny(tmp_path / "alone", kind, method))
    together, alone = run_folders(tmp_path / "grid"), run_folders(tmp_path / "alone")
    assert len(alone) == 3
    for one, other in zip(together, alone, strict=True):
        assert one.name == other.name
        assert read_record(one)["metrics"] == read_record(other)["metrics"]
    dense = next(path for path in alone if "dense" in path.name)
    assert read_record(dense)["metrics"]["kl"] == 0.0
    assert read_record(dense)["metrics"]["top1_agreement"] == 1.0


REFRESHING = ["compensation=ridge", "grid.refresh=[none,experts,compensation]"]


@pytest.mark.parametrize("kind", ["fidelity", "generation"])
def test_methods_that_follow_the_text_do_not_disturb_each_other(
    kind: str, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    options = [f"task.kind={kind}"]
    call(*tiny(tmp_path / "grid", *options, *REFRESHING, tokens=14))
    for refresh in ("none", "experts", "compensation"):
        call(*tiny(tmp_path / "alone", *options, "compensation=ridge", f"refresh={refresh}", tokens=14))
    together, alone = run_folders(tmp_path / "grid"), run_folders(tmp_path / "alone")
    assert [one.name for one in together] == [other.name for other in alone]
    metrics = [read_record(one)["metrics"] for one in together]
    assert metrics == [read_record(other)["metrics"] for other in alone]
    if kind == "fidelity":
        assert len({one["kl"] for one in metrics}) == 3
        by_token = [[sample["kl_by_token"] for sample in read_samples(one)] for one in together]
        for none, *followed in zip(*by_token, strict=True):
            for other in followed:
                assert other[:8] == pytest.approx(none[:8], abs=2e-6)
                assert other[8] == pytest.approx(0, abs=2e-6) != none[8]  # the reading is the dense model's


def test_compare_against_the_formula() -> None:
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    pruned = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]).log()
    kl_C, agreement_C = compare(dense, pruned)
    assert kl_C.tolist() == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0.0])
    assert agreement_C.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("task", ["fidelity", "briefs_choice", "briefs_qa"])
@pytest.mark.parametrize("override", ["sparsity=[0.5,0.2]", "model.architecture.model_type=mixtral"])
def test_what_only_the_model_can_tell_is_one_line(
    task: str, override: str, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    plain = ["model=random_tiny", f"task={task}", "limit=1", f"output_dir={tmp_path}", "wandb.mode=disabled"]
    ended = call(*plain, override)
    assert ended.code == 1
    (line,) = ended.lines("error: ")
    assert "model=random_tiny" in line
    assert "Traceback" not in ended.err
    assert not list(tmp_path.rglob("record.json"))
