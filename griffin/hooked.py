"""Views with hooks: the dense view records and shows activations, the masked view sets dropped ones to zero.

In the masked view every row of a batch has its own experts, and the work is that of the dense model: it is for batches
that measure quality, and for statistics by which each token chooses its own neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from griffin.activations import Recorder
from griffin.feedforward import FeedForwardBlock, find_feedforward_blocks
from griffin.kv_cache import KVCache
from griffin.offloading import Offloaded
from griffin.quantization import linear_layers, quantize
from griffin.refresh import Seen
from griffin.selection import Experts
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
    """The model as it is; `blocks` are the FF blocks of the view, none where it will not be pruned."""

    def __init__(
        self, model: nn.Module, *, pruning: bool = True, compiler: Compiler | None = None, offloaded: bool = False
    ) -> None:
        super().__init__(model, compiler)
        self.blocks = find_feedforward_blocks(self.module) if pruning else []
        self.taps = Taps()
        for layer, block in enumerate(self.blocks):
            block.output.register_forward_hook(partial(self.taps.block, layer))
        if self.blocks:
            self.module.get_decoder().register_forward_hook(self.taps.decoder)
        self.offloaded = Offloaded(self.blocks, self.module.device) if offloaded else None  # FF weights in host memory
        self._groups: list[Seen] = []  # by device
        self._seen: dict[int, Seen] = {}  # the same by layer

    def bring(self, layer: int) -> FeedForwardBlock:
        """A block with its weights on the device, until another one is asked for or runs."""
        if self.offloaded is not None:
            self.offloaded.bring(layer)
        return self.blocks[layer]

    def recording(
        self, ids_BS: Tensor, cache: KVCache, recorder: Recorder, *, hidden: bool = False, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The logits of a call that a recorder expects, and the last hidden states [B, S, H] where they are wanted."""
        taps, states = self.taps, list[Tensor]()
        taps.recorder, taps.hidden = recorder, states if hidden else None
        try:
            logits = self(ids_BS, cache, **options)
        finally:
            taps.recorder = taps.hidden = None
        return logits, states[0] if hidden else None

    def watching(self, ids_1T: Tensor, cache: KVCache, **options: Any) -> tuple[Tensor, list[Seen]]:
        """The logits of a call of one row, and by device what the blocks saw, which is kept until the next one."""
        tokens = ids_1T.shape[1]
        if not self._groups or self._groups[0].z_LTD.shape[1] < tokens:
            devices: dict[torch.device, list[int]] = {}
            for layer, block in enumerate(self.blocks):
                devices.setdefault(block.output.get_parameter("weight").device, []).append(layer)
            self._groups = [Seen(layers, self.blocks, tokens) for layers in devices.values()]
            self._seen = {layer: group for group in self._groups for layer in group.layers}
        self.taps.seen = self._seen
        try:
            logits = self(ids_1T, cache, **options)
        finally:
            self.taps.seen = None
        return logits, self._groups


class Masks:
    """What the hooks of a masked view do. It does not know the view: what is in no cycle is freed at once."""

    def __init__(self, blocks: Sequence[FeedForwardBlock]) -> None:
        self._blocks = blocks
        self._rows: tuple[Experts | None, ...] = ()
        self._dropped: list[Tensor] = []  # by layer, which neurons each row drops [B, 1, D]
        self._gated = False
        self._weights: dict[tuple[int, int], Tensor] = {}  # by layer and row, what quantised rows write by
        self._up: dict[int, Tensor] = {}  # by layer, what the up projection gave in the call that runs

    def load(self, rows: Sequence[Experts | None]) -> None:
        """Take the experts of the rows; None: dense."""
        if len(rows) == len(self._rows) and all(new is old for new, old in zip(rows, self._rows, strict=True)):
            return
        self._rows, self._dropped = tuple(rows), []
        self._weights.clear()
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
        for b, row in enumerate(self._rows):
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
        corrected = {
            b: row
            for b, row in enumerate(self._rows)
            if row is not None and (row.corrections[layer] or row.quantization != "none")
        }
        if not corrected:
            return None
        z_BSD = args[0].reshape(len(self._rows), -1, args[0].shape[-1])
        output_BSH = output.reshape(*z_BSD.shape[:2], -1).clone()
        for b, row in corrected.items():
            kept_SK = z_BSD[b].index_select(1, row.neurons[layer]).float()
            if row.quantization != "none":
                bias: Any = getattr(module, "bias", None)
                written_SH = functional.linear(kept_SK, self._output_weights(layer, row)).to(output.dtype)
                output_BSH[b] = written_SH if bias is None else written_SH + bias
                continue
            for correction in row.corrections[layer]:
                output_BSH[b] += correction.output(kept_SK).to(output.dtype)
        return output_BSH.view(output.shape)

    def _output_weights(self, layer: int, row: Experts) -> Tensor:
        """Quantised: each row has output weights of its own, as it has them in the compact view."""
        key = layer, id(row)
        if key not in self._weights:
            self._weights[key] = row.output_weights(layer, self._blocks[layer])
        return self._weights[key]


class MaskedView(View):
    """The model with each row on the experts that were loaded for it last, in one precision."""

    def __init__(self, model: nn.Module, compiler: Compiler | None = None, quantization: str = "none") -> None:
        super().__init__(model, compiler)
        masks = Masks(find_feedforward_blocks(model))
        self.load, blocks = masks.load, find_feedforward_blocks(self.module)
        if quantization != "none":
            for linear in {*linear_layers(self.module)} - {block.output for block in blocks}:
                quantize(linear, quantization, calls="masked")
        for layer, block in enumerate(blocks):
            block.output.register_forward_pre_hook(partial(masks.mask, layer))
            block.output.register_forward_hook(partial(masks.correct, layer))
            if len(block.inputs) * block.parts > 1:
                block.inputs[-1].register_forward_hook(partial(masks.see_up, layer))
