"""The ways `generate` decodes: those that fit a prompt and its continuation work, the others are refused at once."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from families import fresh, tiny
from running import TOKENS, as_lists, difference, generate, new_tokens, pad, prompt, same, step_logits, text
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StaticCache

import griffin

IDS = prompt(11)
ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2), prompt(1, 3)]
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}
STATIC = {"cache_implementation": "static"}
each_mode = pytest.mark.parametrize("mode", griffin.MODES)


@each_mode
@pytest.mark.parametrize(
    ("length", "sparsity"), [(1, 0.5), (11, 0.25), (11, 0.9), (11, 0.999), (11, [0.0, 0.25, 0.75])]
)
def test_other_sparsities_and_a_prompt_of_one_token_follow_the_reference(length: int, sparsity: Any, mode: str) -> None:
    model, ids = tiny("llama"), prompt(length)
    shares = sparsity if isinstance(sparsity, list) else [sparsity] * 3
    scores = reference.scores(model, "llama", "griffin", ids)
    kept = [max(1, int(80 * (1 - share))) for share in shares]
    experts = [sorted(scores_D.topk(K).indices.tolist()) for scores_D, K in zip(scores, kept, strict=True)]
    expected, logits = reference.generate(model, "llama", ids, experts, TOKENS)
    with griffin.prune(model, sparsity=sparsity, mode=mode) as pruner:
        found = generate(model, ids)
    assert pruner.kept == kept
    assert as_lists(pruner.experts) == experts
    assert new_tokens(found, ids) == [expected]
    assert difference(step_logits(found), logits) < 1e-5


@each_mode
def test_a_prompt_of_embeddings(mode: str) -> None:
    model = tiny("llama")
    with griffin.prune(model, mode=mode) as pruner:
        expected, experts = text(model, IDS)[:, 11:], as_lists(pruner.experts)
        options = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": TOKENS}
        found = model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **options)
        assert torch.equal(found, expected)  # without ids there is no prompt to repeat
        assert as_lists(pruner.experts) == experts


def search(model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor | None = None, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    return new_tokens(generate(model, ids_BS, mask_BS, **options), ids_BS)


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_compact_and_masked_generate_the_same_from_the_prompts_experts(options: dict[str, Any]) -> None:
    model, found = tiny("llama"), []
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode, compensation="ridge") as pruner:
            generate(model, IDS, max_new_tokens=1)
            alone, scores = as_lists(pruner.experts), pruner.scores
            found.append(search(model, IDS, **options))
            assert all(as_lists(pruner.experts, copy) == alone for copy in range(len(pruner.experts[0])))
            for found_BD, expected_1D in zip(pruner.scores, scores, strict=True):
                torch.testing.assert_close(found_BD, expected_1D.expand_as(found_BD))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["greedy", "beam search", "several beams"])
def test_beams_of_a_batch_are_those_of_its_rows_alone(name: str) -> None:
    model, options = tiny("llama"), SEARCHES[name]
    with griffin.prune(model, mode="masked"):
        batch = search(model, *pad(ROWS), **options)
        assert batch == [row for ids in ROWS for row in search(model, ids, **options)]
        assert search(model, *pad(ROWS), **options, **STATIC) == batch


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 5}], ids=str)
@each_mode
def test_a_static_cache_gives_what_the_default_one_gives(mode: str, options: dict[str, Any]) -> None:
    model = tiny("llama")
    with griffin.prune(model, mode=mode) as pruner:
        expected, experts = text(model, IDS, **options), as_lists(pruner.experts)
        assert torch.equal(text(model, IDS, **options, **STATIC), expected)
        assert as_lists(pruner.experts) == experts
        without_mask = {"max_new_tokens": TOKENS, "do_sample": False}
        assert torch.equal(model.generate(IDS, **without_mask, **STATIC), model.generate(IDS, **without_mask))


@torch.no_grad()
@each_mode
def test_forward_calls_on_a_static_cache(mode: str) -> None:
    model, token = tiny("llama"), prompt(1, 1)
    with griffin.prune(model, mode=mode):
        expected = model(token, past_key_values=model(IDS).past_key_values).logits
        cache = StaticCache(model.config, max_cache_len=32)
        for _ in range(2):
            model(IDS, past_key_values=cache)
            assert difference(model(token, past_key_values=cache).logits, expected) < 1e-5
            cache.reset()  # empty again: a new prompt


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "group beam search": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "assisted": {"prompt_lookup_num_tokens": 2},
    "guided": {"guidance_scale": 2.0},
    "uncached": {"use_cache": False},
    "constrained": {"force_words_ids": [[3]], "num_beams": 2},
    "contrasting layers": {"dola_layers": "low"},
}


def refuses(model: PreTrainedModel, *args: Any, **options: Any) -> str:
    """The error that `generate` raises before the model runs, and after which it is pruned as before."""
    calls: list[None] = []
    with griffin.prune(model, experts=None):
        own = {name: getattr(model.generation_config, name) for name in ("guidance_scale", "use_cache")}
        counter = model.model.register_forward_pre_hook(lambda *_: calls.append(None))
        with pytest.raises(ValueError, match=r"supported|KV cache") as error:
            model.generate(IDS, *args, **options)
        counter.remove()
        assert calls == []
        assert own == {name: getattr(model.generation_config, name) for name in own}
    return str(error.value)


@pytest.mark.parametrize("options", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_decoding_is_refused_before_anything_runs(options: dict[str, Any]) -> None:
    config = GenerationConfig(max_new_tokens=3, **options)
    refuses(tiny("llama"), max_new_tokens=3, **options)
    refuses(tiny("llama"), config)
    refuses(tiny("llama"), generation_config=config)
    model = fresh("llama")
    for key, value in options.items():
        setattr(model.generation_config, key, value)
    refuses(model, max_new_tokens=3)


def test_an_assistant_model_and_no_prompt_and_an_empty_one_are_refused() -> None:
    model = tiny("llama")
    assert "assisted_generation" in refuses(model, assistant_model=tiny("mistral"), max_new_tokens=3)
    for options in ({}, {"refresh": "experts"}, {"verification": "exact"}):
        with griffin.prune(model, **options):
            expected = text(model, IDS)
            with pytest.raises(ValueError, match="needs a prompt"):
                model.generate(max_new_tokens=3)
            with pytest.raises(ValueError, match="at least one token"):
                model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=3)
            assert torch.equal(text(model, IDS), expected), "a refusal does not end the pruning"


@each_mode
def test_a_prompt_is_found_under_every_name(mode: str) -> None:
    model, options = tiny("llama"), {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    with griffin.prune(model, mode=mode):
        expected = model.generate(IDS, **options)
        found = [model.generate(inputs=IDS, **options), model.generate(input_ids=IDS, **options)]
        assert same([*found, model.generate(IDS, GenerationConfig(max_new_tokens=4))], [expected] * 3)
