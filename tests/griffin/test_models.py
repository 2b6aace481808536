"""Architectures: what holds for every family of the layout table, against formulas written down on their own; models
beyond it are pruned right or refused by name, never half pruned."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from engines import begun, generated, prefilled, refuse_inexact, scored
from families import FAMILIES, IDS, LAYERS, REFRESHED, SMALL, VERIFIED, VOCABULARY, WAYS, build, fresh, tiny, tokens
from running import ROUTED, TOKENS, as_lists, difference, generate, new_tokens, same, step_logits, text, unchanged
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.integrations.finegrained_fp8 import FP8Linear

import griffin
from griffin import EXACT, RECIPE, Engine, Method, UnsupportedModelError, find_feedforward_blocks

each_family = pytest.mark.parametrize("family", FAMILIES)
SPARSITIES: list[Any] = [0.5, 0.25, 0.9, 0.999, [0.0, 0.25, 0.75]]
RICH = Method("joint", sparsity=(0.0, 0.9, 0.3), compensation="ridge")


@each_family
@torch.no_grad()
def test_a_prompt_runs_as_in_the_plain_model_to_the_bit(family: str) -> None:
    model, ids = tiny(family), tokens(13)
    state = prefilled(Engine(model), ids, RICH, keep_logits=13)
    plain = DynamicCache()  # without sliding windows, as ours
    assert torch.equal(state.logits_TV, model(torch.tensor([ids]), past_key_values=plain).logits[0])
    assert state.cache is not None
    for ours, theirs in zip(state.cache.layers, plain.layers, strict=True):
        assert same((ours.keys[:1, :, :13], ours.values[:1, :, :13]), (theirs.keys, theirs.values))


@each_family
def test_prompts_are_dense_and_what_follows_runs_on_their_experts(family: str) -> None:
    """Where nothing is dropped all is dense to the bit, behind a refresh too."""
    model = tiny(family)
    dense = generate(model, IDS, max_new_tokens=10)
    sparsity = SPARSITIES[FAMILIES.index(family) % len(SPARSITIES)]
    shares = sparsity if isinstance(sparsity, list) else [sparsity] * LAYERS
    scores = reference.scores(model, family, "griffin", IDS)
    experts = [reference.best(*pair) for pair in zip(scores, shares, strict=True)]
    expected, logits = reference.generate(model, family, IDS, experts, 6)
    for mode in griffin.MODES:
        with griffin.prune(model, sparsity, mode=mode) as pruner:
            found = generate(model, IDS)
        assert as_lists(pruner.experts) == experts
        assert new_tokens(found, IDS) == [expected]
        assert difference(step_logits(found), logits) < 1e-5
        assert torch.equal(found.logits[0], dense.logits[0])
        assert difference(found.logits[1], dense.logits[1]) > 1e-3, "its input is the dense one's still"
        with griffin.prune(model, replace(RECIPE, sparsity=0.0, budget="uniform"), mode=mode):
            assert same(generate(model, IDS, max_new_tokens=10).logits, dense.logits)


@each_family
@torch.no_grad()
def test_a_refresh_is_dense_and_compact_is_masked(family: str, early: None) -> None:
    """Its own logits are dense, and so is all that comes before it; what comes between is not."""
    model, following, found = tiny(family), tokens(7, 1), {}
    dense = model(torch.tensor([[*tokens(11), *following]])).logits[0, 11:]
    for mode in griffin.MODES:
        engine = Engine(model, mode=mode)
        found[mode] = scored(engine, begun(engine, tokens(11), replace(RICH, refresh="compensation")), following)
        for step in range(7):
            assert (difference(found[mode][step], dense[step]) < 2e-5) == (step in (2, 4)), step
    assert difference(found["compact"], found["masked"]) < 2e-5


@each_family
def test_verified_texts_are_the_dense_models(family: str, early: None) -> None:
    with griffin.prune(tiny(family), EXACT, draft_tokens=4, **REFRESHED) as pruner:
        found = text(tiny(family), IDS, max_new_tokens=14)[0, 11:].tolist()
    assert len(found) == 14
    assert pruner.drafts[0].drafted > 0
    refuse_inexact(tiny(family), tokens(11), found)


@each_family
def test_the_model_is_never_touched(family: str, way: dict[str, object]) -> None:
    """Neither when the context is left, nor within it: there only its calls are routed."""
    model = tiny(family)
    with unchanged(model):
        before = [vars(module).copy() for module in model.modules()]
        with griffin.prune(model, "griffin" if way == WAYS["compact"] else RECIPE, **way):
            text(model, IDS, max_new_tokens=10)
            for module, then in zip(model.modules(), before, strict=True):
                now = {name: value for name, value in vars(module).items() if name not in ROUTED}
                assert now.keys() == then.keys()
                assert all(now[name] is then[name] for name in then)


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("model_type", "options", "layer"),
    [
        *(("mixtral", {"num_local_experts": 4}, 0), ("gpt_oss", {"num_local_experts": 4}, 0), ("qwen3_moe", MOE, 0)),
        ("qwen3_moe", MOE | {"mlp_only_layers": [0, 1]}, 2),  # behind dense layers
    ],
)
def test_a_mixture_of_experts_is_refused_by_name(model_type: str, options: dict[str, Any], layer: int) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'model\.layers\.{layer}\.mlp'.* mixture of experts"):
        find_feedforward_blocks(build(model_type, **(SMALL | options)))


def projection(kind: type[nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    """One that is no plain matrix in memory."""
    module: nn.Module = kind(32, 80) if kind is nn.Linear else kind()
    module.weight = nn.Parameter(torch.zeros(80, 32, dtype=dtype), requires_grad=False)
    return module


UNPLAIN = [
    *(projection(nn.Module), nn.Identity(), projection(nn.Linear, torch.int8)),
    *(nn.Linear(32, 80, device="meta"), nn.Linear(32, 79)),
    type("Scaled", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})(32, 80),
    FP8Linear(32, 80),  # counts as floating point, but means nothing without the scale beside it
    nn.utils.parametrizations.weight_norm(nn.Linear(32, 80)),  # computed, not stored
]
LAYER, SECOND = "model.layers.1", tiny("llama").model.layers[1].mlp


@pytest.mark.parametrize(
    ("family", "path", "module", "words"),
    [
        *(("llama", f"{LAYER}.mlp.up_proj", module, r"'model\.layers\.1\.mlp\.up_proj'") for module in UNPLAIN),
        ("opt", "model.decoder.layers.2.fc2", nn.Linear(80, 32, device="meta"), r"'model\.decoder\.layers\.2\.fc2'"),
        ("llama", f"{LAYER}.mlp.gate_proj", None, rf"'{LAYER}'.*gate_proj \+ up_proj -> down_proj"),
        ("llama", f"{LAYER}.second", SECOND, rf"'{LAYER}\.mlp', '{LAYER}\.second'"),
    ],
)
def test_a_block_that_is_none_is_refused_by_name(family: str, path: str, module: nn.Module | None, words: str) -> None:
    """An unplain projection, an unknown layout, and two blocks in a layer."""
    model, (parent, _, name) = fresh(family), path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    with pytest.raises(UnsupportedModelError, match=words):
        find_feedforward_blocks(model)


_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
_GEMMA = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_SHARING = _GEMMA | {
    **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "sliding_window": 8},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
# Gemma 3n drops gate values below a quantile that it estimates from all neurons of the token.
_QUANTILE = _GEMMA | {
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    **{"activation_sparsity_pattern": [0.5] * LAYERS, "num_kv_shared_layers": 0, "laurel_rank": 4},
}
# A norm between the neurons and the output projection; an activation that depends on all neurons; an output projection
# that the model goes around.
UNUSUAL: dict[str, dict[str, Any]] = {
    "bitnet": SMALL,
    "gemma3n_text": SMALL | _QUANTILE,
    "bloom": {"n_layer": LAYERS, "n_head": 4, "hidden_size": 32, "pretraining_tp": 2, "slow_but_exact": True},
}
RECURRENT = {
    "falcon_h1": _MAMBA | {"mamba_chunk_size": 8},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": _LINEAR | {"num_experts": 0, "mlp_only_layers": [0, 1, 2]},
}
SHARING = {
    "gemma3n_text": _SHARING | {"activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 4},
    "gemma4_text": _SHARING | {"global_head_dim": 8, "num_global_key_value_heads": 2, "use_double_wide_mlp": False},
}


def in_both_modes(model: PreTrainedModel) -> list[torch.Tensor]:
    found = []
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode):
            found.append(step_logits(generate(model, IDS)))
    assert difference(*found) < 1e-5
    return found


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_the_modes_agree_or_the_model_is_refused(model_type: str) -> None:
    with contextlib.suppress(UnsupportedModelError):
        in_both_modes(build(model_type, **({"vocab_size": VOCABULARY, "pad_token_id": 0} | UNUSUAL[model_type])))


@torch.no_grad()
def test_a_model_without_a_kv_cache_is_refused_and_one_without_generate_left_alone() -> None:
    # Each of its forward calls is the whole sequence, so each would count as a prompt and nothing would be pruned.
    model = build("openai-gpt", vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=4, pad_token_id=0)
    with pytest.raises(UnsupportedModelError, match="no KV cache"):
        griffin.prune(model)
    with pytest.raises(UnsupportedModelError, match="Sequential is not a transformers language model"):
        find_feedforward_blocks(nn.Sequential(nn.Linear(4, 4)))
    decoder, found = fresh("llama").model, []
    for context in (griffin.prune(decoder), contextlib.nullcontext()):
        with context:
            assert "generate" not in vars(decoder)
            found.append(decoder(IDS[:, :3], past_key_values=decoder(IDS).past_key_values).last_hidden_state)
    assert difference(*found) > 1e-3


@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_states_are_pruned_but_never_rolled_back(model_type: str) -> None:
    model = build(model_type, **(SMALL | RECURRENT[model_type]))
    dense, (found, _) = step_logits(generate(model, IDS)), in_both_modes(model)
    assert torch.equal(found[0], dense[0])
    assert difference(found[1], dense[1]) > 1e-3
    message = rf"layer 0 of {type(model).__name__} caches a state \(\w+\) that cannot be cropped"
    with pytest.raises(UnsupportedModelError, match=message):
        griffin.prune(model, **REFRESHED)
    for pruning in (True, False):
        with pytest.raises(UnsupportedModelError, match=message):
            griffin.prefill(Engine(model, pruning=pruning), [[5]], [])


@torch.no_grad()
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("model_type", SHARING)
def test_layers_that_share_keys_and_values(model_type: str, sparsity: float) -> None:
    """All of a prompt is scored, though `generate` asks for its last logits only."""
    model, method = build(model_type, **(SMALL | SHARING[model_type])), Method(sparsity=sparsity, compensation="ridge")
    dense, engine = text(model, IDS), Engine(model)
    with griffin.prune(model, method) as pruner:
        expected = generate(model, IDS)
        scores = pruner.scores if sparsity else []
        model(IDS)
        assert all(difference(*layer) < 1e-5 for layer in zip(scores, pruner.scores if sparsity else [], strict=True))
    assert torch.equal(expected.sequences, dense) == (sparsity == 0.0)
    ((found, _),) = generated(engine, [begun(engine, tokens(11), method)], TOKENS).values()
    assert [found] == new_tokens(expected, IDS)
    with griffin.prune(model, method, refresh="compensation"):  # the first one would come later
        assert torch.equal(text(model, IDS), expected.sequences)
    with griffin.prune(model, method, **VERIFIED) if sparsity else contextlib.nullcontext():
        assert torch.equal(text(model, IDS), dense)
