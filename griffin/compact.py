"""The compact view: its FF blocks compute with the kept neurons' weights only, one set of experts for all rows.

The weights lie in buffers that last from prompt to prompt, so that their addresses do not change. A layer that keeps
all of its neurons has the model's own weights, so that it is bit-identical to dense.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from math import prod
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from griffin.feedforward import UnsupportedModelError, find_feedforward_blocks, gather
from griffin.hooked import DenseView
from griffin.ridge import Correction
from griffin.selection import Experts
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
        self._loaded: Callable[[], Experts | None] = lambda: None

    @property
    def projections(self) -> list[nn.Module]:
        """Those of all blocks."""
        return [projection.module for layer in self._layers for projection in layer]

    def holds(self, experts: Experts) -> bool:
        """Whether these are the experts that were loaded last."""
        return self._loaded() is experts

    def load(self, experts: Experts) -> None:
        """Compute with these experts; those that follow the loaded ones are not gathered anew."""
        if self.holds(experts):
            return
        before = self._loaded()
        self._loaded = lambda: None  # nothing is complete before all of it is gathered
        if before is not None and not experts.follows(before):
            before = None
        for layer, (projections, neurons_K) in enumerate(zip(self._layers, experts.neurons, strict=True)):
            if before is None:
                block = self._dense.bring(layer)
                kept = None if len(neurons_K) == block.width and not self._dense.offloaded else neurons_K
                for projection, dense in zip(projections, block.projections, strict=True):
                    projection.load(dense, kept)
            for correction in experts.corrections[layer][0 if before is None else len(before.corrections[layer]) :]:
                projections[-1].correct(correction)
        self._loaded = ref(experts)

    def learn(self, corrections: Iterable[tuple[int, Correction]]) -> None:
        """Add to what the loaded experts write, by layer, until any are loaded again."""
        self._loaded = lambda: None
        for layer, correction in corrections:
            self._layers[layer][-1].correct(correction)

    def written(self, layer: int, kept_NK: Tensor) -> Tensor:
        """What a layer's neurons write [N, H] at N tokens, with all that was learned and without the bias."""
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


def compact_model(model: nn.Module, experts: Experts) -> Any:
    """A model of the same class on one set of experts, which shares all but its FF weights with the dense one.

    Its `save_pretrained` writes a checkpoint that `from_pretrained` loads, or raises an `UnsupportedModelError` that
    says why the architecture has no config for it.
    """
    view = CompactView(model, DenseView(model))
    view.load(experts)
    pruned = view.module
    try:
        widths = {block.width for block in find_feedforward_blocks(model)}
        pruned.config = _config(pruned, widths, {len(neurons_K) for neurons_K in experts.neurons})
    except UnsupportedModelError as reason:
        message = str(reason)

        def save_pretrained(*_: Any, **__: Any) -> None:
            raise UnsupportedModelError(message)

        pruned.save_pretrained = save_pretrained
    return pruned


def _config(pruned: Any, dense: set[int], widths: set[int]) -> Any:
    """The config of a model of these shapes."""
    if len(widths) > 1:
        raise UnsupportedModelError(
            f"layers keep {min(widths)} to {max(widths)} neurons: a checkpoint has one FF width; expected "
            "budget='uniform' and one sparsity"
        )
    (width,) = widths
    shapes = {name: value.shape for name, value in pruned.state_dict().items()}
    text = pruned.config.get_text_config(decoder=True)
    names = [name for name, value in vars(text).items() if isinstance(value, int) and value in dense]
    # Some have none, and make a multiple of the hidden size of it.
    names += [name for name, value in vars(text).items() if value is None]
    for name in names:
        config = copy.deepcopy(pruned.config)
        setattr(config.get_text_config(decoder=True), name, width)
        try:
            with torch.device("meta"):
                made = type(pruned)._from_config(config)
        except (ValueError, TypeError, RuntimeError, AssertionError, AttributeError, KeyError, ZeroDivisionError):
            continue  # not what says the FF width
        if {key: value.shape for key, value in made.state_dict().items()} == shapes:
            return config
    raise UnsupportedModelError(
        f"{type(pruned).__name__} has no config for an FF width of {width} with these biases: it cannot be saved as a "
        "checkpoint"
    )
