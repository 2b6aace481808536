"""Prompts: one dense pass over each, what it leaves, and the experts that are chosen from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from engines import TOLERANCE, begun, generated, plain_logits, prefilled, tokens
from families import LAYERS, ONE_PER_LAYOUT, WIDTHS, build, tiny
from running import difference
from torch import Tensor
from transformers import DynamicCache

import griffin
from griffin import Engine, Method, PromptState, Recorded, begin, choose, prefill, score, wanted
from griffin.prompt import WORTH

# All that can be recorded, and a method for each of it.
METHODS = [
    *(Method(name) for name, one in griffin.STATISTICS.items() if not one.oracle and not one.self_generated),
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
    assert found.ids == expected.ids
    assert found.length == expected.length
    assert found.recorded.tokens_B.tolist() == expected.recorded.tokens_B.tolist() == [found.length]
    ours, theirs = ([state.logits_TV, *keys_values(state)] for state in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert difference(one, other) < TOLERANCE
    for statistic, layers in expected.recorded.totals.items():
        for one, other in zip(found.recorded.totals[statistic], layers, strict=True):
            if one.dim() == 3:  # the latest rows: a longer prompt beside it puts rows of zeros in front
                assert not one[:, : -other.shape[1]].any()
                one = one[:, -other.shape[1] :]
            assert one.shape == other.shape
            assert difference(one, other) < TOLERANCE


# -- prefill ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*ONE_PER_LAYOUT, "gemma3_text"])
@torch.no_grad()
def test_a_prompt_runs_as_in_the_plain_model_to_the_bit(family: str) -> None:
    model, ids = tiny(family), tokens(13)
    state = prefilled(Engine(model), ids, *METHODS, keep_logits=13)
    assert torch.equal(state.logits_TV, plain_logits(model, ids)[0])
    cache = DynamicCache()  # without sliding windows, as ours
    model(torch.tensor([ids]), past_key_values=cache)
    plain = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    assert all(torch.equal(*pair) for pair in zip(keys_values(state), plain, strict=True))


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


def test_logits_stay_as_the_model_gives_them() -> None:
    model = build(
        "llama", hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=97
    )
    model.bfloat16()
    engine = Engine(model)
    row = begun(engine, tokens(7), Method())
    assert row.state.logits_TV.dtype == torch.bfloat16
    ((_, logits),) = score(engine, [(row, tokens(4, 1))], 1)
    assert logits.dtype == torch.bfloat16
    assert all(total.dtype == torch.float32 for layers in row.state.recorded.totals.values() for total in layers)
    ((_, picked),) = generated(engine, [begun(engine, tokens(7), Method())], 1, 2).values()
    assert picked.dtype == torch.float32, "tokens are picked, and log-likelihoods summed, in float32"


def test_a_model_with_recurrent_states_is_refused() -> None:
    model = build("mamba", hidden_size=16, num_hidden_layers=2, vocab_size=97, state_size=4)
    with pytest.raises(griffin.UnsupportedModelError, match=r"layer 0 of MambaForCausalLM .* cannot be cropped"):
        prefill(Engine(model, pruning=False), [tokens(5)], [])


# -- a prefix ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "length"), [(5, 13), (6, 7), (1, 7)])
@pytest.mark.parametrize("family", MASKS)
def test_a_prompt_goes_on_from_its_prefix(family: str, before: int, length: int) -> None:
    engine, ids = Engine(tiny(family)), tokens(length)
    prefix = prefilled(engine, ids[:before], *METHODS)
    whole = prefilled(engine, ids, *METHODS, keep_logits=length - before)
    refuse_difference(prefilled(engine, ids, *METHODS, keep_logits=length, prefix=prefix), whole)


def test_a_prefix_of_a_prefix() -> None:
    engine, ids = Engine(tiny("llama")), tokens(13)
    state = prefilled(engine, ids[:3], *METHODS)
    for length in (6, 7, 13):
        state = prefilled(engine, ids[:length], *METHODS, prefix=state)
    refuse_difference(state, prefilled(engine, ids, *METHODS))


def test_a_prefix_that_was_one_of_a_batch() -> None:
    engine, ids = Engine(tiny("llama")), tokens(13)
    _, prefix = prefill(engine, [tokens(17, 1), ids[:6]], EVERYTHING)
    refuse_difference(prefilled(engine, ids, *METHODS, prefix=prefix), prefilled(engine, ids, *METHODS))


def test_a_prompt_that_ends_within_the_prefix_runs_whole() -> None:
    """The text goes on after the prompt, and begins with the prefix as a whole."""
    engine, ids = Engine(tiny("llama")), tokens(13)
    prefix = prefilled(engine, ids[:6], *METHODS)
    for length in (4, 6, 8):
        (found,) = prefill(engine, [ids], EVERYTHING, prompt_lengths=[length], prefix=prefix)
        whole = prefilled(engine, ids)
        alone = prefilled(engine, ids[:length], *METHODS)
        refuse_difference(replace(found, logits_TV=alone.logits_TV), alone)
        assert difference(found.logits_TV, whole.logits_TV) < TOLERANCE


@pytest.mark.parametrize(
    ("prefix", "ids"),
    [
        (tokens(5, 1), tokens(13)),
        (tokens(13), tokens(13)),
        (tokens(13), tokens(13)[:9]),
        (tokens(2), tokens(2) + tokens(2 * WORTH, 1)),
    ],
    ids=["another", "all-of-it", "longer", "not-worth-it"],
)
def test_a_prompt_without_the_prefix_runs_whole(prefix: list[int], ids: list[int]) -> None:
    engine = Engine(tiny("llama"))
    state = prefilled(engine, prefix, *METHODS)
    found, whole = prefilled(engine, ids, *METHODS, prefix=state), prefilled(engine, ids, *METHODS)
    assert all(torch.equal(*pair) for pair in zip(everything(found), everything(whole), strict=True))


def test_a_prefix_runs_once() -> None:
    engine, model = Engine(tiny("llama")), tiny("llama")
    lengths: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    try:
        prefix = prefilled(engine, tokens(5))
        for seed in range(3):
            prefilled(engine, tokens(5) + tokens(4, seed), prefix=prefix)
    finally:
        handle.remove()
    assert lengths == [5, 4, 4, 4]


def test_a_prefix_that_did_not_record_what_is_wanted_is_refused() -> None:
    engine = Engine(tiny("llama"))
    prefix = prefilled(engine, tokens(5), Method("griffin"))
    with pytest.raises(ValueError, match="without recording"):
        prefilled(engine, tokens(9), Method("wanda"), prefix=prefix)
    state = prefilled(engine, tokens(9), Method("joint"), prefix=prefix)
    assert list(state.recorded.totals) == wanted([Method("griffin")]), "joint records what griffin does"


def test_what_was_recorded_of_a_prefix_only_is_forgotten() -> None:
    """Else methods would choose from the beginning of a prompt without anybody's notice."""
    engine = Engine(tiny("llama"))
    prefix = prefilled(engine, tokens(9)[:5], Method("griffin"), Method("wanda"))
    state = prefilled(engine, tokens(9), Method("griffin"), prefix=prefix)
    assert list(state.recorded.totals) == wanted([Method("griffin")])
    with pytest.raises(ValueError, match="without recording"):
        prefilled(engine, tokens(13), Method("wanda"), prefix=state)


