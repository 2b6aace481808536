"""The FF projections of a compact view: the kept neurons' weights, in the model's precision or quantised.

The weights lie in buffers that last from prompt to prompt, so that their addresses do not change. A layer that keeps
all of its neurons has the model's own weights, so that it is bit-identical to dense.

Quantised weights are made from those buffers, with what was fitted to the prompt. What is learned later stands beside
the quantised output weights, until there is so much of it that they are quantised anew.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from griffin.feedforward import gather
from griffin.quantization import quantize
from griffin.ridge import Correction
from griffin.views import view_of

# Tokens that are learned before quantised output weights are made anew.
BESIDE = 128


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

    @property
    def learned_bytes(self) -> int:
        """That a step reads of what is learned and not part of the weights."""
        return 0

    def learn(self, correction: Correction) -> None:
        """As `correct`, for what is learned while the projection is in use."""
        self.correct(correction)

    @torch.inference_mode(False)
    @torch.no_grad()
    def correct(self, correction: Correction) -> None:
        """Change what the kept neurons write, on top of earlier corrections of the same experts."""
        weight = self.module.weight.data
        basis_NK, weights_NH = correction.basis_NK.to(weight), correction.weights_NH.to(weight)
        left, right = (weights_NH, basis_NK) if self._neuron_dim else (basis_NK, weights_NH)
        weight.addmm_(left.T, right)  # reads and writes the weights once

    def written(self, inputs_NK: Tensor) -> Tensor:
        """What the kept neurons write, without the bias."""
        weight = self.module.weight.detach()
        return functional.linear(inputs_NK.to(weight.dtype), weight if self._neuron_dim else weight.T)

    def _buffer(self, name: str, shape: list[int], like: Tensor) -> nn.Parameter:
        """The module's parameter, in a memory that moves only when it grows."""
        if name not in self._memory or self._memory[name].numel() < prod(shape):
            self._memory[name] = like.new_empty(prod(shape))
            self._gathered.pop(name, None)
        if name not in self._gathered or list(self._gathered[name].shape) != shape:
            memory = self._memory[name][: prod(shape)].view(shape)
            self._gathered[name] = nn.Parameter(memory, requires_grad=False)
        self.module._parameters[name] = self._gathered[name]
        return self._gathered[name]


class QuantizedProjection(CompactProjection):
    """The same, quantised: the weights are gathered and corrected in a copy of the module in the model's precision."""

    def __init__(
        self, module: nn.Module, quantization: str, *, neurons_out: bool, parts: int, static: bool = False
    ) -> None:
        super().__init__(view_of(module), neurons_out=neurons_out, parts=parts)
        self.quantized: Any = module
        self._quantization, self._static = quantization, static
        self._whole = self._stale = False
        self._beside = _Beside(static)
        if not neurons_out:
            module.register_forward_hook(self._beside.add)

    def load(self, dense: nn.Module, neurons_K: Tensor | None) -> None:
        """As `CompactProjection.load`; all weights are quantised once."""
        if neurons_K is None and self._whole:
            return
        self._whole, self._stale = neurons_K is None, True
        super().load(dense, neurons_K)

    def correct(self, correction: Correction) -> None:
        """As `CompactProjection.correct`; quantised by `finish`."""
        super().correct(correction)
        self._stale = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self, *, learns: bool) -> None:
        """Quantise what was loaded and corrected, if anything was; `learns`: whether more may be learned later."""
        if self._stale:
            quantize(self.quantized, self._quantization, self.module, calls="compiled" if self._static else "eager")
            self._beside.clear(self.module, BESIDE if learns else 0)
            self._stale = False

    def learn(self, correction: Correction) -> None:
        """Stand beside the quantised weights; once there is no more room, become part of them."""
        if not self._beside.append(correction):
            self.correct(self._beside.held)  # all of it at once: weights in the model's precision are slow to change
            self.correct(correction)
            self.finish(learns=True)

    @property
    def learned_bytes(self) -> int:
        """That a step reads of what stands beside the weights, in the model's precision."""
        numbers = self._beside.basis_RK.shape[1] + self._beside.weights_RH.shape[1]
        return int(self._beside.used * numbers * self.module.weight.element_size())

    def written(self, inputs_NK: Tensor) -> Tensor:
        """What the kept neurons write, without the bias."""
        inputs_NK = inputs_NK.to(self.module.weight.dtype)
        written_NH = self._beside.add(self.quantized, (inputs_NK,), self.quantized.forward(inputs_NK))
        return written_NH if self.module.bias is None else written_NH - self.module.bias.detach()


class _Beside:
    """What is added to the output of quantised weights: R rows of factors, in buffers that stay."""

    def __init__(self, static: bool) -> None:
        self._static, self.used = static, 0
        self.basis_RK = self.weights_RH = torch.empty(0, 0)

    @property
    def held(self) -> Correction:
        """All that it holds."""
        return Correction(self.basis_RK[: self.used], self.weights_RH[: self.used])

    def clear(self, module: nn.Module, room: int) -> None:
        """Hold nothing, and have room for so many rows, for weights of this shape."""
        weight = module.get_parameter("weight")
        hidden, kept = weight.shape[:: -1 if isinstance(module, Conv1D) else 1]
        self.used = 0
        if self.basis_RK.shape != (room, kept):
            self.basis_RK, self.weights_RH = weight.new_zeros(room, kept), weight.new_zeros(room, hidden)
        self.weights_RH.zero_()

    @torch.inference_mode(False)
    @torch.no_grad()
    def append(self, correction: Correction) -> bool:
        """Hold one more; False where there is no room for it."""
        end = self.used + len(correction.basis_NK)
        if end > len(self.basis_RK):
            return False
        self.basis_RK[self.used : end] = correction.basis_NK
        self.weights_RH[self.used : end] = correction.weights_NH
        self.used = end
        return True

    def add(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Behind the projection."""
        rows = len(self.basis_RK) if self._static else self.used
        if not rows:
            return output
        return output + (args[0] @ self.basis_RK[:rows].T) @ self.weights_RH[:rows]
