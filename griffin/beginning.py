"""A stretch that many prompts begin with, such as solved examples: run once, and every prompt goes on from there.

Dimensions: B = batch rows, S = positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import DynamicCache

from griffin.gathering import Gatherer, Places, Totals

# A prompt goes on from its beginning where it is less than so many times as long. Attention to a stretch and what was
# before has no shortcut for its causal mask, and in the end that costs what the beginning saves (measured on a CPU).
WORTH = 8


class SharedBeginning:
    """Where prompts start: after the beginning that they share, or with nothing.

    Args:
        gatherer: what is gathered of the prompts.
        run: (token ids [B, S], None, cache, columns of logits) -> logits, the dense pass over a stretch, gathered.
    """

    def __init__(self, gatherer: Gatherer, run: Callable[[Tensor, Tensor | None, DynamicCache, int], Tensor]) -> None:
        self._gatherer = gatherer
        self._run = run
        self._ids_S: Tensor | None = None
        self._cache = DynamicCache()
        self._gathered: tuple[Totals, Places]

    def start(self, ids_S: Tensor, beginning_S: Tensor | None) -> DynamicCache:
        """The KV cache that this prompt's dense pass goes on from, and the gatherer set to the same point.

        That depends on the prompt and the beginning alone, so a prompt runs the same whatever runs with it.
        """
        # A cache made without the model's config keeps every position, also in layers with a sliding window.
        cache = DynamicCache()
        if beginning_S is None or not _shared(ids_S, beginning_S):
            self._gatherer.reset()
            return cache
        if self._ids_S is None or not torch.equal(self._ids_S, beginning_S):
            self._gatherer.reset()
            self._cache = DynamicCache()
            self._run(beginning_S.unsqueeze(0), None, self._cache, 1)
            self._ids_S, self._gathered = beginning_S, self._gatherer.whole()
        cache.layers = [copy.copy(layer) for layer in self._cache.layers]  # growing makes new tensors
        self._gatherer.resume(*self._gathered)
        return cache


def _shared(ids_S: Tensor, beginning_S: Tensor) -> bool:
    length = len(beginning_S)
    return length < len(ids_S) < length * WORTH and torch.equal(ids_S[:length], beginning_S)
