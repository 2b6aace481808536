"""Bytes of weights that decoding one token reads: what its speed depends on where it is bound by memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from griffin.feedforward import FeedForwardBlock, find_feedforward_blocks, weight_out_in
from griffin.statistics import TokenStatistic


@dataclass(frozen=True)
class Traffic:
    """Bytes of weights that a step reads; the KV cache comes on top.

    Attributes:
        dense: of the dense model.
        pruned: with the kept neurons only.
        output_row: of one row of the output embedding; 0 where it has none.
        vocabulary: rows of the output embedding.
    """

    dense: int
    pruned: int
    output_row: int
    vocabulary: int

    def draft(self, tokens: int | None) -> int:
        """With the kept neurons, and so many rows of the output embedding; None: all."""
        return self.pruned if tokens is None else self.pruned - (self.vocabulary - tokens) * self.output_row


def traffic(model: nn.Module, kept: Sequence[int], statistic: object = None) -> Traffic:
    """What a step of a model reads.

    An embedding table counts only where it is the output layer too: decoding looks up one row of it.

    Args:
        model: a `transformers` causal language model.
        kept: neurons that each layer keeps.
        statistic: what chooses them; where that is a `TokenStatistic`, some weights are read to know them.
    """
    whole: Any = model
    blocks = find_feedforward_blocks(model)
    embedding, output = whole.get_input_embeddings().weight, whole.get_output_embeddings()
    weights = {id(weight): weight for weight in whole.parameters()}
    if output is None or output.weight is not embedding:
        weights.pop(id(embedding))
    dense = sum(weight.numel() * weight.element_size() for weight in weights.values())
    dropped = sum(
        round(neuron * (statistic.skippable(block) if isinstance(statistic, TokenStatistic) else 1.0))
        * (block.width - left)
        for block, left, neuron in zip(blocks, kept, neuron_bytes(blocks), strict=True)
    )
    rows = 0 if output is None else len(output.weight)
    row = output.weight[0].numel() * output.weight.element_size() if rows else 0
    return Traffic(dense, dense - dropped, row, rows)


def neuron_bytes(blocks: Sequence[FeedForwardBlock]) -> list[int]:
    """Per block, the bytes of one neuron's weights in all projections."""
    weights = [[weight_out_in(module) for module in (*block.inputs, block.output)] for block in blocks]
    return [
        sum(weight.numel() * weight.element_size() for weight in mine) // block.width
        for block, mine in zip(blocks, weights, strict=True)
    ]
