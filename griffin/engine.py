"""The engine: a model, and what lasts from prompt to prompt: executors with their buffers, and a KV cache for decoding.

Dimensions: B = rows of a batch, S = positions of one forward call, T = positions whose logits are asked for,
V = vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from griffin.activations import ActivationStatistic, Recorded, Recorder
from griffin.executors import MODES, Compact, Experts, Masked
from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks
from griffin.kv_cache import KVCache


class Engine:
    """Runs a model dense or on experts; `use_dense` leaves it as it was.

    Args:
        model: a `transformers` causal language model.
        pruning: whether it will be pruned; a model that only runs dense may have any FF blocks.
        mode: how pruned calls run: `masked`; `compact` or `auto`: compact where all rows share their experts, else
            masked.
        compiled: the model's compiled call, for decoding with caches that are whole; None: not compiled.

    Attributes:
        blocks: the FF blocks, in layer order; none without pruning.
        widths: D of each.
        self_generated: what was recorded over the model's own text, see `griffin.self_generated.prepare`.

    Raises:
        UnsupportedModelError: the model has an FF block that cannot be pruned.
        ValueError: an unknown mode.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pruning: bool = True,
        mode: str = "auto",
        compiled: Callable[..., Any] | None = None,
    ) -> None:
        if mode not in ("auto", *MODES):
            raise ValueError(f"mode={mode!r}: expected one of auto, {', '.join(MODES)}")
        self.model: Any = model
        self.blocks: list[FeedForwardBlock] = find_feedforward_blocks(model) if pruning else []
        self.widths = [block.width for block in self.blocks]
        self.self_generated: dict[ActivationStatistic, tuple[Tensor, ...]] = {}
        self.compiled = compiled
        self._mode = mode
        self._compact, self._masked = Compact(self.blocks), Masked(self.blocks)
        self._on: Compact | Masked | None = None
        self._cache: KVCache | None = None
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters

    @property
    def device(self) -> torch.device:
        """Of the model's inputs."""
        device: torch.device = self.model.device
        return device

    def decoding_cache(self, rows: int, columns: int) -> KVCache:
        """An empty cache of at least so many rows and columns, the same one as last time where it is large enough."""
        whole, cache = self.compiled is not None, self._cache
        if cache is None or cache.rows < rows or cache.columns < columns or (whole and cache.rows != rows):
            self._cache = None  # its memory is free before the next one is allocated
            self._cache = cache = KVCache(rows, columns, whole=whole)
        cache.show(rows, 0, 0)
        return cache

    def load(self, rows: Sequence[Experts | None]) -> None:
        """Put the experts of the rows of the coming calls to work; None: the row runs dense."""
        if all(row is None for row in rows):
            wanted: Compact | Masked | None = None
        elif self._mode != "masked" and len({id(row) for row in rows}) == 1:
            wanted = self._compact
        else:
            wanted = self._masked
        if wanted is not None and wanted is self._on and wanted.holds(rows):
            return  # as in the step before
        self.use_dense()
        if wanted is not None:
            wanted.load(rows)
            self._on = wanted
            wanted.on()

    def dense(self, ids_BS: Tensor, cache: KVCache, **options: Any) -> Tensor:
        """As `forward`, with all rows dense."""
        self.use_dense()
        return self.forward(ids_BS, cache, **options)

    @torch.no_grad()
    def forward(
        self,
        ids_BS: Tensor,
        cache: KVCache,
        *,
        mask_BP: Tensor | None = None,
        positions_BS: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits [B, T, V] of one call of the model, which appends to the cache.

        Args:
            ids_BS: token ids.
            cache: what comes before them.
            mask_BP: which columns of cache and ids are no padding; None: all.
            positions_BS: the tokens' positions in their texts; None: as in the cache.
            logits_to_keep: of the last so many positions only; 0: of all.
        """
        options: dict[str, Any] = {"attention_mask": mask_BP} if mask_BP is not None else {}
        if positions_BS is not None and self._takes_positions:
            options["position_ids"] = positions_BS
        if logits_to_keep and self._keeps_logits:
            options["logits_to_keep"] = kept_positions(self.model, logits_to_keep, ids_BS)
        call = self.compiled if self.compiled is not None and cache.whole else self.model
        logits: Tensor = call(ids_BS, past_key_values=cache, use_cache=True, **options).logits
        return logits[:, -logits_to_keep:] if logits_to_keep else logits

    @contextlib.contextmanager
    def recording(
        self,
        statistics: Sequence[ActivationStatistic],
        before: Recorded,
        rows: int,
        columns: int,
        counted_BS: Tensor | None,
        weight: float = 1.0,
    ) -> Iterator[Recorder]:
        """Record activation statistics of the one forward call in this context, see `Recorder`."""
        recorder = Recorder(self.blocks, statistics)
        recorder.begin(before)
        recorder.expect(rows, columns, counted_BS, weight)
        recorder.attach()
        try:
            yield recorder
        finally:
            recorder.detach()

    def use_dense(self) -> None:
        """Have the model as it is without pruning. Buffers stay for the next prompts."""
        if self._on is not None:
            self._on.off()
            self._on = None

    def unload(self) -> None:
        """Have the model as it is without pruning, and free all buffers."""
        self.use_dense()
        self._compact.unload()
        self._masked.unload()
        self._cache = None


def kept_positions(model: nn.Module, logits_to_keep: int, ids_BS: Tensor) -> int | Tensor:
    """How to ask a model for the logits of the last positions while its FF blocks see all of them.

    Where layers share keys and values, Gemma 4 runs its last layers at the asked positions only if these are a number.
    """
    config: Any = model.config
    if not getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        return logits_to_keep
    columns = ids_BS.shape[1]
    return torch.arange(max(columns - logits_to_keep, 0), columns, device=ids_BS.device)


def refuse_uncroppable(model: nn.Module) -> None:
    """Refuse models whose layers keep more than keys and values, which cannot be rolled back or copied by column.

    Raises:
        UnsupportedModelError: names the layer, for example one with a recurrent state.
    """
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
