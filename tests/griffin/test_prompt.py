"""Prompts: one dense pass over each, what it leaves, and the experts that are chosen from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engines import chosen, generated, prefilled, scored
from families import LAYERS, WIDTHS, build, tiny
from running import TOLERANCE, as_lists, difference, same, tokens
from torch import Tensor

import griffin
from griffin import Engine, Method, PromptState, begin, choose, prefill, wanted

# All that can be recorded, and a method for each of it.
METHODS = [
    *(Method(name) for name, one in griffin.STATISTICS.items() if not one.oracle),
    *(Method(compensation=name) for name in griffin.COMPENSATIONS),
]
EVERYTHING = wanted(METHODS)
# Where the mask matters: rotary and learned positions, ALiBi, and sliding windows.
MASKS = ["llama", "opt", "bloom", "gemma3_text"]


def keys_values(state: PromptState) -> list[Tensor]:
    """All keys and values that a state's cache shows."""
    assert state.cache is not None
    window = slice(None), slice(None), slice(0, state.length)
    return [buffer[window] for layer in state.cache.layers for buffer in (layer.keys, layer.values)]


def everything(state: PromptState) -> list[Tensor]:
    """All tensors of a state."""
    recorded = [total for layers in state.recorded.totals.values() for total in layers]
    return [state.logits_TV, state.recorded.tokens_B, *keys_values(state), *recorded]


def refuse_difference(found: PromptState, expected: PromptState) -> None:
    assert (found.ids, found.length) == (expected.ids, expected.length)
    assert found.recorded.tokens_B.tolist() == expected.recorded.tokens_B.tolist() == [found.length]
    for one, other in zip(*([state.logits_TV, *keys_values(state)] for state in (found, expected)), strict=True):
        assert one.shape == other.shape
        assert difference(one, other) < TOLERANCE
    for statistic, layers in expected.recorded.totals.items():
        for one, other in zip(found.recorded.totals[statistic], layers, strict=True):
            if one.dim() == 3:  # the latest rows: a longer prompt beside it puts rows of zeros in front
                assert not one[:, : -other.shape[1]].any()
                one = one[:, -other.shape[1] :]
            assert difference(one, other) < TOLERANCE


@pytest.mark.parametrize("family", MASKS)
def test_a_padded_batch_is_its_prompts_one_by_one(family: str) -> None:
    engine, prompts = Engine(tiny(family)), [tokens(length, length) for length in (12, 5, 1, 17)]
    for found, ids in zip(prefill(engine, prompts, EVERYTHING, keep_logits=3), prompts, strict=True):
        assert found.logits_TV.shape == (min(3, len(ids)), tiny(family).config.vocab_size)
        refuse_difference(found, prefilled(engine, ids, *METHODS, keep_logits=3))


def test_only_the_prompt_is_recorded_of_a_text_that_goes_on() -> None:
    engine, texts, counts = Engine(tiny("llama")), [tokens(12, 1), tokens(9, 2), tokens(9, 3)], [11, 4, 9]
    found = prefill(engine, texts, EVERYTHING, prompt_lengths=counts, keep_logits=12)
    for state, ids, count in zip(found, texts, counts, strict=True):
        whole, alone = prefilled(engine, ids, keep_logits=12), prefilled(engine, ids[:count], *METHODS)
        assert difference(state.logits_TV, whole.logits_TV) < TOLERANCE
        refuse_difference(replace(state, logits_TV=alone.logits_TV), alone)


def test_an_empty_prompt_and_recurrent_states_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        prefill(Engine(tiny("llama")), [tokens(5), []], [])
    model = build("mamba", hidden_size=16, num_hidden_layers=2, vocab_size=97, state_size=4)
    with pytest.raises(griffin.UnsupportedModelError, match=r"layer 0 of MambaForCausalLM .* cannot be cropped"):
        prefill(Engine(model, pruning=False), [tokens(5)], [])


@pytest.mark.parametrize(("before", "length"), [(5, 13), (6, 7), (1, 7)])
@pytest.mark.parametrize("family", MASKS)
def test_a_prompt_goes_on_from_its_prefix(family: str, before: int, length: int) -> None:
    engine, ids = Engine(tiny(family)), tokens(length)
    prefix = prefilled(engine, ids[:before], *METHODS)
    whole = prefilled(engine, ids, *METHODS, keep_logits=length - before)
    refuse_difference(prefilled(engine, ids, *METHODS, keep_logits=length, prefix=prefix), whole)


