"""Refitting: a compensation goes on learning from what is generated, while the experts stay.

Dimensions: B = batch rows, N = positions that are read, D = FF width, K = kept neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin.compensation import Compensation
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock
from griffin.gathering import Gatherer, Gathering, Places, Stretch
from griffin.modes import Work
from griffin.offloading import bring
from griffin.refresh import WEIGHT


def relative_activations(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """[B, N, D]: z[b, t, :] / ||z[b, t, :]||, times the root of what a token counts as."""
    scale: float = stretch.places.weight**0.5
    return scale * stretch.relative_BSD


def newest(before: Tensor, part: Tensor, places: Places) -> Tensor:
    """Joins parts of which the last is all that matters."""
    return part


_rows = Gathering(relative_activations, join=newest)


class Refit:
    """The corrections of the experts at work, as they go on learning.

    Args:
        blocks: the FF blocks, in layer order.
        work: what the experts are attached to.
        compensation: one that can learn.
        experts: those at work: per layer [B, K], or [1, K] where shared.
        corrections: those at work, with their fits.
        shared: whether all rows share their experts and corrections.
    """

    def __init__(
        self,
        blocks: Sequence[FeedForwardBlock],
        work: Work,
        compensation: Compensation,
        experts: Sequence[Tensor],
        corrections: Sequence[Correction | None],
        *,
        shared: bool,
    ) -> None:
        self._blocks = blocks
        self._work = work
        self._compensation = compensation
        self._experts = experts
        self._corrections = [[] if correction is None else [correction] for correction in corrections]
        self._shared = shared
        self._gatherer = Gatherer(blocks, [_rows])

    def read(self, ids_BN: Tensor, counted_BN: Tensor | None) -> None:
        """The coming forward call is dense, and reads these tokens."""
        self._work.pause()
        self._gatherer.reset()
        self._gatherer.expect(ids_BN.shape[0], ids_BN.shape[1], counted_BN, ids_BN.device, WEIGHT)
        self._gatherer.attach()

    @torch.no_grad()
    def renew(self) -> None:
        """Learn what was read and compute with the experts again."""
        self.stop()
        added = [self._learn(layer) for layer in range(len(self._blocks))]
        self._gatherer.reset()
        self._work.resume(added)

    def stop(self) -> None:
        """Read no more."""
        self._gatherer.detach()

    def _learn(self, layer: int) -> Correction | None:
        rows, before = self._gatherer.total(_rows, layer), self._corrections[layer]
        if not before or rows is None or self._compensation.learn is None:
            return None
        if self._shared:
            rows = self._compensation.share(rows)
        block, experts_BK = self._blocks[layer], self._experts[layer].to(rows.device).expand(len(rows), -1)
        bring(block)
        before.append(self._compensation.learn(before, rows, block, experts_BK))
        return before[-1]
