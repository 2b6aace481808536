"""The compact view: its FF blocks compute with the kept neurons' weights only, one set of experts for all rows.

The weights lie in buffers that last from prompt to prompt, so that their addresses do not change. A layer that keeps
all of its neurons has the model's own weights, so that it is bit-identical to dense.

Dimensions: N = tokens, D = FF width, K = kept neurons, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from griffin.correction import Correction
from griffin.dense import DenseView
from griffin.experts import Experts
from griffin.feedforward import find_feedforward_blocks, gather
from griffin.views import Compiler, View


class CompactView(View):
    """The model on one set of experts."""

    def __init__(self, model: nn.Module, dense: DenseView, compiler: Compiler | None = None) -> None:
        super().__init__(model, compiler)
        self._dense = dense
        self._layers = [
            [
                *(CompactProjection(module, neurons_out=True, parts=block.parts) for module in block.inputs),
                CompactProjection(block.output, neurons_out=False, parts=1),
            ]
            for block in find_feedforward_blocks(self.module)
        ]
        self._loaded: ReferenceType[Experts] | None = None

    @property
    def projections(self) -> list[nn.Module]:
        """Those of all blocks."""
        return [projection.module for layer in self._layers for projection in layer]

    def holds(self, experts: Experts) -> bool:
        """Whether these are the experts that were loaded last."""
        return self._loaded is not None and self._loaded() is experts

    def load(self, experts: Experts) -> None:
        """Compute with these experts from the next call on; those that follow the loaded ones are not gathered anew."""
        if self.holds(experts):
            return
        before = self._loaded() if self._loaded is not None else None
        self._loaded = None  # nothing is complete before all of it is gathered
        goes_on = before is not None and experts.follows(before)
        for layer, (projections, neurons_K) in enumerate(zip(self._layers, experts.neurons, strict=True)):
            corrections: Sequence[Correction] = experts.corrections[layer]
            if goes_on and before is not None:
                corrections = corrections[len(before.corrections[layer]) :]
            else:
                block = self._dense.bring(layer)
                kept = None if len(neurons_K) == block.width and not self._dense.offloaded else neurons_K
                for projection, dense in zip(projections, block.projections, strict=True):
                    projection.load(dense, kept)
            for correction in corrections:
                projections[-1].correct(correction)
        self._loaded = ref(experts)

    def learn(self, corrections: dict[int, Correction]) -> None:
        """Add to what the loaded experts write, by layer. What they learn is not theirs: they are gathered anew when
        they are loaded again."""
        self._loaded = None
        for layer, correction in corrections.items():
            self._layers[layer][-1].correct(correction)

    def written(self, layer: int, kept_NK: Tensor) -> Tensor:
        """What the neurons of a layer write [N, H] at these activations, bias left out, with all that was learned."""
        return self._layers[layer][-1].written(kept_NK)


class CompactProjection:
    """A projection of a view, with the weights of the kept neurons.

    Source: the generation phase of GRIFFIN, Wg[E], Wu[E], b1[E], Wd[:, E]; the output bias stays (arXiv 2404.01365).
    """

    def __init__(self, module: nn.Module, *, neurons_out: bool, parts: int) -> None:
        self.module: Any = module
        self._neurons_out, self._parts = neurons_out, parts
        self._neuron_dim = int(neurons_out == isinstance(module, Conv1D))
        self._memory: dict[str, Tensor] = {}
        self._gathered: dict[str, nn.Parameter] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def load(self, dense: nn.Module, neurons_K: Tensor | None) -> None:
        """Take the kept neurons' weights, and biases, from the dense projection; None: share all of them."""
        weight = dense.get_parameter("weight").detach()
        parameters: dict[str, Any] = self.module._parameters
        bias = getattr(dense, "bias", None)
        parameters["weight"], parameters["bias"] = dense.get_parameter("weight"), bias
        count = weight.shape[self._neuron_dim]
        if neurons_K is not None:
            width, rows = count // self._parts, neurons_K.to(weight.device)
            if self._parts > 1:
                rows = torch.cat([rows + part * width for part in range(self._parts)])
            count = len(rows)
            shape = list(weight.shape)
            shape[self._neuron_dim] = count
            gather(weight, self._neuron_dim, rows, self._buffer("weight", shape, weight).data)
            if self._neurons_out and bias is not None:
                torch.index_select(bias.detach(), 0, rows, out=self._buffer("bias", [count], weight).data)
        if isinstance(self.module, Conv1D) and self._neurons_out:
            self.module.nf = count  # shapes its output; its weight does not
        elif isinstance(self.module, nn.Linear):
            self.module.out_features, self.module.in_features = parameters["weight"].shape

    @torch.inference_mode(False)
    @torch.no_grad()
    def correct(self, correction: Correction) -> None:
        """Change what the kept neurons write, on top of earlier corrections of the same experts."""
        weight = self.module.weight.data
        if correction.basis_TK is not None and correction.weights_TH is not None:
            basis_TK, weights_TH = correction.basis_TK.to(weight), correction.weights_TH.to(weight)
            left, right = (weights_TH, basis_TK) if self._neuron_dim else (basis_TK, weights_TH)
            weight.addmm_(left.T, right)  # reads and writes the weights once
        if correction.bias_H is not None:
            before = self.module._parameters["bias"]
            corrected_H = correction.bias_H.to(weight) + (0 if before is None else before.data)
            self._buffer("bias", list(corrected_H.shape), weight).data.copy_(corrected_H)

    def written(self, inputs_NK: Tensor) -> Tensor:
        """What the kept neurons write at these activations, without the bias."""
        weight = self.module.weight.detach()
        return functional.linear(inputs_NK.to(weight.dtype), weight if self._neuron_dim else weight.T)

    def _buffer(self, name: str, shape: list[int], like: Tensor) -> nn.Parameter:
        """The module's parameter, of this shape, at the beginning of a memory that moves only when it grows."""
        if name not in self._memory or self._memory[name].numel() < prod(shape):
            self._memory[name] = like.new_empty(prod(shape))
            self._gathered.pop(name, None)
        if name not in self._gathered or list(self._gathered[name].shape) != shape:
            memory = self._memory[name][: prod(shape)].view(shape)
            self._gathered[name] = nn.Parameter(memory, requires_grad=False)
        self.module._parameters[name] = self._gathered[name]
        return self._gathered[name]
