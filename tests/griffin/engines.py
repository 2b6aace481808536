"""How the tests run prompts and rows on an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from prompts import prompt
from running import difference
from torch import Tensor
from transformers import PreTrainedModel

from griffin import Engine, Generation, Method, PromptState, Row, begin, decode, greedy, prefill, wanted

TOLERANCE = 1e-5


def tokens(length: int, seed: int = 0) -> list[int]:
    """Token ids of a prompt."""
    return prompt(length, seed)[0].tolist()


def prefilled(engine: Engine, ids: Sequence[int], *methods: Method, **options: Any) -> PromptState:
    """The state of one prompt, from which these methods can choose."""
    (state,) = prefill(engine, [ids], wanted(methods), **options)
    return state


def begun(engine: Engine, ids: Sequence[int], method: Method, label: Any = None) -> Row:
    """The row of a prompt and a method."""
    (row,) = begin(engine, [prefilled(engine, ids, method)], method, labels=[label])
    return row


def never(row: Row) -> bool:
    """No text ends by itself."""
    return False


class Recorder:
    """Picks greedily, and keeps the logits that each token was picked from."""

    def __init__(self) -> None:
        self.logits: dict[Row, list[Tensor]] = {}

    def __call__(self, rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        for row, logits_V in zip(rows, logits_BV, strict=True):
            self.logits.setdefault(row, []).append(logits_V.clone())
        return greedy(rows, logits_BV)


def generated(
    engine: Engine,
    rows: Iterable[Row],
    count: int,
    limit: int,
    *,
    most: int = 1,
    longest: int = 32,
    ended: Callable[[Row], bool] = never,
) -> dict[Any, tuple[list[int], Tensor]]:
    """By label, the tokens of each row, and the logits [N, V] that they were picked from."""
    picked = Recorder()
    texts = decode(engine, rows, count, most, longest, Generation(limit, picked, ended))
    return {row.label: (row.tokens, torch.stack(picked.logits[row])) for row in texts}


def refuse_parting(
    found: tuple[list[int], Tensor], expected: tuple[list[int], Tensor], tolerance: float = TOLERANCE
) -> int:
    """Refuse texts, and their logits, that differ by more than rounding.

    Returns:
        1 where the texts part at a tie, behind which nothing is compared; else 0.
    """
    (ours, our_logits), (theirs, their_logits) = found, expected
    pairs = enumerate(zip(ours, theirs, strict=False))
    same = next((place for place, (one, other) in pairs if one != other), min(len(ours), len(theirs)))
    if same == len(ours) == len(theirs):
        assert difference(our_logits, their_logits) < tolerance
        return 0
    compared = slice(0, same + 1)
    assert difference(our_logits[compared], their_logits[compared]) < tolerance
    best = their_logits[same].topk(2).values
    assert best[0] - best[1] < 2 * tolerance * their_logits.abs().max(), "no tie"
    return 1


@torch.no_grad()
def plain_logits(model: PreTrainedModel, *calls: Sequence[int], keep: int = 0) -> list[Tensor]:
    """Per forward call of the model as it is, with its own KV cache, the logits [S, V], or the last ones to keep."""
    cache, found = None, []
    for call in calls:
        output = model(torch.tensor([call]), past_key_values=cache, use_cache=True, logits_to_keep=keep)
        cache = output.past_key_values
        found.append(output.logits[0])
    return found
