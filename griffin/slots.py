"""Prompts at work in the slots of one KV cache, so that a row which has ended makes room for the next.

All rows end in the same column, like a batch padded on the left, and grow in place. Taking a row out or putting one in
copies that row alone, and no column is kept that is padding in every row.

Dimensions: B = rows at work, N = heads of keys and values, S = positions, E = size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


class SlotsLayer(DynamicLayer):  # type: ignore[misc]
    """A layer of a cache whose keys and values are a part of larger buffers.

    Args:
        like: this layer of a prompt's cache.
        slots: the most rows at a time.
        width: columns of the buffers.
    """

    def __init__(self, like: DynamicLayer, slots: int, width: int) -> None:
        super().__init__()
        self.lazy_initialization(like.keys, like.values)
        # Zeros, since attention multiplies what is masked by 0, and not every number times 0 is 0.
        self._buffers = tuple(
            states.new_zeros(slots, states.shape[1], width, states.shape[3]) for states in (like.keys, like.values)
        )

    def put(self, prompt: DynamicLayer, slot: int, end: int) -> None:
        """A prompt's keys and values into a slot, up to this column."""
        for buffer, states in zip(self._buffers, (prompt.keys, prompt.values), strict=True):
            buffer[slot, :, end - states.shape[2] : end] = states[0]

    def move(self, source: int, slot: int, begin: int, end: int) -> None:
        """What is in these columns of one slot into another."""
        for buffer in self._buffers:
            buffer[slot, :, begin:end] = buffer[source, :, begin:end]

    def shift(self, end: int) -> None:
        """What is shown so that it ends in this column."""
        for buffer, states in zip(self._buffers, (self.keys, self.values), strict=True):
            rows, _, length, _ = states.shape
            buffer[:rows, :, end - length : end] = states.clone()

    def show(self, rows: int, begin: int, end: int) -> None:
        """The cache is what is in these columns of so many slots."""
        self._shown = (rows, begin, end)
        self.keys, self.values = (buffer[:rows, :, begin:end] for buffer in self._buffers)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, N, S, E]; all of them so far."""
        rows, begin, end = self._shown
        self.show(rows, begin, end + key_states.shape[2])
        self.keys[:, :, end - begin :] = key_states
        self.values[:, :, end - begin :] = value_states
        return self.keys, self.values


class Slots:
    """The prompts at work, and what their next tokens are run with.

    Args:
        lengths: tokens of each prompt.
        count: the most prompts at work at a time.
        room: the most tokens that a prompt is continued by.
        device: of the model's inputs.

    Attributes:
        lengths: tokens of each prompt.
        rows: the prompts at work, by their number, in the order of the cache's rows.
    """

    def __init__(self, lengths: Sequence[int], count: int, room: int, device: torch.device) -> None:
        self.lengths = lengths
        self.rows: list[int] = []
        self._count, self._room, self._device = min(count, len(lengths)), room, device
        # Where prompts wait for a slot, as many columns more: the rows are shifted once in so many tokens.
        self._width = max(lengths) + (room if count >= len(lengths) else 2 * room)
        self._begins: list[int] = []  # the first column of each row
        self._end = 0
        self._cache = DynamicCache()

    @property
    def free(self) -> int:
        """How many more prompts there is a slot for."""
        return self._count - len(self.rows)

    def put(self, row: int, prompt: DynamicCache) -> None:
        """Put a prompt to work that has run: its KV cache is copied."""
        if not self._cache.layers:
            self._cache.layers = [SlotsLayer(layer, self._count, self._width) for layer in prompt.layers]
        length = self.lengths[row]
        longest = max([length, *(self._end - begin for begin in self._begins)])
        if longest > self._end or self._end + self._room > self._width:
            self._shift(longest)
        for layer, ran in zip(self._cache.layers, prompt.layers, strict=True):
            layer.put(ran, len(self.rows), self._end)
        self.rows.append(row)
        self._begins.append(self._end - length)
        self._show()

    def remove(self, row: int) -> None:
        """A prompt has ended: the last one takes its slot."""
        slot, last = self.rows.index(row), len(self.rows) - 1
        if slot != last:
            for layer in self._cache.layers:
                layer.move(last, slot, self._begins[last], self._end)
        self.rows[slot], self._begins[slot] = self.rows[last], self._begins[last]
        del self.rows[last], self._begins[last]
        if self.rows:
            self._show()

    def inputs(self) -> dict[str, Any]:
        """The cache, the mask and the positions for a forward call with the next token of each row."""
        columns_S = torch.arange(min(self._begins), self._end + 1, device=self._device)
        begins_B1 = torch.tensor(self._begins, device=self._device).unsqueeze(1)
        mask_BS = (columns_S >= begins_B1).long() if len(set(self._begins)) > 1 else None
        positions_B1 = self._end - begins_B1
        self._end += 1
        return {"past_key_values": self._cache, "attention_mask": mask_BS, "position_ids": positions_B1}

    def _shift(self, end: int) -> None:
        if self.rows:
            for layer in self._cache.layers:
                layer.shift(end)
        self._begins = [begin + end - self._end for begin in self._begins]
        self._end = end

    def _show(self) -> None:
        for layer in self._cache.layers:
            layer.show(len(self.rows), min(self._begins), self._end)


class Lockstep:
    """As `Slots`, but all prompts begin together and stay until the last has ended.

    For what counts the steps of a generation, and for compiled decoding, whose shapes stay as they are.

    Args:
        lengths: tokens of each prompt.
        together: gives one KV cache of those of all prompts, which end in the same column of it; it grows.
        columns: of a static cache; None: it has as many as it holds.
        device: of the model's inputs.

    Attributes:
        lengths: tokens of each prompt.
        rows: the prompts that were put to work.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        together: Callable[[Sequence[DynamicCache]], Cache],
        columns: int | None,
        device: torch.device,
    ) -> None:
        self.lengths = lengths
        self.rows: list[int] = []
        self._together, self._columns = together, columns
        self._prompts: list[DynamicCache] = []
        self._end = max(lengths)
        self._begins_B1 = self._end - torch.tensor(lengths, device=device).unsqueeze(1)
        self._padded = len(set(lengths)) > 1

    @property
    def free(self) -> int:
        """How many prompts have not been put to work."""
        return len(self.lengths) - len(self.rows)

    def put(self, row: int, prompt: DynamicCache) -> None:
        """Put a prompt to work that has run. When all are, their KV caches are copied."""
        self.rows.append(row)
        self._prompts.append(prompt)
        if not self.free:
            self._cache, self._prompts = self._together(self._prompts), []

    def remove(self, row: int) -> None:
        """What has ended is computed on."""

    def inputs(self) -> dict[str, Any]:
        """The cache, the mask and the positions for a forward call with the next token of each row."""
        positions_B1 = self._end - self._begins_B1
        self._end += 1
        columns_S = torch.arange(self._columns or self._end, device=positions_B1.device)
        mask_BS = (columns_S >= self._begins_B1).long() if self._padded else None
        return {"past_key_values": self._cache, "attention_mask": mask_BS, "position_ids": positions_B1}
