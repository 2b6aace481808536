"""KV caches that the caches of prompts are copied into, with room to grow in place.

All prompts end in the same column, like a batch padded on the left: every difference of positions, and so every rotary
angle, sliding window and ALiBi slope, stays what it is for the prompt alone.

`DynamicCache` copies all of its keys and values for every token. A roomy cache does not, with the same results to the
bit; a static one has one shape from the first token to the last besides, which compiled decoding needs.

Dimensions: B = batch rows, N = heads of keys and values, S = positions, E = size of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, StaticCache
from transformers.cache_utils import DynamicLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache whose keys and values are the beginning of larger buffers.

    Args:
        keys: of each prompt, [1, N, S, E], to begin with; they are copied.
        values: as well.
        room: positions that can be added in place. What comes after them grows as in `DynamicLayer`, and so does what
            beams have repeated or reordered.
    """

    def __init__(self, keys: Sequence[Tensor], values: Sequence[Tensor], room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys[0], values[0])
        self._buffers = tuple(_with_room(states, room) for states in (keys, values))
        self._show(max(states.shape[2] for states in keys))

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


def rows(cache: DynamicCache, lengths: Sequence[int]) -> list[DynamicCache]:
    """A cache for each row, which shows its first positions, so many of them, in every layer."""
    split = [DynamicCache() for _ in lengths]
    for row, (one, length) in enumerate(zip(split, lengths, strict=True)):
        one.layers = [copy.copy(layer) for layer in cache.layers]
        for layer in one.layers:
            layer.keys, layer.values = (states[row : row + 1, :, :length] for states in (layer.keys, layer.values))
    return split


def roomy(prompts: Sequence[DynamicCache], room: int) -> DynamicCache:
    """One cache of those of prompts, which hold every position in every layer, with room for as many positions more."""
    copied = DynamicCache()
    copied.layers = [
        RoomyLayer([layer.keys for layer in layers], [layer.values for layer in layers], room)
        for layers in zip(*(prompt.layers for prompt in prompts), strict=True)
    ]
    return copied


def static(prompts: Sequence[DynamicCache], config: PretrainedConfig, positions: int) -> StaticCache:
    """One cache of those of prompts, which hold every position in every layer; its shape does not change as it grows.

    Args:
        prompts: what to begin with.
        config: of the model; layers with a sliding window keep no more than that.
        positions: the most that it will hold.
    """
    copied = StaticCache(config.get_text_config(), max_cache_len=positions)
    for layer, earlier in zip(copied.layers, roomy(prompts, 0).layers, strict=True):
        layer.update(earlier.keys, earlier.values)
    return copied


def _with_room(prompts: Sequence[Tensor], room: int) -> Tensor:
    _, heads, _, size = prompts[0].shape
    longest = max(states.shape[2] for states in prompts)
    buffer = prompts[0].new_empty(len(prompts), heads, longest + room, size)
    for row, states in enumerate(prompts):
        begin = longest - states.shape[2]
        buffer[row, :, :begin] = 0.0  # attention multiplies what is masked by 0, and not every number times 0 is 0
        buffer[row, :, begin:longest] = states[0]
    return buffer
