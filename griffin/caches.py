"""KV caches that a prompt's cache is copied into, with room to grow in place.

`DynamicCache` copies all of its keys and values for every token. A roomy cache does not, with the same results to the
bit; a static one has one shape from the first token to the last besides, which compiled decoding needs.

Dimensions: B = batch rows, N = heads of keys and values, S = positions, E = size of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache whose keys and values are the beginning of larger buffers.

    Args:
        keys_BNSE: to begin with; they are copied.
        values_BNSE: as well.
        room: positions that can be added in place. What comes after them grows as in `DynamicLayer`, and so does what
            beams have repeated or reordered.
    """

    def __init__(self, keys_BNSE: Tensor, values_BNSE: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys_BNSE, values_BNSE)
        self._buffers = tuple(_with_room(states, room) for states in (keys_BNSE, values_BNSE))
        self._show(keys_BNSE.shape[2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, N, S, E]; all of them so far."""
        begin, end = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if self.keys.data_ptr() != self._buffers[0].data_ptr() or end > self._buffers[0].shape[2]:
            grown: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return grown
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, begin:end] = states
        self._show(end)
        return self.keys, self.values

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def roomy(cache: DynamicCache, room: int) -> DynamicCache:
    """A copy of a cache that holds every position in every layer, with room for as many positions more."""
    copied = DynamicCache()
    copied.layers = [RoomyLayer(layer.keys, layer.values, room) for layer in cache.layers]
    return copied


def stacked(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache of several, each of one row, that end in the same column. It takes the place of the first."""
    longest = max(cache.get_seq_length() for cache in caches)
    for layers in zip(*(cache.layers for cache in caches), strict=True):
        for name in ("keys", "values"):
            states = [getattr(layer, name) for layer in layers]
            padded = [nn.functional.pad(one, (0, 0, longest - one.shape[2], 0)) for one in states]
            setattr(layers[0], name, torch.cat(padded))
    return caches[0]


def static(cache: DynamicCache, config: PretrainedConfig, positions: int) -> StaticCache:
    """A copy of a cache that holds every position in every layer, in a shape that does not change as it grows.

    Args:
        cache: what to begin with.
        config: of the model; layers with a sliding window keep no more than that.
        positions: the most that it will hold.
    """
    copied = StaticCache(config.get_text_config(), max_cache_len=positions)
    for layer, earlier in zip(copied.layers, cache.layers, strict=True):
        layer.update(earlier.keys, earlier.values)
    return copied


def _with_room(states_BNSE: Tensor, room: int) -> Tensor:
    rows, heads, length, size = states_BNSE.shape
    buffer = states_BNSE.new_empty(rows, heads, length + room, size)
    buffer[:, :, :length] = states_BNSE
    return buffer
