"""Models beyond the layout table: pruned right or refused, but never silently wrong or half pruned."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from families import LAYERS, VOCABULARY, build, fresh
from prompts import prompt
from running import TOKENS, difference, generate, new_tokens, step_logits
from transformers import PreTrainedModel

import griffin
from griffin import Engine, Generation, Method

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


# -- recurrent states --------------------------------------------------------------------------------------------------

_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
RECURRENT: dict[str, dict[str, Any]] = {
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 8,
    },
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR | {"num_experts": 0, "mlp_only_layers": [0, 1, 2]},
}


@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_states_are_pruned_but_never_rolled_back(model_type: str) -> None:
    model, ids = build(model_type, **(SMALL | RECURRENT[model_type])), prompt(11)
    dense, logits = step_logits(generate(model, ids)), []
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode):
            logits.append(step_logits(generate(model, ids)))
    assert difference(logits[0], logits[1]) < 1e-5
    assert torch.equal(logits[0][0], dense[0])
    assert difference(logits[0][1], dense[1]) > 1e-3
    message = rf"layer 0 of {type(model).__name__} caches a state \(\w+\) that cannot be cropped"
    with pytest.raises(griffin.UnsupportedModelError, match=message):
        griffin.prune(model, refresh="experts")
    with pytest.raises(griffin.UnsupportedModelError, match=message):
        griffin.prefill(Engine(model), ids.tolist(), [])


# -- keys and values that layers share ---------------------------------------------------------------------------------

_SHARING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
SHARING: dict[str, dict[str, Any]] = {
    "gemma3n_text": _SHARING | {"activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4},
    "gemma4_text": _SHARING | {"global_head_dim": 8, "num_global_key_value_heads": 2, "use_double_wide_mlp": False},
}


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("model_type", SHARING)
def test_layers_that_share_keys_and_values(model_type: str, sparsity: float) -> None:
    model, ids = build(model_type, **(SMALL | SHARING[model_type])), prompt(11)
    method = Method(sparsity=sparsity, compensation="ridge")
    if sparsity:
        with griffin.prune(model, sparsity, compensation="ridge"):
            expected = generate(model, ids)
    else:
        expected = generate(model, ids)
    engine = Engine(model)
    rows = griffin.begin(engine, griffin.prefill(engine, ids.tolist(), griffin.wanted([method])), method)
    rule = Generation(TOKENS, griffin.greedy, lambda row: False)
    (row,) = griffin.decode(engine, rows, 1, 1, ids.shape[1], rule)
    assert [row.tokens] == new_tokens(expected, ids)
    with griffin.prune(model, sparsity, compensation="ridge", refresh="experts"):
        refreshed = generate(model, ids)  # the first refresh would come later
    assert torch.equal(refreshed.sequences, expected.sequences)


@torch.no_grad()
@pytest.mark.parametrize("model_type", SHARING)
def test_all_of_a_prompt_is_scored_though_generate_asks_for_its_last_logits_only(model_type: str) -> None:
    model, ids = build(model_type, **(SMALL | SHARING[model_type])), prompt(11)
    with griffin.prune(model) as pruner:
        generate(model, ids)
        found = pruner.scores
        model(ids)
        assert all(difference(*layer) < 1e-5 for layer in zip(found, pruner.scores, strict=True))
