"""Run folders as they come, and one DataFrame of them: what its rows say, and which may stand side by side."""

import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from made import COMMAND, change, record, records, score, scores, write_run

from analysis import frame as frame_module
from analysis.frame import COLUMNS, frame, select
from analysis.runs import Problem, read_run_folders
from analysis.tables import tables
from griffin import Method

DENSE: dict[str, Any] = {"sparsity": 0}
LATENCY: dict[str, Any] = {"kind": "latency"}
NAMES: list[tuple[dict[str, Any], dict[str, Any], str, str, str]] = [
    # What differs between two runs, a column of theirs, and what it tells of each.
    ({}, {"batch_size": 8}, "method", "griffin [batch_size=1] 50%", "griffin [batch_size=8] 50%"),
    ({}, DENSE | {"batch_size": 8, "compile": True, "cpu_onednn": True}, "task", "xsum", "xsum"),
    ({}, {"limit": 10}, "task", "xsum [limit=null]", "xsum [limit=10]"),
    ({}, {"task_decoding": "sampling"}, "task", "xsum [decoding=greedy]", "xsum [decoding=sampling]"),
    ({}, {"task_data_files": "x"}, "task", "xsum [data_files=null]", "xsum [data_files=x]"),
    ({}, {"environment_device": "NVIDIA L40"}, "task", "xsum [device=cpu]", "xsum [device=NVIDIA L40]"),
    ({}, {"task_protocol": "paper"}, "task", "xsum [protocol=null]", "xsum [protocol=paper]"),
    ({"sharpness": 1}, DENSE | {"sharpness": 2}, "task", "xsum [sharpness=1]", "xsum [sharpness=2]"),
    ({}, {"model_dtype": "float16"}, "model", "gemma_7b [dtype=bfloat16]", "gemma_7b [dtype=float16]"),
    ({}, {"model_dtype": "float16"}, "task", "xsum", "xsum"),
    ({}, DENSE | {"output_dir": "elsewhere", "tags": ["x"], "wandb": {"mode": "online"}}, "task", "xsum", "xsum"),
    ({}, {"statistic": "wanda", "offload_dense": True}, "task", "xsum", "xsum"),
    (LATENCY, LATENCY | {"environment_cpus": 64}, "task", "latency [cpus=2]", "latency [cpus=64]"),
    (
        *(LATENCY, LATENCY | {"offload_dense": True}, "task"),
        *("latency [offload_dense=false]", "latency [offload_dense=true]"),
    ),
    ({}, {"mode": "masked"}, "method", "griffin [mode=compact] 50%", "griffin [mode=masked] 50%"),
    ({}, {"mode": "masked", "sparsity": 0.25}, "method", "griffin 50%", "griffin 25%"),
    ({}, {"compensation": "ridge"}, "method", "griffin 50%", "griffin+ridge 50%"),
    ({}, {"shared_experts": True}, "method", "griffin 50%", "griffin shared 50%"),
    (
        *({}, {"statistic": "impact", "compensation": "ridge", "refresh": "compensation"}, "method"),
        *("griffin 50%", "impact+ridge refresh=compensation 50%"),
    ),
    ({}, {}, "family", "griffin [run a]", "griffin [run b]"),
]


@pytest.mark.parametrize(("one", "other", "column", "name", "other_name"), NAMES)
def test_names_tell_what_differs_between_runs_that_may_not_be_compared(
    one: dict[str, Any], other: dict[str, Any], column: str, name: str, other_name: str
) -> None:
    table = frame(records(one, other)).set_index("run_id")
    assert (table[column]["a"], table[column]["b"]) == (name, other_name)


