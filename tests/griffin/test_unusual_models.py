"""Models beyond the layout table: pruned right or refused, but never silently wrong or half pruned."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from families import LAYERS, VOCABULARY, build, fresh
from prompts import prompt
from running import difference, generate, step_logits
from transformers import PreTrainedModel

import griffin

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "eos_token_id": None,
}


def assert_modes_agree_or_refuse(model: PreTrainedModel) -> None:
    ids, logits = prompt(11), []
    for mode in griffin.MODES:
        try:
            context = griffin.prune(model, mode=mode)
        except griffin.UnsupportedModelError:
            return
        with context:
            logits.append(step_logits(generate(model, ids)))
    assert difference(logits[0], logits[1]) < 1e-5


def test_a_norm_between_the_neurons_and_the_output_projection() -> None:
    assert_modes_agree_or_refuse(build("bitnet", **SMALL))


def test_an_activation_that_depends_on_all_neurons() -> None:
    # Gemma 3n drops gate values below a quantile that it estimates from all neurons of the token.
    options = {
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "activation_sparsity_pattern": [0.5] * LAYERS,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
    }
    assert_modes_agree_or_refuse(build("gemma3n_text", **(SMALL | options)))


def test_an_output_projection_that_the_model_goes_around() -> None:
    options = {"n_layer": LAYERS, "n_head": 4, "hidden_size": 32, "pretraining_tp": 2, "slow_but_exact": True}
    assert_modes_agree_or_refuse(build("bloom", vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=None, **options))


@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_model_without_a_kv_cache_is_refused(mode: str) -> None:
    # Each of its forward calls is the whole sequence, so each would count as a prompt and nothing would be pruned.
    model = build("openai-gpt", vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=4, pad_token_id=0)
    with pytest.raises(ValueError, match="cache"), griffin.prune(model, mode=mode):
        generate(model, prompt(11))


def test_a_model_without_generate_is_left_alone() -> None:
    decoder = fresh("llama").model
    with contextlib.suppress(AttributeError, ValueError), torch.no_grad(), griffin.prune(decoder):
        decoder(prompt(11))
    assert not decoder._forward_pre_hooks
    assert "generate" not in vars(decoder)
