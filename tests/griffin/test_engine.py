"""The engine: one dense pass over each prompt, and rows that go on together, each as it does alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from engines import BATCHED, Text, generated, prefilled, refuse_parting, scored, uncompiled
from families import FAMILIES, MASKS, REFRESHED, VERIFIED, VOCABULARY, tiny, tokens
from running import TOLERANCE, difference, same
from torch import Tensor

import griffin
from griffin import Engine, Method, PromptState, Row, begin, prefill, score, wanted

# All that can be recorded, and a method for each of it.
METHODS = [
    *(Method(name) for name, one in griffin.STATISTICS.items() if not one.oracle),
    *(Method(compensation=name) for name in griffin.COMPENSATIONS),
]
EVERYTHING = wanted(METHODS)


def everything(state: PromptState, *, logits: bool = True) -> list[Tensor]:
    """All tensors of a state: logits, the keys and values that its cache shows, and what was recorded."""
    assert state.cache is not None
    window = slice(None), slice(None), slice(0, state.length)
    cached = [buffer[window] for layer in state.cache.layers for buffer in (layer.keys, layer.values)]
    recorded = [total for layers in state.recorded.totals.values() for total in layers]
    return [*([state.logits_TV] if logits else []), *cached, *recorded]


def refuse_difference(found: PromptState, expected: PromptState, *, logits: bool = True) -> None:
    assert (found.ids, found.length) == (expected.ids, expected.length)
    assert found.recorded.tokens == expected.recorded.tokens == found.length
    assert found.recorded.totals.keys() == expected.recorded.totals.keys()
    for one, other in zip(*(everything(state, logits=logits) for state in (found, expected)), strict=True):
        assert one.shape == other.shape
        assert difference(one, other) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_records_what_its_prompts_do_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(griffin.ridge, "ROWS", 4)  # of the longest prompts only the last tokens
    engine, counts = Engine(tiny(family)), [11, 4, 1, 17]
    texts = [tokens(length, length) for length in (12, 9, 1, 17)]
    found = prefill(engine, texts, EVERYTHING, prompt_lengths=counts, keep_logits=12)
    for state, ids, count in zip(found, texts, counts, strict=True):
        whole, alone = prefilled(engine, ids, keep_logits=12), prefilled(engine, ids[:count], *METHODS)
        assert state.logits_TV.shape == (min(12, len(ids)), VOCABULARY)
        assert difference(state.logits_TV, whole.logits_TV) < TOLERANCE
        refuse_difference(state, alone, logits=False)


@pytest.mark.parametrize("ends", [(5, 13), (6, 7), (1, 7), (3, 6, 7, 13)], ids=str)
@pytest.mark.parametrize("family", MASKS)
def test_a_prompt_goes_on_from_its_prefix(family: str, ends: tuple[int, ...]) -> None:
    """Or a prefix of a prefix, which was one of a batch."""
    engine, ids = Engine(tiny(family)), tokens(ends[-1])
    expected = prefilled(engine, ids, *METHODS, keep_logits=ends[-1] - ends[-2])
    _, state = prefill(engine, [tokens(17, 1), ids[: ends[0]]], EVERYTHING)
    lengths: list[int] = []
    engine.dense.module.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for end in ends[1:]:
        state = prefilled(engine, ids[:end], *METHODS, keep_logits=end, prefix=state)
    refuse_difference(state, expected)
    assert lengths == [end - begin for begin, end in pairwise(ends)], "what was run is not run again"


def test_a_prefix_must_have_recorded_what_is_wanted_and_the_rest_is_forgotten() -> None:
    """Else methods would choose from a part of a prompt without anybody's notice."""
    engine = Engine(tiny("llama"))
    state = prefilled(engine, tokens(5), Method("griffin"), Method("wanda"))
    state = prefilled(engine, tokens(9), Method("joint"), prefix=state)
    assert list(state.recorded.totals) == wanted([Method("griffin")]), "joint records what griffin does"
    for methods, options in (([Method("wanda")], {}), ([], {"likely_tokens": True})):
        with pytest.raises(ValueError, match="without recording"):
            prefilled(engine, tokens(13), *methods, prefix=state, **options)
    with pytest.raises(ValueError, match="empty"):
        prefill(engine, [tokens(5), []], [])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_use_of_a_state_changes_it(family: str) -> None:
    """A part of a shared prompt once changed the prompt that it was part of."""
    engine = Engine(tiny(family))
    refreshed, verified = Method(**REFRESHED), Method(**REFRESHED, **VERIFIED)
    methods = [Method("wanda"), Method(compensation="ridge"), Method(sparsity=0.0), refreshed, verified]
    states = prefill(engine, [tokens(9, 1), tokens(12, 2)], wanted(methods), likely_tokens=True)
    before = [[tensor.clone() for tensor in everything(state)] for state in states]
    alone = [begin(engine, states[:1], method, labels=[method])[0] for method in methods]
    generated(engine, alone, 20, most=3)
    generated(engine, begin(engine, states, refreshed, labels=[0, 1]), 20, most=2)
    prefilled(engine, [*tokens(9, 1), 5, 6], *methods, prefix=states[0])
    scored(engine, begin(engine, [states[1]], refreshed)[0], tokens(18))
    for state, tensors in zip(states, before, strict=True):
        assert same(everything(state), tensors)


