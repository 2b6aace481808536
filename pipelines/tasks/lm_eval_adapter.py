"""lm-eval's tasks in our pipeline: their documents, requests, metrics, and texts as its HFLM takes them.

`harness_model` has the other direction, our model in lm-eval. Nothing else imports lm-eval.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval.tasks
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from pipelines.config import RunConfig
from pipelines.data import EMBEDDED
from pipelines.errors import UserError
from pipelines.hub import commit_of, prepare_hub
from pipelines.models import LoadedModel
from pipelines.task_config import HarnessTask
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


def around(loaded: LoadedModel, config: RunConfig) -> HFLM:
    """The model of our pipeline as lm-eval sees it, for its tokens and texts."""
    return HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        batch_size=config.batch_size,
        max_length=loaded.context_length,
        add_bos_token=loaded.add_bos_token,
    )


def asked(lm: HFLM, documents: Sequence[Document], settings: HarnessTask) -> list[Document]:
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
    task = document.task
    found: dict[str, float] = {}
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
    task = documents[0].task
    files = next((split.cache_files for split in task.dataset.values() if split.cache_files), [{"filename": ""}])
    commit = commit_of(files[0]["filename"])
    return {"lm-eval": version("lm-eval"), "task_version": task.VERSION} | ({"data_revision": commit} if commit else {})


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


def text_request(lm: HFLM, instance: Instance, limit: int | None = None) -> TextRequest:
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


def finished_text(lm: HFLM, tokens: list[int], stop: list[str]) -> str:
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
