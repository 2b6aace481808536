"""The masked view: it sets the dropped activations to zero, for each row of a call by itself.

Every row has its own experts, and the work is that of the dense model. It is for batches that measure quality, and for
statistics by which each token chooses its own neurons.

Dimensions: B = rows of a batch, S = positions of one forward call, D = FF width, K = kept neurons, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from griffin.experts import Experts
from griffin.feedforward import FeedForwardBlock, find_feedforward_blocks
from griffin.views import Compiler, View


class Masks:
    """What the hooks of a masked view do."""

    def __init__(self, blocks: Sequence[FeedForwardBlock]) -> None:
        self._blocks = blocks
        self.rows: tuple[Experts | None, ...] = ()
        self._dropped: list[Tensor] = []
        self._gated = False
        self._up: dict[int, Tensor] = {}  # by layer, what the up projection gave in the call that runs

    def load(self, rows: Sequence[Experts | None]) -> None:
        """Take the experts of the rows of the coming calls; None: the row runs dense."""
        if len(rows) == len(self.rows) and all(new is old for new, old in zip(rows, self.rows, strict=True)):
            return
        self.rows, self._dropped = tuple(rows), []
        choices = [row.by_token for row in rows if row is not None and row.by_token is not None]
        self._gated = any(choice.statistic.gate for choice in choices)
        for layer, block in enumerate(self._blocks):
            device = next(row.neurons[layer].device for row in rows if row is not None)
            dropped_BD = torch.zeros(len(rows), block.width, dtype=torch.bool, device=device)
            for dropped_D, row in zip(dropped_BD, rows, strict=True):
                if row is not None:
                    dropped_D.fill_(True).index_fill_(0, row.neurons[layer], False)
            self._dropped.append(dropped_BD.unsqueeze(1))

    def mask(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        """Before the output projection of a layer, whose input is z."""
        z, dropped_B1D = args[0], self._dropped[layer]
        z_BSD = z.reshape(len(dropped_B1D), -1, z.shape[-1])  # some architectures flatten B and S
        masked_BSD = z_BSD.masked_fill(dropped_B1D, 0.0)
        up = self._up.pop(layer, None)
        for b, row in enumerate(self.rows):
            if row is not None and row.by_token is not None:
                up_SD = None if up is None else up.reshape(z_BSD.shape)[b]
                dropped_SD = row.by_token.dropped(layer, self._blocks[layer], z_BSD[b], up_SD)
                masked_BSD[b].masked_fill_(dropped_SD, 0.0)
        return masked_BSD.reshape(z.shape)

    def see_up(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Behind the projection that the up activations come from."""
        if self._gated:
            self._up[layer] = output.chunk(self._blocks[layer].parts, dim=-1)[-1]  # fused: gate, then up

    def correct(self, layer: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Behind the output projection of a layer: add each row's corrections."""
        corrected = {b: row for b, row in enumerate(self.rows) if row is not None and row.corrections[layer]}
        if not corrected:
            return None
        z_BSD = args[0].reshape(len(self.rows), -1, args[0].shape[-1])
        output_BSH = output.reshape(*z_BSD.shape[:2], -1).clone()
        for b, row in corrected.items():
            kept_SK = z_BSD[b].index_select(1, row.neurons[layer]).float()
            for correction in row.corrections[layer]:
                output_BSH[b] += correction.output(kept_SK).to(output.dtype)
        return output_BSH.view(output.shape)


class MaskedView(View):
    """The model with each row on its own experts."""

    def __init__(self, model: nn.Module, compiler: Compiler | None = None) -> None:
        super().__init__(model, compiler)
        self.masks = Masks(find_feedforward_blocks(model))
        for layer, block in enumerate(find_feedforward_blocks(self.module)):
            block.output.register_forward_pre_hook(partial(self.masks.mask, layer))
            block.output.register_forward_hook(partial(self.masks.correct, layer))
            if len(block.inputs) * block.parts > 1:
                block.inputs[-1].register_forward_hook(partial(self.masks.see_up, layer))

    def load(self, rows: Sequence[Experts | None]) -> None:
        """Run the rows of the coming calls on these experts; None: dense."""
        self.masks.load(rows)
