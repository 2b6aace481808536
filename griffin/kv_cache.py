"""The KV cache: one preallocated kind, for prompts, for rows that decode together, and for compiled decoding.

All rows end in the same column, like a batch padded on the left: every difference of positions, and so every rotary
angle, sliding window and ALiBi slope, is what it is for the row alone. Layers with a sliding window keep every position
too; the model's mask hides the old ones. So any cache can be cropped.

Dimensions: B = rows, N = heads of keys and values, S = positions, E = size of a head.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer


class KVLayer(StaticLayer):  # type: ignore[misc]
    """A layer's keys and values: a window of rows and columns of larger buffers, which grows in place.

    Args:
        rows: of the buffers.
        columns: of the buffers.
        whole: attention reads whole buffers and the length is a tensor, as compiled graphs need it: shapes do not
            change as the cache grows. Otherwise it reads the window alone, which costs less.
    """

    def __init__(self, rows: int, columns: int, *, whole: bool) -> None:
        super().__init__(columns)
        self._rows, self._whole = rows, whole
        self.is_compileable = whole
        self.show(rows, 0, 0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for keys and values like these."""
        wide = [
            states.new_empty(()).expand(self._rows, states.shape[1], 0, states.shape[3])
            for states in (key_states, value_states)
        ]
        super().lazy_initialization(*wide)  # zeros: attention multiplies what is masked by 0, and 0 * NaN is not 0
        self.cumulative_length.fill_(self.end)

    def show(self, rows: int, begin: int, end: int) -> None:
        """The window is these columns of the first rows."""
        self.shown, self.begin, self.end = rows, begin, end
        if self._whole and self.is_initialized:
            self.cumulative_length.fill_(end)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, N, S, E]; returns those that attention is to read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._whole:
            keys_values: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return keys_values
        begin, self.end = self.end, self.end + key_states.shape[2]
        window = slice(None, self.shown), slice(None), slice(self.begin, self.end)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[: self.shown, :, begin : self.end] = states
        return self.keys[window], self.values[window]

    def get_seq_length(self) -> Any:
        """Positions in the window."""
        return super().get_seq_length() if self._whole else self.end - self.begin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of positions that attention will read when so many are added, and the first one's."""
        sizes: tuple[int, int] = super().get_mask_sizes(query_length)
        return sizes if self._whole else (self.get_seq_length() + query_length, 0)


class KVCache(StaticCache):  # type: ignore[misc]
    """A model's KV cache: windows of the same rows and columns of every layer's buffers.

    Args:
        rows: the most rows.
        columns: the most positions of a row.
        whole: see `KVLayer`.
    """

    def __init__(self, rows: int, columns: int, *, whole: bool = False) -> None:
        self.rows, self.columns, self.whole = rows, columns, whole
        Cache.__init__(self, layer_class_to_replicate=partial(KVLayer, rows, columns, whole=whole))
        self._window = (rows, 0, 0)

    def show(self, rows: int, begin: int, end: int) -> None:
        """The cache is what is in these columns of its first rows."""
        self._window = (rows, begin, end)
        for layer in self.layers:
            layer.show(rows, begin, end)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions of every row, so many of them."""
        for layer in self.layers:
            layer.show(layer.shown, layer.begin, layer.end - abs(tokens_to_remove))

    def row(self, row: int, begin: int, end: int) -> KVCache:
        """A cache of one of the rows that shares its memory with this one, and shows these columns."""
        one = KVCache(1, self.columns)
        for layer in self.layers:
            own = copy.copy(layer)
            own._rows, own._whole, own.is_compileable = 1, False, False
            if layer.is_initialized:
                own.keys, own.values = layer.keys[row : row + 1], layer.values[row : row + 1]
            one.layers.append(own)
        one.show(1, begin, end)
        return one

    def put(self, row: int, source: KVCache, end: int) -> None:
        """Copy what a cache of one row shows into a row of this one, so that it ends in this column."""
        while len(self.layers) < len(source.layers):
            self.layers.append(KVLayer(self.rows, self.columns, whole=self.whole))
        self.show(*self._window)
        for layer, given in zip(self.layers, source.layers, strict=True):
            if not given.is_initialized:  # this layer uses the keys and values of another one
                continue
            if not layer.is_initialized:
                layer.lazy_initialization(given.keys, given.values)
            begin = end - (given.end - given.begin)
            layer.keys[row, :, begin:end] = given.keys[0, :, given.begin : given.end]
            layer.values[row, :, begin:end] = given.values[0, :, given.begin : given.end]

    def move(self, source: int, row: int, begin: int, end: int) -> None:
        """Copy these columns of one row into another."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys[row, :, begin:end] = layer.keys[source, :, begin:end]
                layer.values[row, :, begin:end] = layer.values[source, :, begin:end]

    def shift(self, rows: int, begin: int, end: int, new_end: int) -> None:
        """Move these columns of the first rows so that they end in another column."""
        new_begin = new_end - (end - begin)
        for layer in self.layers:
            if layer.is_initialized:
                for buffer in (layer.keys, layer.values):
                    buffer[:rows, :, new_begin:new_end] = buffer[:rows, :, begin:end].clone()
