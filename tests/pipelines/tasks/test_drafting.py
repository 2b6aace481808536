"""Verified runs: their texts, what their records say of drafts, and what is predicted of them."""

from pathlib import Path
from typing import Any

import pytest
from calling import Entry, composed, ran, read_record, read_samples, saved_model, texts, tiny

from griffin import DraftStatistics
from pipelines.errors import UserError
from pipelines.records import check_costs
from pipelines.tasks.answers import drafting_metrics, drafting_part, learning_overhead, predicted, rounds
from pipelines.tasks.latency import WIDTHS

METRICS = ("acceptance_rate", "tokens_per_check", "effective_density", "predicted_speedup")


Json = dict[str, Any]


def with_drafts(folder: Path, base: list[str], *overrides: str, tokens: int) -> tuple[Json, list[Json]]:
    """The record and the samples of a run whose texts are those of the dense model."""
    (dense,) = ran(*tiny(folder / "dense", *base, "sparsity=0", tokens=tokens))
    (drafted,) = ran(*tiny(folder / "drafted", *base, *overrides, tokens=tokens))
    record, samples = read_record(drafted), read_samples(drafted)
    assert texts(drafted) == texts(dense)
    assert record["evaluation"] == read_record(dense)["evaluation"]
    for sample in samples:
        assert 0 <= sample["drafting"]["accepted"] <= sample["drafting"]["drafted"]
        assert sample["drafting"]["checks"] <= sample["drafting"]["emitted"]
    return record, samples


@pytest.mark.parametrize("override", ["draft_tokens=auto", "draft_tokens=3", "draft_vocabulary=full"])
def test_exact_texts_are_the_dense_models(override: str, tmp_path: Path) -> None:
    exact = ["verification=exact", "sparsity=0.7", "compensation=ridge", override]
    record, samples = with_drafts(tmp_path, [], *exact, tokens=24)
    assert "verified" in record["method"]["label"]
    assert 0 < record["metrics"]["acceptance_rate"] <= 1
    assert record["metrics"]["tokens_per_check"] >= 1
    assert record["metrics"]["predicted_speedup"] == pytest.approx(1 / record["metrics"]["effective_density"])
    for sample in samples:
        assert sample["drafting"]["emitted"] == sample["generated_tokens"] - 1  # the first one is the prompt's


def test_checks_are_charged_what_the_device_took_for_them(tmp_path: Path) -> None:
    lengths = ["task.prompt_lengths=[8]", "task.generation_lengths=[3]", "task.repeats=1"]
    base = ["model=random_tiny", f"output_dir={tmp_path}", "wandb.mode=disabled"]
    (timed,) = ran(*base, "task=latency", "method=exact", *lengths)
    assert [*check_costs(str(timed))] == [*WIDTHS]
    assert check_costs(str(timed))[1] == 1.0
    exact = ["verification=exact", "sparsity=0.7", f"check_costs={timed}"]
    record, samples = with_drafts(tmp_path, [], *exact, tokens=12)
    charged, done = record["metrics"]["predicted_speedup_charged"], [sample["drafting"] for sample in samples]
    drafts = sum(one["draft_bytes"] / one["step_bytes"] for one in done)
    checks = sum(one["charged_checks"] for one in done)
    assert charged == pytest.approx(sum(one["emitted"] for one in done) / (checks + drafts))
    part = drafting_part([DraftStatistics(widths=[1, 3])], 1, {1: 1.0, 2: 1.2, 4: 2.0})
    assert part["drafting"]["charged_checks"] == pytest.approx(1.0 + 1.6)
    with pytest.raises(UserError, match=r"check_costs=\S+: expected the folder of a finished run of task=latency"):
        composed("task=xsum", f"check_costs={tmp_path}")


def test_drafts_that_are_looked_up(tmp_path: Path) -> None:
    """A text that repeats itself is found in itself."""
    record, _ = with_drafts(tmp_path, [], "sparsity=0", "assistance=prompt_lookup", tokens=48)
    assert "prompt lookup" in record["method"]["label"]
    assert record["metrics"]["predicted_speedup"] > 0.9


