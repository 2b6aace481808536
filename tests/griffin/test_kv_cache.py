"""The KV cache: windows of one memory, in which rows come, move and go."""

from __future__ import annotations

import pytest
import torch
from families import tiny
from running import TOLERANCE, difference, same, tokens
from torch import Tensor
from transformers import DynamicCache

from griffin.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("no_gradients")


def contents(cache: KVCache, row: int, begin: int, end: int) -> list[Tensor]:
    return [buffer[row, :, begin:end].clone() for layer in cache.layers for buffer in (layer.keys, layer.values)]


def filled(*lengths: int) -> list[KVCache]:
    """The caches of prompts, one row each."""
    caches = [KVCache(1, length) for length in lengths]
    for length, cache in zip(lengths, caches, strict=True):
        tiny("llama")(torch.tensor([tokens(length, length)]), past_key_values=cache)
    return caches


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_it_continues_a_prompt_as_the_plain_cache_does(family: str, static: bool) -> None:
    """In its second use too, and after positions have been forgotten."""
    model, cache, (one, three) = tiny(family), KVCache(1, 24, static=static), (tokens(1, 1), tokens(3, 3))
    for length in (13, 9):
        own, plain = KVCache(1, length), DynamicCache(config=model.config)
        for used in (own, plain):
            model(torch.tensor([tokens(length)]), past_key_values=used)
        cache.put(0, own, length)
        cache.set_window(1, 0, length)
        for before, ids in ((length, one), (length + 1, three)):
            assert int(cache.get_seq_length()) == int(plain.get_seq_length()) == before
            expected = model(torch.tensor([ids]), past_key_values=plain).logits
            assert difference(model(torch.tensor([ids]), past_key_values=cache).logits, expected) < TOLERANCE
        cache.set_window(1, 0, length + 4)  # where it is static, the length is a tensor that only the device knows
        cache.crop(-3)
        assert int(cache.get_seq_length()) == length + 1
        assert difference(model(torch.tensor([three]), past_key_values=cache).logits, expected) < TOLERANCE


@pytest.mark.parametrize("static", [False, True])
def test_rows_are_put_and_moved(static: bool) -> None:
    short, long = filled(4, 9)
    cache = KVCache(3, 20, static=static)
    cache.put(0, short, 9)
    cache.put(2, long, 9)
    before = [contents(short, 0, 0, 4), contents(long, 0, 0, 9)]
    assert same(contents(cache, 0, 5, 9), before[0])
    assert same(contents(cache, 2, 0, 9), before[1])
    cache.move(2, 1, 0, 9)
    assert same(contents(cache, 1, 0, 9), before[1])
    for begin, end, new_end in ((0, 9, 16), (7, 16, 12)):  # both ways, over themselves
        cache.shift(2, begin, end, new_end)
        assert same(contents(cache, 0, new_end - 4, new_end), before[0])
        assert same(contents(cache, 1, new_end - 9, new_end), before[1])
    assert same(contents(cache, 2, 0, 9), before[1]), "only the first rows move"
    assert same([*contents(short, 0, 0, 4), *contents(long, 0, 0, 9)], [*before[0], *before[1]])
