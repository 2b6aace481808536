"""Fidelity: how far a method's next-token distributions are from the dense model's, on the dense model's own text.

The dense model continues a prompt greedily. Each method then reads the same continuation from the dense prompt's KV
cache with its own experts, and every next-token distribution is compared. Far more sensitive than ROUGE: thousands
of distributions where a task has dozens of answers, and no sampling noise.

Dimensions: C = continuation tokens, V = vocabulary.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import griffin
from griffin import DENSE, Method
from pipelines.config import RunConfig
from pipelines.methods import engine_for
from pipelines.models import LoadedModel
from pipelines.records import Sample, mean_and_stderr
from pipelines.tasks.answers import DecodingCost, effective_density
from pipelines.tasks.drafting import predicted
from pipelines.tasks.generation import end_tokens
from pipelines.tasks.grouping import begun, groups
from pipelines.tasks.prompts import Prompt, read_prompts


def read(config: RunConfig) -> list[Prompt]:
    """The prompts of a generation task.

    Raises:
        UserError: the data is missing, malformed or unreachable.
    """
    return read_prompts(config.task, config.limit, config.offset)


def evaluate(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Compare every method with dense: one dense pass a prompt, then one short pass a method, as rows of batches."""
    steps = config.task.max_new_tokens
    room = loaded.context_length - steps
    engine = engine_for(loaded.model, methods, config)
    cost = DecodingCost(engine, methods)
    encoded = {prompt.index: loaded.encode(prompt.text, config.task.chat_template, prompt.said) for prompt in prompts}
    fitting = [prompt for prompt in prompts if len(encoded[prompt.index]) <= room]
    for prompt in prompts:
        ids = encoded[prompt.index]
        if len(ids) <= room:
            continue
        skipped = _sample(prompt, len(ids)) | {"skipped": f"longer than {room} tokens"}
        for method in methods:
            if prompt.index not in done[method]:
                yield method, [skipped]
    for group, run in groups(fitting, methods, config, done):
        began = time.perf_counter()
        dense = _dense(loaded, engine, group, encoded, config, methods)
        dense_seconds = (time.perf_counter() - began) / len(group) / len(run)

        pruning = [method for method in run if not method.dense]
        scored: Iterator[tuple[Method, _Dense, Tensor, float, Sample]] = itertools.chain(
            ((method, one, one.logprobs_CV, 0.0, {}) for one in dense for method in run if method.dense),
            (
                (
                    *(row.method, row.label, logits_CV.float().log_softmax(dim=-1), row.seconds),
                    cost.sample_part(row.method, [row]),
                )
                for rows, size in begun(engine, dense, pruning, config, lambda one: one.state)
                for row, logits_CV in griffin.score(engine, ((row, row.label.tokens) for row in rows), size)
            ),
        )
        for method, one, logprobs_CV, seconds, part in scored:
            if one.prompt.index not in done[method]:
                kl_C, agreement_C = compare(one.logprobs_CV, logprobs_CV)
                as_draft: Sample = {}
                if not method.dense:
                    as_draft = {
                        "acceptance": acceptance(one.logprobs_CV, logprobs_CV),
                        "agreement_by_token": agreement_C.int().tolist(),
                        "draft_cost": cost.traffic[method].pruned / cost.traffic[method].dense,
                    }
                sample = (
                    _sample(one.prompt, one.state.length)
                    | part
                    | {
                        "generated_tokens": len(one.tokens),
                        "kl": float(kl_C.mean()),
                        "top1_agreement": float(agreement_C.mean()),
                        "seconds": round(dense_seconds + seconds, 4),
                        "kl_by_token": [round(float(kl), 6) for kl in kl_C],
                        **as_draft,
                    }
                )
                yield method, [sample]


@dataclass(frozen=True, eq=False)
class _Dense:
    """A prompt as the dense model continues it, and the log-probabilities [C, V] after each token that it wrote."""

    prompt: Prompt
    state: griffin.PromptState
    tokens: list[int]
    logprobs_CV: Tensor


