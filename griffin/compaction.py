"""Compact weights: during generation a block computes with the kept neurons' weights only.

Each projection keeps one buffer for its kept neurons for as long as the pruner lives, and gathers whole rows into
it. Where a projection stores its neurons as columns (the output projection of most models), a transposed copy is
made once to gather from: gathering columns costs more than twice as much. So compact mode holds, on top of
the dense model, the kept share of all FF weights and one more copy of those that lie the wrong way round.

Dimensions: D = FF width, H = the other dimension of a projection, K = kept neurons.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin.compensation import Correction
from griffin.feedforward import FeedForwardBlock, weight_out_in


class CompactProjection:
    """A projection that can be switched between its own parameters and those of the kept neurons.

    Args:
        module: the projection; its parameters are never written to.
        neurons_out: True where the neurons are the outputs (input projections), False where they are the inputs.
        parts: D-wide matrices stacked in the projection.
        kept: K.
    """

    def __init__(self, module: nn.Module, *, neurons_out: bool, parts: int, kept: int) -> None:
        self.module = module
        self.parts = parts
        weight = weight_out_in(module).detach()
        rows_DH = weight if neurons_out else weight.T
        self._width = rows_DH.shape[0] // parts
        self._source_DH = rows_DH.contiguous()  # the weight itself where it is row-major already
        self._buffer_KH = self._source_DH.new_empty(parts * kept, rows_DH.shape[1])

        compact = self._buffer_KH if neurons_out else self._buffer_KH.T
        stored = compact.T if isinstance(module, Conv1D) else compact
        self._compact: dict[str, object] = {"weight": nn.Parameter(stored, requires_grad=False)}
        self._bias_D = getattr(module, "bias", None) if neurons_out else None
        if self._bias_D is not None:
            self._bias_buffer_K = self._bias_D.detach().new_empty(parts * kept)
            self._compact["bias"] = nn.Parameter(self._bias_buffer_K, requires_grad=False)
        if neurons_out and isinstance(module, Conv1D):
            self._compact["nf"] = parts * kept  # Conv1D shapes its output by this number, not by its weight
        self._dense = {name: getattr(module, name) for name in self._compact}

    def gather(self, experts_K: Tensor) -> None:
        """Copy the kept neurons' weights, and biases, into the buffers."""
        experts_K = experts_K.to(self._source_DH.device)
        rows = torch.cat([experts_K + part * self._width for part in range(self.parts)])
        torch.index_select(self._source_DH, 0, rows, out=self._buffer_KH)
        if self._bias_D is not None:
            torch.index_select(self._bias_D.detach(), 0, rows, out=self._bias_buffer_K)

    def correct(self, correction: Correction) -> None:
        """Change what the neurons that were gathered last write; the next `gather` begins from the weights again."""
        change_1KH = correction.change()
        if change_1KH is not None:
            self._buffer_KH.add_(change_1KH[0].to(self._buffer_KH.device))
        if correction.bias_BH is not None:
            bias = self._dense.setdefault("bias", self.module.bias)
            bias_H = correction.bias_BH[0].to(self._buffer_KH)
            corrected_H = bias.detach() + bias_H if isinstance(bias, Tensor) else bias_H
            self._compact["bias"] = nn.Parameter(corrected_H, requires_grad=False)

    def install(self) -> None:
        """Compute with the kept neurons from now on."""
        for name, value in self._compact.items():
            setattr(self.module, name, value)

    def uninstall(self) -> None:
        """Compute with the module's own parameters, the same objects as before."""
        for name, value in self._dense.items():
            setattr(self.module, name, value)


class CompactBlock:
    """An FF block that can be switched to `kept` of its neurons. The output bias stays whole."""

    def __init__(self, block: FeedForwardBlock, kept: int) -> None:
        self.projections = [
            CompactProjection(module, neurons_out=True, parts=block.parts, kept=kept) for module in block.inputs
        ]
        self.projections.append(CompactProjection(block.output, neurons_out=False, parts=1, kept=kept))

    def install(self, experts_K: Tensor, correction: Correction | None = None) -> None:
        """Gather the weights of these neurons [K], correct what they write, and compute with them.

        Source: the generation phase of GRIFFIN, Wg[E], Wu[E], b1[E], Wd[:, E] (arXiv 2404.01365).
        """
        for projection in self.projections:
            projection.gather(experts_K)
        if correction is not None:
            self.projections[-1].correct(correction)
        for projection in self.projections:
            projection.install()

    def uninstall(self) -> None:
        """Compute with all neurons."""
        for projection in self.projections:
            projection.uninstall()
