"""Classification and question answering through lm-eval: its tasks, its metrics, its HFLM, our experts.

The only module that imports lm-eval. `python -m pipelines.harness` is lm-eval's own command line with one more model:

    python -m pipelines.harness --model griffin --model_args pretrained=NAME,sparsity=0.5,statistic=griffin --tasks piqa
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import griffin
from pipelines.config import LEARNING, RunConfig
from pipelines.config_fields import one_of
from pipelines.data import EMBEDDED
from pipelines.errors import UserError
from pipelines.hub import prepare_hub
from pipelines.methods import Method, pruner_options
from pipelines.models import LoadedModel
from pipelines.records import Sample, mean_and_stderr
from pipelines.scoring import Request, score
from pipelines.squad import provide_to_lm_eval
from pipelines.task_config import PROTOCOLS, HarnessTask

logging.getLogger("lm_eval").setLevel(logging.ERROR)

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
OWN_TASKS = Path(__file__).parent / "harness_tasks"

# Requests are run in blocks of so many documents, and samples are written when a block is done. Blocks begin at
# fixed documents, so that a continued run batches like an undisturbed one.
_BLOCK_DOCUMENTS = 64


@dataclass(frozen=True)
class Document:
    """One document of a task with the requests that lm-eval makes of it."""

    index: int
    doc: dict[str, Any]
    instances: tuple[Instance, ...]
    task: Any


def read(config: RunConfig) -> list[Document]:
    """The documents of the task, in the data's order.

    Raises:
        UserError: the data is missing, malformed or unreachable.
    """
    task = _build(config.task)
    stop = None if config.limit is None else config.offset + config.limit
    documents = list(task.doc_iterator(rank=0, limit=stop, world_size=1))
    made = []
    if config.offset >= len(documents):
        raise UserError(f"offset={config.offset}: expected less than {len(documents)}, the documents there are")
    for index, doc in documents[config.offset :]:
        context = task.fewshot_context(doc, num_fewshot=0)
        instances = task.construct_requests(doc=doc, ctx=context, metadata=(config.task.name, index, 1))
        made.append(Document(index, doc, tuple(instances) if isinstance(instances, list) else (instances,), task))
    return made


def evaluate(
    loaded: LoadedModel,
    documents: Sequence[Document],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Run the requests of every document under every method, block by block.

    Log-likelihoods share one dense pass between the methods; generations run method by method.
    """
    lm = GriffinLM.around(loaded, config.batch_size)
    for start in range(0, len(documents), _BLOCK_DOCUMENTS):
        block = documents[start : start + _BLOCK_DOCUMENTS]
        needed = [method for method in methods if any(document.index not in done[method] for document in block)]
        instances = [instance for document in block for instance in document.instances]
        began = time.perf_counter()
        likelihoods = _loglikelihoods(lm, loaded, instances, config, needed)
        shared_seconds = (time.perf_counter() - began) / max(len(needed), 1)
        for method in needed:
            began = time.perf_counter()
            texts = _generations(lm, instances, config, method)
            seconds = (shared_seconds + time.perf_counter() - began) / len(block)
            answers = likelihoods[method] | texts
            samples = [
                _sample(document, [answers[id(instance)] for instance in document.instances], seconds)
                for document in block
            ]
            yield method, [sample for sample in samples if sample["index"] not in done[method]]


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """The task's own metrics as fractions, with standard errors, over all samples of a run."""
    names = list(samples[0]["metrics"]) if samples else []
    values: dict[str, float] = {}
    for name in names:
        values[name], values[f"{name}_stderr"] = mean_and_stderr([sample["metrics"][name] for sample in samples])
    return values | {"samples": len(samples)}


def versions(documents: Sequence[Document]) -> dict[str, Any]:
    """What lm-eval ran: its version and the task's."""
    return {"lm-eval": version("lm-eval"), "task_version": documents[0].task.VERSION}


