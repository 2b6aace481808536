"""Texts that go on from prompts that have run, token by token, each until it ends.

Dimensions: B = rows at work, R = prompts, V = vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from griffin.in_pieces import in_pieces
from griffin.shared_prompt import Chosen, SharedPrompt
from griffin.slots import Lockstep, Slots


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and until when.

    Attributes:
        limit: the most new tokens.
        choose: float32 logits [B, V] -> the next token of each row [B].
        ended: whether a prompt that got these new tokens is done.
        call: the model, or its compiled call.
    """

    limit: int
    choose: Callable[[Tensor], Tensor]
    ended: Callable[[list[int]], bool]
    call: Callable[..., Any]


def continue_together(
    shared: SharedPrompt, logits_RV: Tensor, slots: Slots | Lockstep, decoding: Decoding
) -> list[list[int]]:
    """The new tokens of the prompts that ran last. In the `pruned` context of `shared` they go on pruned.

    Args:
        shared: where they ran.
        logits_RV: the logits after each prompt.
        slots: one for each of them.
        decoding: how they go on.
    """

    def start(row: int) -> tuple[Tensor, DynamicCache]:
        return logits_RV[row : row + 1], shared.caches[row]

    return [tokens for _, tokens in sorted(_continued(shared, start, lambda rows: None, slots, decoding))]


def continue_in_turn(
    shared: SharedPrompt,
    begin: Callable[[int], tuple[Tensor, SharedPrompt]],
    choose_experts: Callable[[SharedPrompt], Chosen] | None,
    slots: Slots | Lockstep,
    decoding: Decoding,
) -> Iterator[tuple[int, list[int]]]:
    """Each prompt and its new tokens, as they end: with experts of its own, and run when there is a slot for it.

    Args:
        shared: of the model.
        begin: runs a prompt, by its number, if it has not run before: the logits after it [1, V], and the prompt by
            itself, as `SharedPrompt.part` gives it.
        choose_experts: the experts of a prompt, and what is added with them; None: dense.
        slots: for some of the prompts at a time, or all.
        decoding: how they go on.
    """
    at_work = shared.rows_at_work()

    def start(row: int) -> tuple[Tensor, DynamicCache]:
        at_work.detach()  # the prompt runs dense
        logits_1V, prompt = begin(row)
        if choose_experts is not None:
            at_work.add(row, *choose_experts(prompt))
        return logits_1V, prompt.caches[0]

    try:
        yield from _continued(shared, start, at_work.put_to_work, slots, decoding)
    finally:
        at_work.detach()


@torch.no_grad()
def _continued(
    shared: SharedPrompt,
    start: Callable[[int], tuple[Tensor, DynamicCache]],
    work_on: Callable[[list[int]], None],
    slots: Slots | Lockstep,
    decoding: Decoding,
) -> Iterator[tuple[int, list[int]]]:
    """A prompt that has ended makes room for the next."""
    waiting = deque(range(len(slots.lengths)))
    tokens: dict[int, list[int]] = {}  # of the prompts that go on
    changed = False

    def done(row: int) -> bool:
        if len(tokens[row]) < decoding.limit and not decoding.ended(tokens[row]):
            return False
        slots.remove(row)
        return True

    while waiting or tokens:
        while waiting and slots.free:
            row, changed = waiting.popleft(), True
            logits_1V, cache = start(row)
            tokens[row] = decoding.choose(logits_1V.float()).tolist()
            slots.put(row, cache)
            del cache  # a copy is at work
            if done(row):
                yield row, tokens.pop(row)
        if not tokens:
            continue
        if changed:
            work_on(slots.rows)
            changed = False
        rows = list(slots.rows)
        # What has ended in lockstep goes on, unheard.
        latest_B1 = torch.tensor([tokens.get(row, [0])[-1:] for row in rows], device=shared.device)
        inputs = slots.inputs()
        if not shared.takes_positions:
            del inputs["position_ids"]
        with in_pieces(shared.head):
            output = decoding.call(latest_B1, use_cache=True, **inputs)
        for row, token in zip(rows, decoding.choose(output.logits[:, -1].float()).tolist(), strict=True):
            if row not in tokens:
                continue
            tokens[row].append(token)
            if done(row):
                changed = True
                yield row, tokens.pop(row)
