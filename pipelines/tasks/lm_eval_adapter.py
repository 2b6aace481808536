"""lm-eval: its tasks, its metrics, its HFLM, our experts.

The only module that imports lm-eval. `python -m pipelines.harness` is lm-eval's own command line with one more model,
`griffin`, which importing this module registers.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import simple_parse_args_string
from torch import Tensor

import griffin
from griffin import LEARNING, Method
from pipelines.config import RunConfig
from pipelines.config_fields import one_of
from pipelines.data import EMBEDDED
from pipelines.errors import UserError
from pipelines.hub import prepare_hub
from pipelines.models import LoadedModel
from pipelines.task_config import PROTOCOLS, HarnessTask
from pipelines.tasks.scoring import Request, score
from pipelines.tasks.squad import provide_to_lm_eval

logging.getLogger("lm_eval").setLevel(logging.ERROR)

LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
OWN_TASKS = Path(__file__).parent / "harness_tasks"

# By which lm-eval draws the shots of each document.
SHOTS_SEED = 1234


@dataclass(frozen=True)
class Document:
    """One document of a task, and the requests that lm-eval makes of it once the model's tokenizer is known."""

    index: int
    doc: dict[str, Any]
    task: Any
    instances: tuple[Instance, ...] = ()


def read(config: RunConfig) -> list[Document]:
    """The documents of the task, in the data's order.

    Raises:
        UserError: the data is missing, malformed or unreachable.
    """
    task = _build(config.task)
    stop = None if config.limit is None else config.offset + config.limit
    documents = list(task.doc_iterator(rank=0, limit=stop, world_size=1))
    if config.offset >= len(documents):
        raise UserError(f"offset={config.offset}: expected less than {len(documents)}, the documents there are")
    return [Document(index, doc, task) for index, doc in documents[config.offset :]]


def asked(lm: GriffinLM, documents: Sequence[Document], settings: HarnessTask) -> list[Document]:
    """The documents with their requests, as lm-eval makes them.

    Args:
        lm: whose tokenizer has the chat template.
        documents: as `read`.
        settings: how many shots there are, and whether the text is a conversation.
    """
    made = []
    task = documents[0].task
    task.set_fewshot_seed(SHOTS_SEED)
    for _ in range(documents[0].index if settings.shots else 0):  # those before the first draw their shots too
        task.sampler.sample(settings.shots)
    for document in documents:
        context = task.fewshot_context(
            document.doc,
            num_fewshot=settings.shots,
            apply_chat_template=settings.chat_template,
            fewshot_as_multiturn=settings.chat_template,
            chat_template=lm.apply_chat_template if settings.chat_template else None,
            gen_prefix=task.doc_to_prefix(document.doc),
        )
        instances = task.construct_requests(
            doc=document.doc,
            ctx=context,
            metadata=(settings.name, document.index, 1),
            apply_chat_template=settings.chat_template,
            chat_template=lm.apply_chat_template if settings.chat_template else None,
        )
        made.append(replace(document, instances=tuple(instances) if isinstance(instances, list) else (instances,)))
    return made


def results(document: Document, answers: Sequence[Any], chosen: str | None) -> dict[str, float]:
    """What the task makes of a document's answers: its metrics, through each of its filters.

    Args:
        document: as `asked`.
        answers: one for each request.
        chosen: the filter whose metrics go by their own names, those of others by `<metric>_<filter>`; None: the first.
    """
    task, found = document.task, {}
    instances = [
        replace(one, resps=[answer], filtered_resps={}) for one, answer in zip(document.instances, answers, strict=True)
    ]
    first = chosen or task._filters[0].name
    for ensemble in sorted(task._filters, key=lambda one: one.name != first):
        ensemble.apply(instances)
        plain = ensemble.name == first
        suffix = "" if plain else "_" + ensemble.name.replace("-", "_")
        values = task.process_results(document.doc, [one.filtered_resps[ensemble.name] for one in instances])
        found |= {name + suffix: float(one) for name, one in values.items() if isinstance(one, (bool, int, float))}
    return found


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
        realisable = tuple(name for name, one in griffin.STATISTICS.items() if not one.oracle)
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
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> GriffinLM:
        """As lm-eval's; a mistake is told before a model is loaded, and the settings are printed."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> GriffinLM:
        """As `create_from_arg_string`, of parsed arguments."""
        own = inspect.signature(cls.__init__).parameters
        known = own.keys() | inspect.signature(HFLM.__init__).parameters.keys()
        for key in arg_dict.keys() - known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"--model_args {key}={arg_dict[key]}: no such argument{hint}")
        if not arg_dict.get("pretrained"):
            raise UserError("--model_args: expected pretrained=NAME, a model of the hub or a folder")
        settings = {
            name: arg_dict.get(name, parameter.default)
            for name, parameter in own.items()
            if parameter.kind is parameter.KEYWORD_ONLY
        }
        print("griffin: " + ", ".join(f"{name}={value}" for name, value in settings.items()), file=sys.stderr)
        return cls(**arg_dict, **{key: value for key, value in (additional_config or {}).items() if value is not None})

    @classmethod
    def around(cls, loaded: LoadedModel, config: RunConfig) -> GriffinLM:
        """The model of our own pipeline as lm-eval sees it, for its tokens and texts."""
        return cls(
            sparsity=0.0,
            seed=config.seed,
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            batch_size=config.batch_size,
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
        engine = griffin.Engine(self.model)
        scores = score(loaded, tokens, [self.method], engine, self.protocol, batch_size, self.seed)[self.method]
        return [(one.loglikelihood, one.greedy) for one in scores]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """As HFLM, with each row's own experts."""
        method = self.method
        if method.dense:
            return super()._model_generate(context, max_length, stop, **options)
        with griffin.prune(self.model, method, mode="masked" if len(context) > 1 else "compact", seed=self.seed):
            return super()._model_generate(context, max_length, stop, **options)