def test_a_small_model_as_the_draft(tmp_path: Path) -> None:
    """A model assisted by itself has all of its drafts accepted, at the price of two models."""
    folder = saved_model(tmp_path / "model")
    local = ["model=qwen3_8b", f"model.repo={folder}", "model.dtype=float32"]
    assistance = ["sparsity=0", "assistance=model", f"assistant={folder}", "draft_tokens=4"]
    record, _ = with_drafts(tmp_path, local, *assistance, tokens=16)
    assert record["method"]["label"] == "dense, assistant model"
    assert record["metrics"]["acceptance_rate"] > 0.7
    assert record["metrics"]["effective_density"] == pytest.approx(1.0, abs=0.3)  # a draft costs what a check does


def test_questions_are_answered_as_by_the_dense_model(tmp_path: Path) -> None:
    grid = ["grid.sparsity=[0,0.5]", "grid.verification=[none,exact]"]
    dense, pruned, verified = ran(*tiny(tmp_path / "out", *grid, task="briefs_qa", rows=2))
    answers = [[sample["answers"] for sample in read_samples(folder)] for folder in (dense, verified)]
    assert answers[0] == answers[1]
    assert {*METRICS} & {*read_record(pruned)["metrics"]} == {"effective_density"}
    assert {*METRICS} <= {*read_record(verified)["metrics"]}
    assert all(sample["drafting"]["checks"] > 0 for sample in read_samples(verified))


def test_the_table_has_drafts_where_there_are_some(call: Entry, tmp_path: Path) -> None:
    assert "tokens/check" not in call(*tiny(tmp_path / "out")).out
    assert "tokens/check" in call(*tiny(tmp_path / "out", "verification=exact")).out


def sample(*counts: int) -> dict[str, Any]:
    names = ("checks", "drafted", "accepted", "emitted", "draft_bytes")
    return {"drafting": {"step_bytes": 100, **dict(zip(names, counts, strict=True))}}


def test_metrics_are_ratios_of_sums() -> None:
    samples = [sample(4, 10, 6, 10, 400), sample(1, 0, 0, 1, 0)]
    found = drafting_metrics(samples)
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
    alone = [drafting_metrics(samples[:1]), drafting_metrics(samples[1:])]
    for name in ("tokens_per_check", "effective_density", "predicted_speedup"):
        assert found[f"{name}_stderr"] == pytest.approx(abs(alone[0][name] - alone[1][name]) / 2)
        assert f"{name}_stderr" not in alone[0]
    assert "dense_steps_stderr" not in found
    assert "acceptance_rate" not in drafting_metrics(samples[1:])
    nothing = sample(0, 0, 0, 0, 0)  # the first token ended the text
    assert drafting_metrics([nothing]) == drafting_metrics([]) == {}


def test_learning_is_told_by_what_checks_take() -> None:
    drafts = {"drafting": {"seconds": {"draft": 9.0, "check": 2.0, "learn": 0.75}}}
    assert learning_overhead([drafts, drafts]) == {"learning_overhead": 0.375}
    assert learning_overhead([{}]) == {}


def test_rounds_and_the_best_number_of_drafts_by_hand() -> None:
    agreement = [1, 1, 0, 1, 1, 1, 1, 0]
    by_hand = {1: 5, 2: 3, 3: 3, 4: 2}  # 11, 0, 11, 11, 0; 110, 111, 10; 110, 1111, 0; 110, 11110
    assert {number: rounds(agreement, number) for number in by_hand} == by_hand
    assert rounds([0, 0], 3) == 2
    speedups = {number: 8 / (count * (0.25 * number + 1)) for number, count in by_hand.items()}
    assert predicted([agreement], 0.25) == {"predicted_speedup": speedups[4], "predicted_draft_tokens": 4}
    # Over several texts, one number for all: (8 + 2) tokens, in 3 + 2 rounds with two drafts.
    both = predicted([agreement, [0, 0]], 0.25)
    costs = [(count + 2) * (0.25 * number + 1) for number, count in by_hand.items()]
    assert both["predicted_speedup"] == pytest.approx(10 / min(costs))


def test_standard_errors_read_every_sample_as_often_however_many_there_are() -> None:
    class Counted(dict[str, int]):
        reads = 0

        def __getitem__(self, name: str) -> int:
            Counted.reads += 1
            return super().__getitem__(name)

    def reads(count: int) -> int:
        Counted.reads = 0
        drafting_metrics([{"drafting": Counted(sample(3, 9, 5, 8, 90)["drafting"])} for _ in range(count)])
        return Counted.reads

    assert reads(80) < 9 * reads(10)
