"""One DataFrame with one schema: what its rows say, and which of them may stand side by side."""

from __future__ import annotations

from typing import Any

import pytest
from made import record, score

from analysis import frame as frame_module
from analysis import labels
from analysis.frame import COLUMNS, frame, select
from analysis.runs import checked
from analysis.tables import tables


def test_the_schema_is_documented_and_stands_without_records() -> None:
    assert list(frame([]).columns) == list(COLUMNS)
    for name in COLUMNS:
        assert f"`{name}`" in (frame_module.__doc__ or ""), name


def test_one_row_per_metric_with_the_numbers_of_the_record() -> None:
    numbers = {"rouge1": 12.3456789, "rouge1_stderr": 0.123, "rouge2": 0.1, "rouge2_stderr": 0.0, "samples": 7}
    table = frame([record("a", metrics=numbers)])
    assert list(table["metric"]) == ["rouge1", "rouge2"]
    assert list(table["value"]) == [12.3456789, 0.1]
    assert list(table["stderr"]) == [0.123, 0.0]
    assert set(table["samples"]) == {7}
    assert set(table["command"]) == {"python -m x 'y'"}


def test_the_order_of_the_records_does_not_matter() -> None:
    records = [record("a"), record("b", sparsity=0.25), record("c", sparsity=0), record("d", statistic="wanda")]
    assert frame(records).equals(frame(records[::-1]))
    assert list(frame(records)["method"]) == ["dense", "griffin 25%", "griffin 50%", "wanda 50%"]


@pytest.mark.parametrize("difference", [{"batch_size": 8}, {"compile": True}, {"cpu_onednn": True}])
def test_what_only_changes_rounding_is_the_same_column(difference: dict[str, Any]) -> None:
    assert set(frame([record("a"), record("b", sparsity=0, **difference)])["task"]) == {"xsum"}
    (key,) = difference
    assert all(f"[{key}=" in name for name in frame([record("a"), record("b", **difference)])["method"])


def test_dense_decoding_that_is_assisted_is_neither_dense_nor_pruned() -> None:
    runs = [record("a"), record("b", sparsity=0), record("c", sparsity=0, assistance="prompt_lookup", assistant=None)]
    assert list(frame(runs)["role"]) == ["dense", "assisted", "pruned"]


@pytest.mark.parametrize(
    "difference",
    [
        {"limit": 10},
        {"offset": 5},
        {"seed": 1},
        {"task_decoding": "reference_sampling"},
        {"task_shots": 0},
        {"task_data_files": "other.jsonl"},
        {"environment_device": "NVIDIA L40"},
    ],
)
def test_what_differs_in_how_it_was_evaluated_is_another_column(difference: dict[str, Any]) -> None:
    table = frame([record("a"), record("b", **difference)])
    assert table["task"].nunique() == 2
    (key,) = difference
    told = key.removeprefix("task_").removeprefix("environment_")
    assert all(f"{told}=" in name for name in table["task"])


def test_protocols_are_told_apart() -> None:
    acc = {"acc": 0.5, "acc_stderr": 0.1, "samples": 4}
    both = [record(name, "classification", metrics=acc, task_protocol=name) for name in ("paper", "continuation")]
    assert set(frame(both)["task"]) == {"piqa [protocol=paper]", "piqa [protocol=continuation]"}


def test_dtypes_are_told_apart() -> None:
    table = frame([record("a"), record("b", model_dtype="float16")])
    assert set(table["model"]) == {"gemma_7b [dtype=bfloat16]", "gemma_7b [dtype=float16]"}
    assert table["task"].nunique() == 1


def test_data_counts_by_its_content() -> None:
    def on(name: str, path: str, content: str) -> dict[str, Any]:
        return record(name, task_data_files=path, environment_data={"data_files": content})

    assert frame([on("a", "x", "sha256:1"), on("b", "moved/x", "sha256:1")])["task"].nunique() == 1
    assert frame([on("a", "x", "sha256:1"), on("b", "x", "sha256:2")])["task"].nunique() == 2


def test_data_is_told_by_the_names_of_its_files() -> None:
    def tasks(*files: tuple[str, str]) -> set[str]:
        records = [
            record(f"r{number}", task_data_files=path, environment_data={"data_files": content})
            for number, (path, content) in enumerate(files)
        ]
        return set(frame(records)["task"])

    assert tasks(("x/a.jsonl", "sha256:11"), ("y/b.jsonl", "sha256:22")) == {
        "xsum [data_files=a.jsonl]",
        "xsum [data_files=b.jsonl]",
    }
    same = tasks(("x/a.jsonl", "sha256:1111111"), ("y/a.jsonl", "sha256:2222222"))
    assert same == {"xsum [data_files=a.jsonl 111111]", "xsum [data_files=a.jsonl 222222]"}


def test_where_files_go_and_who_tracks_them_tells_nothing_apart() -> None:
    table = frame([record("a"), record("b", sparsity=0, output_dir="elsewhere", tags=["x"], wandb={"mode": "online"})])
    assert table["task"].nunique() == table["model"].nunique() == 1


def test_a_record_of_an_unknown_version_is_refused_by_name() -> None:
    for missing in ("method", "evaluation"):
        with pytest.raises(ValueError, match="unknown version: it has no method or no evaluation"):
            checked({key: value for key, value in record("a").items() if key != missing}, "a")


