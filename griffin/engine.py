"""The engine: the views of a model, and the KV cache that lasts from prompt to prompt."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from griffin.compact import CompactView
from griffin.draft_vocabulary import DraftView
from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks
from griffin.hooked import DenseView, MaskedView
from griffin.kv_cache import KVCache
from griffin.selection import Experts
from griffin.views import Compiler, View

# How rows run on their experts.
MODES = ("compact", "masked")


class Engine:
    """Runs rows of a model dense or on experts. The model itself is never touched.

    Args:
        pruning: whether the model will be pruned; one that only runs dense may have any FF blocks.
        mode: how pruned calls run: `masked`; `compact` or `auto`: compact where all rows share their experts, else
            masked. Rows whose tokens choose for themselves are always masked.
        compiler: what compiles decoding steps, see `griffin.compiled_call`; None: nothing.
        offload_dense: whether the FF weights are in host memory, see `griffin.offloading`.

    Raises:
        UnsupportedModelError: the model has an FF block that cannot be pruned.
        ValueError: an unknown mode, or `offload_dense` without `pruning`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pruning: bool = True,
        mode: str = "auto",
        compiler: Compiler | None = None,
        offload_dense: bool = False,
    ) -> None:
        if mode not in ("auto", *MODES):
            raise ValueError(f"mode={mode!r}: expected one of auto, {', '.join(MODES)}")
        if offload_dense and not pruning:
            raise ValueError("offload_dense=True with pruning=False: expected pruning=True, which finds the FF weights")
        self.model: Any = model
        # Of the model, in layer order; none without pruning. Views have blocks of their own.
        self.blocks: list[FeedForwardBlock] = find_feedforward_blocks(model) if pruning else []
        self.widths = [block.width for block in self.blocks]
        self.compiled = compiler is not None
        self.lock = threading.RLock()  # for calls of several threads, which wait
        self.mode, self._compiler, self._offload = mode, compiler, offload_dense
        # Views by precision.
        self._compact: dict[str, CompactView] = {}
        self._masked: dict[str, MaskedView] = {}
        self._draft: dict[str, DraftView] = {}
        self._cache: KVCache | None = None

    @property
    def device(self) -> torch.device:
        """Of the model's inputs."""
        device: torch.device = self.model.device
        return device

    @cached_property
    def dense(self) -> DenseView:
        """The model as it is."""
        return DenseView(self.model, pruning=bool(self.blocks), compiler=self._compiler, offloaded=self._offload)

    def compact(self, quantization: str = "none") -> CompactView:
        """The model on the experts that were loaded last, in one precision."""
        if quantization not in self._compact:
            self._compact[quantization] = CompactView(self.model, self.dense, self._compiler, quantization)
        return self._compact[quantization]

    def masked(self, quantization: str = "none") -> MaskedView:
        """The model with each row on the experts that were loaded for it last, in one precision."""
        if quantization not in self._masked:
            self._masked[quantization] = MaskedView(self.model, self._compiler, quantization)
        return self._masked[quantization]

    def draft(self, quantization: str = "none") -> DraftView:
        """The compact view with a part of the output embedding, see `output_embedding`."""
        if quantization not in self._draft:
            self._draft[quantization] = DraftView(self.compact(quantization), self._compiler)
        return self._draft[quantization]

    def view(self, rows: Sequence[Experts | None]) -> View:
        """The view on which rows of one precision run together, with their experts; None: the row runs dense."""
        if all(row is None for row in rows):
            return self.dense
        first = rows[0]
        shared = all(row is first for row in rows)
        if first is not None and shared and self.mode != "masked" and first.by_token is None:
            compact = self.compact(first.quantization)
            compact.load(first)
            compact.quantize_head()
            return compact
        masked = self.masked(next(row.quantization for row in rows if row is not None))
        masked.load(rows)
        return masked

    def decoding_cache(self, rows: int, columns: int, *, static: bool = False) -> KVCache:
        """An empty cache of at least these rows and columns, for compiled calls if `static`; last time's if it fits."""
        cache = self._cache
        fits = cache is not None and cache.static == static and cache.rows >= rows and cache.columns >= columns
        if cache is None or not fits or (static and cache.rows != rows):
            self._cache = cache = None  # its memory is free before the next one is allocated
            cache = self._cache = KVCache(rows, columns, static=static)
        cache.set_window(rows, 0, 0)
        return cache

    def unload(self) -> None:
        """Free views and buffers; they are made again when they are needed."""
        for views in (self._draft, self._compact, self._masked):
            views.clear()
        vars(self).pop("dense", None)
        self._cache = None

    def written(self, experts: Experts, layer: int, kept_NK: Tensor) -> Tensor:
        """What a layer's experts write [N, H] at these activations of N tokens, corrected, without the bias."""
        compact = self._compact.get(experts.quantization)
        if compact is not None and compact.holds(experts):
            return compact.written(layer, kept_NK).float()
        block = self.dense.bring(layer)
        if experts.quantization != "none":
            return functional.linear(kept_NK.float(), experts.output_weights(layer, block))
        columns_HK = block.output_columns(experts.neurons[layer])
        written_NH = functional.linear(kept_NK.to(columns_HK.dtype), columns_HK).float()
        for correction in experts.corrections[layer]:
            written_NH = written_NH + correction.output(kept_NK.float())
        return written_NH


def refuse_uncroppable(model: nn.Module) -> None:
    """Raise an `UnsupportedModelError` where a layer keeps more than keys and values, such as a recurrent state, which
    cannot be rolled back or copied by column."""
    config: Any = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers language model")
    for number, layer in enumerate(DynamicCache(config=config).layers):
        # Layers that use the keys and values of another one keep nothing: a DummyLayer in newer transformers.
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and type(layer).__name__ != "DummyLayer":
            raise UnsupportedModelError(
                f"layer {number} of {type(model).__name__} caches a state ({type(layer).__name__}) that cannot be "
                "cropped; only attention layers can be rolled back"
            )