def _sample(prompt: Prompt, prompt_tokens: int) -> Sample:
    return {"index": prompt.index, "id": prompt.id, "prompt_tokens": prompt_tokens}


def _dense(
    loaded: LoadedModel,
    engine: griffin.Engine,
    group: Sequence[Prompt],
    encoded: dict[int, list[int]],
    config: RunConfig,
    methods: Sequence[Method],
) -> list[_Dense]:
    """The dense model's greedy continuations: up to `max_new_tokens` tokens, ending with an end token if it comes.

    Statistics that are oracles record the activations of these tokens.
    """
    ends = end_tokens(loaded)
    scorers = [method.scorer for method in methods if method.oracle and not method.dense]
    oracles = [scorer.activations for scorer in scorers if isinstance(scorer, griffin.Statistic) and scorer.activations]
    states = [griffin.prefill(engine, [encoded[prompt.index]], griffin.wanted(methods))[0] for prompt in group]
    rows = [row for number, state in enumerate(states) for row in griffin.begin(engine, [state], DENSE, 0, [number])]
    generation = griffin.Generation(config.task.max_new_tokens, lambda row: row.tokens[-1] in ends)
    texts = {row.label: row.tokens for row in griffin.decode(engine, rows, generation, batch_size=config.batch_size)}
    found = []
    for number, prompt in enumerate(group):
        state, tokens = states[number], texts[number]
        cache = engine.decoding_cache(1, state.length + len(tokens))
        assert state.cache is not None
        cache.put(0, state.cache, state.length)
        cache.set_window(1, 0, state.length)
        recorder = griffin.Recorder(engine.dense.blocks, oracles, [griffin.Recorded()])
        recorder.expect([slice(None)], [len(tokens)])
        (logits_CV,), _ = engine.dense.recording(torch.tensor([tokens], device=engine.device), cache, recorder)
        logprobs_CV = logits_CV.float().log_softmax(dim=-1)
        found.append(_Dense(prompt, replace(state, continuation=recorder.recorded_B[0]), tokens, logprobs_CV))
    return found


def compare(dense_CV: Tensor, pruned_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Per position [C], KL(dense || pruned) in nats, and 1 where the most likely token is the same, else 0.

    Args:
        dense_CV: log-probabilities of the dense model.
        pruned_CV: log-probabilities of the pruned model.
    """
    kl_C = (dense_CV.exp() * (dense_CV - pruned_CV)).sum(dim=-1)
    agreement_C = dense_CV.argmax(dim=-1) == pruned_CV.argmax(dim=-1)
    return kl_C, agreement_C.float()


def acceptance(dense_CV: Tensor, pruned_CV: Tensor) -> float:
    """The probability that speculative sampling keeps a token drawn from the pruned model: the mean over positions of
    the mass that both distributions have.

    Args:
        dense_CV: log-probabilities of the dense model.
        pruned_CV: log-probabilities of the pruned model.
    """
    return float(torch.minimum(dense_CV, pruned_CV).exp().sum(dim=-1).mean())


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """`kl`, `top1_agreement` and `acceptance` with standard errors over prompts, counts, and what exact verification
    is predicted to bring, greedily."""
    compared = [sample for sample in samples if "skipped" not in sample]
    values: dict[str, float] = {}
    for name in ("kl", "top1_agreement", "acceptance"):
        if compared and name in compared[0]:
            values[name], values[f"{name}_stderr"] = mean_and_stderr([sample[name] for sample in compared])
    if compared and "draft_cost" in compared[0]:
        values |= effective_density(compared)
        values |= predicted([sample["agreement_by_token"] for sample in compared], compared[0]["draft_cost"])
    return values | {"samples": len(compared), "skipped_prompts": len(samples) - len(compared)}
