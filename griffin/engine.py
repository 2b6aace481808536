"""The engine: a model, and what lasts from prompt to prompt: executors with their buffers, and KV caches for decoding.

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

from griffin.activations import ActivationStatistic, BlockHooks, Recorded, Recorder
from griffin.correction import Correction
from griffin.draft_vocabulary import DraftVocabulary, output_embedding
from griffin.executors import MODES, Compact, Experts, Masked
from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks
from griffin.kv_cache import KVCache


class Engine:
    """Runs a model dense or on experts; `use_dense` leaves it as it was.

    Args:
        model: a `transformers` causal language model.
        pruning: whether it will be pruned; a model that only runs dense may have any FF blocks.
        mode: how pruned calls run: `masked`; `compact` or `auto`: compact where all rows share their experts, else
            masked. Rows whose tokens choose for themselves are always masked.
        compiled: the model's compiled call, see `griffin.compiled_call`; None: not compiled.

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
        self._vocabulary: DraftVocabulary | None = None
        self._caches: dict[bool, KVCache] = {}
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters

    @property
    def device(self) -> torch.device:
        """Of the model's inputs."""
        device: torch.device = self.model.device
        return device

    def decoding_cache(self, rows: int, columns: int, *, verified: bool = False) -> KVCache:
        """An empty cache of at least so many rows and columns, the same one as last time where it is large enough.

        Args:
            rows: of a batch.
            columns: positions of a row.
            verified: for a row that is verified, which may run while a batch waits with its own cache.
        """
        whole, cache = self.compiled is not None, self._caches.get(verified)
        if cache is None or cache.rows < rows or cache.columns < columns or (whole and cache.rows != rows):
            del cache
            self._caches.pop(verified, None)  # its memory is free before the next one is allocated
            cache = self._caches[verified] = KVCache(rows, columns, whole=whole)
        cache.show(rows, 0, 0)
        return cache

    @property
    def vocabulary(self) -> DraftVocabulary:
        """The rows of the output embedding that drafts use.

        Raises:
            UnsupportedModelError: the model's output embedding is no linear layer.
        """
        if self._vocabulary is None:
            self._vocabulary = DraftVocabulary(output_embedding(self.model), padded=self.compiled is not None)
        return self._vocabulary

    def load(self, rows: Sequence[Experts | None]) -> None:
        """Put the experts of the rows of the coming calls to work; None: the row runs dense."""
        if all(row is None for row in rows):
            wanted: Compact | Masked | None = None
        elif self._mode != "masked" and len({id(row) for row in rows}) == 1 and not _by_token(rows[0]):
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

    def draft(self, experts: Experts) -> None:
        """Put the experts of a row by itself to work with compact weights, whatever the mode; they are gathered anew
        where others were loaded since, or where what they learned is to be forgotten."""
        self.use_dense()
        self._compact.load([experts])
        self.resume_draft()

    def resume_draft(self) -> None:
        """Put the experts of the last `draft` back to work, with all that they learned."""
        self._on = self._compact
        self._compact.on()

    def draft_output(self, layer: int, kept_NK: Tensor) -> Tensor:
        """What the drafting experts of a layer write [N, H] at these activations, with all that they learned."""
        return self._compact.output(layer, kept_NK)

    def draft_learns(self, layer: int, correction: Correction) -> None:
        """Add to what the drafting experts of a layer write."""
        self._compact.learn(layer, correction)

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
        call = self.model
        if self.compiled is not None and cache.whole:
            call = self.compiled
            # From here on a CUDA graph may overwrite what the call before returned.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
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

    @contextlib.contextmanager
    def hidden_states(self, wanted: bool) -> Iterator[list[Tensor]]:
        """The last hidden states [B, S, H] of the forward calls in this context, which the output embedding reads.

        Args:
            wanted: whether to keep any.
        """
        seen: list[Tensor] = []
        if not wanted:
            yield seen
            return
        handle = self.model.get_decoder().register_forward_hook(
            lambda module, args, output: seen.append(output.last_hidden_state)
        )
        try:
            yield seen
        finally:
            handle.remove()

    @contextlib.contextmanager
    def watching(self, wanted: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Per layer, z [S, D] and what the block makes of it [S, H], of the one forward call in this context.

        Args:
            wanted: whether to keep any.
        """
        seen: list[tuple[Tensor, Tensor]] = []
        if not wanted:
            yield seen
            return

        def after(layer: int, z: Tensor, output: Tensor) -> None:
            seen.append((z.detach().flatten(0, -2), output.detach().flatten(0, -2)))

        hooks = BlockHooks(self.blocks)
        hooks.attach(lambda layer, z: None, after)
        try:
            yield seen
        finally:
            hooks.detach()

    def use_dense(self) -> None:
        """Have the model as it is without pruning. Buffers stay for the next prompts."""
        if self._vocabulary is not None:
            self._vocabulary.off()
        if self._on is not None:
            self._on.off()
            self._on = None

    def unload(self) -> None:
        """Have the model as it is without pruning, and free all buffers."""
        self.use_dense()
        self._compact.unload()
        self._masked.unload()
        self._vocabulary = None
        self._caches = {}


def _by_token(row: Experts | None) -> bool:
    """Whether each token of a row chooses its neurons, which no compact weights can follow."""
    return row is not None and row.by_token is not None


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
