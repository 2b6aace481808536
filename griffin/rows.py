"""Rows: what is continued, and how texts are generated.

Dimensions: B = rows of a batch, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from griffin.drift import Drift
from griffin.engine import Engine
from griffin.executors import Experts
from griffin.method import Method
from griffin.prompt import PromptState, choose
from griffin.refresh import next_refresh


@dataclass
class Drafting:
    """What became of a row's drafts.

    Attributes:
        checks: dense steps, each of which checked some tokens, or none.
        drafted: tokens that were drafted.
        looked_up: those of them that were looked up in the text, not drafted by the experts.
        accepted: those of the drafted tokens that were kept.
        emitted: new tokens, all but the prompt's first one: accepted tokens, and one of the dense model's own a check.
        draft_bytes: of weights that the drafts have read.
        seconds: of drafting, checking, learning and choosing anew.
    """

    checks: int = 0
    drafted: int = 0
    looked_up: int = 0
    accepted: int = 0
    emitted: int = 0
    draft_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("draft", "check", "learn", "choose"), 0.0))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time of this context as drafting, checking, learning or choosing anew."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


@dataclass(eq=False)
class Row:
    """A prompt that one method continues.

    Attributes:
        states: the prompts of all rows that share its experts, in a list that all of them have; with
            `refresh=experts`, also what was generated since.
        place: which of them is its own.
        method: how it is pruned.
        experts: what it computes with; None: dense. Rows that share their experts have the same object.
        seed: of random selections.
        label: whatever tells the row from others, for whoever asked for it.
        tokens: new tokens so far; the last one has not run yet.
        seconds: what choosing its experts took, and its share of the steps that it was part of.
        ran: how many tokens of its continuation have run.
        unread: those of them that have run pruned since its last refresh.
        refreshed: how many of its steps were refreshes, and so dense.
        drift: with `refresh=drift`, what was seen since its experts were chosen; None: nothing yet.
        drafting: what became of its drafts, where it is verified.
    """

    states: list[PromptState]
    place: int
    method: Method
    experts: Experts | None
    seed: int = 0
    label: Any = None
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    ran: int = 0
    unread: list[Tensor] = field(default_factory=list)
    refreshed: int = 0
    drift: Drift | None = None
    drafting: Drafting = field(default_factory=Drafting)

    @property
    def state(self) -> PromptState:
        """Its prompt."""
        return self.states[self.place]

    @state.setter
    def state(self, state: PromptState) -> None:
        self.states[self.place] = state

    @property
    def refreshes(self) -> bool:
        """Whether some of its steps are dense ones."""
        return self.method.refresh != "none" and self.experts is not None

    @property
    def due(self) -> bool:
        """Whether its next step is a dense one."""
        if self.method.refresh == "drift":
            return self.drift is not None and self.drift.due
        return self.refreshes and self.ran >= next_refresh(self.ran - sum(len(ids) for ids in self.unread))


def begin(
    engine: Engine, states: Sequence[PromptState], method: Method, seed: int = 0, labels: Sequence[Any] = (None,)
) -> list[Row]:
    """The row of a prompt under a method, with its experts; or those of several prompts that share one set of experts.

    Rows that share their experts must run in one batch.
    """
    began = time.perf_counter()
    experts, shared = choose(engine, states, method, seed), list(states)
    seconds = (time.perf_counter() - began) / len(shared)
    return [
        Row(shared, place, method, experts, seed, label, seconds=seconds)
        for place, label in zip(range(len(shared)), labels, strict=True)
    ]


@dataclass(frozen=True)
class Generation:
    """How texts are generated.

    Attributes:
        limit: the most new tokens of a row.
        pick: (rows, float32 logits [B, V]) -> the next token of each row [B].
        ended: whether a row that got its newest token is done. It is asked once for each token.
        scores: (row, tokens drafted behind its own, their logits [V]) -> the logits [V] that `pick` would pick by; for
            verified rows, whose tokens other than the first are not picked by `pick`.
        draw: (row, chances [N]) -> a number drawn by these, [1]; None: the most likely token is picked. For verified
            rows too.
    """

    limit: int
    pick: Callable[[Sequence[Row], Tensor], Tensor]
    ended: Callable[[Row], bool]
    scores: Callable[[Row, Sequence[int], Tensor], Tensor] | None = None
    draw: Callable[[Row, Tensor], Tensor] | None = None

    def scored(self, row: Row, drafted: Sequence[int], logits_V: Tensor) -> Tensor:
        """The logits [V] that a token behind the drafted ones is picked by."""
        return logits_V if self.scores is None else self.scores(row, drafted, logits_V)


def greedy(rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
    """The most likely token of each row [B]."""
    return logits_BV.argmax(dim=-1)
