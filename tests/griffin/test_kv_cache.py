"""The KV cache: windows of one memory, in which rows come, move and go."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engines import TOLERANCE, tokens
from families import LAYERS, tiny
from running import difference
from torch import Tensor
from transformers import DynamicCache

from griffin.kv_cache import KVCache

FAMILIES = ["llama", "opt", "gemma3_text"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def contents(cache: KVCache, row: int, begin: int, end: int) -> list[Tensor]:
    return [buffer[row, :, begin:end].clone() for layer in cache.layers for buffer in (layer.keys, layer.values)]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def filled(*lengths: int) -> list[KVCache]:
    """The caches of prompts, one row each."""
    caches = [KVCache(1, length) for length in lengths]
    for length, cache in zip(lengths, caches, strict=True):
        tiny("llama")(torch.tensor([tokens(length, length)]), past_key_values=cache)
    return caches


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_continues_a_prompt_as_the_plain_cache_does(family: str, whole: bool) -> None:
    """In its second use too, and after positions have been forgotten."""
    model, cache, (one, three) = tiny(family), KVCache(1, 24, whole=whole), (tokens(1, 1), tokens(3, 3))
    for length in (13, 9):
        own, plain = KVCache(1, length), DynamicCache(config=model.config)
        for used in (own, plain):
            model(torch.tensor([tokens(length)]), past_key_values=used)
        cache.put(0, own, length)
        cache.show(1, 0, length)
        for before, ids in ((length, one), (length + 1, three)):
            assert int(cache.get_seq_length()) == int(plain.get_seq_length()) == before
            expected = model(torch.tensor([ids]), past_key_values=plain).logits
            assert difference(model(torch.tensor([ids]), past_key_values=cache).logits, expected) < TOLERANCE
        cache.show(1, 0, length + 4)  # where it is whole, the length is a tensor that only the device knows
        cache.crop(3)
        assert int(cache.get_seq_length()) == length + 1
        assert difference(model(torch.tensor([three]), past_key_values=cache).logits, expected) < TOLERANCE


def test_its_memory_stays_where_it_is() -> None:
    cache, model, places = KVCache(2, 24), tiny("llama"), []
    for length in (12, 5, 24):
        cache.show(2, 0, 0)
        model(torch.tensor([tokens(length)] * 2), past_key_values=cache)
        places.append([buffer.data_ptr() for layer in cache.layers for buffer in (layer.keys, layer.values)])
    assert places[0] == places[1] == places[2]
    assert len(places[0]) == 2 * LAYERS
    assert cache.layers[0].keys.shape == (2, 2, 24, 8)


@pytest.mark.parametrize("whole", [False, True])
def test_rows_are_put_and_moved(whole: bool) -> None:
    short, long = filled(4, 9)
    cache = KVCache(3, 20, whole=whole)
    cache.put(0, short, 9)
    cache.put(2, long, 9)
    before = [contents(short, 0, 0, 4), contents(long, 0, 0, 9)]
    assert same(contents(cache, 0, 5, 9), before[0])
    assert same(contents(cache, 2, 0, 9), before[1])
    cache.move(2, 1, 0, 9)
    assert same(contents(cache, 1, 0, 9), before[1])
    cache.shift(2, 0, 9, 16)
    assert same(contents(cache, 0, 12, 16), before[0])
    assert same(contents(cache, 1, 7, 16), before[1])
    cache.shift(2, 7, 16, 12)  # both ways, over themselves
    assert same(contents(cache, 0, 8, 12), before[0])
    assert same(contents(cache, 1, 3, 12), before[1])
    assert same(contents(cache, 2, 0, 9), before[1]), "only the first rows move"
    assert same(contents(short, 0, 0, 4), before[0])
    assert same(contents(long, 0, 0, 9), before[1])


def test_a_window_is_continued_as_the_prompt_was() -> None:
    model, (short, long) = tiny("llama"), filled(4, 9)
    cache, call = KVCache(3, 20), torch.tensor([[5, 6]])
    cache.put(0, long, 12)
    cache.put(1, short, 12)
    for row, own, length in ((0, long, 9), (1, short, 4)):
        own_cache = KVCache(1, 20)
        own_cache.put(0, own, length)
        own_cache.show(1, 0, length)
        expected = model(call, past_key_values=own_cache).logits
        one = cache.row(row, 12 - length, 12)
        assert one.get_seq_length() == length
        assert difference(model(call, past_key_values=one).logits, expected) < TOLERANCE
        # It shares the memory: what it has appended is there.
        assert same(contents(cache, row, 12, 14), contents(one, 0, 12, 14))
        assert all(states.any() for states in contents(cache, row, 12, 14))


def test_what_is_not_shown_is_not_read() -> None:
    """Neither the rows behind, nor what an earlier prompt left in front and behind."""
    model, call = tiny("llama"), torch.tensor([[5, 6]])
    found = []
    for rubbish in (0.0, 7.0):
        cache = KVCache(3, 20)
        cache.put(0, filled(9)[0], 12)
        for layer in cache.layers:
            for buffer in (layer.keys, layer.values):
                buffer[1:] = buffer[:, :, :3] = buffer[:, :, 12:] = rubbish
        cache.show(1, 3, 12)
        found.append(model(call, past_key_values=cache).logits)
    assert torch.equal(*found)