def test_a_prefix_of_a_prefix_and_one_that_was_one_of_a_batch() -> None:
    engine, ids = Engine(tiny("llama")), tokens(13)
    expected, state = prefilled(engine, ids, *METHODS), prefilled(engine, ids[:3], *METHODS)
    lengths: list[int] = []
    engine.dense.module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for length in (6, 7, 13):
        state = prefilled(engine, ids[:length], *METHODS, prefix=state)
    refuse_difference(state, expected)
    assert lengths == [3, 1, 6], "what was run is not run again"
    _, prefix = prefill(engine, [tokens(17, 1), ids[:6]], EVERYTHING)
    refuse_difference(prefilled(engine, ids, *METHODS, prefix=prefix), expected)


def test_a_prefix_must_have_recorded_what_is_wanted_and_the_rest_is_forgotten() -> None:
    """Else methods would choose from a part of a prompt without anybody's notice."""
    engine = Engine(tiny("llama"))
    prefix = prefilled(engine, tokens(5), Method("griffin"))
    with pytest.raises(ValueError, match="without recording"):
        prefilled(engine, tokens(9), Method("wanda"), prefix=prefix)
    with pytest.raises(ValueError, match="without recording"):
        prefilled(engine, tokens(9), prefix=prefix, likely_tokens=True)
    prefix = prefilled(engine, tokens(5), Method("griffin"), Method("wanda"))
    state = prefilled(engine, tokens(9), Method("joint"), prefix=prefix)
    assert list(state.recorded.totals) == wanted([Method("griffin")]), "joint records what griffin does"
    with pytest.raises(ValueError, match="without recording"):
        prefilled(engine, tokens(13), Method("wanda"), prefix=state)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_use_of_a_state_changes_it(family: str) -> None:
    """A part of a shared prompt once changed the prompt that it was part of."""
    engine = Engine(tiny(family))
    refreshed = [Method(refresh="experts"), Method(compensation="ridge", refresh="compensation")]
    verified = Method(compensation="ridge", refresh="compensation", verification="exact")
    methods = [Method("wanda"), Method(compensation="mean"), Method(sparsity=0.0), *refreshed, verified]
    states = prefill(engine, [tokens(9, 1), tokens(12, 2)], wanted(methods), likely_tokens=True)
    before = [[tensor.clone() for tensor in everything(state)] for state in states]

    def texts(state: PromptState) -> list[tuple[list[int], Tensor]]:
        rows = [begin(engine, [state], method, labels=[method])[0] for method in methods]
        return list(generated(engine, rows, 20, most=3).values())

    first = texts(states[0])
    generated(engine, begin(engine, states, refreshed[0], labels=[0, 1]), 20, most=2)
    prefilled(engine, [*tokens(9, 1), 5, 6], *methods, prefix=states[0])
    scored(engine, begin(engine, [states[1]], refreshed[1])[0], tokens(18))
    for state, tensors in zip(states, before, strict=True):
        assert same(everything(state), tensors)
    for (ours, logits), (theirs, their_logits) in zip(texts(states[0]), first, strict=True):
        assert ours == theirs
        assert torch.equal(logits, their_logits)


def neurons(engine: Engine, states: list[PromptState], method: Method, seed: int = 0) -> list[list[int]]:
    return as_lists(chosen(engine, states, method, seed).neurons, None)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_experts_are_those_of_scores_in_order(method: Method) -> None:
    engine = Engine(tiny("gpt2"))
    state = prefilled(engine, tokens(9), method)
    experts = chosen(engine, state, method)
    for neurons_K, corrections in zip(experts.neurons, experts.corrections, strict=True):
        assert (neurons_K.dtype, len(neurons_K)) == (torch.int64, WIDTHS["gpt2"] // 2)
        assert bool((neurons_K.diff() > 0).all())
        assert len(corrections) == (method.compensation != "none")
    for dense in (replace(method, sparsity=0.0), replace(method, sparsity=(0.0,) * LAYERS)):
        assert choose(engine, [state], dense) is None, "nothing is dropped"
