"""Which forward calls are a prompt and which are generation follows from the KV cache."""

from __future__ import annotations

import pytest
import reference
import torch
from families import LAYERS, VARIED, tiny
from prompts import prompt
from reference import Span
from running import TOKENS, as_lists, difference, generate, new_tokens
from torch import Tensor
from transformers import PreTrainedModel

import griffin


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("family", ["llama", "opt"])  # its output projection has no bias of its own, or has one
def test_a_second_prompt_is_as_the_first_in_a_new_context(family: str, mode: str) -> None:
    model, first, second = tiny(family), prompt(11), prompt(7, 1)
    with griffin.prune(model, mode=mode) as pruner:
        expected = generate(model, second)
        experts = as_lists(pruner.experts)
    with griffin.prune(model, mode=mode) as pruner:
        generate(model, first)
        found = generate(model, second)
    assert as_lists(pruner.experts) == experts
    assert all(torch.equal(*steps) for steps in zip(found.logits, expected.logits, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_prompt_after_generation_is_dense(mode: str) -> None:
    model, ids = tiny("llama"), prompt(7, 1)
    dense = model(ids).logits
    with griffin.prune(model, mode=mode):
        generate(model, prompt(11))
        assert torch.equal(model(ids).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("family", VARIED)
def test_several_tokens_on_a_filled_cache_are_generation(family: str, mode: str) -> None:
    model, ids = tiny(family), prompt(11)
    experts = reference.experts(model, family, "griffin", ids[:, :7], 0.5)
    expected, _ = reference.run(model, family, ids, Span(7, 11, experts))
    with griffin.prune(model, mode=mode):
        cache = model(ids[:, :7]).past_key_values
        first = model(ids[:, 7:10], past_key_values=cache).logits[0]
        second = model(ids[:, 10:], past_key_values=cache).logits[0]
    assert difference(torch.cat([first, second]), expected[7:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_without_a_cache_every_call_is_a_prompt(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    dense = model(ids).logits
    with griffin.prune(model, mode=mode):
        for _ in range(2):
            assert torch.equal(model(ids, use_cache=False).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_generation_without_a_prompt_is_refused(mode: str) -> None:
    model = tiny("llama")
    cache = model(prompt(11)).past_key_values
    with griffin.prune(model, mode=mode), pytest.raises(ValueError, match="run the prompt inside the context"):
        model(prompt(1, 1), past_key_values=cache)


@torch.no_grad()
def test_a_call_without_tokens_is_refused() -> None:
    model = tiny("llama")
    with griffin.prune(model), pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(attention_mask=torch.ones(1, 3))


@torch.no_grad()
def test_arguments_may_be_positional() -> None:
    model, ids = tiny("llama"), prompt(7)
    ids_BS = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], dim=1)
    mask_BS = (ids_BS != 0).long()
    with griffin.prune(model) as pruner:
        model(ids)
        expected = as_lists(pruner.experts)
        model(ids_BS, mask_BS)
        assert as_lists(pruner.experts) == expected


def converse(
    model: PreTrainedModel, family: str, first: Tensor, second: Tensor
) -> tuple[list[list[int]], list[int], Tensor]:
    """The reference of a second turn: its experts, its tokens and the first turn's answer.

    The last token of the answer was not forwarded yet, so it is read with the second turn.
    """
    start = first.shape[1]
    experts = reference.experts(model, family, "griffin", first, 0.5)
    answer, _ = reference.generate(model, family, first, experts, TOKENS)
    ids = torch.cat([first, torch.tensor([answer]), second], dim=1)
    turns = [Span(start, start + TOKENS - 1, experts)]
    _, z = reference.run(model, family, ids, *turns)
    # What the prompts wrote is scored, what was generated is not.
    prompts = [torch.cat([z_SD[:start], z_SD[start + TOKENS - 1 :]]) for z_SD in z]
    scores = reference.score_layers(model, family, "griffin", prompts)
    experts = [reference.best(scores_D, 0.5) for scores_D in scores]
    length, tokens = ids.shape[1], []
    for _ in range(TOKENS):
        logits, _ = reference.run(model, family, ids, *turns, Span(length, ids.shape[1], experts))
        tokens.append(int(logits[-1].argmax()))
        ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
    return experts, tokens, torch.tensor([answer])


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_conversation_goes_on(family: str, mode: str, chunk: int | None) -> None:
    model, first, second = tiny(family), prompt(9), prompt(4, 1)
    experts, tokens, answer = converse(model, family, first, second)
    with griffin.prune(model, mode=mode) as pruner:
        turn = generate(model, first)
        assert torch.equal(turn.sequences, torch.cat([first, answer], dim=1))
        ids = torch.cat([turn.sequences, second], dim=1)
        found = generate(model, ids, past_key_values=turn.past_key_values, prefill_chunk_size=chunk)
    assert as_lists(pruner.experts) == experts
    assert new_tokens(found, ids) == [tokens]


@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_conversation_goes_on_with_the_new_tokens_only(mode: str) -> None:
    model, first, second = tiny("llama"), prompt(9), prompt(4, 1)
    experts, tokens, answer = converse(model, "llama", first, second)
    with griffin.prune(model, mode=mode) as pruner:
        turn = generate(model, first)
        ids = torch.cat([answer[:, -1:], second], dim=1)
        mask = torch.ones(1, turn.sequences.shape[1] + second.shape[1], dtype=torch.long)  # covers what is cached too
        found = generate(model, ids, mask, past_key_values=turn.past_key_values)
    assert as_lists(pruner.experts) == experts
    assert new_tokens(found, ids) == [tokens]


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_forward_calls_go_on_after_generate(mode: str) -> None:
    model, ids, token = tiny("llama"), prompt(11), prompt(1, 1)
    with griffin.prune(model, mode=mode) as pruner:
        output = generate(model, ids)
        found = model(token, past_key_values=output.past_key_values).logits[0, -1]
    written = torch.cat([output.sequences[:, :-1], token], dim=1)
    experts = Span(ids.shape[1], written.shape[1], as_lists(pruner.experts))
    assert difference(found, reference.run(model, "llama", written, experts)[0][-1]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_the_length_of_generates_prompt_is_forgotten(mode: str) -> None:
    model, ids, token = tiny("llama"), prompt(3), prompt(1, 1)
    with griffin.prune(model, mode=mode):
        expected = model(token, past_key_values=model(ids).past_key_values).logits
        generate(model, prompt(11))
        assert torch.equal(model(token, past_key_values=model(ids).past_key_values).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_cache_filled_before_pruning_is_continued_by_a_prompt(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    _, z = reference.run(model, "llama", ids)
    scores = reference.score_layers(model, "llama", "griffin", [z_SD[6:] for z_SD in z])
    cache = model(ids[:, :6]).past_key_values
    with griffin.prune(model, mode=mode) as pruner:
        generate(model, ids, past_key_values=cache)
    assert as_lists(pruner.experts) == [reference.best(scores_D, 0.5) for scores_D in scores]


@torch.no_grad()
@pytest.mark.parametrize("other_length", [6, 7], ids=["same length", "other length"])
def test_a_prompt_is_not_added_to_another_ones(other_length: int) -> None:
    model, ids = tiny("llama"), prompt(11)
    _, z = reference.run(model, "llama", ids)
    expected = reference.score_layers(model, "llama", "griffin", [z_SD[6:] for z_SD in z])
    with griffin.prune(model) as pruner:
        cache = model(ids[:, :6]).past_key_values
        model(prompt(other_length, 1))
        with pruner.prefill():
            model(ids[:, 6:], past_key_values=cache)  # not the cache of the last prompt: a new one begins
    for layer in range(LAYERS):
        assert difference(pruner.scores[layer][0], expected[layer]) < 1e-5
