"""Executors: three ways to run a model's FF blocks.

Dense is the model as it is. Compact computes with the kept neurons' weights only: one set of experts, for all rows of
the call. Masked sets the dropped activations to zero: every row of the call has its own experts, and the work is that
of the dense model. An executor is loaded, then switched on and off; loading anew while it is on takes effect at once.

Dimensions: B = rows of a batch, S = positions of one forward call, D = FF width, K = kept neurons, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin.activations import BlockHooks
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock
from griffin.offloading import bring, unwatch, watch
from griffin.token_statistics import TokenChoice

MODES = ("compact", "masked")

# On a CPU, columns of a matrix with more numbers than this are gathered by `torch.gather`, which uses all threads.
LARGE = 2**22


@dataclass(frozen=True, eq=False)
class Experts:
    """What a row computes with, layer by layer.

    Attributes:
        neurons: the kept neurons [K], int64, ascending. A layer that keeps all of them runs as in the dense model.
        corrections: what compensations add to the layer's output, one after the other.
        by_token: how each token chooses among these neurons, which are all; None: these are what is kept.
    """

    neurons: tuple[Tensor, ...]
    corrections: tuple[tuple[Correction, ...], ...]
    by_token: TokenChoice | None = None


class Masked:
    """Zeroes the activations of dropped neurons, for each row of the coming calls by itself."""

    def __init__(self, blocks: Sequence[FeedForwardBlock]) -> None:
        self._blocks = blocks
        self._hooks = BlockHooks(blocks)
        self._up_hooks: list[Any] = []
        self._up: dict[int, Tensor] = {}  # by layer, what the up projection gave in the call that runs
        self._rows: Sequence[Experts | None] = ()
        self._dropped: list[Tensor] = []

    def holds(self, rows: Sequence[Experts | None]) -> bool:
        """Whether these are the experts that were loaded last."""
        return len(rows) == len(self._rows) and all(new is old for new, old in zip(rows, self._rows, strict=True))

    def load(self, rows: Sequence[Experts | None]) -> None:
        """Take the experts of the rows of the coming calls; None: the row runs dense."""
        if self.holds(rows):
            return
        self._rows, self._dropped = tuple(rows), []
        for layer, block in enumerate(self._blocks):
            device = next(row.neurons[layer].device for row in rows if row is not None)
            dropped_BD = torch.zeros(len(rows), block.width, dtype=torch.bool, device=device)
            for dropped_D, row in zip(dropped_BD, rows, strict=True):
                if row is not None:
                    dropped_D.fill_(True).index_fill_(0, row.neurons[layer], False)
            self._dropped.append(dropped_BD.unsqueeze(1))

    def on(self) -> None:
        """Mask from the next forward call on."""
        self._hooks.attach(self._mask, self._correct)
        if not self._up_hooks and any(row and row.by_token and row.by_token.statistic.gate for row in self._rows):
            for layer, block in enumerate(self._blocks):
                if len(block.inputs) * block.parts > 1:
                    self._up_hooks.append(block.inputs[-1].register_forward_hook(partial(self._see_up, layer)))

    def off(self) -> None:
        """Mask no more."""
        self._hooks.detach()
        for handle in self._up_hooks:
            handle.remove()
        self._up_hooks, self._up = [], {}

    def unload(self) -> None:
        """Mask no more, and forget the experts."""
        self.off()
        self._rows, self._dropped = (), []

    def _mask(self, layer: int, z: Tensor) -> Tensor:
        dropped_B1D = self._dropped[layer]
        z_BSD = z.reshape(len(dropped_B1D), -1, z.shape[-1])  # some architectures flatten B and S
        masked_BSD = z_BSD.masked_fill(dropped_B1D, 0.0)
        up = self._up.pop(layer, None)
        for b, row in enumerate(self._rows):
            if row is not None and row.by_token is not None:
                up_SD = None if up is None else up.reshape(z_BSD.shape)[b]
                dropped_SD = row.by_token.dropped(layer, self._blocks[layer], z_BSD[b], up_SD)
                masked_BSD[b].masked_fill_(dropped_SD, 0.0)
        return masked_BSD.reshape(z.shape)

    def _see_up(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self._up[layer] = output.chunk(self._blocks[layer].parts, dim=-1)[-1]  # fused: gate, then up

    def _correct(self, layer: int, z: Tensor, output: Tensor) -> Tensor | None:
        corrected = {b: row for b, row in enumerate(self._rows) if row is not None and row.corrections[layer]}
        if not corrected:
            return None
        z_BSD = z.reshape(len(self._rows), -1, z.shape[-1])
        output_BSH = output.reshape(*z_BSD.shape[:2], -1).clone()
        for b, row in corrected.items():
            kept_SK = z_BSD[b].index_select(1, row.neurons[layer]).float()
            for correction in row.corrections[layer]:
                if (added_SH := correction.output(kept_SK)) is not None:
                    output_BSH[b] += added_SH.to(output.dtype)
        return output_BSH.view(output.shape)


class Compact:
    """Runs the blocks with the weights of one set of experts, gathered into buffers that last from prompt to prompt.

    A layer that keeps all of its neurons keeps its own weights, so that it is bit-identical to dense. The dense weights
    stay in memory for the next prompt; where they are offloaded, they come to the device for gathering only.
    """

    def __init__(self, blocks: Sequence[FeedForwardBlock]) -> None:
        self._blocks = blocks
        self._compact: dict[int, list[CompactProjection]] = {}  # by layer
        self._loaded: Experts | None = None
        self._learned = False  # whether more was added to the weights of the loaded experts than they say

    def holds(self, rows: Sequence[Experts | None]) -> bool:
        """Whether these are the experts that were loaded last."""
        return rows[0] is self._loaded

    def load(self, rows: Sequence[Experts | None]) -> None:
        """Gather the weights of the experts, which all rows share.

        Experts that differ from those loaded before in further corrections only are not gathered again.
        """
        (experts,) = {id(row): row for row in rows}.values()
        assert experts is not None
        if experts is self._loaded and not self._learned:
            return
        loaded, self._loaded = self._loaded, None  # nothing is whole before all of it is gathered
        goes_on = loaded is not None and not self._learned and _goes_on(experts, loaded)
        self._learned = False
        for layer, (block, neurons_K) in enumerate(zip(self._blocks, experts.neurons, strict=True)):
            if len(neurons_K) == block.width:
                continue
            corrections = experts.corrections[layer]
            if goes_on and loaded is not None:
                corrections = corrections[len(loaded.corrections[layer]) :]
            else:
                bring(block)
                for projection in self._projections(layer):
                    projection.gather(neurons_K)
            for correction in corrections:
                self._projections(layer)[-1].correct(correction)
        self._loaded = experts

    def learn(self, layer: int, correction: Correction) -> None:
        """Add to what the loaded experts write in a layer, until experts are loaded again."""
        self._learned = True
        self._projections(layer)[-1].correct(correction)

    def output(self, layer: int, kept_NK: Tensor) -> Tensor:
        """What the loaded experts write [N, H] at these activations of the kept neurons, the output bias included."""
        return self._projections(layer)[-1].output(kept_NK)

    def on(self) -> None:
        """Compute with the gathered weights from the next forward call on."""
        assert self._loaded is not None
        for layer, block in enumerate(self._blocks):
            if len(self._loaded.neurons[layer]) < block.width:
                for projection in self._compact[layer]:
                    projection.install()
                unwatch(block)
            elif layer in self._compact:  # experts that were loaded before may still be at work in it
                self._off(layer)

    def off(self) -> None:
        """Compute with the modules' own parameters, the same objects as before."""
        for layer in self._compact:
            self._off(layer)

    def unload(self) -> None:
        """Compute densely, and free the buffers."""
        self.off()
        self._compact, self._loaded = {}, None

    def _off(self, layer: int) -> None:
        for projection in self._compact[layer]:
            projection.uninstall()
        watch(self._blocks[layer])

    def _projections(self, layer: int) -> list[CompactProjection]:
        if layer not in self._compact:
            block = self._blocks[layer]
            self._compact[layer] = [
                *(CompactProjection(module, neurons_out=True, parts=block.parts) for module in block.inputs),
                CompactProjection(block.output, neurons_out=False, parts=1),
            ]
        return self._compact[layer]