# -- a state is immutable ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_use_of_a_state_changes_it(family: str) -> None:
    """A part of a shared prompt once changed the prompt that it was part of."""
    engine = Engine(tiny(family))
    refreshed = [Method(refresh="experts"), Method(compensation="ridge", refresh="compensation")]
    methods = [Method("wanda"), Method(compensation="mean"), Method(sparsity=0.0), *refreshed]
    states = prefill(engine, [tokens(9, 1), tokens(12, 2)], wanted(methods))
    before = [[tensor.clone() for tensor in everything(state)] for state in states]

    def texts(state: PromptState) -> list[tuple[list[int], Tensor]]:
        rows = [begin(engine, [state], method, labels=[method])[0] for method in methods]
        return list(generated(engine, rows, len(rows), 20, most=3).values())

    first = texts(states[0])
    shared = begin(engine, states, refreshed[0], labels=[0, 1])
    generated(engine, shared, 2, 20, most=2)
    prefilled(engine, [*tokens(9, 1), 5, 6], *methods, prefix=states[0])
    list(score(engine, [(row, tokens(18)) for row in begin(engine, [states[1]], refreshed[1])], 1))
    for state, tensors in zip(states, before, strict=True):
        assert all(torch.equal(*pair) for pair in zip(everything(state), tensors, strict=True))
    for (ours, logits), (theirs, their_logits) in zip(texts(states[0]), first, strict=True):
        assert ours == theirs
        assert torch.equal(logits, their_logits)


