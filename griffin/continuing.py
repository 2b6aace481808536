"""Texts that go on from shared prompts, token by token, each until it ends.

Dimensions: B = rows at work, R = prompts, V = vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from griffin.in_pieces import in_pieces
from griffin.shared_prompt import SharedPrompt
from griffin.slots import Lockstep, Slots


@torch.no_grad()
def continue_prompts(
    shared: SharedPrompt,
    logits_RV: Tensor,
    slots: Slots | Lockstep,
    limit: int,
    choose: Callable[[Tensor], Tensor],
    ended: Callable[[list[int]], bool],
    call: Callable[..., Any],
) -> list[list[int]]:
    """Each prompt's new tokens. A prompt that has ended makes room for the next.

    Args:
        shared: where the prompts ran last; in its `pruned` context they go on pruned.
        logits_RV: the logits after each prompt.
        slots: `shared.slots(..)`, or `shared.lockstep(..)`.
        limit: the most new tokens.
        choose: float32 logits [B, V] -> the next token of each row [B].
        ended: whether a prompt that got these new tokens is done.
        call: the model, or its compiled call.
    """
    tokens = [[token] for token in choose(logits_RV.float()).tolist()]
    going = {row for row in range(len(tokens)) if limit > 1 and not ended(tokens[row])}
    waiting = deque(sorted(going))
    device, changed = logits_RV.device, True
    while going:
        if waiting and slots.free:
            slots.put([waiting.popleft() for _ in range(min(slots.free, len(waiting)))])
            changed = True
        if changed:
            shared.work_on(slots.rows)
        latest_B1 = torch.tensor([tokens[row][-1:] for row in slots.rows], device=device)
        inputs = slots.inputs()
        if not shared.takes_positions:
            del inputs["position_ids"]
        with in_pieces(shared.head):
            output = call(latest_B1, use_cache=True, **inputs)
        changed = False
        for row, token in zip(list(slots.rows), choose(output.logits[:, -1].float()).tolist(), strict=True):
            if row not in going:
                continue
            tokens[row].append(token)
            if len(tokens[row]) == limit or ended(tokens[row]):
                going.remove(row)
                slots.remove(row)
                changed = True
    return tokens
