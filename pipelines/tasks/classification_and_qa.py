"""Classification and question answering: the requests that lm-eval's tasks make, answered under every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import griffin
from griffin import Method, Row
from pipelines.records import Sample
from pipelines.task_config import HarnessTask
from pipelines.tasks.answers import answer_metrics, decoding_part, means
from pipelines.tasks.generation import end_tokens, picking
from pipelines.tasks.lm_eval_adapter import HFLM, Document, TextRequest, around, asked, results
from pipelines.tasks.lm_eval_adapter import read as read
from pipelines.tasks.lm_eval_adapter import versions as versions
from pipelines.tasks.prompts import BATCHES, Batches, Evaluation
from pipelines.tasks.scoring import Request, Score, score

# Log-likelihoods of so many documents are batched together.
_BLOCK_DOCUMENTS = 64


def evaluate(run: Evaluation, documents: Sequence[Document]) -> Batches:
    """Answer the requests of every document under every method: each prompt runs once for all, and a document's sample
    is there when its last request is answered."""
    if run.config.task.chat_template:
        run.loaded.need_chat_template()
    lm = around(run.loaded, run.config)
    documents = asked(lm, documents, run.config.task)
    return (_texts if run.config.kind.generates else _likelihoods)(run, lm, documents)


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """The task's own metrics as fractions, with standard errors, and what answers took, over all samples."""
    values = means([sample["metrics"] for sample in samples], list(samples[0]["metrics"]) if samples else [])
    tokens = [sample["generated_tokens"] for sample in samples if "generated_tokens" in sample]
    counts = {"samples": len(samples)} | ({"generated_tokens": sum(tokens)} if tokens else {})
    return values | counts | answer_metrics(samples)


def _likelihoods(run: Evaluation, lm: HFLM, documents: Sequence[Document]) -> Batches:
    """The samples of documents whose continuations are scored."""
    config = run.config
    for block, methods in run.groups(documents, size=_BLOCK_DOCUMENTS):
        asking = [(document, instance) for document in block for instance in document.instances]
        requests = [Request(*map(tuple, _encode(lm, *instance.args))) for _, instance in asking]
        answered: dict[tuple[Method, int], dict[int, Score]] = {}
        for batch in score(
            run.engine,
            requests,
            methods,
            protocol=config.task.protocol,
            context_length=run.loaded.context_length,
            batch_size=config.batch_size,
            seed=config.seed,
        ):
            samples: dict[Method, list[Sample]] = {}
            for method, number, answer in batch:
                document, _ = asking[number]
                answers = answered.setdefault((method, document.index), {})
                answers[number] = answer
                if len(answers) == len(document.instances) and run.lacks(method, document):
                    ordered = [answers[place] for place in sorted(answers)]
                    values = [(answer.loglikelihood, answer.greedy) for answer in ordered]
                    seconds = sum(answer.seconds for answer in ordered)
                    samples.setdefault(method, []).append(_sample(document, values, seconds, config.task))
            yield from samples.items()


def _encode(lm: HFLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    if context == "":
        return [lm.prefix_token_id], lm.tok_encode(continuation, add_special_tokens=False)
    return lm._encode_pair(context, continuation)


def _texts(run: Evaluation, lm: HFLM, documents: Sequence[Document]) -> Batches:
    """The samples of documents that ask for a text, as rows end."""
    task = run.config.task
    if run.config.batch_size > 1:  # of like length, the longest first, as in HFLM
        documents = sorted(documents, key=lambda document: -len(lm.tok_encode(document.instances[0].args[0])))
    for block, methods in run.groups(documents, BATCHES):
        requests = {TextRequest.of(lm, document, task.max_new_tokens): document for document in block}
        longest = max(len(request.ids) for request in requests)
        generation = _generation(run, lm, [*requests])
        rows = run.generated([*requests], methods, lambda request: run.prefill(request.ids), generation, longest)
        for row, seconds in rows:
            sample = _sample(requests[row.label], [row.label.text(lm, row.tokens)], seconds, task)
            sample["prompt"] = requests[row.label].instances[0].args[0]
            yield row.method, [sample | decoding_part(row, run)]


def _generation(run: Evaluation, lm: HFLM, requests: Sequence[TextRequest]) -> griffin.Generation:
    ends = end_tokens(run.loaded)

    def ended(row: Row) -> bool:
        if row.tokens[-1] in ends or len(row.tokens) == row.label.limit:
            return True
        text = lm.tok_decode(row.tokens)  # what follows a stop text would be cut anyway
        return any(stop in text for stop in row.label.stop if stop)

    limit = max(request.limit for request in requests)
    return picking(run.config, limit, ended, requests[0].temperature)  # a task has one


def _sample(document: Document, values: list[Any], seconds: float, task: HarnessTask) -> Sample:
    return {
        "index": document.index,
        "id": str(document.doc.get("id", document.doc.get("idx", document.index))),
        "seconds": round(seconds, 4),
        "answers": values,
        "target": document.task.doc_to_target(document.doc),
        "metrics": results(document, values, task.filter),
    }