def test_the_words_are_the_records() -> None:
    method = record("a")["method"] | {"label": "a new method 9 bits", "family": "a new method"}
    (row,) = frame([record("a") | {"method": method}]).itertuples()
    assert (row.family, row.method) == ("a new method", "a new method 9 bits")


def test_new_axes_are_methods_of_their_own() -> None:
    table = frame(
        [
            record("a"),
            record("b", compensation="ridge"),
            record("c", budget="late"),
            record("d", selection="sample"),
            record("e", shared_experts=True),
            record("f", statistic="impact", compensation="ridge", refresh="compensation"),
        ]
    )
    assert set(table["method"]) == {
        *("griffin 50%", "griffin+ridge 50%", "griffin late 50%", "griffin sample 50%"),
        *("griffin shared 50%", "impact+ridge refresh=compensation 50%"),
    }


def test_a_key_that_nobody_has_heard_of_is_never_mixed() -> None:
    table = frame(
        [record("a", sharpness=1), record("b", sharpness=2, sparsity=0), record("c", sharpness=1, sparsity=0)]
    )
    assert set(table["task"]) == {"xsum [sharpness=1]", "xsum [sharpness=2]"}


def test_names_and_tables_cost_every_run_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task has a seed and a sparsity of its own, so that each table could have a cell for every two runs."""
    counted: list[Any] = []
    monkeypatch.setattr(labels, "_text", lambda value: counted.append(value) or str(value))

    def cost(count: int) -> tuple[int, int]:
        counted.clear()
        table = frame([record(f"r{seed}", seed=seed, sparsity=seed / 100) for seed in range(1, count + 1)])
        return len(counted), sum(len(cells) for made in tables(table) for _, cells in made.rows)

    few, many = cost(10), cost(80)
    assert [large <= 8.5 * small for small, large in zip(few, many, strict=True)] == [True, True]


def test_modes_are_told_apart_where_two_runs_would_share_a_cell() -> None:
    table = frame([record("a", mode="masked"), record("b"), record("c", mode="masked", sparsity=0.25)])
    assert set(table["method"]) == {"griffin [mode=masked] 50%", "griffin [mode=compact] 50%", "griffin 25%"}


def test_runs_that_nothing_tells_apart_are_told_by_their_ids() -> None:
    table = frame([record("griffin-0123456789"), record("griffin-9876543210")])
    assert set(table["family"]) == {"griffin [run 0123456789]", "griffin [run 9876543210]"}


def test_a_dense_run_is_dense_whatever_its_statistic() -> None:
    (row,) = frame([record("a", sparsity=0, statistic="wanda", compensation="ridge", mode="masked")]).itertuples()
    assert (row.method, row.family, row.statistic, row.compensation, row.sparsity) == ("dense", "dense", "", "", 0.0)


def test_one_sparsity_per_layer_has_no_place_on_an_axis() -> None:
    (row,) = frame([record("a", sparsity=[0.5, 0.25])]).itertuples()
    assert row.sparsity != row.sparsity
    assert "per layer" in row.method


def test_lengths_come_from_the_suffix_or_the_single_pair() -> None:
    several = {**score(9.0, name="perplexity"), **score(8.0, name="perplexity_p64_g32")}
    table = frame([record("a", "perplexity", metrics=several)])
    assert set(table["metric"]) == {"perplexity"}
    assert select(table, prompt_length=64)["value"].tolist() == [8.0]
    assert table["prompt_length"].isna().tolist() == [True, False] or table["prompt_length"].isna().sum() == 1
    (row,) = frame([record("b", "latency", metrics={"decode_speedup": 1.5, "samples": 5})]).itertuples()
    assert (row.prompt_length, row.generation_length) == (64, 32)


def test_times_of_different_machines_are_told_apart() -> None:
    numbers = {"decode_speedup": 1.5, "samples": 5}
    table = frame(
        [record("a", "latency", metrics=numbers), record("b", "latency", metrics=numbers, environment_cpus=64)]
    )
    assert set(table["task"]) == {"latency [cpus=2]", "latency [cpus=64]"}


def test_offloading_tells_times_apart_and_nothing_else() -> None:
    numbers = {"decode_speedup": 1.5, "samples": 5}
    table = frame(
        [record("a", "latency", metrics=numbers), record("b", "latency", metrics=numbers, offload_dense=True)]
    )
    assert set(table["task"]) == {"latency [offload_dense=false]", "latency [offload_dense=true]"}
    texts = frame([record("c"), record("d", statistic="wanda", offload_dense=True)])
    assert set(texts["task"]) == {"xsum"}


def test_an_automatic_batch_size_is_what_it_came_to() -> None:
    runs = [
        record("a", batch_size="auto", environment_batch_size=16),
        record("b", batch_size="auto", statistic="wanda"),
        record("c", batch_size=4, statistic="random"),
    ]
    sizes = dict(frame(runs)[["run_id", "batch_size"]].itertuples(index=False))
    assert sizes["a"] == 16
    assert sizes["b"] != sizes["b"], "unknown where no sample says it"
    assert sizes["c"] == 4
