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
from pipelines.tasks.harness_tasks.question_answering import provide_to_lm_eval

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
    """The documents of the task, in the data's order."""
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
    """The documents with their requests, as lm-eval makes them of so many shots and, maybe, a conversation."""
    made, chat = [], settings.chat_template
    task, template = documents[0].task, lm.apply_chat_template if chat else None
    task.set_fewshot_seed(SHOTS_SEED)
    for _ in range(documents[0].index if settings.shots else 0):  # those before the first draw their shots too
        task.sampler.sample(settings.shots)
    for document in documents:
        context = task.fewshot_context(
            document.doc,
            num_fewshot=settings.shots,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            chat_template=template,
            gen_prefix=task.doc_to_prefix(document.doc),
        )
        metadata = (settings.name, document.index, 1)
        requests = task.construct_requests(
            doc=document.doc, ctx=context, metadata=metadata, apply_chat_template=chat, chat_template=template
        )
        made.append(replace(document, instances=tuple(requests) if isinstance(requests, list) else (requests,)))
    return made


def results(document: Document, answers: Sequence[Any], chosen: str | None) -> dict[str, float]:
    """What the task makes of a document's answers, one for each request: its metrics, through each of its filters.

    The metrics of the chosen filter, else of the first, go by their own names, others by `<metric>_<filter>`.
    """
    task = document.task
    found: dict[str, float] = {}
    pairs = zip(document.instances, answers, strict=True)
    instances = [replace(instance, resps=[answer], filtered_resps={}) for instance, answer in pairs]
    first = chosen or task._filters[0].name
    for ensemble in sorted(task._filters, key=lambda ensemble: ensemble.name != first):
        ensemble.apply(instances)
        suffix = "" if ensemble.name == first else "_" + ensemble.name.replace("-", "_")
        values = task.process_results(document.doc, [instance.filtered_resps[ensemble.name] for instance in instances])
        found |= {name + suffix: float(one) for name, one in values.items() if isinstance(one, (bool, int, float))}
    return found


def versions(documents: Sequence[Document]) -> dict[str, Any]:
    """What lm-eval ran: its version and the task's."""
    task = documents[0].task
    files = next((split.cache_files for split in task.dataset.values() if split.cache_files), [{"filename": ""}])
    commit = commit_of(files[0]["filename"])
    return {"lm-eval": version("lm-eval"), "task_version": task.VERSION} | ({"data_revision": commit} if commit else {})


@dataclass(frozen=True, eq=False)
class TextRequest:
    """A text that lm-eval asks for.

    Attributes:
        index: of its document.
        ids: the prompt's tokens, as HFLM would make them.
        limit: the most new tokens.
        stop: what ends the text; it is cut there.
        temperature: of sampling; 0: greedy.
    """

    index: int
    ids: list[int]
    limit: int
    stop: list[str]
    temperature: float

    @classmethod
    def of(cls, lm: HFLM, document: Document, limit: int | None) -> TextRequest:
        """What the one `generate_until` request of a document asks for; at most so many tokens, else as the task says.

        Raises:
            UserError: the task's generation arguments ask for more than greedy decoding or a temperature.
        """
        (instance,) = document.instances
        context, arguments = instance.args
        options = normalize_gen_kwargs(arguments, lm.max_gen_toks)
        most: int = options.pop("max_gen_toks")
        limit = limit or most
        end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(options.pop("until", None), eos=end)
        temperature = float(options.pop("temperature", 0.0) or 0.0)
        if options.pop("do_sample", temperature > 0) is False:
            temperature = 0.0
        if options:
            names = ", ".join(sorted(options))
            raise UserError(f"generation_kwargs of the task: {names}: expected greedy or a temperature")
        ids, _ = lm.tok_batch_encode([context], left_truncate_len=lm.max_length - limit, truncation=lm.truncation)
        return cls(document.index, ids[0].tolist(), limit, stop, temperature)

    def text(self, lm: HFLM, tokens: list[int]) -> str:
        """The text of these tokens, cut as HFLM does it."""
        text = lm.tok_decode(tokens)
        return str(postprocess_generated_text(generation=text, stop=self.stop, think_end_token=None))


def _build(task: HarnessTask) -> Any:
    """The lm-eval task, on local data where there is any."""
    own = OWN_TASKS / task.definition
    path = own if own.is_file() else LM_EVAL_TASKS / task.definition
    overrides: dict[str, Any] = {"include": str(path), "task": task.name}
    if data := task.data_files or (task.embedded and EMBEDDED / task.embedded):
        files = {"validation": str(Path(data).resolve())}
        if task.shots and task.shots_file:
            files["shots"] = str(Path(task.shots_file).resolve())
        overrides |= dict.fromkeys(("training_split", "test_split", "dataset_name"))
        overrides |= {"validation_split": "validation", "fewshot_split": "shots" if "shots" in files else None}
        overrides |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    else:
        prepare_hub()
    provide_to_lm_eval()
    with tempfile.TemporaryDirectory() as folder:
        definition = Path(folder) / f"{task.name}.yaml"
        definition.write_text(yaml.safe_dump(overrides))
        try:
            manager = lm_eval.tasks.TaskManager(include_defaults=False)
            built: Any = manager.load([str(definition)])["tasks"][task.name]
            first = next(iter(built.doc_iterator(rank=0, limit=1, world_size=1)))[1]
            context = built.fewshot_context(first, num_fewshot=0)
            built.construct_requests(doc=first, ctx=context, metadata=(task.name, 0, 1))
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
