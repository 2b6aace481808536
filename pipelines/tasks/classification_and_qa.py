"""Classification and question answering: the requests that lm-eval's tasks make, answered under every method."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pipelines.config import RunConfig
from pipelines.methods import Method
from pipelines.models import LoadedModel
from pipelines.records import Sample, mean_and_stderr
from pipelines.tasks.lm_eval_adapter import Document, GriffinLM, read, versions
from pipelines.tasks.scoring import Request, score

__all__ = ["evaluate", "metrics", "read", "versions"]

# Log-likelihoods of so many documents are computed together, and samples are written when a block is done.
_BLOCK_DOCUMENTS = 64


def evaluate(
    loaded: LoadedModel,
    documents: Sequence[Document],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Answer the requests of every document under every method, block by block: each prompt runs once for all."""
    lm = GriffinLM.around(loaded, config, methods)
    for block in _blocks(lm, documents, config.batch_size):
        needed = [method for method in methods if any(document.index not in done[method] for document in block)]
        if not needed:
            continue
        instances = [instance for document in block for instance in document.instances]
        began = time.perf_counter()
        likelihoods = _loglikelihoods(lm, loaded, instances, config, needed)
        shared_seconds = time.perf_counter() - began
        for method in needed:
            # One block, one seed: sampled text depends neither on the texts before it nor on a resumption.
            torch.manual_seed(zlib.crc32(f"{config.seed} {block[0].index}".encode()))
            began = time.perf_counter()
            texts, prompt_seconds = _generations(lm, instances, method)
            own_seconds = time.perf_counter() - began - prompt_seconds
            shared_seconds += prompt_seconds  # the first method's: the others find the prompts run
            seconds = (shared_seconds / len(needed) + own_seconds) / len(block)
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


def _blocks(lm: GriffinLM, documents: Sequence[Document], batch_size: int) -> Iterator[Sequence[Document]]:
    """The documents that are run, and whose samples are written, together.

    Where text is generated it is a batch of prompts of like length, the longest first, as in HFLM. Blocks are the same
    whatever is done already, so that a continued run batches like an undisturbed one.
    """
    size = _BLOCK_DOCUMENTS
    if any(instance.request_type == "generate_until" for document in documents for instance in document.instances):
        size = batch_size
        if size > 1:
            lengths = {one.index: len(lm.tok_encode(one.instances[0].args[0])) for one in documents}
            documents = sorted(documents, key=lambda document: -lengths[document.index])
    for start in range(0, len(documents), size):
        yield documents[start : start + size]


def _loglikelihoods(
    lm: GriffinLM, loaded: LoadedModel, instances: Sequence[Any], config: RunConfig, methods: Sequence[Method]
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


def _generations(lm: GriffinLM, instances: Sequence[Any], method: Method) -> tuple[dict[int, str], float]:
    """The text of each generation request, by the instance's identity, and the seconds that went into prompts."""
    wanted = [instance for instance in instances if instance.request_type == "generate_until"]
    lm.method, lm.prompt_seconds = method, 0.0
    texts = lm.generate_until(wanted, disable_tqdm=True)
    return {id(instance): text for instance, text in zip(wanted, texts, strict=True)}, lm.prompt_seconds


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
