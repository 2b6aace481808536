"""A static cache has room for more than it holds, and `generate` builds its masks before the forward call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import tiny
from prompts import pad, prompt
from running import TOKENS, as_lists, generate, new_tokens
from transformers import StaticCache

import griffin

ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2), prompt(1, 3)]
STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["greedy", "beams", "chunks"]
)
@pytest.mark.parametrize("mode", griffin.MODES)
def test_generation_is_as_with_the_default_cache(mode: str, options: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model, mode=mode) as pruner:
        expected = new_tokens(generate(model, ids, **options), ids)
        experts = as_lists(pruner.experts)
        assert new_tokens(generate(model, ids, **STATIC, **options), ids) == expected
        assert as_lists(pruner.experts) == experts


@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_prompt_without_a_mask(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model, mode=mode):
        expected = model.generate(ids, max_new_tokens=TOKENS)
        assert torch.equal(model.generate(ids, max_new_tokens=TOKENS, **STATIC), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_left_padded_batch(options: dict[str, Any]) -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad(ROWS, "left")
    with griffin.prune(model, mode="masked") as pruner:
        expected = new_tokens(generate(model, ids_BS, mask_BS, **options), ids_BS)
        experts = pruner.experts
        assert new_tokens(generate(model, ids_BS, mask_BS, **STATIC, **options), ids_BS) == expected
        assert all(torch.equal(*layer) for layer in zip(pruner.experts, experts, strict=True))


def test_padding_that_only_generate_knows_of_is_refused() -> None:
    model = tiny("llama")
    ids_BS, _ = pad(ROWS, "left")
    with griffin.prune(model, mode="masked"), pytest.raises(ValueError, match="2-D attention_mask"):
        model.generate(ids_BS, max_new_tokens=TOKENS, **STATIC)  # it takes the mask from the padding token


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_forward_calls_on_a_static_cache(mode: str) -> None:
    model, ids, token = tiny("llama"), prompt(11), prompt(1, 1)
    with griffin.prune(model, mode=mode):
        expected = model(token, past_key_values=model(ids).past_key_values).logits
        cache = StaticCache(model.config, max_cache_len=32)
        model(ids, past_key_values=cache)
        torch.testing.assert_close(model(token, past_key_values=cache).logits, expected, rtol=1e-5, atol=1e-4)
        cache.reset()  # empty again: a new prompt
        model(ids, past_key_values=cache)
        torch.testing.assert_close(model(token, past_key_values=cache).logits, expected, rtol=1e-5, atol=1e-4)
