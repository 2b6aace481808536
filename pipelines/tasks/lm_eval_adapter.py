"""lm-eval: its tasks, its metrics, its HFLM, our experts.

The only module that imports lm-eval. `python -m pipelines.harness` is lm-eval's own command line with one more model,
`griffin`, which importing this module registers.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

import griffin
from griffin.decoding import refuse_decoding
from pipelines.config import LEARNING, RunConfig
from pipelines.config_fields import one_of
from pipelines.data import EMBEDDED
from pipelines.errors import UserError
from pipelines.hub import prepare_hub
from pipelines.methods import Method, pruned, shared_prompt
from pipelines.models import LoadedModel
from pipelines.task_config import PROTOCOLS, HarnessTask
from pipelines.tasks.scoring import Request, score
from pipelines.tasks.squad import provide_to_lm_eval

logging.getLogger("lm_eval").setLevel(logging.ERROR)

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
OWN_TASKS = Path(__file__).parent / "harness_tasks"


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

    Attributes:
        method: which answers the coming requests.
        prompt_seconds: what dense passes over prompts to be continued have taken since it was last set.

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
        self.mode, self.shared_experts = "masked", False
        self.prompt_seconds = 0.0
        self._methods: Sequence[Method] = [self.method]
        self._prompts: list[list[int]] = []

    @classmethod
    def around(cls, loaded: LoadedModel, config: RunConfig, methods: Sequence[Method]) -> GriffinLM:
        """The model of our own pipeline as lm-eval sees it, for any of these methods: its `method` says which."""
        lm = cls(
            sparsity=0.0,
            seed=config.seed,
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            batch_size=config.batch_size,
            max_length=loaded.context_length,
            add_bos_token=loaded.add_bos_token,
        )
        lm.mode, lm.shared_experts, lm._methods = config.mode, config.shared_experts, methods
        return lm

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

    @cached_property
    def _shared(self) -> griffin.SharedPrompt:
        return shared_prompt(self.model, self._methods)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], *, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """As HFLM, going on from the prompts' dense pass, which is run once for all methods in turn."""
        refuse_decoding(self.model.generation_config, None, options, one_text=self.method.refresh != "none")
        began = time.perf_counter()
        prompts = [ids[kept] for ids, kept in zip(context, attention_mask.bool(), strict=True)]
        rows = [ids.tolist() for ids in prompts]
        if rows != self._prompts:
            with torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None):
                self._logits_BV = self._shared.run_each(prompts)
            self._prompts = rows
        self.prompt_seconds += time.perf_counter() - began
        options |= {
            "attention_mask": attention_mask,
            "past_key_values": self._shared.fork(max_length - context.shape[1]),
        }
        with pruned(self._shared, self.method, self), griffin.prefilled(self.model, self._logits_BV):
            return super()._model_generate(context, max_length, stop, **options)


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


def command_line() -> None:
    """lm-eval's own command line, `lm_eval`, which now knows the model `griffin`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
