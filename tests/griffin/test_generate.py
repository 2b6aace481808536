"""Which calls are a prompt, by their KV cache; what a pruner tells; and which ways of `generate` to decode work."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from families import IDS, LAYERS, REFRESHED, ROWS, VERIFIED, fresh, pad, prompt, tiny
from reference import Span
from running import TOKENS, as_lists, difference, generate, new_tokens, same, text
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StaticCache

import griffin
from griffin import DraftStatistics, RowStatistics, traffic

DRAFTED = VERIFIED | {"draft_tokens": 4, "draft_vocabulary": "full"}
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize(
    "options", [{}, {"compensation": "ridge"}, {"selection": "sample"}, {"sparsity": [0, 0.9, 0.5]}]
)
def test_two_prompts_in_turn_each_continue_with_their_own_experts(options: dict[str, object], mode: str) -> None:
    model, prompts, following = tiny("llama"), [prompt(11, 0), prompt(7, 1)], [prompt(5, 2), prompt(5, 3)]

    def step(cache: object, which: int, at: int, tokens: int = 1) -> Any:
        return model(following[which][:, at : at + tokens], past_key_values=cache).logits

    dense = model(prompts[0]).logits
    with griffin.prune(model, mode=mode, **options) as pruner:
        for what in ("scores", "experts", "chosen"):
            with pytest.raises(RuntimeError, match="no prompt has run yet"):
                getattr(pruner, what)
        alone, experts = [], []
        for which, ids in enumerate(prompts):
            cache = model(ids).past_key_values
            alone.append([step(cache, which, at) for at in range(5)])
            experts.append(as_lists(pruner.experts))
        text(model, prompt(19, 9))  # a longer text, whose end is forgotten
        caches = [model(ids).past_key_values for ids in prompts]
        for at, which, tokens in ((0, 0, 1), (0, 1, 2), (1, 0, 1), (2, 0, 3), (2, 1, 1), (3, 1, 2)):
            found, expected = step(caches[which], which, at, tokens), alone[which][at : at + tokens]
            assert difference(found, torch.cat(expected, dim=1)) < 1e-5
            assert as_lists(pruner.experts) == experts[which]
        for call in ((prompts[0],), (prompts[0], torch.ones_like(prompts[0]))):  # arguments may be positional
            for cached in (True, False):  # every call without a cache is dense
                assert torch.equal(model(*call, use_cache=cached).logits, dense), "a prompt after generation"
    assert experts[0] != experts[1]


def converse(model: Any, family: str, first: Tensor, second: Tensor) -> tuple[list[list[int]], list[int], Tensor]:
    """The reference of a second turn: its experts, its tokens and the first turn's answer.

    The last token of the answer was not forwarded yet, so it is read with the second turn.
    """
    start, begins = first.shape[1], first.shape[1] + TOKENS - 1
    experts = [reference.best(one, 0.5) for one in reference.scores(model, family, "griffin", first)]
    answer, _ = reference.generate(model, family, first, experts, TOKENS)
    ids = torch.cat([first, torch.tensor([answer]), second], dim=1)
    turn = Span(start, begins, experts)
    _, z = reference.run(model, family, ids, turn)
    # What the prompts wrote is scored, what was generated is not.
    prompts = [torch.cat([z_SD[:start], z_SD[begins:]]) for z_SD in z]
    experts = [reference.best(one, 0.5) for one in reference.score_layers(model, family, "griffin", prompts)]
    found, _ = reference.generate(model, family, ids, experts, TOKENS, turn)
    return experts, found, torch.tensor([answer])


@pytest.mark.parametrize("new_only", [False, True])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_conversation_goes_on(family: str, mode: str, chunk: int | None, new_only: bool) -> None:
    model, first, second = tiny(family), prompt(9), prompt(4, 1)
    experts, expected, answer = converse(model, family, first, second)
    with griffin.prune(model, mode=mode) as pruner:
        turn = generate(model, first)
        assert torch.equal(turn.sequences, torch.cat([first, answer], dim=1))
        ids = torch.cat([turn.sequences, second], dim=1)
        mask = torch.ones_like(ids)  # covers what is cached too
        ids = torch.cat([answer[:, -1:], second], dim=1) if new_only else ids
        found = generate(model, ids, mask, past_key_values=turn.past_key_values, prefill_chunk_size=chunk)
    assert as_lists(pruner.experts) == experts
    assert new_tokens(found, ids) == [expected]


def test_a_cache_filled_before_pruning_or_by_another_prompt_begins_a_prompt(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    _, z = reference.run(model, "llama", ids)
    expected = reference.score_layers(model, "llama", "griffin", [z_SD[6:] for z_SD in z])
    cache = model(ids[:, :6]).past_key_values
    with griffin.prune(model, mode=mode) as pruner, pruner.prefill():
        for other_length in (6, 7):
            model(prompt(other_length, 1))
            model(ids[:, 6:], past_key_values=cache)  # not the cache of the last prompt: a new one begins
            for layer in range(LAYERS):
                assert difference(pruner.scores[layer][0], expected[layer]) < 1e-5
            cache.crop(-5)


STEPS = 11
# Method, dense steps of a text; verified texts have as many as there are checks.
TAKEN: list[tuple[dict[str, Any], int]] = [
    *(({"sparsity": 0.0}, STEPS), ({}, 0), ({"mode": "masked"}, 0), (DRAFTED, 0)),
    (REFRESHED | {"mode": "masked"}, 1),
]


@pytest.mark.parametrize(("options", "dense"), TAKEN, ids=str)
def test_stats_say_what_each_text_of_the_last_call_took(options: dict[str, Any], dense: int) -> None:
    model, read = tiny("llama"), traffic(tiny("llama"), [40] * LAYERS)
    with griffin.prune(model, **options) as pruner:
        assert pruner.stats == pruner.drafts == []
        for batch in ((ROWS[0],), pad(ROWS)) if "mode" in options or options == DRAFTED else ((ROWS[0],),):
            text(model, *batch, max_new_tokens=STEPS + 1)
            assert len(pruner.stats) == len(pruner.chosen) == len(batch[0])
            assert len(pruner.drafts) == (len(batch[0]) if options == DRAFTED else 0)
    for place, row in enumerate(pruner.stats):
        drafts = (
            pruner.drafts[place] if pruner.drafts else DraftStatistics(STEPS - dense, emitted=STEPS, widths=[1] * dense)
        )
        assert drafts.emitted == STEPS
        assert (row.tokens, row.dense_steps, row.dense_bytes) == (STEPS + 1, drafts.checks, STEPS * read.dense)
        assert row.acceptance == (drafts.accepted / drafts.drafted if pruner.drafts else None)
        assert row.bytes_read == drafts.checks * read.dense + drafts.drafted * read.pruned
        assert row.effective_density == row.bytes_read / row.dense_bytes
        assert row.seconds > 0
    assert RowStatistics(1, 0, 0, 0, 0.0).effective_density == 1.0, "nothing was decoded"


BEAMS = [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}]
SAMPLED = [{"do_sample": True} | more for more in ({}, {"num_return_sequences": 3}, {"num_beams": 3})]
STATIC = {"cache_implementation": "static"}


def test_a_prompt_is_found_under_every_name_and_as_embeddings(mode: str) -> None:
    model, options = tiny("llama"), {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}
    with griffin.prune(model, mode=mode) as pruner:
        expected, experts = model.generate(IDS, **options), as_lists(pruner.experts)
        found = [model.generate(inputs=IDS, **options), model.generate(input_ids=IDS, **options)]
        assert same([*found, model.generate(IDS, GenerationConfig(max_new_tokens=4))], [expected] * 3)
        found = model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **options)
        assert torch.equal(found, expected[:, 11:])  # without ids there is no prompt to repeat
        assert as_lists(pruner.experts) == experts


def test_a_static_cache_gives_what_the_default_one_gives(mode: str) -> None:
    model, token, cache = tiny("llama"), prompt(1, 1), StaticCache(tiny("llama").config, max_cache_len=32)
    with griffin.prune(model, mode=mode):
        assert torch.equal(text(model, IDS), text(model, IDS, **STATIC))
        for ids in (IDS, prompt(7, 1)):
            expected = model(token, past_key_values=model(ids).past_key_values).logits
            model(ids, past_key_values=cache)
            assert difference(model(token, past_key_values=cache).logits, expected) < 1e-5
            cache.reset()  # empty again: a new prompt


def search(model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor | None = None, **options: Any) -> list[list[int]]:
    torch.manual_seed(0)
    return new_tokens(generate(model, ids_BS, mask_BS, **options), ids_BS)


AGREEING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    *(({"compensation": "ridge"}, decoding) for decoding in (*BEAMS, *SAMPLED)),
    *(({"shared_experts": True, "selection": name}, {}) for name in griffin.SELECTIONS),
    *(({"shared_experts": True, "statistic": name}, {}) for name in ("magnitude", "random")),
    *(({"shared_experts": True, "compensation": "ridge", "refresh": name}, {}) for name in griffin.REFRESHES),
]


@pytest.mark.parametrize(("pruning", "decoding"), AGREEING, ids=str)
def test_compact_and_masked_generate_the_same(pruning: dict[str, Any], decoding: dict[str, Any], early: None) -> None:
    """Of one prompt, and of a batch that shares its experts."""
    model, batch, found = tiny("llama"), pad(ROWS if "shared_experts" in pruning else [IDS]), []
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode, **pruning) as pruner:
            found.append((search(model, *batch, **decoding), as_lists(pruner.experts)))
            assert {one.shape for one in pruner.experts} == {(1, 40)}
    assert found[0] == found[1]


@pytest.mark.parametrize("options", [*BEAMS, {"prefill_chunk_size": 5}], ids=str)
def test_texts_and_beams_of_a_batch_are_those_of_its_rows_alone(options: dict[str, Any]) -> None:
    model = tiny("llama")
    with griffin.prune(model, mode="masked"):
        batch = search(model, *pad(ROWS), **options)
        assert batch == [row for ids in ROWS for row in search(model, ids, **options)]
        assert search(model, *pad(ROWS), **options, **STATIC) == batch


UNSUPPORTED: list[dict[str, Any]] = [
    {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    *({"penalty_alpha": 0.6, "top_k": 4}, {"prompt_lookup_num_tokens": 2}, {"guidance_scale": 2.0}),
    *({"use_cache": False}, {"force_words_ids": [[3]], "num_beams": 2}, {"dola_layers": "low"}),
]


def refuses(model: PreTrainedModel, *args: Any, **options: Any) -> str:
    """The error that `generate` raises before the model runs, and after which its config is as before."""
    before = model.generation_config.to_dict()
    with griffin.prune(model), pytest.raises(ValueError, match=r"supported|KV cache") as error:
        # The error of a model that had run would be another one: there is no such token.
        model.generate(torch.tensor([[10**6]]), *args, **options)
    assert model.generation_config.to_dict() == before
    return str(error.value)


@pytest.mark.parametrize("options", UNSUPPORTED, ids=str)
def test_unsupported_decoding_is_refused_before_anything_runs(options: dict[str, Any]) -> None:
    config, model = GenerationConfig(max_new_tokens=3, **options), fresh("llama")
    refuses(model, max_new_tokens=3, **options)
    refuses(model, config)
    refuses(model, generation_config=config)
    model.generation_config.update(**options)
    refuses(model, max_new_tokens=3)


def test_an_assistant_model_and_no_prompt_and_an_empty_one_are_refused() -> None:
    model = tiny("llama")
    assert "assisted_generation" in refuses(model, assistant_model=tiny("mistral"), max_new_tokens=3)
    for options in ({}, REFRESHED, VERIFIED):
        with griffin.prune(model, **options):
            with pytest.raises(ValueError, match="needs a prompt"):
                model.generate(max_new_tokens=3)
            with pytest.raises(ValueError, match="at least one token"):
                model.generate(torch.empty(1, 0, dtype=torch.long), max_new_tokens=3)
