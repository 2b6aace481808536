"""Perplexity and fidelity: a given text read with experts, against plain forward calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calling import Outcome, composed, ran, read_record, read_samples, tiny

import griffin
from pipelines.composition import Call
from pipelines.job import attempt
from pipelines.models import load
from pipelines.sweeps import FAILED
from pipelines.tasks.answers import predicted
from pipelines.tasks.fidelity import acceptance, compare
from pipelines.tasks.prompts import read

TEXT = "The tide comes in twice a day, and the harbour fills slowly. " * 30


def perplexity(folder: Path, *more: str) -> list[str]:
    (folder / "text.txt").write_text(TEXT)
    plain = ["model=random_tiny", "task=perplexity", "limit=3", "wandb.mode=disabled", f"output_dir={folder / 'out'}"]
    lengths = ["task.prompt_lengths=[12,40]", "task.generation_lengths=[5,16]"]
    return [*plain, f"task.data_files={folder / 'text.txt'}", *lengths, *more]


def fidelity(out: Path, *more: str, rows: int = 3, tokens: int = 12) -> list[str]:
    return tiny(out, "task.kind=fidelity", *more, rows=rows, tokens=tokens)


def test_perplexity_of_every_cell_is_that_of_plain_calls(tmp_path: Path) -> None:
    options = perplexity(tmp_path, "statistic=wanda")
    (folder,) = ran(*options)
    metrics = read_record(folder)["metrics"]
    assert metrics["samples"] == 3

    loaded = load(composed(*options).model, "cpu", 0)
    ids = loaded.encode(TEXT)
    for prompt, generation in itertools.product((12, 40), (5, 16)):
        losses = []
        for window in range(3):
            tokens = ids[window * 56 : (window + 1) * 56]
            whole = torch.tensor([tokens[40 - prompt : 40 + generation]])
            with griffin.prune(loaded.model, 0.5, statistic="wanda", mode="masked"):
                first = loaded.model(whole[:, :prompt], use_cache=True)
                rest = loaded.model(whole[:, prompt:-1], past_key_values=first.past_key_values)
            logits = torch.cat([first.logits[0, -1:], rest.logits[0]])
            losses.append(float(torch.nn.functional.cross_entropy(logits, whole[0, prompt:])))
        name = f"perplexity_p{prompt}_g{generation}"
        assert metrics[name] == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
        assert metrics[f"{name}_stderr"] > 0


def test_a_text_too_short_and_a_window_too_long_are_told(call: Callable[..., Outcome], tmp_path: Path) -> None:
    for override in ("task.prompt_lengths=[3000]", "task.prompt_lengths=[8000]"):
        ended = call(*perplexity(tmp_path, override))
        assert ended.code == 1
        assert len(ended.lines("error: ")) == 1
        assert "Traceback" not in ended.err


def test_fidelity_is_the_kl_of_plain_calls(tmp_path: Path) -> None:
    options = fidelity(tmp_path / "out", rows=2, tokens=6)
    (folder,) = ran(*options)
    config = composed(*options)
    loaded = load(config.model, "cpu", 0)
    for sample, prompt in zip(read_samples(folder), read(config), strict=True):
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


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three methods on the same texts: dense, and pruned without and with refreshes."""
    grid = ["grid.sparsity=[0,0.5]", "compensation=ridge", "grid.refresh=[none,compensation]"]
    return ran(*fidelity(tmp_path_factory.mktemp("fidelity") / "out", *grid))


def test_what_follows_the_text_is_read_again_by_the_dense_model(together: list[Path]) -> None:
    dense, plain, refreshed = (read_record(folder)["metrics"] for folder in together)
    assert (dense["kl"], dense["top1_agreement"]) == (0.0, 1.0)
    assert len({plain["kl"], refreshed["kl"], 0.0}) == 3
    for before, sample in zip(*map(read_samples, together[1:]), strict=True):
        assert sample["kl_by_token"][:8] == pytest.approx(before["kl_by_token"][:8], abs=2e-6)
        assert sample["kl_by_token"][8] == pytest.approx(0, abs=2e-6) != before["kl_by_token"][8]


def test_every_pruned_method_is_judged_as_a_draft(together: list[Path]) -> None:
    assert "predicted_speedup" not in read_record(together[0])["metrics"]
    for folder in together[1:]:
        metrics, samples = read_record(folder)["metrics"], read_samples(folder)
        for sample in samples:
            bits = sample["agreement_by_token"]
            assert sum(bits) / len(bits) == pytest.approx(sample["top1_agreement"])
            assert 0 < sample["acceptance"] <= 1
            assert sample["draft_cost"] == samples[0]["draft_cost"] < 1
        best = predicted([sample["agreement_by_token"] for sample in samples], samples[0]["draft_cost"])
        assert {name: metrics[name] for name in best} == best


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_oracle_has_seen_the_text_that_it_is_judged_on(batch_size: int, tmp_path: Path) -> None:
    grid = ["grid.statistic=[griffin,oracle]", "sparsity=0.5", f"batch_size={batch_size}"]
    griffins, oracles = (read_record(folder)["metrics"] for folder in ran(*fidelity(tmp_path / "out", *grid)))
    assert 0 < oracles["kl"] < griffins["kl"]
    (alone,) = ran(*fidelity(tmp_path / "alone", "statistic=oracle", f"batch_size={batch_size}"))
    assert read_record(alone)["metrics"]["kl"] == pytest.approx(oracles["kl"], rel=1e-3 if batch_size > 1 else 0)


def test_compare_against_the_formula() -> None:
    dense = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    pruned = torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.2, 0.7]]).log()
    kl_C, agreement_C = compare(dense, pruned)
    assert kl_C.tolist() == pytest.approx([0.5 * math.log(2) - 0.25 * math.log(2), 0.0])
    assert agreement_C.tolist() == [0.0, 1.0]
    assert acceptance(dense, pruned) == pytest.approx((0.75 + 1.0) / 2), "the mass that both have"


RECURRENT = [
    *("model.architecture.model_type=falcon_h1", "+model.architecture.mamba_d_ssm=64"),
    *("+model.architecture.mamba_n_heads=4", "+model.architecture.mamba_d_head=16"),
    *("+model.architecture.mamba_d_state=8", "+model.architecture.mamba_n_groups=1"),
]


@pytest.mark.parametrize(
    ("name", "overrides", "word"),
    [
        ("per layer", ["sparsity=[0.5,0.2]"], "3"),
        ("mixture", ["model.architecture.model_type=mixtral"], "mixture"),
        ("recurrent", RECURRENT, "layer 0"),
    ],
)
def test_what_only_the_model_can_tell_is_one_line(
    name: str, overrides: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = ["briefs", "fidelity", "briefs_choice", "briefs_qa", "perplexity", "latency"]
    for task in (*tasks, *([] if name == "per layer" else ["flocking"])):  # which prunes nothing
        plain = ["model=random_tiny", f"task={task}", "limit=1", "wandb.mode=disabled"]
        plain = perplexity(tmp_path) if task == "perplexity" else plain
        (status,) = attempt(composed(*plain, f"output_dir={tmp_path / task}", *overrides), Call((), None, single=True))
        told = capsys.readouterr().err
        (line,) = [line for line in told.splitlines() if line.startswith("error: ")]
        assert (status.state, f"error: {status.reason}") == (FAILED, line)
        assert "Traceback" not in told
        assert "model=random_tiny" in line
        assert word in line
        assert not list(tmp_path.rglob("record.json"))