@pytest.mark.parametrize(
    ("files", "names"),
    [
        ([("x", "1"), ("moved/x", "1")], {"xsum"}),
        ([("x/a.jsonl", "11"), ("y/b.jsonl", "22")], {"xsum [data_files=a.jsonl]", "xsum [data_files=b.jsonl]"}),
        (
            [("x/a.jsonl", "1111111"), ("x/a.jsonl", "2222222")],
            {"xsum [data_files=a.jsonl 111111]", "xsum [data_files=a.jsonl 222222]"},
        ),
    ],
)
def test_data_counts_by_its_content_and_is_told_by_its_name(files: list[tuple[str, str]], names: set[str]) -> None:
    read = [
        {"task_data_files": path, "environment_data": {"data_files": f"sha256:{content}"}} for path, content in files
    ]
    assert set(frame(records(*read))["task"]) == names


def test_the_schema_is_documented_and_stands_without_records() -> None:
    assert list(frame([]).columns) == list(COLUMNS)
    for name in COLUMNS:
        assert f"`{name}`" in (frame_module.__doc__ or ""), name


def test_every_axis_of_a_method_has_a_column() -> None:
    table = frame(records({"compensation": "ridge"}, DENSE))
    assert {axis.name for axis in fields(Method)} <= {*table}
    assert table["compensation"].tolist() == ["", "ridge"], "dense has no settings"


def test_one_row_per_metric_with_the_numbers_of_the_record() -> None:
    numbers = {"rouge1": 12.3456789, "rouge1_stderr": 0.123, "rouge2": 0.1, "rouge2_stderr": 0.0, "samples": 7}
    table = frame([record("a", metrics=numbers)])
    shown = table[["metric", "value", "stderr", "samples", "command"]].to_numpy().tolist()
    assert shown == [["rouge1", 12.3456789, 0.123, 7, COMMAND], ["rouge2", 0.1, 0.0, 7, COMMAND]]


def test_the_order_of_the_records_does_not_matter() -> None:
    assisted = DENSE | {"assistance": "prompt_lookup", "assistant": None}
    runs = records({}, {"sparsity": 0.25}, DENSE, {"statistic": "wanda"}, assisted, {"sparsity": [0.5, 0.25]})
    assert frame(runs).equals(frame(runs[::-1]))
    assert list(frame(runs)["run_id"]) == ["c", "e", "b", "a", "f", "d"]
    assert list(frame(runs)["role"]) == ["dense", "assisted", *["pruned"] * 4]
    assert list(frame(records(DENSE, DENSE | {"quantization": "int8"}))["role"]) == ["dense", "pruned"]


def test_the_words_are_the_records() -> None:
    method = record("a")["method"] | {"label": "a new method 9 bits", "family": "a new method"}
    (row,) = frame([record("a") | {"method": method}]).itertuples()
    assert (row.family, row.method) == ("a new method", "a new method 9 bits")


