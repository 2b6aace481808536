"""Classification and question answering through lm-eval, on the embedded articles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from calling import Outcome, composed, cut_off, prompts_run, ran, read_record, read_samples, timeless
from lm_eval.models.huggingface import HFLM

import griffin
from pipelines.composition import Call
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.job import attempt
from pipelines.models import load
from pipelines.tasks import lm_eval_adapter
from pipelines.tasks.harness_model import GriffinLM
from pipelines.tracking import Media, Tracker

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


DOCUMENTS = 4  # of a run


def arguments(out: Path, task: str, *more: str) -> list[str]:
    plain = ["model=random_tiny", f"task={task}", f"limit={DOCUMENTS}", f"output_dir={out}", "wandb.mode=disabled"]
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


@pytest.mark.parametrize("onednn", ["true", "false"])
@pytest.mark.parametrize("task", ["briefs_choice", "briefs_boolq", "briefs_qa"])
def test_dense_equals_plain_lm_eval(task: str, onednn: str, tmp_path: Path) -> None:
    options = arguments(tmp_path, task, "sparsity=0", "batch_size=4", f"cpu_onednn={onednn}")
    (folder,) = ran(*options)
    found, expected = read_record(folder)["metrics"], hflm(composed(*options))
    assert {name: found[name] for name in expected if not name.endswith("_stderr")} == {
        name: value for name, value in expected.items() if not name.endswith("_stderr")
    }


# What the YAML file of a task may ask for: stops, here letters that random weights write, and a temperature.
STOPS: dict[str, Any] = {"until": ["e", "\u00e9", "~"], "max_gen_toks": 24}
SAMPLED = {"do_sample": True, "temperature": 0.7, "max_gen_toks": 12}


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
    documents = lm_eval_adapter.asked(lm_eval_adapter.around(loaded, config), lm_eval_adapter.read(config), config.task)
    instances = [instance for document in documents for instance in document.instances]
    (method,) = config.methods()
    with griffin.prune(loaded.model, method, mode="masked", seed=config.seed):
        return [[text] for text in lm.generate_until(instances, disable_tqdm=True)]


METHODS = (
    *(["sparsity=0"], ["sparsity=0.5"], ["statistic=random", "selection=sample"]),
    ["compensation=ridge", "refresh=compensation"],
)


@pytest.mark.parametrize("method", METHODS, ids=" ".join)
def test_answers_are_those_of_hflm_dense_or_under_the_pruner(method: list[str], tmp_path: Path) -> None:
    options = arguments(tmp_path / "out", "briefs_qa", *asking(tmp_path, STOPS), *method)
    expected = plain_answers(composed(*options))
    for batch_size in (1, 4):
        (folder,) = ran(*options, f"batch_size={batch_size}")
        assert answers(folder) == expected
    assert len({text for (text,) in expected}) > 1, "answers that are all alike test nothing"


def test_a_context_too_long_loses_its_beginning_as_in_hflm(tmp_path: Path) -> None:
    kwargs = {"until": ["\n"], "max_gen_toks": 24}
    whole = arguments(tmp_path / "out", "briefs_qa", *asking(tmp_path, kwargs), "limit=3")
    options = [*whole, "model.architecture.max_position_embeddings=1000"]
    expected = plain_answers(composed(*options))
    assert expected != plain_answers(composed(*whole)), "all prompts fit"
    for batch_size in (1, 4):
        (folder,) = ran(*options, f"batch_size={batch_size}")
        assert answers(folder) == expected


def test_sampled_answers_depend_on_seed_and_document_only(tmp_path: Path) -> None:
    sampled = asking(tmp_path, SAMPLED)
    grid = ["grid.statistic=[griffin,magnitude]", "grid.sparsity=[0,0.5]"]
    dense, _, together = ran(*arguments(tmp_path / "grid", "briefs_qa", *sampled, *grid))
    single = arguments(tmp_path / "alone", "briefs_qa", *sampled, "statistic=magnitude")
    (alone,) = ran(*single)
    assert alone.name == together.name
    assert answers(alone) == answers(together)
    cut_off(alone, 2)
    ran(*single)
    assert answers(alone) == answers(together)
    (batch,) = ran(*single, "batch_size=4")
    assert answers(batch) == answers(together)
    greedy = arguments(tmp_path, "briefs_qa", *asking(tmp_path, {"max_gen_toks": 12}), "sparsity=0")
    assert answers(dense) != plain_answers(composed(*greedy))


@pytest.mark.parametrize("asked", [{"num_beams": 3}, {"repetition_penalty": 1.5}, {"top_k": 50, "temperature": 1}])
def test_what_is_neither_greedy_nor_a_temperature_is_refused(
    asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = arguments(tmp_path / "out", "briefs_qa", *asking(tmp_path, asked))
    (status,) = attempt(composed(*options), Call((), None, single=True))
    assert f"generation_kwargs of the task: {next(iter(asked))}: expected greedy" in str(status.reason)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("task", LOCAL)
def test_local_data_in_the_hub_layout_equals_plain_lm_eval(task: str, tmp_path: Path) -> None:
    data = SHARED_DATA / f"{LOCAL[task]}.jsonl"
    if not data.is_file():
        pytest.skip(f"no file {data.name} beside the project")
    short = ["limit=2"] if task in ("coqa", "qasper") else ["limit=8"]
    options = arguments(tmp_path, task, f"task.data_files={data}", "sparsity=0", "batch_size=4", *short)
    (folder,) = ran(*options)
    found, expected = read_record(folder)["metrics"], hflm(composed(*options))
    assert expected
    assert all(found[name] == value for name, value in expected.items() if not name.endswith("_stderr"))


GRID = ("grid.statistic=[griffin,magnitude]", "grid.sparsity=[0,0.5]", "grid.compensation=[none,ridge]")


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("briefs_choice", ["task.protocol=continuation"]),
        ("briefs_qa", []),
        ("briefs_qa", ["batch_size=4", "shared_experts=true", "selection=topk_sample"]),
    ],
)
def test_a_grid_equals_separate_runs_to_the_bit(task: str, options: list[str], tmp_path: Path) -> None:
    grid = ran(*arguments(tmp_path / "grid", task, *GRID, *options))
    points = (["sparsity=0"], ["compensation=ridge"], ["statistic=magnitude"])
    alone = [ran(*arguments(tmp_path / "alone", task, *method, *options))[0] for method in points]
    assert len(grid) == 5
    by_name = {folder.name: timeless(folder) for folder in grid}
    assert [timeless(folder) for folder in alone] == [by_name[folder.name] for folder in alone]
    assert len({str(found[1]) for found in by_name.values()}) > 3, "methods that agree test nothing"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_grid_runs_each_prompt_once(batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = prompts_run(monkeypatch)
    folders = ran(*arguments(tmp_path, "briefs_qa", *GRID, f"batch_size={batch_size}"))
    assert [len(each) for each in lengths] == [1] * DOCUMENTS
    for folder in folders:
        samples = read_samples(folder)
        assert read_record(folder)["timing"]["seconds"] == pytest.approx(sum(sample["seconds"] for sample in samples))
        assert all(sample["seconds"] > 0 for sample in samples)


def test_the_record_says_protocol_and_versions(tmp_path: Path) -> None:
    (folder,) = ran(*arguments(tmp_path, "briefs_choice", "task.protocol=continuation"))
    record = read_record(folder)
    assert record["config"]["task"]["protocol"] == "continuation"
    assert record["environment"]["lm-eval"] == lm_eval.__version__
    assert record["environment"]["task_version"] == 1.0
    assert {"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "samples"} <= set(record["metrics"])


def test_lm_eval_can_use_the_model_by_name(tmp_path: Path) -> None:
    config, generating = (composed(*arguments(tmp_path, task)) for task in ("briefs_choice", "briefs_qa"))
    loaded = load(config.model, "cpu", 0)
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    results = lm_eval.simple_evaluate(
        model="griffin",
        model_args=f"pretrained={tmp_path / 'model'},sparsity=0.5,statistic=griffin,dtype=float32",
        tasks=[lm_eval_adapter._build(config.task), lm_eval_adapter._build(generating.task)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),  # an index of thousands of files
        device="cpu",
        limit=DOCUMENTS,
        bootstrap_iters=0,
    )
    assert results["config"]["model"] == "griffin"
    assert 0 <= results["results"]["briefs_choice"]["acc,none"] <= 1
    (folder,) = ran(*arguments(tmp_path / "out", "briefs_qa", "mode=masked"))
    found = {sample["doc_id"]: sample["resps"][0] for sample in results["samples"]["briefs_qa"]}
    assert [found[index] for index in range(DOCUMENTS)] == answers(folder)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ({"statistic": "grifin"}, "statistic=grifin: expected one of griffin"),
        ({"statistic": "oracle"}, "statistic=oracle: knows the continuation"),
        ({"sparsity": 50}, "sparsity=50: expected 0 <="),
        ({"protocol": "foo"}, "protocol=foo: expected one of paper, continuation"),
        ({"compensation": "foo"}, "compensation=foo: expected one of none"),
        ({"method": "recipee"}, "method=recipee: expected one of dense"),
        ({"statistic": "teal", "verification": "exact"}, "verification=exact with statistic=teal"),
    ],
)
def test_lm_eval_is_told_mistakes_before_it_loads_a_model(mistake: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        GriffinLM(pretrained="no-such-model", **mistake)


def test_lm_eval_verifies_texts_and_refuses_to_verify_log_likelihoods(tmp_path: Path) -> None:
    config = composed(*arguments(tmp_path, "briefs_qa", *asking(tmp_path, STOPS), "sparsity=0", "limit=2"))
    loaded = load(config.model, "cpu", 0)
    options = {"add_bos_token": False, "max_length": loaded.context_length}
    lm = GriffinLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, method="exact", draft_tokens=2, **options)
    documents = lm_eval_adapter.asked(lm, lm_eval_adapter.read(config), config.task)
    instances = [instance for document in documents for instance in document.instances]
    assert [[text] for text in lm.generate_until(instances, disable_tqdm=True)] == plain_answers(config)
    with pytest.raises(UserError, match="verification=exact: log-likelihoods cannot be verified"):
        lm._loglikelihood_tokens([])


def test_data_of_another_layout_is_told_in_one_line(call: Callable[..., Outcome], tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"goal": "Boil an egg."}\n')
    ended = call(*arguments(tmp_path / "out", "piqa", f"task.data_files={data}"))
    assert ended.code == 1
    (line,) = ended.lines("error: ")
    assert f"task.data_files={data}" in line
    assert "Traceback" not in ended.err
    assert not list((tmp_path / "out").rglob("record.json"))


def test_answers_of_every_shape_fit_into_the_table_of_w_and_b(tmp_path: Path) -> None:
    class Run:
        def log(self, shown: dict[str, Any]) -> None:
            tables.append(shown["samples_table"])  # wandb refuses a column of several types

    tables: list[Any] = []
    for task in ("briefs_choice", "briefs_qa"):
        (folder,) = ran(*arguments(tmp_path / task, task, "limit=2"))
        Tracker(Run(), folder).show(Media(tables={"samples": read_samples(folder)}))
    assert [len(table.data) for table in tables] == [2, 2]
