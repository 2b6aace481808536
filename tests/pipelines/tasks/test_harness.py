"""Classification and question answering through lm-eval, on the embedded articles."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from calling import Outcome, composed, prompts_run, read_record, read_samples, run_folder, run_folders
from lm_eval.models.huggingface import HFLM

import griffin
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.methods import methods, pruner_options
from pipelines.models import load
from pipelines.tasks import classification_and_qa, lm_eval_adapter

SHARED_DATA = Path(__file__).parents[3].parent / "shared" / "data"
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
    task = lm_eval_adapter._build(config.task)
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


# What the YAML file of a task may ask for beside plain greedy decoding. Stops are letters that random weights write.
KWARGS: dict[str, dict[str, Any]] = {
    "stops": {"until": ["e", "\u00e9", "~"], "max_gen_toks": 24},
    "beams": {"num_beams": 3, "max_gen_toks": 8},
    "penalty": {"repetition_penalty": 1.5, "max_new_tokens": 12},
}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 50, "max_gen_toks": 12}


def asking(folder: Path, kwargs: dict[str, Any]) -> list[str]:
    """Options for a task like briefs_qa, with other generation kwargs."""
    definition = folder / "asking.yaml"
    scored = "!function " + str(lm_eval_adapter.OWN_TASKS / "question_answering.briefs_qa")
    plain = {"include": str(lm_eval_adapter.OWN_TASKS / "briefs_qa.yaml"), "generation_kwargs": kwargs}
    definition.write_text(f"process_results: {scored}\n{yaml.safe_dump(plain)}")
    return [f"task.definition={definition}"]


def answers(folder: Path) -> list[list[str]]:
    """What a run answered, in the data's order."""
    return [sample["answers"] for sample in read_samples(folder)]


