"""Masked experts: dropped activations are set to zero, so every sequence of a batch can have its own experts.

Dimensions: B = batch rows, S = positions of one forward call, D = FF width, K = kept neurons, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from griffin.block_hooks import BlockHooks
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock


class Mask:
    """Zeroes the activations of all but the experts, in every position of every forward call while attached."""

    def __init__(self, blocks: Sequence[FeedForwardBlock]) -> None:
        self._blocks = blocks
        self._hooks = BlockHooks(blocks, self._mask, self._correct)
        self._experts: Sequence[Tensor] = []
        self._dropped_B1D: list[Tensor] = []
        self._corrections: list[list[Correction]] = []

    def attach(
        self,
        experts: Sequence[Tensor],
        corrections: Iterable[Correction | None] | None = None,
        widths: Sequence[int] | None = None,
    ) -> None:
        """Mask from the next forward call on.

        Args:
            experts: per layer, the kept neurons: [B, K] for the rows of the coming calls, or [1, K] for all rows.
            corrections: per layer, what a compensation adds for these experts, for each row or, as shared experts
                have it, for all; None: nothing.
            widths: per layer, the neurons that the block computes, of which `experts` are numbers; None: all.
        """
        widths = widths or [block.width for block in self._blocks]
        self._experts = experts
        self._dropped_B1D = [
            torch.ones(len(experts_BK), width, dtype=torch.bool, device=experts_BK.device)
            .scatter_(1, experts_BK, False)
            .unsqueeze(1)
            for width, experts_BK in zip(widths, experts, strict=True)
        ]
        given: Iterable[Correction | None] = [None] * len(experts) if corrections is None else corrections
        self._corrections = [[] if correction is None else [correction] for correction in given]
        self._hooks.attach()

    def pause(self) -> None:
        """Mask no more, until `resume`."""
        self._hooks.detach()

    def resume(self, added: Sequence[Correction | None]) -> None:
        """Mask again, with these corrections on top of those that there are."""
        for corrections, correction in zip(self._corrections, added, strict=True):
            corrections += [] if correction is None else [correction]
        self._hooks.attach()

    def detach(self) -> None:
        """Mask no more."""
        self._hooks.detach()
        self._experts, self._dropped_B1D, self._corrections = [], [], []

    def _mask(self, layer: int, z: Tensor) -> Tensor:
        dropped_B1D = self._dropped_B1D[layer]
        z_BSD = z.reshape(len(dropped_B1D), -1, z.shape[-1])  # some architectures flatten B and S
        return z_BSD.masked_fill(dropped_B1D, 0.0).reshape(z.shape)

    def _correct(self, layer: int, z: Tensor, output: Tensor) -> Tensor | None:
        corrections = self._corrections[layer]
        if not corrections:
            return None
        z_BSD = z.reshape(corrections[0].prompts, -1, z.shape[-1])
        experts_BSK = self._experts[layer].unsqueeze(1).expand(*z_BSD.shape[:2], -1)
        kept_BSK = z_BSD.gather(2, experts_BSK).float()
        for correction in corrections:
            output = output + correction.output(kept_BSK).reshape(output.shape).to(output.dtype)
        return output