@register_model("griffin")
class GriffinLM(HFLM):
    """lm-eval's HFLM, pruned: log-likelihoods under a protocol, generations with each request's own experts.

    Args:
        sparsity: share of FF neurons dropped; 0 is HFLM.
        statistic: one of `griffin.STATISTICS`.
        selection: one of `griffin.SELECTIONS`.
        compensation: one of `griffin.COMPENSATIONS`.
        budget: one of `griffin.BUDGETS`.
        refresh: one of `griffin.REFRESHES`.
        protocol: `paper` or `continuation`, for log-likelihoods.
        seed: of random statistics and selections.
        arguments: HFLM's own, `pretrained` first.

    Raises:
        UserError: a value that is not allowed, before the model is loaded.
    """

    def __init__(
        self,
        *,
        sparsity: float = 0.5,
        statistic: str = "griffin",
        selection: str = "topk",
        compensation: str = "none",
        budget: str = "uniform",
        refresh: str = "none",
        protocol: str = "paper",
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        realisable = tuple(name for name, one in griffin.STATISTICS.items() if not one.hindsight)
        for key, value, allowed in (
            ("statistic", statistic, realisable),
            ("selection", selection, griffin.SELECTIONS),
            ("compensation", compensation, tuple(griffin.COMPENSATIONS)),
            ("budget", budget, tuple(griffin.BUDGETS)),
            ("refresh", refresh, tuple(griffin.REFRESHES)),
            ("protocol", protocol, PROTOCOLS),
        ):
            one_of(key, value, allowed)
        if not 0 <= sparsity < 1:
            raise UserError(f"sparsity={sparsity}: expected a number, 0 <= sparsity < 1")
        if refresh == "compensation":
            one_of("compensation", compensation, sorted(LEARNING))
        super().__init__(**arguments)
        self.method = Method(statistic, selection, float(sparsity), compensation, budget, refresh)
        self.protocol = protocol
        self.seed = int(seed)

    @classmethod
    def around(cls, loaded: LoadedModel, batch_size: int) -> GriffinLM:
        """The model of our own pipeline as lm-eval sees it; dense until told otherwise."""
        return cls(
            sparsity=0.0,
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            batch_size=batch_size,
            max_length=loaded.context_length,
            add_bos_token=loaded.add_bos_token,
        )

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.method.dense:
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        loaded = LoadedModel(self.model, self.tokenizer, False, self.max_length, str(self.device))
        tokens = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        batch_size = override_bs or (1 if self.batch_size == "auto" else self.batch_size)
        scores = score(loaded, tokens, [self.method], self.protocol, batch_size, self.seed)[self.method]
        return [(one.loglikelihood, one.greedy) for one in scores]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As HFLM, with the experts of each request's own prompt."""
        if self.method.dense:
            return super().generate_until(requests, disable_tqdm)
        method = self.method
        with griffin.prune(
            self.model,
            method.sparsity,
            method.statistic,
            method.selection,
            mode="masked",
            seed=self.seed,
            compensation=method.compensation,
            budget=method.budget,
            refresh=method.refresh,
        ):
            return super().generate_until(requests, disable_tqdm)


def _build(task: HarnessTask) -> Any:
    """The lm-eval task, on local data where there is any."""
    overrides: dict[str, Any] = {}
    path = _definition(task)
    data = task.data_files or (task.embedded and str(EMBEDDED / task.embedded))
    if data:
        splits = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
        overrides = splits | {
            "validation_split": "validation",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"validation": str(Path(data).resolve())}},
        }
    else:
        prepare_hub()
    provide_to_lm_eval()
    with tempfile.TemporaryDirectory() as folder:
        definition = Path(folder) / f"{task.name}.yaml"
        definition.write_text(yaml.safe_dump({"include": str(path), "task": task.name, **overrides}))
        try:
            manager = lm_eval.tasks.TaskManager(include_defaults=False)
            built: Any = manager.load([str(definition)])["tasks"][task.name]
            first = next(iter(built.doc_iterator(rank=0, limit=1, world_size=1)))[1]
            built.construct_requests(
                doc=first, ctx=built.fewshot_context(first, num_fewshot=0), metadata=(task.name, 0, 1)
            )
        except Exception as error:  # data sets, templates and the hub fail in too many ways to name
            source = f"task.data_files={task.data_files}" if task.data_files else f"task={task.name}"
            reason = str(error).splitlines()[0] if str(error) else ""
            raise UserError(
                f"{source}: not usable as {task.name} data ({type(error).__name__}: {reason}); "
                "expected the hub data set's layout, in JSON Lines, or a connection to the hub"
            ) from error
    return built


def _definition(task: HarnessTask) -> Path:
    own = OWN_TASKS / task.definition
    return own if own.is_file() else LM_EVAL_TASKS / task.definition


def _loglikelihoods(
    lm: GriffinLM, loaded: LoadedModel, instances: Sequence[Instance], config: RunConfig, methods: Sequence[Method]
) -> dict[Method, dict[int, tuple[float, bool]]]:
    """Per method, the (log-likelihood, greedy) of each log-likelihood request, by the instance's identity."""
    wanted = [instance for instance in instances if instance.request_type == "loglikelihood"]
    tokens = [Request(*map(tuple, _encode(lm, *instance.args))) for instance in wanted]
    scores = (
        score(loaded, tokens, methods, config.task.protocol, config.batch_size, config.seed)
        if wanted
        else {method: [] for method in methods}
    )
    return {
        method: {id(instance): (one.loglikelihood, one.greedy) for instance, one in zip(wanted, each, strict=True)}
        for method, each in scores.items()
    }


def _encode(lm: GriffinLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if context == "":
        return [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
    return lm._encode_pair(context, continuation)


def _generations(lm: GriffinLM, instances: Sequence[Instance], config: RunConfig, method: Method) -> dict[int, str]:
    """The text of each generation request, by the instance's identity."""
    wanted = [instance for instance in instances if instance.request_type == "generate_until"]
    if not wanted:
        return {}
    if method.dense:
        texts = HFLM.generate_until(lm, wanted, disable_tqdm=True)
    else:
        with griffin.prune(lm.model, **pruner_options(config, method)):
            texts = HFLM.generate_until(lm, wanted, disable_tqdm=True)
    return {id(instance): text for instance, text in zip(wanted, texts, strict=True)}


def _sample(document: Document, answers: list[Any], seconds: float) -> Sample:
    found = document.task.process_results(document.doc, answers)
    return {
        "index": document.index,
        "id": str(document.doc.get("id", document.doc.get("idx", document.index))),
        "seconds": round(seconds, 4),
        "answers": answers,
        "target": document.task.doc_to_target(document.doc),
        "metrics": {name: float(value) for name, value in found.items() if isinstance(value, (bool, int, float))},
    }


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
