"""Fidelity: how far a method's next-token distributions are from the dense model's, on the dense model's own text.

The dense model continues a prompt greedily. Each method then reads the same continuation from the dense prompt's KV
cache with its own experts, and every next-token distribution is compared. Far more sensitive than ROUGE: thousands
of distributions where a task has dozens of answers, and no sampling noise.

Dimensions: C = continuation tokens, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import griffin
from griffin import DENSE
from pipelines.records import Sample
from pipelines.tasks.answers import decoding_part, effective_density, means, predicted, sample_counts
from pipelines.tasks.generation import end_tokens
from pipelines.tasks.prompts import Batches, Evaluation, Prompt, fitting
from pipelines.tasks.prompts import read as read


def evaluate(run: Evaluation, prompts: Sequence[Prompt]) -> Batches:
    """Compare every method with dense: one dense pass a prompt, then one short pass a method, as rows of batches."""
    encoded, skipped = fitting(run, prompts)
    yield from skipped
    for group, beside in run.groups([*encoded]):
        began = time.perf_counter()
        texts = continued(run, {prompt: encoded[prompt] for prompt in group})
        dense_seconds = (time.perf_counter() - began) / len(group) / len(beside)
        for method in beside:
            for text in texts if method.dense else ():
                if run.lacks(method, text.prompt):
                    yield method, [_sample(text, text.logprobs_CV, dense_seconds)]
        pruning = [method for method in beside if not method.dense]
        for rows, size in run.begun(texts, pruning, lambda text: text.state):
            for row, logits_CV in griffin.score(run.engine, ((row, row.label.tokens) for row in rows), size):
                if run.lacks(row.method, row.label.prompt):
                    traffic, logprobs_CV = run.traffic[row.method], logits_CV.float().log_softmax(dim=-1)
                    cost = traffic.pruned / traffic.dense
                    sample = _sample(row.label, logprobs_CV, dense_seconds + row.seconds, cost)
                    yield row.method, [sample | decoding_part(row, run)]


@dataclass(frozen=True, eq=False)
class Text:
    """A prompt as the dense model continues it, and the log-probabilities [C, V] after each token that it wrote."""

    prompt: Prompt
    state: griffin.PromptState
    tokens: list[int]
    logprobs_CV: Tensor


def continued(run: Evaluation, encoded: dict[Prompt, list[int]]) -> list[Text]:
    """The dense model's greedy continuations: up to `max_new_tokens` tokens, ending with an end token if it comes.

    Statistics that are oracles record the activations of these tokens.
    """
    engine, ends = run.engine, end_tokens(run.loaded)
    scorers = [method.scorer for method in run.methods if method.oracle and not method.dense]
    oracles = [scorer.activations for scorer in scorers if isinstance(scorer, griffin.Statistic) and scorer.activations]
    states = {prompt: run.prefill(ids) for prompt, ids in encoded.items()}
    rows = [griffin.begin(engine, [state], DENSE, 0, [prompt])[0] for prompt, state in states.items()]
    generation = griffin.Generation(run.config.task.max_new_tokens, lambda row: row.tokens[-1] in ends)
    ended = griffin.decode(engine, rows, generation, batch_size=run.config.batch_size)
    texts = {row.label: row.tokens for row in ended}
    found = []
    for prompt, state in states.items():
        tokens = texts[prompt]
        cache = engine.decoding_cache(1, state.length + len(tokens))
        assert state.cache is not None
        cache.put(0, state.cache, state.length)
        cache.set_window(1, 0, state.length)
        recorder = griffin.Recorder(engine.dense.blocks, oracles, [griffin.Recorded()])
        recorder.expect([slice(None)], [len(tokens)])
        (logits_CV,), _ = engine.dense.recording(torch.tensor([tokens], device=engine.device), cache, recorder)
        logprobs_CV = logits_CV.float().log_softmax(dim=-1)
        found.append(Text(prompt, replace(state, continuation=recorder.recorded_B[0]), tokens, logprobs_CV))
    return found


def _sample(text: Text, logprobs_CV: Tensor, seconds: float, draft_cost: float | None = None) -> Sample:
    """A method's log-probabilities along a text; where it is pruned, by what a draft costs, also as drafts."""
    kl_C, agreement_C = compare(text.logprobs_CV, logprobs_CV)
    sample = text.prompt.sample_part(text.state.ids) | {
        "generated_tokens": len(text.tokens),
        "kl": float(kl_C.mean()),
        "top1_agreement": float(agreement_C.mean()),
        "seconds": round(seconds, 4),
        "kl_by_token": [round(float(kl), 6) for kl in kl_C],
    }
    if draft_cost is None:
        return sample
    return sample | {
        "acceptance": acceptance(text.logprobs_CV, logprobs_CV),
        "agreement_by_token": agreement_C.int().tolist(),
        "draft_cost": draft_cost,
    }


def compare(dense_CV: Tensor, pruned_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Of log-probabilities, per position [C], KL(dense || pruned) in nats, and 1 where the most likely token is the
    same, else 0."""
    kl_C = (dense_CV.exp() * (dense_CV - pruned_CV)).sum(dim=-1)
    agreement_C = dense_CV.argmax(dim=-1) == pruned_CV.argmax(dim=-1)
    return kl_C, agreement_C.float()


def acceptance(dense_CV: Tensor, pruned_CV: Tensor) -> float:
    """The probability that speculative sampling keeps a token drawn from the pruned model: the mean over positions of
    the mass that both distributions have, of which these are the log-probabilities."""
    return float(torch.minimum(dense_CV, pruned_CV).exp().sum(dim=-1).mean())


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """`kl`, `top1_agreement` and `acceptance` with standard errors over prompts, counts, and what exact verification
    is predicted to bring, greedily."""
    compared = [sample for sample in samples if "skipped" not in sample]
    names = [name for name in ("kl", "top1_agreement", "acceptance") if compared and name in compared[0]]
    values = means(compared, names)
    if "acceptance" in values:
        values |= effective_density(compared)
        values |= predicted([sample["agreement_by_token"] for sample in compared], compared[0]["draft_cost"])
    return values | sample_counts(samples)
