"""The dense view: it records statistics of prompts, and shows the activations of checks and refreshes.

Its hooks are there for good, and do nothing in a call that nobody records.

Dimensions: B = rows of a batch, S = positions, T = tokens of a call of one row, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from griffin.activations import ActivationStatistic, Recorded, Recorder
from griffin.feedforward import FeedForwardBlock, find_feedforward_blocks
from griffin.kv_cache import KVCache
from griffin.offloading import Offloaded
from griffin.refresh import Seen
from griffin.views import Compiler, View


@dataclass(eq=False)
class Taps:
    """What the hooks of a dense view do: nothing, unless something here is set."""

    recorder: Recorder | None = None  # takes in the activations of the call that runs
    seen: dict[int, Seen] | None = None  # by layer, what keeps them as they are
    hidden: list[Tensor] | None = None  # takes in the last hidden states [B, S, H], which the output embedding reads

    def block(self, layer: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Behind the output projection of a layer, whose input is z."""
        if self.recorder is not None:
            self.recorder.record(layer, args[0], output)
        if self.seen is not None:
            self.seen[layer].take(layer, args[0], output)

    def decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind the decoder."""
        if self.hidden is not None:
            self.hidden.append(output.last_hidden_state)


class DenseView(View):
    """The model as it is, with hooks; `blocks` are the FF blocks of the view."""

    def __init__(
        self, model: nn.Module, *, pruning: bool, compiler: Compiler | None = None, offloaded: bool = False
    ) -> None:
        super().__init__(model, compiler)
        self.blocks = find_feedforward_blocks(self.module) if pruning else []
        self.taps = Taps()
        for layer, block in enumerate(self.blocks):
            block.output.register_forward_hook(partial(self.taps.block, layer))
        if self.blocks:
            self.module.get_decoder().register_forward_hook(self.taps.decoder)
        self._offloaded = Offloaded(self.blocks, self.module.device) if offloaded else None
        self._seen: dict[int, Seen] = {}

    @property
    def offloaded(self) -> bool:
        """Whether its FF weights are in host memory."""
        return self._offloaded is not None

    def bring(self, layer: int) -> FeedForwardBlock:
        """A block with its weights on the device, until another one is asked for or runs."""
        if self._offloaded is not None:
            self._offloaded.bring(layer)
        return self.blocks[layer]

    def recorder(self, statistics: Sequence[ActivationStatistic], before: Recorded) -> Recorder:
        """What records these statistics, see `recording`."""
        return Recorder(self.blocks, statistics, before)

    def recording(
        self, ids_BS: Tensor, cache: KVCache, recorder: Recorder, *, hidden: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """A call, see `View`, that a recorder expects; returns the logits, and the last hidden states [B, S, H] where
        they are wanted."""
        taps = self.taps
        states: list[Tensor] = []
        taps.recorder, taps.hidden = recorder, states if hidden else None
        try:
            logits = self(ids_BS, cache, **options)
        finally:
            taps.recorder = taps.hidden = None
        return logits, states[0] if hidden else None

    def watching(self, ids_1T: Tensor, cache: KVCache, **options: Any) -> tuple[Tensor, list[Seen]]:
        """A call of one row, see `View`; returns the logits, and by device what the blocks saw, which is kept until the
        next such call."""
        tokens = ids_1T.shape[1]
        if not self._seen or self._seen[0].tokens < tokens:
            devices: dict[torch.device, list[int]] = {}
            for layer, block in enumerate(self.blocks):
                devices.setdefault(block.output.get_parameter("weight").device, []).append(layer)
            groups = [Seen(layers, self.blocks, tokens) for layers in devices.values()]
            self._seen = {layer: group for group in groups for layer in group.layers}
        self.taps.seen = self._seen
        try:
            logits = self(ids_1T, cache, **options)
        finally:
            self.taps.seen = None
        return logits, list({id(group): group for group in self._seen.values()}.values())
