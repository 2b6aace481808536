"""Verified runs: their texts, what their records say of drafts, and what is predicted of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import Outcome, composed, cut_off, ran, read_record, read_samples, texts, timeless, tiny

from pipelines.models import load
from pipelines.tasks.drafting import agreeing_runs, metrics, predicted, timing

SAMPLED = "task.decoding=reference_sampling"
METRICS = ("acceptance_rate", "tokens_per_check", "effective_density", "predicted_speedup")


@pytest.mark.parametrize("override", ["draft_tokens=auto", "draft_tokens=3", "draft_vocabulary=full"])
def test_exact_texts_are_the_dense_models(override: str, tmp_path: Path) -> None:
    grid = ["grid.verification=[none,exact]", "grid.sparsity=[0,0.7]", override]
    dense, pruned, verified = ran(*tiny(tmp_path / "out", *grid, "compensation=ridge", tokens=24))
    assert texts(verified) == texts(dense)
    assert "verified" in verified.name
    assert {*METRICS} & {*read_record(pruned)["metrics"]} == {"effective_density"}
    found = read_record(verified)["metrics"]
    assert 0 < found["acceptance_rate"] <= 1
    assert found["tokens_per_check"] >= 1
    assert found["predicted_speedup"] == pytest.approx(1 / found["effective_density"])
    for sample in read_samples(verified):
        counts = sample["drafting"]
        assert counts["emitted"] == sample["generated_tokens"] - 1  # the first one is the prompt's
        assert counts["accepted"] <= counts["drafted"]


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [SAMPLED],
        ["grid.verification=[threshold]", "draft_tokens=2", SAMPLED],
        ["compensation=ridge", "grid.refresh=[none,compensation]"],
    ],
)
def test_a_verified_run_that_was_cut_off_ends_as_undisturbed(overrides: list[str], tmp_path: Path) -> None:
    grid = {"grid.verification": "[none,exact]", "grid.sparsity": "[0,0.5]"}
    grid |= dict(one.split("=", 1) for one in overrides)
    options = tiny(tmp_path / "out", *(f"{key}={value}" for key, value in grid.items()), rows=4, tokens=14)
    folders = ran(*options)
    whole = [timeless(folder) for folder in folders]
    for kept in ((0, 1, 2, 3, 1), (3, 2, 1, 0, 2)):
        for folder, count in zip(folders, kept, strict=False):
            cut_off(folder, count)
        ran(*options)
        assert [timeless(folder) for folder in folders] == whole


@pytest.mark.parametrize("override", ["assistance=prompt_lookup", "prompt_lookup=true"])
def test_drafts_that_are_looked_up(override: str, tmp_path: Path) -> None:
    """A text that repeats itself is found in itself, by transformers or before the experts draft."""
    (dense,) = ran(*tiny(tmp_path / "dense", "sparsity=0", tokens=48))
    pruned = ["sparsity=0"] if override.startswith("assistance") else ["sparsity=0.5", "verification=exact"]
    (assisted,) = ran(*tiny(tmp_path / "out", *pruned, override, tokens=48))
    assert texts(assisted) == texts(dense)
    record = read_record(assisted)
    assert "prompt lookup" in record["method"]["label"]
    assert record["evaluation"] == read_record(dense)["evaluation"]
    assert record["metrics"]["predicted_speedup"] > 0.9
    for sample in read_samples(assisted):
        counts = sample["drafting"]
        assert 0 <= counts["accepted"] <= counts["drafted"]
        assert counts["checks"] <= counts["emitted"]


def test_a_small_model_as_the_draft(tmp_path: Path) -> None:
    """A model assisted by itself has all of its drafts accepted, at the price of two models."""
    folder = tmp_path / "model"
    loaded = load(composed("model=random_tiny").model, "cpu", 0)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    local = ["model=qwen3_8b", f"model.repo={folder}", "model.dtype=float32"]
    assistance = ["sparsity=0", "assistance=model", f"assistant={folder}", "draft_tokens=4"]
    dense, assisted = (
        ran(*tiny(tmp_path / name, *local, *extra, tokens=16))[0]
        for name, extra in (("dense", ["sparsity=0"]), ("assisted", assistance))
    )
    assert texts(assisted) == texts(dense)
    record = read_record(assisted)
    assert record["method"]["label"] == "dense, assistant model"
    assert record["metrics"]["acceptance_rate"] > 0.7
    assert record["metrics"]["effective_density"] == pytest.approx(1.0, abs=0.3)  # a draft costs what a check does


def test_sampled_texts_of_verified_rows_depend_on_seed_and_prompt_only(tmp_path: Path) -> None:
    def sampled(name: str, *overrides: str, rows: int = 4) -> list[str]:
        (folder,) = ran(*tiny(tmp_path / name, SAMPLED, "verification=exact", *overrides, rows=rows))
        return texts(folder)

    alone = sampled("alone")
    assert sampled("two", rows=2) == alone[:2]
    assert sampled("other", "seed=1") != alone


def test_questions_are_answered_as_by_the_dense_model(tmp_path: Path) -> None:
    plain = ["model=random_tiny", "task=briefs_qa", "limit=2", f"output_dir={tmp_path}", "wandb.mode=disabled"]
    dense, verified = ran(*plain, "grid.sparsity=[0,0.5]", "verification=exact")
    answers = [[sample["answers"] for sample in read_samples(folder)] for folder in (dense, verified)]
    assert answers[0] == answers[1]
    assert {*METRICS} <= {*read_record(verified)["metrics"]}
    assert all(sample["drafting"]["checks"] > 0 for sample in read_samples(verified))


def test_the_table_has_drafts_where_there_are_some(call: Callable[..., Outcome], tmp_path: Path) -> None:
    assert "tokens/check" not in call(*tiny(tmp_path / "out")).out
    assert "tokens/check" in call(*tiny(tmp_path / "out", "verification=exact")).out


def sample(**counts: Any) -> dict[str, Any]:
    return {"drafting": {"step_bytes": 100, **counts}}


def test_metrics_are_ratios_of_sums() -> None:
    samples = [
        sample(checks=4, drafted=10, accepted=6, emitted=10, draft_bytes=400),
        sample(checks=1, drafted=0, accepted=0, emitted=1, draft_bytes=0),
    ]
    found = metrics(samples)
    assert {name: value for name, value in found.items() if not name.endswith("_stderr")} == pytest.approx(
        {
            "tokens_per_check": 11 / 5,
            "drafted_per_check": 2,
            "dense_steps": 5 / 15,
            "effective_density": 900 / 1100,
            "predicted_speedup": 11 / 9,
            "acceptance_rate": 0.6,
        }
    )
    # Of two samples, half of what either would say alone apart.
    alone = [metrics(samples[:1]), metrics(samples[1:])]
    for name in ("tokens_per_check", "effective_density", "predicted_speedup"):
        assert found[f"{name}_stderr"] == pytest.approx(abs(alone[0][name] - alone[1][name]) / 2)
        assert f"{name}_stderr" not in alone[0]
    assert "dense_steps_stderr" not in found
    assert "acceptance_rate" not in metrics(samples[1:])
    nothing = sample(checks=0, drafted=0, accepted=0, emitted=0, draft_bytes=0)  # the first token ended the text
    assert metrics([nothing]) == metrics([]) == {}


def test_learning_is_told_by_what_checks_take() -> None:
    seconds = {"draft": 9.0, "check": 2.0, "learn": 0.75}
    assert timing([sample(seconds=seconds), sample(seconds=seconds)]) == {"learning_overhead": 0.375}
    assert timing([{}]) == {}


def test_rounds_and_the_best_number_of_drafts_by_hand() -> None:
    agreement = [1, 1, 0, 1, 1, 1, 1, 0]
    assert agreeing_runs(agreement, 1) == 5  # 11, 0, 11, 11, 0
    assert agreeing_runs(agreement, 2) == 3  # 110, 111, 10
    assert agreeing_runs(agreement, 4) == 2  # 110, 11110
    assert agreeing_runs([0, 0], 3) == 2
    speedups = {k: 8 / (rounds * (0.25 * k + 1)) for k, rounds in {1: 5, 2: 3, 3: 3, 4: 2}.items()}
    assert predicted([agreement], 0.25) == {"predicted_speedup": speedups[4], "predicted_draft_tokens": 4}
    # Over several texts, one number for all: (8 + 2) tokens, in 3 + 2 rounds with two drafts.
    both = predicted([agreement, [0, 0]], 0.25)
    costs = {k: (rounds + 2) * (0.25 * k + 1) for k, rounds in {1: 5, 2: 3, 3: 3, 4: 2}.items()}
    assert both["predicted_speedup"] == pytest.approx(10 / min(costs.values()))


def test_standard_errors_read_every_sample_as_often_however_many_there_are() -> None:
    class Counted(dict[str, int]):
        reads = 0

        def __getitem__(self, name: str) -> int:
            Counted.reads += 1
            return super().__getitem__(name)

    def reads(count: int) -> int:
        Counted.reads = 0
        counts = {"checks": 3, "drafted": 9, "accepted": 5, "emitted": 8, "draft_bytes": 90, "step_bytes": 100}
        metrics([{"drafting": Counted(counts)} for _ in range(count)])
        return Counted.reads

    assert reads(80) < 9 * reads(10)
