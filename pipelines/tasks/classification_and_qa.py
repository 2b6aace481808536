"""Classification and question answering: the requests that lm-eval's tasks make, answered under every method."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
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
from pipelines.tasks.grouping import BATCHES, groups
from pipelines.tasks.lm_eval_adapter import (
    Document,
    GriffinLM,
    TextRequest,
    asked,
    finished_text,
    read,
    results,
    text_request,
    versions,
)
from pipelines.tasks.scoring import Request, score

__all__ = ["evaluate", "metrics", "read", "versions"]

# Log-likelihoods of so many documents are computed together, and samples are written when a block is done.
_BLOCK_DOCUMENTS = 64

# Per method, the answer to each request, by the request's identity.
Answers = dict[Method, dict[int, Any]]


def evaluate(
    loaded: LoadedModel,
    documents: Sequence[Document],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Answer the requests of every document under every method, block by block: each prompt runs once for all."""
    if config.task.chat_template:
        loaded.need_chat_template()
    lm = GriffinLM.around(loaded, config)
    documents = asked(lm, documents, config.task)
    engine = engine_for(loaded.model, methods, config)
    cost = DecodingCost(engine, methods)
    for block in _blocks(lm, documents, methods, config):
        needed = [method for method in methods if any(document.index not in done[method] for document in block)]
        if not needed:
            continue
        run = needed if config.batch_size == 1 else methods
        instances = [instance for document in block for instance in document.instances]
        began = time.perf_counter()
        answers = _loglikelihoods(lm, loaded, engine, instances, config, run)
        texts = _texts(lm, loaded, engine, instances, config, run)
        for method in run:
            answers[method] |= {instance: text.text for instance, text in texts[method].items()}
        seconds = (time.perf_counter() - began) / len(run) / len(block)
        for method in needed:
            samples = [
                _sample(document, [answers[method][id(one)] for one in document.instances], config.task, seconds)
                | cost.sample_part(method, _rows(document, texts[method]))
                for document in block
                if document.index not in done[method]
            ]
            yield method, samples


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """The task's own metrics as fractions, with standard errors, and what answers took, over all samples."""
    names = list(samples[0]["metrics"]) if samples else []
    values: dict[str, float] = {}
    for name in names:
        values[name], values[f"{name}_stderr"] = mean_and_stderr([sample["metrics"][name] for sample in samples])
    tokens = [sample["generated_tokens"] for sample in samples if "generated_tokens" in sample]
    counts = {"samples": len(samples)} | ({"generated_tokens": sum(tokens)} if tokens else {})
    return values | counts | answer_metrics(samples)


def _blocks(
    lm: GriffinLM, documents: Sequence[Document], methods: Sequence[Method], config: RunConfig
) -> Iterator[Sequence[Document]]:
    """The documents that are run, and whose samples are written, together.

    Where text is generated they are of like length, the longest first, as in HFLM.
    """
    if not any(instance.request_type == "generate_until" for document in documents for instance in document.instances):
        for start in range(0, len(documents), _BLOCK_DOCUMENTS):
            yield documents[start : start + _BLOCK_DOCUMENTS]
        return
    if config.batch_size > 1:
        lengths = {one.index: len(lm.tok_encode(one.instances[0].args[0])) for one in documents}
        documents = sorted(documents, key=lambda document: -lengths[document.index])
    shared = config.shared_experts
    yield from groups(documents, methods[:1] if shared else methods, config.batch_size, 1 if shared else BATCHES)


def _loglikelihoods(
    lm: GriffinLM,
    loaded: LoadedModel,
    engine: griffin.Engine,
    instances: Sequence[Any],
    config: RunConfig,
    methods: Sequence[Method],
) -> Answers:
    """The (log-likelihood, greedy) of each log-likelihood request."""
    wanted = [instance for instance in instances if instance.request_type == "loglikelihood"]
    if not wanted:
        return {method: {} for method in methods}
    tokens = [Request(*map(tuple, _encode(lm, *instance.args))) for instance in wanted]
    scores = score(loaded, tokens, methods, engine, config.task.protocol, config.batch_size, config.seed)
    return {
        method: {id(instance): (one.loglikelihood, one.greedy) for instance, one in zip(wanted, each, strict=True)}
        for method, each in scores.items()
    }


def _encode(lm: GriffinLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if context == "":
        return [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
    return lm._encode_pair(context, continuation)


@dataclass(frozen=True, eq=False)
class _Wanted:
    """A text that is wanted: its number among all, the request's identity, and what it is."""

    index: int
    instance: int
    request: TextRequest


@dataclass(frozen=True, eq=False)
class _Text:
    """A text as lm-eval takes it, and the row that it was generated as."""

    text: str
    row: Row


def _rows(document: Document, texts: dict[int, _Text]) -> list[Row]:
    return [texts[id(one)].row for one in document.instances if id(one) in texts]


def _texts(
    lm: GriffinLM,
    loaded: LoadedModel,
    engine: griffin.Engine,
    instances: Sequence[Any],
    config: RunConfig,
    methods: Sequence[Method],
) -> dict[Method, dict[int, _Text]]:
    """Per method, the text of each generation request, by the request's identity."""
    wanted = [
        _Wanted(instance.doc_id, id(instance), text_request(lm, instance, config.task.max_new_tokens))
        for instance in instances
        if instance.request_type == "generate_until"
    ]
    texts: dict[Method, dict[int, _Text]] = {method: {} for method in methods}
    if not wanted:
        return texts
    record, likely = griffin.wanted(methods), any(method.prunes_vocabulary for method in methods)

    def rows() -> Iterator[Row]:
        for one in wanted:
            (state,) = griffin.prefill(engine, [one.request.ids], record, likely_tokens=likely)
            for method in methods:
                yield from griffin.begin(engine, [state], method, config.seed, [one])

    batches: list[tuple[Iterable[Row], int]] = [(rows(), config.batch_size)]
    if config.shared_experts:
        states = [griffin.prefill(engine, [one.request.ids], record)[0] for one in wanted]
        batches = [(griffin.begin(engine, states, method, config.seed, wanted), len(wanted)) for method in methods]
    longest = max(len(one.request.ids) for one in wanted)
    generation = _generation(lm, loaded, wanted, config)
    for batch, size in batches:
        for row in griffin.decode(engine, batch, generation, batch_size=size, max_prompt_tokens=longest):
            text = finished_text(lm, row.tokens, row.label.request.stop)
            texts[row.method][row.label.instance] = _Text(text, row)
    return texts


def _generation(lm: GriffinLM, loaded: LoadedModel, wanted: Sequence[_Wanted], config: RunConfig) -> griffin.Generation:
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


def _sample(document: Document, answers: list[Any], task: HarnessTask, seconds: float) -> Sample:
    return {
        "index": document.index,
        "id": str(document.doc.get("id", document.doc.get("idx", document.index))),
        "seconds": round(seconds, 4),
        "answers": answers,
        "target": document.task.doc_to_target(document.doc),
        "metrics": results(document, answers, task.filter),
    }