# -- choosing ---------------------------------------------------------------------------------------------------------


def neurons(engine: Engine, states: Sequence[PromptState], method: Method, seed: int = 0) -> list[list[int]]:
    experts = choose(engine, states, method, seed)
    assert experts is not None
    return [neurons_K.tolist() for neurons_K in experts.neurons]


def test_nothing_is_chosen_where_nothing_is_dropped() -> None:
    engine = Engine(tiny("llama"))
    state = prefilled(engine, tokens(9))
    for method in (Method(sparsity=0.0), Method("glass", "sample", sparsity=(0.0,) * LAYERS)):
        assert choose(engine, [state], method) is None


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_experts_are_those_of_scores_in_order(method: Method) -> None:
    engine = Engine(tiny("gpt2"))
    experts = choose(engine, [prefilled(engine, tokens(9), method)], method)
    assert experts is not None
    for neurons_K, corrections in zip(experts.neurons, experts.corrections, strict=True):
        assert neurons_K.dtype == torch.int64
        assert len(neurons_K) == WIDTHS["gpt2"] // 2
        assert bool((neurons_K.diff() > 0).all())
        assert len(corrections) == (method.compensation != "none")


@pytest.mark.parametrize("method", [Method("random"), Method("wanda", "sample"), Method("magnitude", "topk_sample")])
def test_a_prompt_draws_the_same_in_any_batch(method: Method) -> None:
    engine, prompts = Engine(tiny("llama")), [tokens(9, 1), tokens(12, 2)]
    batch = prefill(engine, prompts, wanted([method]))
    drawn = [neurons(engine, [state], method) for state in batch]
    assert [neurons(engine, [prefilled(engine, ids, method)], method) for ids in reversed(prompts)] == drawn[::-1]
    assert drawn[0] != drawn[1], "prompts draw their own"
    assert neurons(engine, batch[:1], method, seed=1) != drawn[0]


def test_prompts_share_experts_by_the_papers_aggregation() -> None:
    engine, method = Engine(tiny("llama")), Method("griffin")
    states = [prefilled(engine, tokens(length, length), method) for length in (3, 12, 9)]
    (statistic,) = wanted([method])
    for layer, found in enumerate(neurons(engine, states, method)):
        summed = sum(state.recorded.totals[statistic][layer][0].double().sqrt() / state.length**0.5 for state in states)
        assert found == sorted(summed.topk(len(found)).indices.tolist())


def test_an_oracle_chooses_from_the_continuation() -> None:
    engine, oracle = Engine(tiny("llama")), Method("oracle", compensation="ridge")
    statistic = griffin.STATISTICS["oracle"].activations
    assert statistic is not None
    assert statistic not in wanted([oracle]), "the prompt is not what it reads"
    state = prefilled(engine, tokens(9), oracle)
    later = prefill(engine, [tokens(7, 1)], [statistic])[0].recorded
    other = prefill(engine, [tokens(7, 2)], [statistic])[0].recorded

    def chosen(continuation: Recorded) -> list[list[int]]:
        return neurons(engine, [replace(state, continuation=continuation)], oracle)

    assert chosen(later) == chosen(later) != chosen(other)
