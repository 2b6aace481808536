"""Classification and question answering through lm-eval, on the embedded articles."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import pytest
import yaml
from calling import composed, cut_off, ran, read_samples, saved_model, tiny
from lm_eval.models.huggingface import HFLM

import griffin
from pipelines.composition import Call
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.job import attempt
from pipelines.models import load
from pipelines.tasks import lm_eval_adapter
from pipelines.tasks.harness_model import GriffinLM
from pipelines.tasks.harness_tasks import question_answering as squad
from pipelines.tracking import Media, Tracker

DOCUMENTS = 4  # of a run


def arguments(out: Path, task: str, *more: str) -> list[str]:
    return tiny(out, *more, task=task, rows=DOCUMENTS)


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
    (method,) = config.methods()
    with griffin.prune(loaded.model, method, mode="masked", seed=config.seed):
        return texts(lm, config)


def texts(lm: HFLM, config: RunConfig) -> list[list[str]]:
    """What a model of lm-eval answers to the requests of a run's task."""
    documents = lm_eval_adapter.asked(lm, lm_eval_adapter.read(config), config.task)
    instances = [instance for document in documents for instance in document.instances]
    return [[text] for text in lm.generate_until(instances, disable_tqdm=True)]


@pytest.mark.parametrize(
    "method",
    [
        *("sparsity=0", "sparsity=0.5", "statistic=random selection=sample"),
        *("compensation=ridge refresh=compensation", "model.architecture.max_position_embeddings=1000"),
    ],
)
def test_answers_are_those_of_hflm_dense_or_under_the_pruner(method: str, tmp_path: Path) -> None:
    whole = arguments(tmp_path / "out", "briefs_qa", *asking(tmp_path, STOPS))
    options = [*whole, *method.split()]
    expected = plain_answers(composed(*options))
    for batch_size in (1, 4):
        (folder,) = ran(*options, f"batch_size={batch_size}")
        assert answers(folder) == expected
    assert len({text for (text,) in expected}) > 1, "answers that are all alike test nothing"
    if method.startswith("model"):  # contexts that are too long lose their beginning
        assert expected != plain_answers(composed(*whole)), "all prompts fit"


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


def evaluated(task: Any, tmp_path: Path, model: str, model_args: str = "", **options: Any) -> Any:
    """What lm-eval itself makes of a task on the tiny model."""
    return lm_eval.simple_evaluate(
        model=model,
        model_args=f"pretrained={saved_model(tmp_path / 'model')},dtype=float32{model_args}",
        tasks=[lm_eval_adapter._build(task)],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False),  # an index of thousands of files
        device="cpu",
        limit=DOCUMENTS,
        bootstrap_iters=0,
        **options,
    )


def test_lm_eval_scores_log_likelihoods_by_the_name_of_our_model(tmp_path: Path) -> None:
    config = composed(*arguments(tmp_path, "briefs_choice"))
    results = evaluated(config.task, tmp_path, "griffin", ",sparsity=0.5,statistic=griffin")
    assert results["config"]["model"] == "griffin"
    assert 0 <= results["results"]["briefs_choice"]["acc,none"] <= 1
    with pytest.raises(UserError, match="scores log-likelihoods only; for texts: --model hf"):
        evaluated(composed(*arguments(tmp_path, "briefs_qa")).task, tmp_path, "griffin", ",sparsity=0.5")


PROBLEMS = [
    {"question": f"A ferry takes {boats} cars a trip. How many in 3 trips?", "answer": f"3 * {boats}\n#### {3 * boats}"}
    for boats in range(4, 4 + DOCUMENTS)
]


@pytest.mark.parametrize("task", ["briefs_qa", "gsm8k_cot_zeroshot"])
@pytest.mark.parametrize("method", ["griffin", "exact", "dense"])
def test_lm_evals_own_model_generates_by_a_method(method: str, task: str, tmp_path: Path) -> None:
    """Without anything of ours but a folder, and with the answers of our own pipeline; GSM8K as lm-eval defines it."""
    griffin.save_custom_generate(tmp_path / "folder")
    data, options = tmp_path / "gsm8k.jsonl", [f"method={method}"]
    data.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    options += [f"task.data_files={data}", "task.max_new_tokens=24"] if task != "briefs_qa" else []
    gen_kwargs = {"custom_generate": str(tmp_path / "folder"), "trust_remote_code": True, "method": method}
    gen_kwargs |= {"max_gen_toks": 24} if task != "briefs_qa" else {}
    results = evaluated(composed(*arguments(tmp_path, task, *options)).task, tmp_path, "hf", gen_kwargs=gen_kwargs)
    found = {sample["doc_id"]: sample["resps"][0] for sample in results["samples"][task]}
    (ours,) = ran(*arguments(tmp_path / "out", task, *options))
    assert [found[index] for index in range(DOCUMENTS)] == answers(ours)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ({"statistic": "oracle"}, "statistic=oracle: knows the continuation"),
        ({"sparsity": 50}, "sparsity=50: expected 0 <="),
        ({"protocol": "foo"}, "protocol=foo: expected one of paper, continuation"),
        ({"compensation": "foo"}, "compensation=foo: expected one of none"),
        ({"method": "recipee"}, "method=recipee: expected one of dense"),
        ({"statistic": "teal", "verification": "exact"}, "verification=exact with statistic=teal"),
        ({"method": "exact"}, "verification=exact: log-likelihoods cannot be verified; for texts: --model hf"),
    ],
)
def test_lm_eval_is_told_mistakes_before_it_loads_a_model(mistake: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        GriffinLM(pretrained="no-such-model", **mistake)


def test_answers_of_every_shape_fit_into_the_table_of_w_and_b(tmp_path: Path) -> None:
    for task in ("briefs_choice", "briefs_qa"):
        shown: list[dict[str, Any]] = []
        (folder,) = ran(*arguments(tmp_path / task, task, "limit=2"))
        Tracker(SimpleNamespace(log=shown.append), folder).show(Media(tables={"samples": read_samples(folder)}))
        assert len(shown[0]["samples_table"].data) == 2  # wandb refuses a column of several types


@pytest.mark.parametrize(
    ("gold", "prediction", "exact", "f1"),
    [
        (" The  U.S. Army, an  old\none!", "us army old one", 1, 1.0),
        ("black cat", "cat", 0, 2 / 3),
        ("cat", "dog", 0, 0.0),
        ("", "", 1, 1.0),
        ("", "cat", 0, 0.0),
        ("a a b b", "b b b", 0, 2 * (2 / 3) * (2 / 2) / (2 / 3 + 2 / 2)),  # articles go, repeated tokens count
    ],
)
def test_short_answers_are_compared_as_squad_does(gold: str, prediction: str, exact: int, f1: float) -> None:
    squad.provide_to_lm_eval()
    for place in (squad, importlib.import_module("transformers.data.metrics.squad_metrics")):  # where lm-eval looks
        assert place.compute_exact(gold, prediction) == exact
        assert place.compute_f1(gold, prediction) == pytest.approx(f1)
