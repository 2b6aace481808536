"""Classification and question answering through lm-eval, on the embedded articles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from calling import Outcome, composed, read_record, read_samples, run_folder, run_folders
from lm_eval.models.huggingface import HFLM

from pipelines import harness
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.models import load

SHARED_DATA = Path(__file__).parents[2].parent / "shared" / "data"
# Tasks with the file that stands in for the hub's data set, in its layout.
LOCAL = {
    "piqa": "piqa",
    "copa": "copa",
    "arc_easy": "arc_easy",
    "boolq": "boolq",
    "hellaswag": "hellaswag",
    "coqa": "coqa_like",
    "qasper": "qasper",
}


def arguments(out: Path, task: str, *more: str) -> list[str]:
    plain = ["model=random_tiny", f"task={task}", "limit=6", f"output_dir={out}", "wandb.mode=disabled"]
    return [*plain, *more]


def hflm(config: RunConfig) -> dict[str, float]:
    """The same task by lm-eval itself: its HFLM, its evaluator."""
    loaded = load(config.model, "cpu", config.seed)
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=config.batch_size, add_bos_token=False)
    task = harness._build(config.task)
    results = lm_eval.evaluate(lm, {config.task.name: task}, limit=config.limit, bootstrap_iters=0)["results"]
    return {
        key.removesuffix(",none"): value for key, value in results[config.task.name].items() if key.endswith(",none")
    }


@pytest.mark.parametrize("task", ["briefs_choice", "briefs_boolq", "briefs_qa"])
def test_dense_equals_plain_lm_eval_to_the_last_digit(task: str, call: Callable[..., Outcome], tmp_path: Path) -> None:
    options = arguments(tmp_path, task, "sparsity=0", "batch_size=4")
    assert call(*options).code == 0
    found, expected = read_record(run_folder(tmp_path))["metrics"], hflm(composed(*options))
    assert {name: found[name] for name in expected if not name.endswith("_stderr")} == {
        name: value for name, value in expected.items() if not name.endswith("_stderr")
    }


@pytest.mark.parametrize("task", LOCAL)
def test_local_data_in_the_hub_layout_equals_plain_lm_eval(
    task: str, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    data = SHARED_DATA / f"{LOCAL[task]}.jsonl"
    if not data.is_file():
        pytest.skip(f"no file {data.name} beside the project")
    short = ["limit=2"] if task in ("coqa", "qasper") else ["limit=8"]
    options = arguments(tmp_path, task, f"task.data_files={data}", "sparsity=0", "batch_size=4", *short)
    assert call(*options).code == 0
    found, expected = read_record(run_folder(tmp_path))["metrics"], hflm(composed(*options))
    assert expected
    assert all(found[name] == value for name, value in expected.items() if not name.endswith("_stderr"))


@pytest.mark.parametrize("task", ["briefs_choice", "briefs_qa"])
def test_a_grid_equals_separate_runs(task: str, call: Callable[..., Outcome], tmp_path: Path) -> None:
    grid = ["grid.statistic=[griffin,magnitude]", "grid.sparsity=[0,0.5]", "batch_size=3"]
    assert call(*arguments(tmp_path / "grid", task, *grid)).code == 0
    for method in (["sparsity=0"], ["statistic=griffin"], ["statistic=magnitude"]):
        assert call(*arguments(tmp_path / "alone", task, *method, "batch_size=3")).code == 0
    together, alone = run_folders(tmp_path / "grid"), run_folders(tmp_path / "alone")
    assert [path.name for path in together] == [path.name for path in alone]
    assert len(alone) == 3
    for one, other in zip(together, alone, strict=True):
        assert read_record(one)["metrics"] == read_record(other)["metrics"]
        assert [sample["answers"] for sample in read_samples(one)] == [
            sample["answers"] for sample in read_samples(other)
        ]


def test_the_record_says_protocol_and_versions(call: Callable[..., Outcome], tmp_path: Path) -> None:
    assert call(*arguments(tmp_path, "briefs_choice", "task.protocol=continuation")).code == 0
    record = read_record(run_folder(tmp_path))
    assert record["config"]["task"]["protocol"] == "continuation"
    assert record["environment"]["lm-eval"] == lm_eval.__version__
    assert record["environment"]["task_version"] == 1.0
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples"} <= set(record["metrics"])


def test_the_rest_of_a_run_that_was_cut_off_is_as_undisturbed(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "_BLOCK_DOCUMENTS", 2)
    options = ("briefs_choice", "batch_size=3")
    assert call(*arguments(tmp_path / "whole", *options)).code == 0
    whole = run_folder(tmp_path / "whole")
    assert call(*arguments(tmp_path / "cut", *options)).code == 0
    cut = run_folder(tmp_path / "cut")
    (cut / "record.json").unlink()
    lines = (cut / "samples.jsonl").read_text().splitlines(keepends=True)
    (cut / "samples.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    assert call(*arguments(tmp_path / "cut", *options)).code == 0
    assert [sample["answers"] for sample in read_samples(cut)] == [sample["answers"] for sample in read_samples(whole)]
    assert read_record(cut)["metrics"] == read_record(whole)["metrics"]


def test_generations_in_a_batch_use_each_prompt_s_own_experts(call: Callable[..., Outcome], tmp_path: Path) -> None:
    for name, size in (("alone", 1), ("batch", 4)):
        assert call(*arguments(tmp_path / name, "briefs_qa", f"batch_size={size}", "mode=masked")).code == 0
    alone, batch = (read_samples(run_folder(tmp_path / name)) for name in ("alone", "batch"))
    assert [sample["answers"] for sample in alone] == [sample["answers"] for sample in batch]


def test_lm_eval_can_use_the_model_by_name(tmp_path: Path) -> None:
    config = composed(*arguments(tmp_path, "briefs_choice"))
    loaded = load(config.model, "cpu", 0)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    results = lm_eval.simple_evaluate(
        model="griffin",
        model_args=f"pretrained={tmp_path / 'model'},sparsity=0.5,statistic=griffin,dtype=float32",
        tasks=[harness._build(config.task)],
        device="cpu",
        limit=4,
        bootstrap_iters=0,
    )
    assert results["config"]["model"] == "griffin"
    assert 0 <= results["results"]["briefs_choice"]["acc,none"] <= 1


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ({"statistic": "grifin"}, "statistic=grifin: expected one of griffin"),
        ({"statistic": "oracle"}, "statistic=oracle: expected one of griffin"),
        ({"sparsity": 50}, "sparsity=50: expected a number"),
        ({"protocol": "foo"}, "protocol=foo: expected one of paper, continuation"),
        ({"compensation": "foo"}, "compensation=foo: expected one of none"),
    ],
)
def test_lm_eval_is_told_mistakes_before_it_loads_a_model(mistake: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        harness.GriffinLM(pretrained="no-such-model", **mistake)


def test_data_of_another_layout_is_told_in_one_line(call: Callable[..., Outcome], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"goal": "Boil an egg."}\n')
    ended = call(*arguments(tmp_path / "out", "piqa", f"task.data_files={data}"))
    assert ended.code == 1
    (line,) = ended.lines("error: ")
    assert f"task.data_files={data}" in line
    assert "Traceback" not in ended.err
    assert not list((tmp_path / "out").rglob("record.json"))


def test_answers_of_every_shape_fit_into_the_table_of_w_and_b(call: Callable[..., Outcome], tmp_path: Path) -> None:
    for task in ("briefs_choice", "briefs_qa"):
        ended = call(*arguments(tmp_path / task, task, "wandb.mode=offline", "limit=3"))
        assert ended.code == 0
        assert list(run_folder(tmp_path / task).glob("wandb/offline-run-*/files/media/table/*.json"))
