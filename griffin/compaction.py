"""Compact weights: during generation a block computes with the kept neurons' weights only.

Each projection keeps one buffer for its kept neurons from prompt to prompt and gathers whole rows into it, so nothing
is allocated after the first prompt. Nothing here waits for the device.

On a CPU, in float32 and float64, a single token reads the kept neurons' rows one by one, which is faster than a product
with them (`griffin.in_place`). So the first tokens after a prompt read them where they are in the dense weights and
nothing is copied for them; rows that stand together are read faster still, so from `COPY_AFTER` tokens on they do. The
results are the same to the bit. Several tokens at once multiply with the copies (a few of them in pieces:
`griffin.in_pieces`), and an output projection whose weights are corrected has them from the beginning.

Where a projection stores its neurons as columns (the output projection of most models), a transposed copy is made once
to read from: columns cost more than twice as much. So compact mode holds, on top of the dense model, one more copy of
the weights that lie the wrong way round and, once it has gathered, the kept share of all FF weights.

Where the dense weights are offloaded, a block's are brought to the device for gathering and no transposed copy is
kept: the device holds the kept share alone.

Dimensions: D = FF width, H = the other dimension of a projection, K = kept neurons.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock
from griffin.in_pieces import FEW, dot_products, weighted_sums
from griffin.in_place import DotProducts, WeightedSum, can_read
from griffin.offloading import bring, unwatch, watch

# Reading rows that stand together saves, per token, about a quarter of the time that gathering them takes (measured on
# models of 135M to 1.1B): copying pays from here on, and whoever stops before has not paid for it.
COPY_AFTER = 4


class CompactProjection:
    """A projection that can be switched between its own parameters and those of the kept neurons.

    Args:
        module: the projection; its parameters are never written to.
        neurons_out: True where the neurons are the outputs (input projections), False where they are the inputs.
        parts: D-wide matrices stacked in the projection.
        offloaded: True where the weight comes to the device now and then: it must be there for `__init__` and `keep`.
        compiled: True where the module is going to be compiled, so that its weights must stand in one place.
    """

    def __init__(self, module: nn.Module, *, neurons_out: bool, parts: int, offloaded: bool, compiled: bool) -> None:
        self.module = module
        self.parts = parts
        self._neurons_out = neurons_out
        # What a Conv1D calls nf shapes its output; its weight does not.
        self._dense = {name: getattr(module, name) for name in ("weight", "bias", "nf") if hasattr(module, name)}
        rows_DH = self._neurons()
        self._width = rows_DH.shape[0] // parts
        self._source_DH = None if offloaded else rows_DH.contiguous()  # the weight itself where it is row-major already
        self._buffer_KH = rows_DH.new_empty(0, rows_DH.shape[1])
        self._bias_D = getattr(module, "bias", None) if neurons_out else None
        self._kept = 0
        self._gathered = self._replaced = False
        # Whoever gave the module a forward of its own wants it called, as accelerate does.
        self._reads_rows = can_read(rows_DH) and not compiled and "forward" not in vars(module)

    def keep(self, experts_K: Tensor) -> None:
        """The kept neurons from now on, until `install` only by name."""
        experts_K = experts_K.to(self._buffer_KH.device)
        self._rows = experts_K
        if self.parts > 1:
            self._rows = torch.cat([experts_K + part * self._width for part in range(self.parts)])
        self._gathered = False
        self._tokens = 0
        if self._source_DH is None or not self._reads_rows:
            self.gather()

    def gather(self) -> None:
        """Copy the kept neurons' weights, and biases, into the buffers, unless they are there."""
        if self._gathered:
            return
        if len(self._rows) != self.parts * self._kept:
            self._make_room(len(self._rows) // self.parts)
        source_DH = self._neurons() if self._source_DH is None else self._source_DH
        torch.index_select(source_DH, 0, self._rows, out=self._rows_KH)
        if self._bias_D is not None:
            torch.index_select(self._bias_D.detach(), 0, self._rows, out=self._bias_K)
        self._compact = dict(self._parameters)  # without the correction of an earlier prompt
        self._gathered = True

    def correct(self, correction: Correction) -> None:
        """Change what the kept neurons write, on top of earlier changes; `keep` begins anew."""
        self.gather()
        change_1KH = correction.change()
        if change_1KH is not None:
            self._rows_KH.add_(change_1KH[0].to(self._rows_KH.device))
        if correction.bias_BH is not None:
            bias, bias_H = self._dense.get("bias"), correction.bias_BH[0].to(self._rows_KH)
            corrected_H = bias.detach() + bias_H if isinstance(bias, Tensor) else bias_H
            self._compact["bias"] = nn.Parameter(corrected_H, requires_grad=False)

    def install(self) -> None:
        """Compute with the kept neurons from now on."""
        if self._gathered:
            self._install_copies()
        if self._reads_rows:
            self._read_rows = self._reader()
            vars(self.module)["forward"] = self._forward  # as setting an attribute does, at a tenth of the time

    def uninstall(self) -> None:
        """Compute with the module's own parameters, the same objects as before."""
        if self._reads_rows:
            vars(self.module).pop("forward", None)  # uncovers the class's own
        if self._replaced:
            for name, value in self._dense.items():
                setattr(self.module, name, value)
            self._replaced = False

    def _install_copies(self) -> None:
        self._replaced = True
        for name, value in self._compact.items():
            setattr(self.module, name, value)

    def _reader(self) -> DotProducts | WeightedSum:
        """Reads the kept rows where they are, or in the buffer, which may be corrected: the same to the bit."""
        if self._gathered:
            matrix, rows, weights = self._rows_KH, torch.arange(len(self._rows)), self._dense | self._compact
        else:
            assert self._source_DH is not None
            matrix, rows, weights = self._source_DH, self._rows, self._dense
        bias = weights.get("bias")
        own = bias.detach() if isinstance(bias, Tensor) else None
        if not self._neurons_out:
            return WeightedSum(matrix, rows, own)
        return DotProducts(matrix, rows, own if self._gathered or own is None else own[rows])

    def _forward(self, x: Tensor) -> Tensor:
        """The module's forward with the kept neurons: one token reads their rows, more multiply with the copies."""
        tokens = x.numel() // x.shape[-1]
        plain = (torch.is_grad_enabled() and x.requires_grad) or torch.is_autocast_enabled("cpu")
        if tokens == 1 and not plain:
            self._tokens += 1
            if self._tokens > COPY_AFTER and not self._gathered:
                self.gather()
                self._read_rows = self._reader()
            return self._read_rows(x.flatten()).view(*x.shape[:-1], -1)
        self.gather()
        if tokens <= FEW and not plain:
            return self._multiply_rows(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        if not self._replaced:
            self._install_copies()
        output: Tensor = type(self.module).forward(self.module, x)
        return output

    def _multiply_rows(self, x: Tensor) -> Tensor:
        products = (dot_products if self._neurons_out else weighted_sums)(x, self._rows_KH)
        bias = (self._dense | self._compact).get("bias")
        return products.add_(bias.detach()) if isinstance(bias, Tensor) else products

    def _neurons(self) -> Tensor:
        """[parts * D, H], a view: the dense weights of the projection, a row for each neuron."""
        weight: Tensor = self._dense["weight"].detach()
        return weight.T if isinstance(self.module, Conv1D) == self._neurons_out else weight

    def _make_room(self, kept: int) -> None:
        """Parameters for K neurons, in the buffer that there is where it is large enough."""
        self._kept = kept
        rows = self.parts * kept
        # Buffers made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            if rows > len(self._buffer_KH):
                self._buffer_KH = self._buffer_KH.new_empty(rows, self._buffer_KH.shape[1])
            self._rows_KH = self._buffer_KH[:rows]
            compact = self._rows_KH if self._neurons_out else self._rows_KH.T
            stored = compact.T if isinstance(self.module, Conv1D) else compact
            self._parameters: dict[str, object] = {"weight": nn.Parameter(stored, requires_grad=False)}
            if self._bias_D is not None:
                self._bias_K = self._bias_D.detach().new_empty(rows)
                self._parameters["bias"] = nn.Parameter(self._bias_K, requires_grad=False)
            if self._neurons_out and isinstance(self.module, Conv1D):
                self._parameters["nf"] = rows


class CompactBlock:
    """An FF block that can be switched to some of its neurons. The output bias stays whole."""

    def __init__(self, block: FeedForwardBlock, *, offloaded: bool, compiled: bool) -> None:
        self.projections = [
            CompactProjection(module, neurons_out=True, parts=block.parts, offloaded=offloaded, compiled=compiled)
            for module in block.inputs
        ]
        self.projections.append(
            CompactProjection(block.output, neurons_out=False, parts=1, offloaded=offloaded, compiled=compiled)
        )

    def install(self, experts_K: Tensor, correction: Correction | None = None) -> None:
        """Compute with these neurons [K] only, and correct what they write.

        Source: the generation phase of GRIFFIN, Wg[E], Wu[E], b1[E], Wd[:, E] (arXiv 2404.01365).
        """
        for projection in self.projections:
            projection.keep(experts_K)
        self.reinstall(correction)

    def reinstall(self, correction: Correction | None) -> None:
        """Compute with the neurons that were kept last, corrected once more."""
        if correction is not None:
            self.projections[-1].correct(correction)
        for projection in self.projections:
            projection.install()

    def uninstall(self) -> None:
        """Compute with all neurons."""
        for projection in self.projections:
            projection.uninstall()


class Compaction:
    """Makes all blocks compute with their experts' weights only, while attached: one expert set for all rows.

    A block that keeps all of its neurons keeps its own weights, so that it is bit-identical to dense. The first prompt
    that needs buffers makes them; they last as long as this object.

    Args:
        blocks: the FF blocks, in layer order.
        compiled: True where the model's call is compiled: the kept neurons' weights are always copied.
    """

    def __init__(self, blocks: Sequence[FeedForwardBlock], *, compiled: bool = False) -> None:
        self._blocks, self._compiled = blocks, compiled
        self._compact: list[CompactBlock | None] = [None] * len(blocks)
        self._at_work: dict[int, CompactBlock] = {}  # by layer

    def attach(self, experts: Sequence[Tensor], corrections: Iterable[Correction | None] | None = None) -> None:
        """Compute with these experts from the next forward call on.

        Args:
            experts: per layer, the kept neurons: [1, K].
            corrections: per layer, what a compensation adds for these experts; None: nothing.
        """
        for layer, (experts_1K, correction) in enumerate(zip(experts, corrections or repeat(None), strict=False)):
            block, compact = self._blocks[layer], self._compact[layer]
            if experts_1K.shape[1] == block.width:
                continue
            offloaded = bring(block)
            if compact is None:
                with torch.inference_mode(False):
                    compact = self._compact[layer] = CompactBlock(block, offloaded=offloaded, compiled=self._compiled)
            self._at_work[layer] = compact
            compact.install(experts_1K[0], correction)
            unwatch(block)

    def pause(self) -> None:
        """Compute with all neurons, until `resume`."""
        for layer, compact in self._at_work.items():
            compact.uninstall()
            watch(self._blocks[layer])

    def resume(self, added: Sequence[Correction | None]) -> None:
        """Compute with the same experts again, and these corrections on top of what was corrected before."""
        for layer, compact in self._at_work.items():
            compact.reinstall(added[layer])
            unwatch(self._blocks[layer])

    def detach(self) -> None:
        """Compute with all neurons."""
        self.pause()
        self._at_work = {}