@dataclass(frozen=True)
class TextRequest:
    """A text that lm-eval asks for.

    Attributes:
        ids: the prompt's tokens, as HFLM would make them.
        limit: the most new tokens.
        stop: what ends the text; it is cut there.
        temperature: of sampling; 0: greedy.
    """

    ids: list[int]
    limit: int
    stop: list[str]
    temperature: float


def text_request(lm: GriffinLM, instance: Instance, limit: int | None = None) -> TextRequest:
    """What a `generate_until` request asks for.

    Args:
        lm: whose tokens count.
        instance: the request.
        limit: the most new tokens; None: as many as the task says.

    Raises:
        UserError: the task's generation arguments ask for more than greedy decoding or a temperature.
    """
    context, arguments = instance.args
    options = normalize_gen_kwargs(arguments, lm.max_gen_toks)
    limit = limit or options.pop("max_gen_toks")
    options.pop("max_gen_toks", None)
    stop = handle_stop_sequences(
        options.pop("until", None), eos=lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
    )
    temperature = float(options.pop("temperature", 0.0) or 0.0)
    if options.pop("do_sample", temperature > 0) is False:
        temperature = 0.0
    if options:
        raise UserError(
            f"generation_kwargs of the task: {', '.join(sorted(options))}: expected greedy or a temperature"
        )
    ids, _ = lm.tok_batch_encode([context], left_truncate_len=lm.max_length - limit, truncation=lm.truncation)
    return TextRequest(ids[0].tolist(), limit, stop, temperature)


def finished_text(lm: GriffinLM, tokens: list[int], stop: list[str]) -> str:
    """The text of a generation, cut as HFLM does it."""
    text: str = postprocess_generated_text(generation=lm.tok_decode(tokens), stop=stop, think_end_token=None)
    return text


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
        if task.shots and task.shots_file:
            overrides["dataset_kwargs"]["data_files"]["shots"] = str(Path(task.shots_file).resolve())
            overrides["fewshot_split"] = "shots"
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
            shots = len(built.sampler.fewshot_docs()) if task.shots else 0
        except Exception as error:  # data sets, templates and the hub fail in too many ways to name
            source = f"task.data_files={task.data_files}" if task.data_files else f"task={task.name}"
            reason = str(error).splitlines()[0] if str(error) else ""
            raise UserError(
                f"{source}: not usable as {task.name} data ({type(error).__name__}: {reason}); "
                "expected the hub data set's layout, in JSON Lines, or a connection to the hub"
            ) from error
    if shots < task.shots:
        raise UserError(f"task.shots={task.shots}: expected at most {shots}, the solved examples there are")
    return built


def _definition(task: HarnessTask) -> Path:
    own = OWN_TASKS / task.definition
    return own if own.is_file() else LM_EVAL_TASKS / task.definition


def arguments_help() -> str:
    """The arguments of the model `griffin` with their meanings and defaults, beside HFLM's own."""
    described = (GriffinLM.__doc__ or "").partition("Args:")[2].partition("Raises:")[0]
    texts = {
        name.strip(): text.strip().replace("`", "")
        for line in described.splitlines()
        for name, colon, text in [line.partition(":")]
        if colon
    }
    lines = ["--model griffin takes HFLM's --model_args, and these (defaults in brackets):"]
    for name, parameter in inspect.signature(GriffinLM.__init__).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            lines.append(f"  {name:14} {texts[name].rstrip('.')} ({parameter.default})")
    return "\n".join([*lines, ""])


def command_line() -> None:
    """lm-eval's own command line, `lm_eval`, which now knows the model `griffin`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
