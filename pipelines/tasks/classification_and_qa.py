"""Classification and question answering: the requests that lm-eval's tasks make, answered under every method."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import griffin
from griffin import Method, Row
from pipelines.config import RunConfig
from pipelines.methods import engine_for
from pipelines.models import LoadedModel
from pipelines.records import Sample, mean_and_stderr
from pipelines.task_config import HarnessTask
from pipelines.tasks.answers import DecodingCost, answer_metrics
from pipelines.tasks.generation import end_tokens, sampled
from pipelines.tasks.grouping import BATCHES, begun, groups
from pipelines.tasks.lm_eval_adapter import (
    HFLM,
    Document,
    TextRequest,
    around,
    asked,
    finished_text,
    read,
    results,
    text_request,
    versions,
)
from pipelines.tasks.scoring import Request, score

__all__ = ["evaluate", "metrics", "read", "versions"]

# Log-likelihoods of so many documents are batched together.
_BLOCK_DOCUMENTS = 64


@dataclass(frozen=True, eq=False)
class _Answer:
    """What lm-eval takes for one request, the seconds it took, and the row that a text was generated as."""

    value: Any
    seconds: float
    row: Row | None = None


# Of those that come together: the method, the request's identity, and its answer.
_Answers = Generator[list[tuple[Method, int, _Answer]], None, None]


def evaluate(
    loaded: LoadedModel,
    documents: Sequence[Document],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Answer the requests of every document under every method: each prompt runs once for all, and a document's sample
    is there when its last request is answered."""
    if config.task.chat_template:
        loaded.need_chat_template()
    lm = around(loaded, config)
    documents = asked(lm, documents, config.task)
    engine = engine_for(loaded.model, methods, config)
    cost = DecodingCost(engine, methods)
    generates = config.kind.generates
    if generates and config.batch_size > 1:  # of like length, the longest first, as in HFLM
        lengths = {one.index: len(lm.tok_encode(one.instances[0].args[0])) for one in documents}
        documents = sorted(documents, key=lambda document: -lengths[document.index])
    size = None if generates else _BLOCK_DOCUMENTS
    for block, run in groups(documents, methods, config, done, BATCHES, size):
        document_of = {id(instance): document for document in block for instance in document.instances}
        answered: dict[tuple[Method, int], dict[int, _Answer]] = {}
        with closing(_answers(lm, loaded, engine, block, config, run)) as answers:
            for together in answers:
                samples: dict[Method, list[Sample]] = {}
                for method, instance, answer in together:
                    document = document_of[instance]
                    given = answered.setdefault((method, document.index), {})
                    given[instance] = answer
                    if len(given) < len(document.instances):
                        continue
                    del answered[method, document.index]
                    if document.index not in done[method]:
                        ordered = [given[id(one)] for one in document.instances]
                        part = cost.sample_part(method, [one.row for one in ordered if one.row])
                        samples.setdefault(method, []).append(_sample(document, ordered, config.task) | part)
                yield from samples.items()


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """The task's own metrics as fractions, with standard errors, and what answers took, over all samples."""
    names = list(samples[0]["metrics"]) if samples else []
    values: dict[str, float] = {}
    for name in names:
        values[name], values[f"{name}_stderr"] = mean_and_stderr([sample["metrics"][name] for sample in samples])
    tokens = [sample["generated_tokens"] for sample in samples if "generated_tokens" in sample]
    counts = {"samples": len(samples)} | ({"generated_tokens": sum(tokens)} if tokens else {})
    return values | counts | answer_metrics(samples)


def _answers(
    lm: HFLM,
    loaded: LoadedModel,
    engine: griffin.Engine,
    block: Sequence[Document],
    config: RunConfig,
    methods: Sequence[Method],
) -> _Answers:
    """The answers to all requests of a block, as they come."""
    instances = [instance for document in block for instance in document.instances]
    wanted = [instance for instance in instances if instance.request_type == "loglikelihood"]
    tokens = [Request(*map(tuple, _encode(lm, *instance.args))) for instance in wanted]
    scores = score(loaded, tokens, methods, engine, config.task.protocol, config.batch_size, config.seed)
    for batch in scores:
        yield [
            (method, id(wanted[number]), _Answer((one.loglikelihood, one.greedy), one.seconds))
            for method, number, one in batch
        ]
    yield from _texts(lm, loaded, engine, instances, config, methods)


def _encode(lm: HFLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if context == "":
        return [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
    return lm._encode_pair(context, continuation)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """A text that is wanted: its number among all, the request's identity, and what it is."""

    index: int
    instance: int
    request: TextRequest


def _texts(
    lm: HFLM,
    loaded: LoadedModel,
    engine: griffin.Engine,
    instances: Sequence[Any],
    config: RunConfig,
    methods: Sequence[Method],
) -> _Answers:
    """The text of each generation request, as rows end."""
    wanted = [
        _Wanted(instance.doc_id, id(instance), text_request(lm, instance, config.task.max_new_tokens))
        for instance in instances
        if instance.request_type == "generate_until"
    ]
    if not wanted:
        return
    record, likely = griffin.wanted(methods), any(method.prunes_vocabulary for method in methods)
    prefill_seconds: dict[int, float] = {}

    def prefilled(text: _Wanted) -> griffin.PromptState:
        began = time.perf_counter()
        (state,) = griffin.prefill(engine, [text.request.ids], record, likely_tokens=likely)
        prefill_seconds[text.instance] = time.perf_counter() - began
        return state

    longest = max(len(text.request.ids) for text in wanted)
    generation = _generation(lm, loaded, wanted, config)
    for rows, size in begun(engine, wanted, methods, config, prefilled):
        for row in griffin.decode(engine, rows, generation, batch_size=size, max_prompt_tokens=longest):
            text = finished_text(lm, row.tokens, row.label.request.stop)
            seconds = row.seconds + prefill_seconds[row.label.instance] / len(methods)
            yield [(row.method, row.label.instance, _Answer(text, seconds, row))]


def _generation(lm: HFLM, loaded: LoadedModel, wanted: Sequence[_Wanted], config: RunConfig) -> griffin.Generation:
    ends, temperature = end_tokens(loaded), wanted[0].request.temperature  # a task has one

    def ended(row: Row) -> bool:
        request = row.label.request
        if row.tokens[-1] in ends or len(row.tokens) == request.limit:
            return True
        text = lm.tok_decode(row.tokens)  # what follows a stop text would be cut anyway
        return any(stop in text for stop in request.stop if stop)

    limit = max(one.request.limit for one in wanted)
    if temperature:
        return sampled(config.seed, limit, ended, temperature)
    return griffin.Generation(limit, ended)


def _sample(document: Document, answers: Sequence[_Answer], task: HarnessTask) -> Sample:
    values = [answer.value for answer in answers]
    return {
        "index": document.index,
        "id": str(document.doc.get("id", document.doc.get("idx", document.index))),
        "seconds": round(sum(answer.seconds for answer in answers), 4),
        "answers": values,
        "target": document.task.doc_to_target(document.doc),
        "metrics": results(document, values, task.filter),
    }
