"""Log-likelihoods of given continuations under many methods, for the price of one dense pass and short extra ones.

Two protocols say which positions use the experts. With `paper`, everything before the last input token is the prompt
and the last position alone is pruned. With `continuation`, the context is the prompt and every position of the
continuation is pruned; as in generation, the first continuation token is then still predicted by the dense model, so
one-token continuations do not differ from dense at all.

Dimensions: B = rows of a batch, S = positions, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import griffin
from pipelines.methods import Method, continued, shared_prompt
from pipelines.models import LoadedModel

PROTOCOLS = ("paper", "continuation")


@dataclass(frozen=True)
class Request:
    """A continuation to be scored after a context, in tokens. Both hold at least one."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The log-likelihood of a continuation (natural logarithm), and whether greedy decoding would have written it."""

    loglikelihood: float
    greedy: bool


@dataclass(frozen=True)
class _Row:
    """One row of a forward call: context + continuation without the last token, and where its prompt ends."""

    ids: tuple[int, ...]
    prompt_length: int


def score(
    loaded: LoadedModel,
    requests: Sequence[Request],
    methods: Sequence[Method],
    protocol: str,
    batch_size: int,
    seed: int,
) -> dict[Method, list[Score]]:
    """Score every request under every method.

    A request gets the scores it gets alone, up to rounding: rows are batched by length and padded on the right.
    Requests that differ only in their last token share a row. Too long ones lose tokens on the left, as in lm-eval.

    Args:
        loaded: the model.
        requests: what to score.
        methods: how; a dense method is the dense pass itself.
        protocol: one of `PROTOCOLS`.
        batch_size: rows of a forward call.
        seed: of random statistics and selections.

    Returns:
        Per method, the scores in the order of the requests.
    """
    rows = [_row(request, protocol, loaded.context_length) for request in requests]
    scores: dict[Method, list[Score | None]] = {method: [None] * len(requests) for method in methods}
    members: dict[_Row, list[int]] = {}
    for number, row in enumerate(rows):
        members.setdefault(row, []).append(number)
    ordered = sorted(members, key=lambda row: (-len(row.ids), row.ids))
    shared = shared_prompt(loaded.model, methods)
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        tails = [
            max(len(requests[number].continuation) for number in members[row]) for row in batch
        ]  # positions at each row's end whose logits are needed
        for method, logits in _logits(loaded, shared, batch, tails, methods, seed):
            for row, tail_logits in zip(batch, logits, strict=True):
                for number in members[row]:
                    scores[method][number] = _score(tail_logits, requests[number].continuation)
    return {method: [one for one in each if one is not None] for method, each in scores.items()}


def _row(request: Request, protocol: str, context_length: int) -> _Row:
    whole = (request.context + request.continuation)[-(context_length + 1) :]
    ids = whole[:-1]
    before = len(whole) - len(request.continuation)
    return _Row(ids, len(ids) - 1 if protocol == "paper" else max(before, 0))


def _logits(
    loaded: LoadedModel,
    shared: griffin.SharedPrompt,
    batch: Sequence[_Row],
    tails: Sequence[int],
    methods: Sequence[Method],
    seed: int,
) -> Iterator[tuple[Method, list[Tensor]]]:
    """Per method, each row's logits of its last `tail` positions, [tail, V]."""
    device = loaded.model.device
    lengths = [len(row.ids) for row in batch]
    width = max(lengths)
    ids_BS = _padded([row.ids for row in batch], device)
    prompts_B = torch.tensor([row.prompt_length for row in batch], device=device)
    keep = width - min(length - tail for length, tail in zip(lengths, tails, strict=True))
    dense_BKV = shared.run(ids_BS, prompts_B, last=keep)
    dense = [
        dense_BKV[number, keep - width + length - tail : keep - width + length]
        for number, (length, tail) in enumerate(zip(lengths, tails, strict=True))
    ]
    following = [row.ids[row.prompt_length :] for row in batch]
    following_B = torch.tensor([len(ids) for ids in following], device=device)
    following_BC = _padded(following, device)
    for method in methods:
        if method.dense or not following_BC.shape[1]:
            yield method, dense
            continue
        pruned_BCV = continued(shared, method, following_BC, following_B, seed)
        yield (
            method,
            [
                torch.cat([dense[number][: max(tail - len(ids), 0)], pruned_BCV[number, : len(ids)][-tail:]])
                for number, (tail, ids) in enumerate(zip(tails, following, strict=True))
            ],
        )


def _score(tail_logits: Tensor, continuation: tuple[int, ...]) -> Score:
    logprobs = torch.log_softmax(tail_logits[-len(continuation) :], dim=-1)
    tokens = torch.tensor(continuation, device=logprobs.device)
    picked = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    return Score(float(picked.sum()), bool((logprobs.argmax(dim=-1) == tokens).all()))


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[B, S] int64, padded on the right with 0: what stands there is never looked at."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device, dtype=torch.int64)