def _goes_on(experts: Experts, before: Experts) -> bool:
    """Whether these are the same neurons with further corrections, if any."""
    corrections = zip(experts.corrections, before.corrections, strict=True)
    return experts.neurons is before.neurons and all(now[: len(then)] == then for now, then in corrections)


class CompactProjection:
    """A projection that can be switched between its own parameters and those of the kept neurons.

    Source: the generation phase of GRIFFIN, Wg[E], Wu[E], b1[E], Wd[:, E]; the output bias stays whole
    (arXiv 2404.01365).

    Args:
        module: the projection; its parameters are never written to.
        neurons_out: True where the neurons are the outputs (input projections), False where they are the inputs.
        parts: D-wide matrices stacked in the projection.
    """

    def __init__(self, module: nn.Module, *, neurons_out: bool, parts: int) -> None:
        self.module, self._neurons_out, self._parts = module, neurons_out, parts
        # What a Conv1D calls nf shapes its output; its weight does not.
        self._dense = {name: getattr(module, name) for name in ("weight", "bias", "nf") if hasattr(module, name)}
        self._compact: dict[str, object] = {}
        self._neuron_dim = int(neurons_out == isinstance(module, Conv1D))
        weight = self._weight()
        self._width = weight.shape[self._neuron_dim] // parts
        self._memory = weight.new_empty(0)
        self._bias_memory = weight.new_empty(0)

    @torch.inference_mode(False)
    @torch.no_grad()
    def gather(self, neurons_K: Tensor) -> None:
        """Copy the kept neurons' weights, and biases, into the buffers. Their addresses do not change with prompts."""
        weight = self._weight()
        rows = neurons_K.to(weight.device)
        if self._parts > 1:
            rows = torch.cat([rows + part * self._width for part in range(self._parts)])
        shape = list(weight.shape)
        shape[self._neuron_dim] = len(rows)
        compact = self._buffer("weight", "_memory", shape)
        if self._neuron_dim == 1 and weight.device.type == "cpu" and weight.numel() > LARGE:
            torch.gather(weight, 1, rows.expand(len(weight), -1), out=compact.data)
        else:
            torch.index_select(weight, self._neuron_dim, rows, out=compact.data)
        bias = self._dense.get("bias")
        if isinstance(bias, nn.Parameter):
            if self._neurons_out:
                torch.index_select(bias.detach(), 0, rows, out=self._buffer("bias", "_bias_memory", [len(rows)]).data)
            else:
                self._compact["bias"] = bias  # without the correction of an earlier prompt
        elif "bias" in self._dense:
            self._compact["bias"] = None
        if "nf" in self._dense:
            self._compact["nf"] = len(rows) if self._neurons_out else self._dense["nf"]

    @torch.inference_mode(False)
    @torch.no_grad()
    def correct(self, correction: Correction) -> None:
        """Change what the kept neurons write, on top of earlier corrections of the same experts."""
        weight = self._compact["weight"]
        assert isinstance(weight, nn.Parameter)
        if correction.basis_TK is not None and correction.weights_TH is not None:
            basis_TK, weights_TH = correction.basis_TK.to(weight.device), correction.weights_TH.to(weight.device)
            left, right = (weights_TH, basis_TK) if self._neuron_dim else (basis_TK, weights_TH)
            if weight.dtype == left.dtype:
                weight.data.addmm_(left.T, right)  # reads and writes the weights once
            else:
                weight.data.add_(left.T @ right)
        if correction.bias_H is not None:
            before = self._compact.get("bias")
            own = before.data if isinstance(before, nn.Parameter) else torch.zeros_like(correction.bias_H)
            corrected_H = own + correction.bias_H.to(own)
            self._buffer("bias", "_bias_memory", list(corrected_H.shape)).data.copy_(corrected_H)

    def output(self, inputs_NK: Tensor) -> Tensor:
        """What the projection makes of these inputs with the kept neurons, while its own parameters may be in place."""
        weight, bias = self._compact["weight"], self._compact.get("bias")
        assert isinstance(weight, nn.Parameter)
        output = inputs_NK @ (weight.data.T if self._neuron_dim else weight.data)
        return output + bias.data if isinstance(bias, nn.Parameter) else output

    def install(self) -> None:
        """Compute with the kept neurons from now on."""
        self._set(self._compact)

    def uninstall(self) -> None:
        """Compute with the module's own parameters, the same objects as before."""
        if self.module._parameters["weight"] is not self._dense["weight"]:
            self._set(self._dense)

    def _set(self, values: dict[str, object]) -> None:
        for name, value in values.items():
            if name in self.module._parameters:
                # As setattr does, without the checks that cost more than some products.
                self.module._parameters[name] = value  # type: ignore[assignment]
            else:
                setattr(self.module, name, value)

    def _weight(self) -> Tensor:
        weight = self._dense["weight"]
        assert isinstance(weight, nn.Parameter)
        return weight.detach()

    def _buffer(self, name: str, memory: str, shape: list[int]) -> nn.Parameter:
        """A parameter of this shape that lies at the beginning of a memory, which grows but never moves otherwise."""
        before = self._compact.get(name)
        if isinstance(before, nn.Parameter) and list(before.shape) == shape and before is not self._dense.get(name):
            return before
        if getattr(self, memory).numel() < prod(shape):
            setattr(self, memory, self._weight().new_empty(prod(shape)))
        parameter = nn.Parameter(getattr(self, memory)[: prod(shape)].view(shape), requires_grad=False)
        self._compact[name] = parameter
        return parameter