def plain_answers(config: RunConfig) -> list[list[str]]:
    """The same by lm-eval's HFLM, one prompt at a time, dense or under the pruner."""
    loaded = load(config.model, "cpu", config.seed)
    length = loaded.context_length
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, add_bos_token=False, max_length=length)
    instances = [instance for document in lm_eval_adapter.read(config) for instance in document.instances]
    (method,) = methods(config)
    if method.dense:
        return [[text] for text in lm.generate_until(instances, disable_tqdm=True)]
    with griffin.prune(loaded.model, **(pruner_options(config, method) | {"mode": "masked"})):
        return [[text] for text in lm.generate_until(instances, disable_tqdm=True)]


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("sparsity", [0, 0.5])
@pytest.mark.parametrize("kwargs", KWARGS.values(), ids=KWARGS)
def test_answers_are_those_of_hflm_whatever_a_task_asks_for(
    kwargs: dict[str, Any], sparsity: float, batch_size: int, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    options = arguments(tmp_path / "out", "briefs_qa", *asking(tmp_path, kwargs), f"sparsity={sparsity}")
    assert call(*options, f"batch_size={batch_size}").code == 0
    found = answers(run_folder(tmp_path / "out"))
    assert found == plain_answers(composed(*options))
    assert len({text for (text,) in found}) > 1, "answers that are all alike test nothing"


@pytest.mark.parametrize("refresh", ["experts", "compensation"])
def test_answers_with_refresh_are_those_of_the_pruner(
    refresh: str, call: Callable[..., Outcome], tmp_path: Path
) -> None:
    kwargs = asking(tmp_path, {"max_gen_toks": 24})
    options = arguments(tmp_path / "out", "briefs_qa", *kwargs, f"refresh={refresh}", "compensation=ridge")
    assert call(*options, "batch_size=4").code == 0
    assert answers(run_folder(tmp_path / "out")) == plain_answers(composed(*options))


def test_a_context_too_long_loses_its_beginning_as_in_hflm(call: Callable[..., Outcome], tmp_path: Path) -> None:
    kwargs = {"until": ["\n"], "max_gen_toks": 24}
    lengths = "model.architecture.max_position_embeddings=1000"
    whole = arguments(tmp_path / "whole", "briefs_qa", *asking(tmp_path, kwargs))
    for batch_size in (1, 4):
        options = arguments(tmp_path / str(batch_size), "briefs_qa", *asking(tmp_path, kwargs), lengths)
        assert call(*options, f"batch_size={batch_size}").code == 0
        assert answers(run_folder(tmp_path / str(batch_size))) == plain_answers(composed(*options))
    assert plain_answers(composed(*options)) != plain_answers(composed(*whole)), "all prompts fit"


def test_sampled_answers_are_reproducible_and_nobody_else_s(call: Callable[..., Outcome], tmp_path: Path) -> None:
    sampled = asking(tmp_path, SAMPLED)
    grid = ["grid.statistic=[griffin,magnitude]", "grid.sparsity=[0,0.5]"]
    assert call(*arguments(tmp_path / "grid", "briefs_qa", *sampled, *grid)).code == 0
    assert call(*arguments(tmp_path / "alone", "briefs_qa", *sampled, "statistic=magnitude")).code == 0
    alone, (dense, _, together) = run_folder(tmp_path / "alone"), run_folders(tmp_path / "grid")
    assert alone.name == together.name
    assert answers(alone) == answers(together)
    (alone / "record.json").unlink()
    lines = (alone / "samples.jsonl").read_text().splitlines(keepends=True)
    (alone / "samples.jsonl").write_text("".join(lines[:2]))
    assert call(*arguments(tmp_path / "alone", "briefs_qa", *sampled, "statistic=magnitude")).code == 0
    assert answers(alone) == answers(together)
    greedy = arguments(tmp_path, "briefs_qa", *asking(tmp_path, {"max_gen_toks": 12}), "sparsity=0")
    assert answers(dense) != plain_answers(composed(*greedy))


def test_what_does_not_follow_its_prompt_is_refused(call: Callable[..., Outcome], tmp_path: Path) -> None:
    ended = call(*arguments(tmp_path / "out", "briefs_qa", *asking(tmp_path, {"guidance_scale": 1.5})))
    assert ended.code == 1
    assert "guidance_scale=1.5" in ended.lines("error: ")[0]


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


def untimed(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A run's record and samples, but for where, when and by which call it ran."""
    record = read_record(folder)
    record["config"]["output_dir"] = record["environment"]["command"] = record["timing"] = None
    return record, [sample | {"seconds": None} for sample in read_samples(folder)]


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("briefs_choice", ["batch_size=3"]),
        ("briefs_qa", []),
        ("briefs_qa", ["batch_size=3"]),
        ("briefs_qa", ["batch_size=4", "shared_experts=true", "selection=topk_sample"]),
    ],
)
def test_a_grid_equals_separate_runs(
    task: str, options: list[str], call: Callable[..., Outcome], tmp_path: Path
) -> None:
    grid = ["grid.statistic=[griffin,magnitude]", "grid.sparsity=[0,0.5]", "grid.compensation=[none,ridge]"]
    assert call(*arguments(tmp_path / "grid", task, *grid, *options)).code == 0
    points = [
        [f"statistic={name}", f"compensation={how}"] for name in ("griffin", "magnitude") for how in ("none", "ridge")
    ]
    for method in (["sparsity=0"], *points):
        assert call(*arguments(tmp_path / "alone", task, *method, *options)).code == 0
    together, alone = run_folders(tmp_path / "grid"), run_folders(tmp_path / "alone")
    assert len(alone) == 5
    assert [untimed(folder) for folder in together] == [untimed(folder) for folder in alone]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_grid_runs_each_prompt_once(
    batch_size: int, call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_run(monkeypatch)
    grid = ["grid.statistic=[griffin,wanda,magnitude]", "grid.sparsity=[0,0.25,0.5]", f"batch_size={batch_size}"]
    assert call(*arguments(tmp_path, "briefs_qa", *grid)).code == 0
    assert len(run_folders(tmp_path)) == 7
    assert prompts == [1] * 6
    assert len({str(answers(folder)) for folder in run_folders(tmp_path)}) > 4, "methods that agree test nothing"
    for folder in run_folders(tmp_path):
        samples = read_samples(folder)
        assert read_record(folder)["timing"]["seconds"] == pytest.approx(sum(sample["seconds"] for sample in samples))
        assert all(sample["seconds"] > 0 for sample in samples)


def test_the_record_says_protocol_and_versions(call: Callable[..., Outcome], tmp_path: Path) -> None:
    assert call(*arguments(tmp_path, "briefs_choice", "task.protocol=continuation")).code == 0
    record = read_record(run_folder(tmp_path))
    assert record["config"]["task"]["protocol"] == "continuation"
    assert record["environment"]["lm-eval"] == lm_eval.__version__
    assert record["environment"]["task_version"] == 1.0
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples"} <= set(record["metrics"])


@pytest.mark.parametrize(
    ("task", "options"), [("briefs_choice", ["batch_size=3"]), ("briefs_qa", []), ("briefs_qa", ["batch_size=4"])]
)
def test_the_rest_of_a_grid_that_was_cut_off_is_as_undisturbed(
    task: str, options: list[str], call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classification_and_qa, "_BLOCK_DOCUMENTS", 2)
    grid = arguments(tmp_path / "out", task, *options, "grid.sparsity=[0,0.5]")
    assert call(*grid).code == 0
    whole = [untimed(folder) for folder in run_folders(tmp_path / "out")]
    for left, behind in ((0, 0), (1, 0), (3, 2), (5, 5), (6, 4)):  # a method may be a batch ahead of the other
        for folder, kept in zip(run_folders(tmp_path / "out"), (left, behind), strict=True):
            (folder / "record.json").unlink()
            lines = (folder / "samples.jsonl").read_text().splitlines(keepends=True)
            (folder / "samples.jsonl").write_text(
                "".join([*lines[:kept], *(line[:20] for line in lines[kept : kept + 1])])
            )
        assert call(*grid).code == 0
        assert [untimed(folder) for folder in run_folders(tmp_path / "out")] == whole


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_are_written_batch_by_batch(
    batch_size: int, call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, calls = classification_and_qa._sample, itertools.count()

    def breaking(*arguments: Any) -> dict[str, Any]:
        if next(calls) == 3 * batch_size:  # the second batch of the second method
            raise MemoryError
        return made(*arguments)

    monkeypatch.setattr(classification_and_qa, "_sample", breaking)
    assert call(*arguments(tmp_path, "briefs_qa", f"batch_size={batch_size}", "grid.sparsity=[0,0.5]")).code == 1
    assert [len(read_samples(folder)) for folder in run_folders(tmp_path)] == [2 * batch_size, batch_size]


def test_generations_in_a_batch_use_each_prompt_s_own_experts(call: Callable[..., Outcome], tmp_path: Path) -> None:
    for name, size in (("alone", 1), ("batch", 4)):
        assert call(*arguments(tmp_path / name, "briefs_qa", f"batch_size={size}", "mode=masked")).code == 0
    alone, batch = (answers(run_folder(tmp_path / name)) for name in ("alone", "batch"))
    assert alone == batch


def test_lm_eval_can_use_the_model_by_name(call: Callable[..., Outcome], tmp_path: Path) -> None:
    config, generating = (composed(*arguments(tmp_path, task)) for task in ("briefs_choice", "briefs_qa"))
    loaded = load(config.model, "cpu", 0)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    results = lm_eval.simple_evaluate(
        model="griffin",
        model_args=f"pretrained={tmp_path / 'model'},sparsity=0.5,statistic=griffin,dtype=float32",
        tasks=[lm_eval_adapter._build(config.task), lm_eval_adapter._build(generating.task)],
        device="cpu",
        limit=6,
        bootstrap_iters=0,
    )
    assert results["config"]["model"] == "griffin"
    assert 0 <= results["results"]["briefs_choice"]["acc,none"] <= 1
    assert call(*arguments(tmp_path / "out", "briefs_qa", "mode=masked")).code == 0
    found = {sample["doc_id"]: sample["resps"][0] for sample in results["samples"]["briefs_qa"]}
    assert [found[index] for index in range(6)] == answers(run_folder(tmp_path / "out"))


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
        lm_eval_adapter.GriffinLM(pretrained="no-such-model", **mistake)


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
