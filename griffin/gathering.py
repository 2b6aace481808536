"""Gathering: what the statistics need to know of a prompt, added up while the model runs it dense.

Dimensions: B = batch rows, S = positions of one forward call, D = FF width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from griffin.block_hooks import BlockHooks
from griffin.feedforward import FeedForwardBlock
from griffin.statistics import Statistic

Gather = Callable[[Tensor], Tensor]


class Gatherer:
    """Adds up, per layer, what the given statistics gather over the positions that count.

    Hooks are on the model while attached, and one forward call serves all statistics.
    """

    def __init__(self, blocks: Sequence[FeedForwardBlock], statistics: Sequence[Statistic]) -> None:
        gathers = dict.fromkeys(statistic.gather for statistic in statistics)
        self._totals: dict[Gather, list[Tensor | None]] = {
            gather: [None] * len(blocks) for gather in gathers if gather is not None
        }
        self._hooks = BlockHooks(blocks, self._gather)
        self._shape_BS = (0, 0)
        self._counted_BS: Tensor | None = None

    def attach(self) -> None:
        """Gather from the next forward call on; a no-op for statistics that do not read activations."""
        if self._totals:
            self._hooks.attach()

    def detach(self) -> None:
        """Gather no more; what has been gathered stays."""
        self._hooks.detach()

    def expect(self, rows: int, positions: int, counted_BS: Tensor | None) -> None:
        """Announce the next forward call's shape, and which of its positions count (None: all)."""
        self._shape_BS = (rows, positions)
        self._counted_BS = counted_BS

    def reset(self) -> None:
        """Begin a new prompt."""
        for totals in self._totals.values():
            totals[:] = [None] * len(totals)

    def total(self, statistic: Statistic, layer: int) -> Tensor | None:
        """[B, D] float32: what this statistic's `score` takes; None for one that gathers nothing."""
        return None if statistic.gather is None else self._totals[statistic.gather][layer]

    @torch.no_grad()
    def _gather(self, layer: int, z: Tensor) -> None:
        z_BSD = z.detach().reshape(*self._shape_BS, -1).float()  # some architectures flatten B and S
        if self._counted_BS is not None:
            z_BSD = z_BSD.masked_fill(~self._counted_BS.to(z.device).unsqueeze(-1), 0.0)
        for gather, totals in self._totals.items():
            part_BD, before_BD = gather(z_BSD), totals[layer]
            totals[layer] = part_BD if before_BD is None else before_BD + part_BD
