"""Hooks on the output projections of FF blocks, whose input is z: the one place where activations are seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from griffin.feedforward import FeedForwardBlock


class BlockHooks:
    """One hook on every block, called as `hook(layer, z)`; what it returns, if anything, replaces z."""

    def __init__(self, blocks: Sequence[FeedForwardBlock], hook: Callable[[int, Tensor], Tensor | None]) -> None:
        self._blocks = blocks
        self._hook = hook
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Put the hooks on, unless they are."""
        if not self._handles:
            self._handles = [
                block.output.register_forward_pre_hook(lambda _, args, layer=layer: self._hook(layer, args[0]))
                for layer, block in enumerate(self._blocks)
            ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