LENGTHS = [12, 3, 17]  # some beyond the sliding window
LIMIT = 20  # two refreshes


def ended(row: Row) -> bool:
    return (sum(row.tokens) + 3 * len(row.tokens)) % 29 == 5


def rows(engine: Engine, methods: list[Method]) -> Iterator[Row]:
    """Every prompt under every method, labelled by both."""
    for length in LENGTHS:
        state = prefilled(engine, tokens(length, length), *methods)
        for method in methods:
            yield from begin(engine, [state], method, labels=[(length, method)])


@cache
def alone(family: str) -> dict[tuple[int, Method], Text]:
    """What every row generates by itself, on compact weights."""
    engine = Engine(tiny(family), mode="compact")
    return generated(engine, rows(engine, BATCHED), LIMIT, ended=ended)


@pytest.mark.parametrize(("most", "compiler"), [(4, None), (30, None), (30, uncompiled), (7, uncompiled)])
@pytest.mark.parametrize("family", MASKS)
def test_a_row_generates_what_it_does_alone(family: str, most: int, compiler: Any) -> None:
    """Masked in a batch of other prompts and methods, of which some end and others come; or all of them together."""
    engine, expected = Engine(tiny(family), compiler=compiler), alone(family)
    longest = 17 if most == 4 else 0  # where it is not announced, a longer prompt makes room for itself
    found = generated(engine, rows(engine, BATCHED), LIMIT, most=most, longest=longest, ended=ended)
    assert found.keys() == expected.keys()
    for label in expected:
        refuse_parting(found[label], expected[label])
    assert list(found) != list(expected), "rows end in another order than they come in"


@pytest.mark.parametrize("family", ["llama", "bloom", "gemma3_text"])
def test_scoring_a_text_gives_the_logits_that_generated_it_and_compiles_nothing(family: str) -> None:
    engine, expected = Engine(tiny(family), compiler=lambda module: pytest.fail), alone(family)
    given = ((row, expected[row.label][0]) for row in rows(engine, BATCHED))
    found = list(score(engine, given, 4))
    assert [row.label for row, _ in found] == [row.label for row in rows(engine, BATCHED)], "in order"
    for row, logits_CV in found:
        text, picked = expected[row.label]
        assert len(logits_CV) == len(text)
        assert difference(logits_CV[:-1], picked[1:]) < TOLERANCE or len(text) == 1


@pytest.mark.parametrize("ends", [0, 4])
def test_shared_experts_are_refreshed_by_all_texts_that_have_not_ended(compiler: Any, ends: int) -> None:
    """What runs on behind the end of a text, where calls are compiled, teaches nothing."""
    engine, method = Engine(tiny("llama"), compiler=compiler), BATCHED[-2]
    states = [prefilled(engine, tokens(length, length), method) for length in LENGTHS]
    members = begin(engine, states, method, labels=LENGTHS)
    over, learned = {LENGTHS[0]: ends}, members[0].experts
    texts = generated(engine, members, 10, most=3, ended=lambda row: len(row.tokens) == over.get(row.label))
    assert {len(texts[length][0]) for length in LENGTHS} == ({10} if not ends else {4, 10})
    assert len({id(row.experts) for row in members}) == 1, "one set, after refreshes too"
    # The one refresh, with the ninth token, adds a correction of each text to the prompts'.
    for before, after in zip(learned.corrections, members[0].experts.corrections, strict=True):
        assert len(after) == len(before) + (2 if ends else 3)
