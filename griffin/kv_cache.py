"""The KV cache: one preallocated kind, for prompts, decoding and compiled decoding.

All rows end in the same column, like a batch padded on the left: every difference of positions, and so every rotary
angle, sliding window and ALiBi slope, is what it is for the row alone. Layers with a sliding window keep every position
too, behind the model's mask. So any cache can forget its last positions.

Dimensions: N = heads of keys and values, E = size of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, StaticCache
from transformers.cache_utils import StaticLayer


class KVLayer(StaticLayer):  # type: ignore[misc]
    """A layer's keys and values: a window of rows and columns of larger buffers, which grows in place."""

    @torch.inference_mode(False)  # or buffers made in inference mode could not be written to outside of it
    def __init__(self, rows: int, columns: int, *, static: bool) -> None:
        super().__init__(columns)
        self._rows, self._static = rows, static
        self.is_compileable = static
        self.set_window(rows, 0, 0)

    @torch.inference_mode(False)
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate the buffers for keys and values like these."""
        wide = [
            states.new_empty(()).expand(self._rows, states.shape[1], 0, states.shape[3])
            for states in (key_states, value_states)
        ]
        super().lazy_initialization(*wide)  # zeros: attention multiplies what is masked by 0, and 0 * NaN is not 0
        self.cumulative_length.fill_(self.end)

    def set_window(self, rows: int, begin: int, end: int) -> None:
        """The window is these columns of the first rows."""
        self.window_rows, self.begin, self.end = rows, begin, end
        if self._static and self.is_initialized:
            self.cumulative_length.fill_(end)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, N, S, E]; returns those that attention is to read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._static:
            keys_values: tuple[Tensor, Tensor] = super().update(key_states, value_states)
            return keys_values
        begin, self.end = self.end, self.end + key_states.shape[2]
        window = slice(None, self.window_rows), slice(None), slice(self.begin, self.end)
        for buffer, states in ((self.keys, key_states), (self.values, value_states)):
            buffer[: self.window_rows, :, begin : self.end] = states
        return self.keys[window], self.values[window]

    def get_seq_length(self) -> Any:
        """Positions in the window."""
        return super().get_seq_length() if self._static else self.end - self.begin

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many positions attention will read when so many are added, and the first one's."""
        sizes: tuple[int, int] = super().get_mask_sizes(query_length)
        return sizes if self._static else (self.get_seq_length() + query_length, 0)


class KVCache(StaticCache):  # type: ignore[misc]
    """A model's KV cache: windows of the same rows and columns of every layer's buffers."""

    def __init__(self, rows: int, columns: int, *, static: bool = False) -> None:
        self.rows, self.columns, self.static = rows, columns, static
        Cache.__init__(self, layer_class_to_replicate=partial(KVLayer, rows, columns, static=static))
        self._window = (rows, 0, 0)

    def set_window(self, rows: int, begin: int, end: int) -> None:
        """The cache is what is in these columns of its first rows."""
        self._window = (rows, begin, end)
        for layer in self.layers:
            layer.set_window(rows, begin, end)

    def row(self, row: int, begin: int, end: int) -> KVCache:
        """A cache of these columns of one row that shares its memory with this one."""
        view = KVCache(1, self.columns)
        for layer in self.layers:
            mine = copy.copy(layer)
            mine._rows, mine._static, mine.is_compileable = 1, False, False
            if layer.is_initialized:
                mine.keys, mine.values = layer.keys[row : row + 1], layer.values[row : row + 1]
            view.layers.append(mine)
        view.set_window(1, begin, end)
        return view

    def put(self, row: int, source: KVCache, end: int) -> None:
        """Copy what a cache of one row holds into a row of this one, so that it ends in this column."""
        while len(self.layers) < len(source.layers):
            self.layers.append(KVLayer(self.rows, self.columns, static=self.static))
        self.set_window(*self._window)
        for layer, given in zip(self.layers, source.layers, strict=True):
            if not given.is_initialized:  # this layer uses the keys and values of another one
                continue
            if not layer.is_initialized:
                layer.lazy_initialization(given.keys, given.values)
            begin = end - (given.end - given.begin)
            layer.keys[row, :, begin:end] = given.keys[0, :, given.begin : given.end]
            layer.values[row, :, begin:end] = given.values[0, :, given.begin : given.end]


def copied(cache: KVCache) -> KVCache:
    """A cache of one row with memory of its own, as large as what it holds."""
    _, begin, end = cache._window
    copy_of = KVCache(1, end - begin)
    copy_of.put(0, cache, end - begin)
    copy_of.set_window(1, 0, end - begin)
    return copy_of


def row_of(cache: Any, row: int, begin: int) -> KVCache:
    """What a cache of transformers holds of one row from a column on; what a window has forgotten is 0."""
    length = int(cache.get_seq_length())
    own = KVCache(1, length - begin)
    for given in cache.layers:
        layer = KVLayer(1, length - begin, static=False)
        if given.is_initialized:
            layer.lazy_initialization(given.keys, given.values)
            kept = min(length - begin, given.keys.shape[2])
            first = length - kept if given.keys.shape[2] >= length else given.keys.shape[2] - kept
            for buffer, values in ((layer.keys, given.keys), (layer.values, given.values)):
                buffer[0, :, length - begin - kept :] = values[row, :, first : first + kept]
        own.layers.append(layer)
    own.set_window(1, 0, length - begin)
    return own


def append_rows(cache: Any, rows: Sequence[KVCache], columns: Sequence[tuple[int, int]], length: int) -> None:
    """Append what rows hold behind what a cache of transformers holds, up to a length."""
    before = int(cache.get_seq_length())
    for number, layer in enumerate(rows[0].layers):
        if not layer.is_initialized:
            continue
        both = []
        for name in ("keys", "values"):
            sample = getattr(layer, name)
            states = sample.new_zeros(len(rows), sample.shape[1], length - before, sample.shape[3])
            for place, (row, (begin, count)) in enumerate(zip(rows, columns, strict=True)):
                given = row.layers[number]
                skipped = max(before - begin, 0)
                held = getattr(given, name)[0, :, given.begin + skipped : given.begin + count]
                states[place, :, begin + skipped - before : begin + count - before] = held
            both.append(states)
        cache.update(*both, number)
