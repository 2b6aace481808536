"""The compact view: its FF blocks compute with the kept neurons' weights only, one set of experts for all rows.

A quantised view has all of its linear layers quantised: attention once, the kept neurons' weights when they are loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from griffin.feedforward import UnsupportedModelError, find_feedforward_blocks
from griffin.hooked import DenseView
from griffin.projection import CompactProjection, QuantizedProjection
from griffin.quantization import linear_layers, quantize, together
from griffin.ridge import Correction
from griffin.selection import Experts
from griffin.views import Compiler, View, view_of


class CompactView(View):
    """The model on one set of experts, in one precision."""

    def __init__(
        self, model: nn.Module, dense: DenseView, compiler: Compiler | None = None, quantization: str = "none"
    ) -> None:
        super().__init__(model, compiler)
        self._dense, self.quantization = dense, quantization
        kind: Any = CompactProjection
        if quantization != "none":
            kind = partial(QuantizedProjection, quantization=quantization, static=compiler is not None)
        blocks = find_feedforward_blocks(self.module)
        self._layers: list[list[Any]] = [
            [
                *(kind(module, neurons_out=True, parts=block.parts) for module in block.inputs),
                kind(block.output, neurons_out=False, parts=1),
            ]
            for block in blocks
        ]
        self._experts: Callable[[], Experts | None] = lambda: None  # those that were loaded last
        self._loaded: list[list[ref[Any]]] = []  # by layer, the neurons and corrections that the weights are made of
        # What a view of this one has in common with it: layers whose weights change or are packed.
        self.shared = [module for block in blocks for module in block.projections]
        calls = "eager" if compiler is None else "compiled"
        self._quantize = partial(quantize, quantization=quantization, calls=calls)
        self._packs = calls == "eager" and next(model.parameters()).device.type == "cpu"
        self._head = self.module.get_output_embeddings() if quantization != "none" else None  # until it is quantised
        self.head = self._head and view_of(self._head)  # as it was
        if quantization != "none":
            others = [layer for layer in linear_layers(self.module) if layer not in {*self.shared, self._head}]
            together((partial(self._quantize, layer) for layer in others), packing=self._packs)
            self.shared += others

    @property
    def learned_bytes(self) -> int:
        """That a step reads of what was learned and is not part of the weights yet."""
        return sum(projections[-1].learned_bytes for projections in self._layers)

    def quantize_head(self) -> None:
        """Have the output embedding quantised too; a draft that has some rows of it does without."""
        if self._head is not None:
            self._quantize(self._head)
            self._head = None

    def holds(self, experts: Experts) -> bool:
        """Whether these were loaded last."""
        return self._experts() is experts

    def load(self, experts: Experts) -> None:
        """Compute with these experts; those that were loaded, with further corrections, are not gathered anew."""
        if self.holds(experts):
            return
        by_layer: list[tuple[Any, ...]] = [
            (neurons_K, *added) for neurons_K, added in zip(experts.neurons, experts.corrections, strict=True)
        ]
        loaded = self._loaded
        # What was loaded may be what these experts begin with.
        follows = len(loaded) == len(by_layer) and all(
            len(old) <= len(parts) and all(one() is part for one, part in zip(old, parts, strict=False))
            for old, parts in zip(loaded, by_layer, strict=True)
        )
        loaded = loaded if follows else [[] for _ in by_layer]
        self._forget()  # nothing is complete before all of it is gathered
        for layer, (projections, parts) in enumerate(zip(self._layers, by_layer, strict=True)):
            if not loaded[layer]:
                block, neurons_K = self._dense.bring(layer), experts.neurons[layer]
                kept = None if len(neurons_K) == block.width and not self._dense.offloaded else neurons_K
                for projection, dense in zip(projections, block.projections, strict=True):
                    projection.load(dense, kept)
            for correction in parts[max(1, len(loaded[layer])) :]:
                projections[-1].correct(correction)
        if self.quantization != "none":
            learns = bool(experts.fits)
            projections = [projection for layer in self._layers for projection in layer]
            together((partial(one.finish, learns=learns) for one in projections), packing=self._packs)
        self._experts, self._loaded = ref(experts), [[ref(part) for part in parts] for parts in by_layer]

    def _forget(self) -> None:
        self._experts, self._loaded = (lambda: None), []

    def learn(self, corrections: Iterable[tuple[int, Correction]]) -> None:
        """Add to what the loaded experts write, by layer, until any are loaded again."""
        self._forget()
        for layer, correction in corrections:
            self._layers[layer][-1].learn(correction)

    def written(self, layer: int, kept_NK: Tensor) -> Tensor:
        """What a layer's neurons write [N, H] at N tokens, with all that was learned and without the bias."""
        output: CompactProjection = self._layers[layer][-1]
        return output.written(kept_NK)


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
