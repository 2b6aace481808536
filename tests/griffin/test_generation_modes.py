"""The ways `generate` decodes: those that fit a prompt and its continuation work, the others are refused at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import fresh, tiny
from prompts import pad, prompt
from running import as_lists, generate, new_tokens
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

import griffin

ROWS = [prompt(11, 0), prompt(4, 1)]
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 3},
    "several beams": {"num_beams": 3, "num_return_sequences": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
}
DETERMINISTIC = ["greedy", "beam search", "several beams"]


def search(model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor | None = None, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    return new_tokens(generate(model, ids_BS, mask_BS, **options), ids_BS)


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_compact_and_masked_generate_the_same_from_the_prompts_experts(options: dict[str, Any]) -> None:
    model, ids, found = tiny("llama"), prompt(11), []
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode) as pruner:
            generate(model, ids, max_new_tokens=1)
            alone = as_lists(pruner.experts)
            found.append(search(model, ids, **options))
            for copy in range(len(pruner.experts[0])):
                assert as_lists(pruner.experts, copy) == alone
    assert found[0] == found[1]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mode", griffin.MODES)
def test_scores_do_not_depend_on_the_number_of_beams(mode: str, shared: bool) -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model, mode=mode, shared_experts=shared) as pruner:
        generate(model, ids)
        alone = pruner.scores
        generate(model, ids, num_beams=3)
        for found_BD, expected_1D in zip(pruner.scores, alone, strict=True):
            torch.testing.assert_close(found_BD, expected_1D.expand_as(found_BD))


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_beams_of_a_batch_are_those_of_its_rows_alone(name: str) -> None:
    model, options = tiny("llama"), SEARCHES[name]
    ids_BS, mask_BS = pad(ROWS, "left")
    with griffin.prune(model, mode="masked"):
        batch = search(model, ids_BS, mask_BS, **options)
        alone = [tokens for ids in ROWS for tokens in search(model, ids, **options)]
    assert batch == alone


@pytest.mark.parametrize("mode", griffin.MODES)
def test_beams_of_a_batch_share_experts(mode: str) -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad(ROWS, "left")
    with griffin.prune(model, mode=mode, shared_experts=True) as pruner:
        generate(model, ids_BS, mask_BS)
        expected = as_lists(pruner.experts)
        generate(model, ids_BS, mask_BS, num_beams=3)
        assert as_lists(pruner.experts) == expected


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("selection", ["sample", "topk_sample"])
def test_beams_of_a_prompt_draw_the_same_experts(selection: str, mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model, selection=selection, mode=mode) as pruner:
        generate(model, ids)
        alone = as_lists(pruner.experts)
        generate(model, ids, num_beams=3)
        assert all(as_lists(pruner.experts, beam) == alone for beam in range(len(pruner.experts[0])))


def test_sampling_depends_on_the_torch_seed_alone() -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model):
        first, second = (search(model, ids, do_sample=True) for _ in range(2))
    assert first == second


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
    """The error that `generate` raises before the model runs."""
    calls: list[None] = []
    counter = model.register_forward_pre_hook(lambda *_: calls.append(None))
    try:
        with griffin.prune(model), pytest.raises(ValueError, match=r"supported|KV cache") as error:
            model.generate(prompt(11), *args, **options)
    finally:
        counter.remove()
    assert calls == []
    return str(error.value)


@pytest.mark.parametrize("options", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_decoding_is_refused_before_anything_runs(options: dict[str, Any]) -> None:
    refuses(tiny("llama"), max_new_tokens=3, **options)


@pytest.mark.parametrize("options", UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_decoding_is_refused_from_a_config(options: dict[str, Any]) -> None:
    config = GenerationConfig(max_new_tokens=3, **options)
    refuses(tiny("llama"), config)
    refuses(tiny("llama"), generation_config=config)


@pytest.mark.parametrize("name", ["guided", "uncached", "assisted"])
def test_unsupported_decoding_is_refused_from_the_models_own_config(name: str) -> None:
    model = fresh("llama")
    for key, value in UNSUPPORTED[name].items():
        setattr(model.generation_config, key, value)
    refuses(model, max_new_tokens=3)


def test_an_assistant_model_is_refused() -> None:
    assert "assisted_generation" in refuses(tiny("llama"), assistant_model=tiny("mistral"), max_new_tokens=3)


def test_an_argument_overrides_the_models_own_config() -> None:
    model, ids = fresh("llama"), prompt(11)
    with griffin.prune(model):
        expected = new_tokens(generate(model, ids), ids)
        model.generation_config.guidance_scale = 2.0
        assert new_tokens(generate(model, ids, guidance_scale=1.0), ids) == expected


def test_a_refusal_does_not_end_the_pruning() -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model):
        expected = new_tokens(generate(model, ids), ids)
        with pytest.raises(ValueError, match="guidance_scale"):
            generate(model, ids, guidance_scale=2.0)
        assert new_tokens(generate(model, ids), ids) == expected


def test_generate_without_a_prompt_is_refused() -> None:
    model = tiny("llama")
    with griffin.prune(model), pytest.raises(ValueError, match="needs a prompt"):
        model.generate(max_new_tokens=3)


@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_prompt_is_found_under_every_name(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    with griffin.prune(model, mode=mode):
        expected = model.generate(ids, **options)
        assert torch.equal(model.generate(inputs=ids, **options), expected)
        assert torch.equal(model.generate(input_ids=ids, **options), expected)
        assert torch.equal(model.generate(ids, GenerationConfig(max_new_tokens=4)), expected)
