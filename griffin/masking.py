"""Masked experts: dropped activations are set to zero, so every sequence of a batch can have its own experts.

Dimensions: B = batch rows, S = positions of one forward call, D = FF width, K = kept neurons, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from griffin.block_hooks import BlockHooks
from griffin.compensation import Correction
from griffin.feedforward import FeedForwardBlock


class Mask:
    """Zeroes the activations of all but the experts, in every position of every forward call while attached."""

    def __init__(self, blocks: Sequence[FeedForwardBlock]) -> None:
        self._blocks = blocks
        self._hooks = BlockHooks(blocks, self._mask, self._correct)
        self._experts: Sequence[Tensor] = []
        self._dropped_B1D: list[Tensor] = []
        self._corrections: Sequence[Correction | None] = []

    def attach(self, experts: Sequence[Tensor], corrections: Iterable[Correction | None] | None = None) -> None:
        """Mask from the next forward call on.

        Args:
            experts: per layer, the kept neurons: [B, K] for the rows of the coming calls, or [1, K] for all rows.
            corrections: per layer, what a compensation adds for these experts, for each row or, as shared experts
                have it, for all; None: nothing.
        """
        self._experts = experts
        self._dropped_B1D = [
            torch.ones(len(experts_BK), block.width, dtype=torch.bool, device=experts_BK.device)
            .scatter_(1, experts_BK, False)
            .unsqueeze(1)
            for block, experts_BK in zip(self._blocks, experts, strict=True)
        ]
        self._corrections = [None] * len(experts) if corrections is None else list(corrections)
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
        correction = self._corrections[layer]
        if correction is None:
            return None
        z_BSD = z.reshape(correction.prompts, -1, z.shape[-1])
        experts_BSK = self._experts[layer].unsqueeze(1).expand(*z_BSD.shape[:2], -1)
        kept_BSK = z_BSD.gather(2, experts_BSK).float()
        return output + correction.output(kept_BSK).reshape(output.shape).to(output.dtype)
