"""Log-likelihoods of given continuations under many methods, for the price of one dense pass and short extra ones.

Two protocols say which positions use the experts. With `paper`, everything before the last input token is the prompt
and the last position alone is pruned. With `continuation`, the context is the prompt and every position of the
continuation is pruned; as in generation, the first continuation token is then still predicted by the dense model, so
one-token continuations do not differ from dense at all.

Dimensions: B = rows of a batch, S = positions, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import griffin
from griffin import Method, Row


@dataclass(frozen=True)
class Request:
    """A continuation to be scored after a context, in tokens. Both hold at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation (natural logarithm), whether greedy decoding would have written it, and its
    share of its batch's seconds."""

    loglikelihood: float
    greedy: bool
    seconds: float = field(compare=False)


@dataclass(frozen=True)
class _Row:
    """One row of a forward call: context + continuation without the last token, and where its prompt ends."""

    ids: tuple[int, ...]
    prompt_length: int


def score(
    engine: griffin.Engine,
    requests: Sequence[Request],
    methods: Sequence[Method],
    *,
    protocol: str,
    context_length: int,
    batch_size: int,
    seed: int,
) -> Iterator[list[tuple[Method, int, Score]]]:
    """Score every request under every method, batch by batch.

    A request gets the scores it gets alone, up to rounding: rows are batched by length and padded on the right.
    Requests that differ only in their last token share a row. Too long ones lose tokens on the left, as in lm-eval. A
    dense method is the dense pass itself.

    Yields:
        Of each batch: the method, the request's place among the requests, its score.
    """
    members: dict[_Row, list[int]] = {}
    for number, request in enumerate(requests):
        whole = (request.context + request.continuation)[-(context_length + 1) :]
        before = len(whole) - 2 if protocol == "paper" else max(len(whole) - len(request.continuation), 0)
        members.setdefault(_Row(whole[:-1], before), []).append(number)
    ordered = sorted(members, key=lambda row: (-len(row.ids), row.ids))
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        # How many positions at each row's end logits are needed of.
        tails = {row: max(len(requests[number].continuation) for number in members[row]) for row in batch}
        began = time.perf_counter()
        scores = [
            (method, number, _score(logits_TV, requests[number].continuation))
            for method, row, logits_TV in _logits(engine, tails, methods, batch_size, seed)
            for number in members[row]
        ]
        seconds = (time.perf_counter() - began) / len(scores)
        yield [(method, number, Score(*values, seconds)) for method, number, values in scores]


def _logits(
    engine: griffin.Engine, tails: dict[_Row, int], methods: Sequence[Method], batch_size: int, seed: int
) -> Iterator[tuple[Method, _Row, Tensor]]:
    """Per method and row of a batch, the logits [T, V] of its last positions, as many as its tail has."""
    states = griffin.prefill(
        engine,
        [row.ids for row in tails],
        griffin.wanted(methods),
        prompt_lengths=[row.prompt_length for row in tails],
        keep_logits=max(tails.values()),
    )
    pruning = [method for method in methods if not method.dense]
    following = {row: row.ids[row.prompt_length :] for row in tails}
    for row, state in zip(tails, states, strict=True):
        for method in methods if not following[row] else [method for method in methods if method.dense]:
            yield method, row, state.logits_TV[-tails[row] :]

    def rows() -> Iterator[tuple[Row, tuple[int, ...]]]:
        for row, state in zip(tails, states, strict=True):
            for method in pruning if following[row] else ():
                (pruned,) = griffin.begin(engine, [state], method, seed, [(row, state)])
                yield pruned, following[row]

    for pruned, logits_CV in griffin.score(engine, rows(), batch_size):
        row, state = pruned.label
        # Positions of the prompt are the dense model's.
        dense_TV = state.logits_TV[: len(state.logits_TV) - len(following[row])]
        yield pruned.method, row, torch.cat([dense_TV, logits_CV])[-tails[row] :]


def _score(tail_logits: Tensor, continuation: tuple[int, ...]) -> tuple[float, bool]:
    # In float32, also where the model computes in half precision: sums of log-likelihoods would lose digits.
    logprobs = torch.log_softmax(tail_logits[-len(continuation) :].float(), dim=-1)
    tokens = torch.tensor(continuation, device=logprobs.device)
    picked = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return float(picked.sum()), bool((logprobs.argmax(dim=-1) == tokens).all())
