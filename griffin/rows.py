"""Rows: what is continued, how texts are generated, and what that took.

Dimensions: B = rows of a batch, V = vocabulary, N = tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from griffin.choosing import choose
from griffin.engine import Engine
from griffin.experts import Experts
from griffin.method import Method
from griffin.prompt import PromptState
from griffin.refresh import next_refresh
from griffin.traffic import Traffic


@dataclass
class DraftStatistics:
    """What became of a row's draft tokens."""

    checks: int = 0  # dense steps, each of which checked some draft tokens, or none
    drafted: int = 0
    looked_up: int = 0  # those of them that were looked up in the text, not drafted by the experts
    accepted: int = 0  # those of them that became part of the text
    emitted: int = 0  # new tokens but the first: accepted ones, and one of the dense model's own a check
    draft_bytes: int = 0  # of weights that the drafts have read
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("draft", "check", "learn", "choose"), 0.0))

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time of this context as drafting, checking, learning or choosing anew."""
        began = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - began


@dataclass(frozen=True)
class RowStatistics:
    """What one text took."""

    tokens: int  # new ones; the first one comes with the prompt
    dense_steps: int  # of the dense model behind the prompt: all of a dense row, refreshes, or checks
    bytes_read: int  # of weights, behind the prompt
    dense_bytes: int  # that dense decoding would have read
    seconds: float  # of choosing experts and of decoding, its share of batches
    acceptance: float | None = None  # accepted draft tokens over all draft tokens; None: there were none

    @property
    def effective_density(self) -> float:
        """Bytes read, over those of dense decoding; 1 where nothing was decoded."""
        return self.bytes_read / self.dense_bytes if self.dense_bytes else 1.0


@dataclass(eq=False)
class Row:
    """A prompt that one method continues.

    Rows that share their experts have the same list of states, and the same experts.
    """

    states: list[PromptState]  # of all rows that share its experts; with `refresh=experts`, also what was generated
    place: int  # which of them is its own
    method: Method
    experts: Experts | None  # what it computes with; None: dense
    seed: int = 0  # of random selections
    label: Any = None  # whatever tells the row from others, for whoever asked for it
    keep_cache: bool = False  # whether its state has the dense KV cache of all but its last token when it ends
    tokens: list[int] = field(default_factory=list)  # new ones so far; the last one has not run yet
    seconds: float = 0.0  # what choosing its experts took, and its share of the steps that it was part of
    ran: int = 0  # how many tokens of its continuation have run
    since_refresh: list[Tensor] = field(default_factory=list)  # [T] each: those that ran pruned since its last refresh
    refreshed: int = 0  # how many of its steps were refreshes, and so dense
    drafts: DraftStatistics = field(default_factory=DraftStatistics)

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
        return self.refreshes and self.ran >= next_refresh(self.ran - sum(len(ids) for ids in self.since_refresh))

    def statistics(self, traffic: Traffic) -> RowStatistics:
        """What it took, by the traffic of its model with as many neurons as it keeps."""
        drafts, steps = self.drafts, max(len(self.tokens) - 1, 0)
        if self.method.verified and self.experts is not None:
            read = drafts.checks * traffic.dense + drafts.draft_bytes
            acceptance = drafts.accepted / drafts.drafted if drafts.drafted else None
            return RowStatistics(len(self.tokens), drafts.checks, read, steps * traffic.dense, self.seconds, acceptance)
        dense = steps if self.experts is None else self.refreshed
        read = dense * traffic.dense + (steps - dense) * traffic.pruned
        return RowStatistics(len(self.tokens), dense, read, steps * traffic.dense, self.seconds)


def begin(
    engine: Engine,
    states: Sequence[PromptState],
    method: Method,
    seed: int = 0,
    labels: Sequence[Any] = (None,),
    *,
    experts: Experts | None = None,
    keep_cache: bool = False,
) -> list[Row]:
    """The row of a prompt under a method, with its experts; or those of several prompts that share one set of experts,
    which must run in one batch.

    Args:
        engine: the model.
        states: of the prompts.
        method: how they are continued.
        seed: of random selections.
        labels: of the rows.
        experts: chosen before, of this or another prompt; None: they are chosen now.
        keep_cache: see `Row`.
    """
    began = time.perf_counter()
    experts = replace(experts, fits=()) if experts is not None else choose(engine, states, method, seed)
    seconds = (time.perf_counter() - began) / len(states)
    rechosen = method.refresh == "experts" and experts is not None
    shared = [state if rechosen or keep_cache else _light(state, method) for state in states]
    return [
        Row(shared, place, method, experts, seed, label, keep_cache, seconds=seconds)
        for place, label in zip(range(len(shared)), labels, strict=True)
    ]


def _light(state: PromptState, method: Method) -> PromptState:
    return replace(state.without_recorded(), likely=state.likely if method.prunes_vocabulary else None)


# -- how texts are generated ------------------------------------------------------------------------------------------


def never(row: Row) -> bool:
    """No text ends before its limit."""
    return False


@dataclass(frozen=True)
class Generation:
    """How texts are generated.

    Attributes:
        max_new_tokens: of a row.
        ended: whether a row that got its newest token is done. It is asked once for each token.
        process_logits: (rows, of each the draft tokens behind its own [N] or None, logits [B, V]) -> the logits [B, V]
            that the next tokens are picked by; None: as they are.
        draw: (row, probabilities [N]) -> a number drawn by these, [1]; None: the most likely token is picked.
    """

    max_new_tokens: int
    ended: Callable[[Row], bool] = never
    process_logits: Callable[[Sequence[Row], Sequence[Tensor | None], Tensor], Tensor] | None = None
    draw: Callable[[Row, Tensor], Tensor] | None = None

    def processed(self, row: Row, drafted_N: Tensor | None, logits_V: Tensor) -> Tensor:
        """The logits [V] that a token of one row is picked by."""
        if self.process_logits is None:
            return logits_V
        return self.process_logits([row], [drafted_N], logits_V.unsqueeze(0))[0]

    def pick(self, rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        """The next token of each row [B], from float32 logits."""
        if self.process_logits is not None:
            logits_BV = self.process_logits(rows, [None] * len(rows), logits_BV)
        if self.draw is None:
            return logits_BV.argmax(dim=-1)
        probabilities_BV = logits_BV.softmax(dim=-1)
        return torch.cat([self.draw(row, probs_V) for row, probs_V in zip(rows, probabilities_BV, strict=True)])
