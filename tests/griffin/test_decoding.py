"""Decoding: rows that go on together, freely or along a given text, each as it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import reference
import torch
from engines import (
    TOLERANCE,
    Recorder,
    begun,
    generated,
    never,
    plain_logits,
    prefilled,
    refuse_parting,
    tokens,
)
from families import ONE_PER_LAYOUT, tiny
from prompts import prompt
from running import difference
from torch import Tensor

import griffin
from griffin import Engine, Generation, Method, Row, begin, choose, decode, score, wanted
from griffin.decoding import Batch

SLIDING = "gemma3_text"
# Where the mask matters: rotary and learned positions, ALiBi, and sliding windows.
MASKS = ["llama", "opt", "bloom", SLIDING]
REFRESHED = [
    Method(refresh="experts"),
    Method("wanda", compensation="mean", refresh="experts"),
    Method(compensation="ridge", refresh="compensation"),
]
# Beside each other in one batch.
METHODS = [
    Method(sparsity=0.0),
    Method(),
    Method("wanda", sparsity=0.75),
    Method("random", "sample"),
    Method(sparsity=(0.5, 0.0, 0.9)),
    Method("joint", compensation="mean", budget="late"),
    Method(compensation="ridge"),
    *REFRESHED,
]
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
def alone(family: str) -> dict[tuple[int, Method], tuple[list[int], Tensor]]:
    """What every row generates by itself, on compact weights."""
    engine = Engine(tiny(family), mode="compact")
    return generated(engine, rows(engine, METHODS), len(LENGTHS) * len(METHODS), LIMIT, ended=ended)


# -- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*ONE_PER_LAYOUT, SLIDING])
def test_it_generates_what_the_formulas_say(family: str) -> None:
    model, ids = tiny(family), prompt(12)
    chosen = reference.experts(model, family, "griffin", ids, 0.5)
    expected = reference.generate(model, family, ids, chosen, 6)
    for mode in griffin.MODES:
        engine = Engine(model, mode=mode)
        ((_, found),) = generated(engine, [begun(engine, ids[0].tolist(), Method())], 1, 6).items()
        assert refuse_parting(found, expected) == 0


@pytest.mark.parametrize("most", [4, len(LENGTHS) * len(METHODS)])
@pytest.mark.parametrize("family", MASKS)
def test_a_row_generates_what_it_does_alone(family: str, most: int) -> None:
    """Masked in a batch of other prompts and methods, of which some end and others come."""
    engine, expected = Engine(tiny(family)), alone(family)
    found = generated(engine, rows(engine, METHODS), len(expected), LIMIT, most=most, longest=17, ended=ended)
    assert found.keys() == expected.keys()
    ties = sum(refuse_parting(found[label], expected[label]) for label in expected)
    assert ties == 0, "not one is to be expected of random weights"
    assert list(found) != list(expected), "rows end in another order than they come in"


def test_rows_end_at_different_times() -> None:
    # Else the test above would not show that one takes the place of another.
    lengths = {len(text) for family in MASKS for text, _ in alone(family).values()}
    assert len(lengths) > 4
    assert max(lengths) == LIMIT


def test_methods_differ() -> None:
    # Else the rows of a batch could have each other's experts.
    texts = {method: tuple(alone("llama")[12, method][1][1].tolist()) for method in METHODS[:7]}
    assert len({*texts.values()}) == len(texts)
    last = {method: tuple(alone("bloom")[17, method][1][-1].tolist()) for method in [METHODS[1], *REFRESHED]}
    assert len({*last.values()}) == len(last)


@pytest.mark.parametrize("family", [*ONE_PER_LAYOUT, SLIDING])
def test_sparsity_0_is_the_plain_model_to_the_bit(family: str) -> None:
    """For prompts one after the other, which begin in other columns of one KV cache."""
    model, prompts = tiny(family), [tokens(6, 1), tokens(4, 2), tokens(5, 3)]
    engine = Engine(model)
    states = [prefilled(engine, ids) for ids in prompts]
    refreshed = Method("wanda", compensation="ridge", refresh="experts", sparsity=0.0)
    for method in (Method(sparsity=0.0), refreshed):
        members = [begin(engine, [state], method, labels=[label])[0] for label, state in enumerate(states)]
        found = generated(engine, members, 3, 9)
        for label, ids in enumerate(prompts):
            text, logits = found[label]
            # The plain cache forgets what a sliding window of 8 positions has passed, so sums have fewer terms.
            same = 8 - len(ids) if family == SLIDING else 9
            plain = torch.cat(plain_logits(model, ids, *([token] for token in text[:-1]), keep=1))
            assert torch.equal(logits[:same], plain[:same])
            assert difference(logits, plain) < TOLERANCE
            (row,) = begin(engine, [states[label]], method)
            ((_, scored),) = score(engine, [(row, text[:2])], 1)
            assert torch.equal(scored, plain_logits(model, ids, text[:2])[1])


def test_a_prompt_runs_when_there_is_room_for_it() -> None:
    # Else the caches of all prompts would be held at once.
    engine, came = Engine(tiny("llama")), []

    def coming() -> Iterator[Row]:
        for row in rows(engine, METHODS[1:3]):
            came.append(row)
            yield row

    texts = decode(engine, coming(), 6, 2, 17, Generation(LIMIT, Recorder(), ended))
    for over, _ in enumerate(texts):
        assert len(came) <= over + 2
        assert all(row.state.cache is None for row in came), "copied, and not needed any more"
    assert len(came) == 6


def test_what_ends_at_once_makes_room_at_once() -> None:
    engine = Engine(tiny("llama"))
    found = generated(engine, rows(engine, METHODS[:3]), 9, 1, most=2, longest=17)
    assert [len(text) for text, _ in found.values()] == [1] * 9
    assert not list(decode(engine, [], 0, 2, 17, Generation(3, Recorder(), never)))


@pytest.mark.parametrize("family", ["llama", SLIDING])
def test_whole_caches_as_compiled_graphs_need_them_give_the_same_texts(family: str) -> None:
    """All rows come first and stay; what comes after the end of a row is discarded."""
    model, expected = tiny(family), alone(family)
    engine = Engine(model, compiled=model)
    count = len(expected)
    found = generated(engine, rows(engine, METHODS), count, LIMIT, most=count, longest=17, ended=ended)
    assert found.keys() == expected.keys()
    for label, (text, logits) in found.items():
        assert refuse_parting((text, logits[: len(text)]), expected[label]) == 0
    with pytest.raises(ValueError, match="compiled"):
        generated(engine, rows(engine, METHODS), count, LIMIT, most=count - 1, longest=17)


def test_a_batch_takes_several_tokens_a_step() -> None:
    engine, ids = Engine(tiny("llama")), torch.tensor([tokens(6, 1), tokens(6, 2)])
    found = []
    for steps in ([6], [1, 3, 2], [1] * 6):
        batch = Batch(engine, 2, 17, 6)
        for length, method in ((12, METHODS[2]), (17, METHODS[6])):
            batch.add(begun(engine, tokens(length), method))
        found.append(torch.cat([batch.step(part) for part in ids.split(steps, dim=1)], dim=1))
        engine.use_dense()
    assert all(difference(one, found[0]) < TOLERANCE for one in found[1:])


# -- along a given text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bloom", SLIDING])
def test_scoring_a_text_gives_the_logits_that_generated_it(family: str) -> None:
    engine, expected = Engine(tiny(family)), alone(family)

    def given() -> Iterator[tuple[Row, list[int]]]:
        for row in rows(engine, METHODS):
            yield row, expected[row.label][0]

    scored = list(score(engine, given(), 4))
    assert {row.label for row, _ in scored} == expected.keys()
    for row, logits_CV in scored:
        text, picked = expected[row.label]
        assert len(logits_CV) == len(text)
        assert difference(logits_CV[:-1], picked[1:]) < TOLERANCE


def test_scores_come_in_the_order_of_the_rows() -> None:
    engine = Engine(tiny("llama"))
    given = [(row, tokens(1 + number % 3, number)) for number, row in enumerate(rows(engine, METHODS))]
    found = list(score(engine, given, 4))
    assert [row for row, _ in found] == [row for row, _ in given]
    assert [len(logits) for _, logits in found] == [len(ids) for _, ids in given]


@pytest.mark.parametrize("method", REFRESHED, ids=lambda method: method.label)
def test_a_refresh_changes_what_comes_after_it_only(method: Method) -> None:
    engine, text = Engine(tiny("llama")), tokens(LIMIT, 5)
    plain = Method(method.statistic, compensation=method.compensation)
    ((_, without),) = score(engine, [(begun(engine, tokens(12), plain), text)], 1)
    ((_, found),) = score(engine, [(begun(engine, tokens(12), method), text)], 1)
    ((_, dense),) = score(engine, [(begun(engine, tokens(12), METHODS[0]), text)], 1)
    assert difference(found[:8], without[:8]) < TOLERANCE
    assert difference(found[8], dense[8]) < TOLERANCE, "the refresh itself is a dense step over a dense KV cache"
    assert difference(found[16], dense[16]) < TOLERANCE
    assert all(difference(found[step], without[step]) > 1e-3 for step in range(8, LIMIT))
    assert all(difference(found[step], dense[step]) > 1e-3 for step in (7, 9, 15, 17))


# -- rows that share their experts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Method("griffin", "topk_sample"), *REFRESHED], ids=lambda method: method.label)
def test_prompts_that_share_experts(method: Method) -> None:
    found = {}
    for mode in ("compact", "masked"):
        engine = Engine(tiny("llama"), mode=mode)
        states = [prefilled(engine, tokens(length, length), method) for length in LENGTHS]
        members = begin(engine, states, method, labels=LENGTHS)
        assert len({id(row.experts) for row in members}) == 1
        before = members[0].experts
        found[mode] = generated(engine, members, 3, LIMIT, most=3, longest=17)
        if method.refresh == "none":
            assert all(row.experts is before for row in members)
        else:
            assert len({id(row.experts) for row in members}) == 1, "one set, after refreshes too"
            assert members[0].experts is not before
    for length in LENGTHS:
        assert refuse_parting(found["compact"][length], found["masked"][length]) == 0


def test_shared_experts_are_refreshed_by_all_texts() -> None:
    engine, method = Engine(tiny("llama"), mode="masked"), REFRESHED[0]
    states = [prefilled(engine, tokens(length, length), method) for length in LENGTHS]
    members = begin(engine, states, method, labels=LENGTHS)
    texts = generated(engine, members, 3, 10, most=3, longest=17)
    extended = []
    for row, state in zip(members, states, strict=True):
        read = texts[row.label][0][:9]  # the refresh came with the ninth
        assert row.state.ids == (*state.ids, *read)
        # As if it had been in the prompt, four times.
        (statistic,) = wanted([method])
        whole = prefilled(engine, [*state.ids, *read], method)
        totals = (one.recorded.totals[statistic] for one in (whole, state, row.state))
        for total, own, now in zip(*totals, strict=True):
            assert difference(now, own + 4 * (total - own)) < 10 * TOLERANCE
        extended.append(row.state)
    expected, found = choose(engine, extended, method), members[0].experts
    assert expected is not None
    assert found is not None
    assert all(torch.equal(*pair) for pair in zip(found.neurons, expected.neurons, strict=True))


def test_one_that_has_ended_still_counts_for_the_experts_that_it_shared() -> None:
    engine, method = Engine(tiny("llama")), REFRESHED[0]
    states = [prefilled(engine, tokens(length, length), method) for length in LENGTHS]
    members = begin(engine, states, method, labels=LENGTHS)
    generated(engine, members, 3, 10, most=3, longest=17, ended=lambda row: row.label == 3 and len(row.tokens) == 4)
    assert [len(row.state.ids) for row in members] == [12 + 9, 3, 17 + 9], "one ended before the refresh"
    expected, found = choose(engine, [row.state for row in members], method), members[0].experts
    without = choose(engine, [members[0].state, members[2].state], method)
    assert expected is not None
    assert without is not None
    assert found is not None
    assert all(torch.equal(*pair) for pair in zip(found.neurons, expected.neurons, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(found.neurons, without.neurons, strict=True))