def test_names_and_tables_cost_every_run_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task has a seed and a sparsity of its own, so that each table could have a cell for every two runs."""
    counted: list[Any] = []
    monkeypatch.setattr(frame_module, "_text", lambda value: counted.append(value) or str(value))

    def cost(count: int) -> tuple[int, int]:
        counted.clear()
        table = frame([record(f"r{seed}", seed=seed, sparsity=seed / 100) for seed in range(1, count + 1)])
        return len(counted), sum(len(cells) for made in tables(table) for _, cells in made.rows)

    few, many = cost(10), cost(80)
    assert [large <= 8.5 * small for small, large in zip(few, many, strict=True)] == [True, True]


def test_a_dense_run_is_dense_whatever_its_statistic() -> None:
    (row,) = frame([record("a", sparsity=0, statistic="wanda", compensation="ridge", mode="masked")]).itertuples()
    assert (row.method, row.family, row.role, row.sparsity) == ("dense", "dense", "dense", 0.0)


def test_one_sparsity_per_layer_has_no_place_on_an_axis() -> None:
    (row,) = frame([record("a", sparsity=[0.5, 0.25])]).itertuples()
    assert row.sparsity != row.sparsity
    assert "per layer" in row.method


def test_lengths_come_from_the_suffix_or_the_single_pair() -> None:
    table = frame([record("a", "perplexity", metrics=scores(perplexity=9.0, perplexity_p64_g32=8.0))])
    assert set(table["metric"]) == {"perplexity"}
    assert table["prompt_length"].isna().tolist() == [True, False]
    assert select(table, prompt_length=64)["value"].tolist() == [8.0]
    (row,) = frame([record("b", "latency", metrics={"decode_speedup": 1.5, "samples": 5})]).itertuples()
    assert (row.prompt_length, row.generation_length) == (64, 32)


def test_an_automatic_batch_size_is_what_it_came_to() -> None:
    automatic = {"batch_size": "auto"}
    runs = records(automatic | {"environment_batch_size": 16}, automatic | {"statistic": "wanda"}, {"batch_size": 4})
    sizes = dict(frame(runs)[["run_id", "batch_size"]].itertuples(index=False))
    assert (sizes["a"], sizes["c"]) == (16, 4)
    assert sizes["b"] != sizes["b"], "unknown where no sample says it"


def problem_of(folder: Path) -> Problem:
    """What is wrong with this run, which is then no result; nothing is with those beside it."""
    found = read_run_folders([folder.parent])
    (problem,) = found.problems
    assert problem.run_id == folder.name
    assert len(found.records) == 3
    assert folder.name not in [record["run_id"] for record in found.records]
    return problem


@pytest.fixture
def folder(runs: Path) -> Path:
    """A run folder beside others, to be damaged."""
    return runs / "xsum-griffin-50"


def test_a_run_folder_itself_will_do_and_so_will_several(runs: Path) -> None:
    one, other = runs / "xsum-dense", runs / "latency-griffin-50"
    assert len(read_run_folders([one]).records) == 1
    assert len(read_run_folders([one, other, one]).records) == 2


@pytest.mark.parametrize(
    ("state", "failed"),
    [('{"samples": 3, "failed": "out of memory"}', "; it failed: out of memory"), ("{", ""), ("", "")],
)
def test_a_missing_record_is_an_unfinished_run_that_says_why_it_failed_if_that_is_known(
    state: str, failed: str, folder: Path
) -> None:
    (folder / "record.json").unlink()
    if state:
        (folder / "state.json").write_text(state, encoding="utf-8")
    problem = problem_of(folder)
    assert (problem.state, problem.reason) == ("unfinished", f"no record.json, 4 samples so far{failed}")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "running"}', "\udcff"])
def test_a_damaged_record_is_told(text: str, folder: Path) -> None:
    (folder / "record.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert problem_of(folder).state == "damaged"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"status": "failed"}, "status 'failed'"),
        ({"run_id": "another"}, "another"),
        ({"metrics__rouge1": "high"}, "metrics.rouge1"),
        ({"metrics__rouge1": None}, "metrics.rouge1"),
        ({"config__model": {}}, "config.model.name"),
        ({"timing": None}, "timing"),
        ({"method": {"label": ""}}, "method.label"),
        ({"method": ["griffin"]}, "method"),
        ({"evaluation": ...}, "unknown version"),
        ({"method": ...}, "unknown version"),
    ],
)
def test_a_record_that_is_none_is_told(values: dict[str, Any], words: str, folder: Path) -> None:
    change(folder, **values)
    problem = problem_of(folder)
    assert problem.state == "damaged"
    assert words in problem.reason


def test_a_run_that_is_there_twice_counts_once_unless_the_two_differ(folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    shutil.copytree(folder, copies / folder.name)
    assert len(read_run_folders([folder.parent, copies]).records) == 4
    shutil.rmtree(copies)
    write_run(copies, record(folder.name, metrics=score(1.0)))
    found = read_run_folders([folder.parent, copies])
    assert [problem.state for problem in found.problems] == ["conflicting"]
    assert len(found.records) == 3  # which of the two is right, nobody knows
