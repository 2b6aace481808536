"""Hooks on the output projections of FF blocks, whose input is z: the one place where activations are seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from griffin.feedforward import FeedForwardBlock


class BlockHooks:
    """One hook on every block, called as `hook(layer, z)`; what it returns, if anything, replaces z.

    With `after`, also one called as `after(layer, z, output)` with that z; what it returns, if anything, replaces
    the output.
    """

    def __init__(
        self,
        blocks: Sequence[FeedForwardBlock],
        hook: Callable[[int, Tensor], Tensor | None],
        after: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
    ) -> None:
        self._blocks = blocks
        self._hook = hook
        self._after = after
        self._handles: list[Any] = []

    def attach(self) -> None:
        """Put the hooks on, unless they are."""
        if not self._handles:
            self._handles = [
                block.output.register_forward_pre_hook(lambda _, args, layer=layer: self._hook(layer, args[0]))
                for layer, block in enumerate(self._blocks)
            ]

        if self._after is not None and len(self._handles) == len(self._blocks):
            after = self._after
            self._handles += [
                block.output.register_forward_hook(lambda _, args, out, layer=layer: after(layer, args[0], out))
                for layer, block in enumerate(self._blocks)
            ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
