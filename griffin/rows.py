"""Rows: what is continued, how texts are generated, and what that took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from griffin.activations import Recorded
from griffin.engine import Engine
from griffin.feedforward import FeedForwardBlock, find_feedforward_blocks, weight_out_in
from griffin.method import Method
from griffin.prompt import PromptState, choose
from griffin.quantization import linear_layers, stored_bits
from griffin.refresh import next_refresh
from griffin.selection import Experts
from griffin.statistics import TokenStatistic


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights that a step reads; the KV cache comes on top."""

    dense: int  # of the dense model
    pruned: int  # with the kept neurons only
    output_row: int  # of one row of the output embedding; 0 where it has none
    vocabulary: int  # rows of the output embedding

    def draft(self, tokens: int | None) -> int:
        """With the kept neurons, and so many rows of the output embedding; None: all."""
        return self.pruned if tokens is None else self.pruned - (self.vocabulary - tokens) * self.output_row


def traffic(model: nn.Module, kept: Sequence[int], statistic: object = None, quantization: str = "none") -> Traffic:
    """What a step of a model reads that keeps so many neurons of each layer; a `TokenStatistic` reads more, to choose.
    An embedding table counts only where it is the output layer too: decoding looks up one row of it. Quantised weights
    count as if the model's own had 16 bits, whatever it runs in."""
    whole: Any = model
    blocks = find_feedforward_blocks(model)
    embedding, output = whole.get_input_embeddings().weight, whole.get_output_embeddings()
    weights = {id(weight): weight for weight in whole.parameters()}
    if output is None or output.weight is not embedding:
        weights.pop(id(embedding))
    dense = sum(weight.nbytes for weight in weights.values())
    dropped = sum(
        round(neuron * (statistic.skippable(block) if isinstance(statistic, TokenStatistic) else 1.0))
        * (block.width - left)
        for block, left, neuron in zip(blocks, kept, neuron_bytes(blocks), strict=True)
    )
    pruned, row = dense - dropped, 0 if output is None else output.weight[0].nbytes
    if quantization != "none":
        outputs = {block.output: left / block.width for block, left in zip(blocks, kept, strict=True)}
        shares = outputs | {module: outputs[block.output] for block in blocks for module in block.inputs}
        for layer in linear_layers(model):
            bits = stored_bits(quantization, weight_out_in(layer).shape[1] * outputs.get(layer, 1.0))
            pruned -= round(layer.get_parameter("weight").nbytes * shares.get(layer, 1.0) * (1.0 - bits / 16))
        row = round(row * stored_bits(quantization, output.weight.shape[1]) / 16)
    return Traffic(dense, pruned, row, 0 if output is None else len(output.weight))


def neuron_bytes(blocks: Sequence[FeedForwardBlock]) -> list[int]:
    """Per block, the bytes of one neuron's weights in all projections."""
    return [sum(weight.nbytes for weight in block.weights) // block.width for block in blocks]


@dataclass
class DraftStatistics:
    """What became of a row's draft tokens."""

    drafted: int = 0
    accepted_by_check: list[int] = field(default_factory=list)  # those of them that became part of the text
    emitted: int = 0  # new tokens but the first: accepted ones, and one of the dense model's own a check
    draft_bytes: int = 0  # of weights that the drafts have read
    widths: list[int] = field(default_factory=list)  # in tokens, of the checks: dense steps over drafts and one token
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("draft", "check", "learn"), 0.0))

    @property
    def accepted(self) -> int:
        """Draft tokens that became part of the text."""
        return sum(self.accepted_by_check)

    @property
    def checks(self) -> int:
        """How many there were; some of them of no draft."""
        return len(self.widths)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count the time of this context as drafting, checking or learning."""
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
    """A prompt that one method continues. Rows that share their experts have the same object."""

    state: PromptState
    method: Method
    experts: Experts | None  # what it computes with; None: dense
    label: Any = None  # whatever tells the row from others, for whoever asked for it
    keep_cache: bool = False  # whether its state has the dense KV cache of all but its last token when it ends
    tokens: list[int] = field(default_factory=list)  # new ones so far; the last one has not run yet
    seconds: float = 0.0  # what choosing its experts took, and its share of the steps that it was part of
    ran: int = 0  # how many tokens of its continuation have run
    since_refresh: list[Tensor] = field(default_factory=list)  # [T] each: those that ran pruned since its last refresh
    refreshed: int = 0  # how many of its steps were refreshes, and so dense
    drafts: DraftStatistics = field(default_factory=DraftStatistics)

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
            dense, pruned = drafts.checks, drafts.draft_bytes
        else:
            dense = steps if self.experts is None else self.refreshed
            pruned = (steps - dense) * traffic.pruned
        read, acceptance = dense * traffic.dense + pruned, drafts.accepted / drafts.drafted if drafts.drafted else None
        return RowStatistics(len(self.tokens), dense, read, steps * traffic.dense, self.seconds, acceptance)


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

    Experts that were chosen before, of this or another prompt, may be given; else they are chosen now, with the seed of
    random statistics and selections. `keep_cache`: see `Row`; what was recorded is kept then too.
    """
    began = time.perf_counter()
    if experts is None:
        experts = choose(engine, states, method, seed)
    else:
        experts = replace(experts, fits=(), quantization=method.quantization)
    seconds = (time.perf_counter() - began) / len(states)
    if not keep_cache:  # the memory of what was recorded can go, since experts are chosen for good
        light = [replace(state, recorded=Recorded(state.recorded.tokens), continuation=None) for state in states]
        states = [state if method.prunes_vocabulary else replace(state, likely=None) for state in light]
    return [
        Row(state, method, experts, label, keep_cache, seconds=seconds)
        for state, label in zip(states, labels, strict=True)
    ]


@dataclass(frozen=True)
class Generation:
    """How texts are generated.

    Attributes:
        ended: whether a row is done with its newest token. It is asked once for each token.
        process_logits: (rows, of each the draft tokens behind its own [N] or None, logits [B, V]) -> the logits [B, V]
            that the next tokens are picked by; None: as they are.
        draw: (row, probabilities [N]) -> a number drawn by these, [1]; None: the most likely token is picked.
    """

    max_new_tokens: int
    ended: Callable[[Row], bool] = lambda row: False
    process_logits: Callable[[Sequence[Row], Sequence[Tensor | None], Tensor], Tensor] | None = None
    draw: Callable[[Row, Tensor], Tensor] | None = None

    def ends(self, row: Row, token: int) -> bool:
        """Give a row its next token; whether that ends it."""
        row.tokens.append(token)
        return self.ended(row) or len(row.tokens) >= self.max_new_tokens

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
