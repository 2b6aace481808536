"""Masked experts: dropped activations are set to zero, so every sequence of a batch can have its own experts.

Dimensions: B = batch rows, S = positions of one forward call, D = FF width, K = kept neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin.block_hooks import BlockHooks
from griffin.feedforward import FeedForwardBlock


class Mask:
    """Zeroes the activations of all but the experts, in every position of every forward call while attached."""

    def __init__(self, blocks: Sequence[FeedForwardBlock]) -> None:
        self._blocks = blocks
        self._hooks = BlockHooks(blocks, self._mask)
        self._dropped_B1D: list[Tensor] = []

    def attach(self, experts: Sequence[Tensor]) -> None:
        """Mask from the next forward call on.

        Args:
            experts: per layer, the kept neurons: [B, K] for the rows of the coming calls, or [1, K] for all rows.
        """
        self._dropped_B1D = [
            torch.ones(len(experts_BK), block.width, dtype=torch.bool, device=experts_BK.device)
            .scatter_(1, experts_BK, False)
            .unsqueeze(1)
            for block, experts_BK in zip(self._blocks, experts, strict=True)
        ]
        self._hooks.attach()

    def detach(self) -> None:
        """Mask no more."""
        self._hooks.detach()
        self._dropped_B1D = []

    def _mask(self, layer: int, z: Tensor) -> Tensor:
        dropped_B1D = self._dropped_B1D[layer]
        z_BSD = z.reshape(len(dropped_B1D), -1, z.shape[-1])  # some architectures flatten B and S
        return z_BSD.masked_fill(dropped_B1D, 0.0).reshape(z.shape)
