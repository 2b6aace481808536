"""Exactness: whether a greedy text is the dense model's, and where not, how close the dense model's choice was.

In float32 verified texts are the dense model's. In half precision logits have few values, the best two are often equal,
and products over several tokens round otherwise than those over one. The dense text is written one token at a time.

Dimensions: B = rows, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

import griffin
from griffin import DENSE, Generation, Row
from pipelines.records import Sample
from pipelines.tasks.answers import answer_metrics, begin_alike, decoding_part, means, sample_counts
from pipelines.tasks.generation import end_tokens
from pipelines.tasks.prompts import Batches, Evaluation, Prompt, fitting
from pipelines.tasks.prompts import read as read

# What a text is, or how far apart the best two logits were where it first differs, in steps of their number format.
OUTCOMES = ("equal_texts", "differ_at_tie", "differ_at_one_step", "differ_further")


def evaluate(run: Evaluation, prompts: Sequence[Prompt]) -> Batches:
    """Write each prompt's text densely, then under every method, and compare them up to their first difference."""
    encoded, skipped = fitting(run, prompts)
    yield from skipped
    ends, length = end_tokens(run.loaded), run.config.task.max_new_tokens
    steps: list[int] = []

    def ended(row: Row) -> bool:
        return row.tokens[-1] in ends

    def watch(rows: Sequence[Row], drafted: Sequence[Tensor | None], logits_BV: Tensor) -> Tensor:
        steps.append(steps_apart(logits_BV[0].to(run.loaded.model.dtype)))
        return logits_BV

    for (prompt,), methods in run.groups([*encoded], size=1):
        steps.clear()
        state, longest = run.prefill(encoded[prompt]), len(encoded[prompt])
        (dense,) = _written(run, prompt, state, DENSE, Generation(length, ended, watch), longest)
        for method in [method for method in methods if run.lacks(method, prompt)]:
            began = time.perf_counter()
            (row,) = _written(run, prompt, state, method, Generation(length, ended), longest)
            same = begin_alike(row.tokens, dense.tokens)
            apart = None if row.tokens == dense.tokens else steps[same]
            sample = prompt.sample_part(encoded[prompt]) | {"seconds": round(time.perf_counter() - began, 4)}
            text = run.loaded.tokenizer.decode(row.tokens, skip_special_tokens=True)
            sample |= {"text": text, "compared_tokens": same, "steps_apart": apart, "ties": steps.count(0)}
            yield method, [sample | decoding_part(row, run)]


def _written(
    run: Evaluation,
    prompt: Prompt,
    state: griffin.PromptState,
    method: griffin.Method,
    generation: Generation,
    longest: int,
) -> list[Row]:
    rows = griffin.begin(run.engine, [state], method, run.config.seed, [prompt])
    return [*griffin.decode(run.engine, iter(rows), generation, max_prompt_tokens=longest)]


def steps_apart(logits_V: Tensor) -> int:
    """How many steps of their number format lie between the best two logits; 0: they are equal."""
    best, second = logits_V.topk(2).values
    below = torch.nextafter(best, torch.full_like(best, -torch.inf))
    return round(float(best - second) / float(best - below))


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """The shares of texts with each outcome, and tokens: compared up to where texts differ, and ties of dense texts."""
    found = [sample for sample in samples if "skipped" not in sample]
    outcomes = [_outcome(sample["steps_apart"]) for sample in found]
    shares = [{name: float(name == outcome) for name in OUTCOMES} for outcome in outcomes]
    counts = {name: sum(one[name] for one in found) for name in ("generated_tokens", "compared_tokens", "ties")}
    return means(shares, OUTCOMES) | sample_counts(samples) | counts | answer_metrics(found)


def _outcome(apart: int | None) -> str:
    return OUTCOMES[0] if apart is None else OUTCOMES[1:][min(apart, 2)]
