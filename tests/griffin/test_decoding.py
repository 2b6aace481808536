"""Decoding: rows that go on together, freely or along a given text, each as it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from engines import Text, begun, chosen, generated, prefilled, refuse_parting, uncompiled
from families import tiny
from running import TOLERANCE, difference, same, tokens

from griffin import Engine, Generation, Method, Row, begin, decode, score, wanted
from griffin.batch import Batch

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
def alone(family: str) -> dict[tuple[int, Method], Text]:
    """What every row generates by itself, on compact weights."""
    engine = Engine(tiny(family), mode="compact")
    return generated(engine, rows(engine, METHODS), LIMIT, ended=ended)


@pytest.mark.parametrize(("most", "compiler"), [(4, None), (30, None), (30, uncompiled), (7, uncompiled)])
@pytest.mark.parametrize("family", MASKS)
def test_a_row_generates_what_it_does_alone(family: str, most: int, compiler: Any) -> None:
    """Masked in a batch of other prompts and methods, of which some end and others come; or all of them together."""
    engine, expected = Engine(tiny(family), compiler=compiler), alone(family)
    longest = 17 if most == 4 else 0  # where it is not announced, a longer prompt makes room for itself
    found = generated(engine, rows(engine, METHODS), LIMIT, most=most, longest=longest, ended=ended)
    assert found.keys() == expected.keys()
    for label in expected:
        refuse_parting(found[label], expected[label])
    assert list(found) != list(expected), "rows end in another order than they come in"


def test_rows_end_at_different_times_and_methods_differ() -> None:
    # Else the test above would not show that one takes the place of another, nor that each has its own experts.
    lengths = {len(text) for family in MASKS for text, _ in alone(family).values()}
    assert len(lengths) > 4
    assert max(lengths) == LIMIT
    texts = {method: tuple(alone("llama")[12, method][1][1].tolist()) for method in METHODS[:7]}
    assert len({*texts.values()}) == len(texts)
    last = {method: tuple(alone("bloom")[17, method][1][-1].tolist()) for method in [METHODS[1], *REFRESHED]}
    assert len({*last.values()}) == len(last)


def test_a_prompt_runs_when_there_is_room_for_it() -> None:
    # Else the caches of all prompts would be held at once.
    engine, came = Engine(tiny("llama")), []

    def coming() -> Iterator[Row]:
        for row in rows(engine, METHODS[1:3]):
            came.append(row)
            yield row

    for over, _ in enumerate(decode(engine, coming(), Generation(LIMIT, ended), batch_size=2)):
        assert len(came) <= over + 2
        assert all(row.state.cache is None for row in came), "copied, and not needed any more"
    assert len(came) == 6
    assert [len(text) for text, _ in generated(engine, rows(engine, METHODS[:3]), 1, most=2).values()] == [1] * 9
    assert not list(decode(engine, [], Generation(3), batch_size=2))


def test_a_batch_takes_several_tokens_a_step() -> None:
    engine, ids, found = Engine(tiny("llama")), torch.tensor([tokens(6, 1), tokens(6, 2)]), []
    for steps in ([6], [1, 3, 2], [1] * 6):
        batch = Batch(engine, 2, 17, 6)
        for length, method in ((12, METHODS[2]), (17, METHODS[6])):
            batch.add(begun(engine, tokens(length), method))
        found.append(torch.cat([batch.step(part) for part in ids.split(steps, dim=1)], dim=1))
    assert all(difference(one, found[0]) < TOLERANCE for one in found[1:])


def compiles(module: Any) -> Any:
    """A compiler whose calls fail."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("compiled")

    return fail


@pytest.mark.parametrize("family", ["llama", "bloom", SLIDING])
def test_scoring_a_text_gives_the_logits_that_generated_it_and_compiles_nothing(family: str) -> None:
    engine, expected = Engine(tiny(family), compiler=compiles), alone(family)
    given = ((row, expected[row.label][0]) for row in rows(engine, METHODS))
    found = list(score(engine, given, 4))
    assert [row.label for row, _ in found] == [row.label for row in rows(engine, METHODS)], "in order"
    for row, logits_CV in found:
        text, picked = expected[row.label]
        assert len(logits_CV) == len(text)
        assert difference(logits_CV[:-1], picked[1:]) < TOLERANCE or len(text) == 1
    with pytest.raises(AssertionError, match="compiled"):
        generated(engine, [begun(engine, tokens(5), METHODS[1])], 3)


@pytest.mark.parametrize("method", [Method("griffin", "topk_sample"), *REFRESHED], ids=lambda method: method.label)
def test_prompts_that_share_experts(method: Method) -> None:
    found = {}
    for mode in ("compact", "masked"):
        engine = Engine(tiny("llama"), mode=mode)
        states = [prefilled(engine, tokens(length, length), method) for length in LENGTHS]
        members = begin(engine, states, method, labels=LENGTHS)
        before = members[0].experts
        found[mode] = generated(engine, members, LIMIT, most=3)
        assert len({id(row.experts) for row in members}) == 1, "one set, after refreshes too"
        assert (members[0].experts is before) == (method.refresh == "none")
    for length in LENGTHS:
        refuse_parting(found["compact"][length], found["masked"][length])


@pytest.mark.parametrize("ends", [0, 4])
@pytest.mark.parametrize("compiler", [None, uncompiled])
def test_shared_experts_are_refreshed_by_all_texts_that_have_not_ended(compiler: Any, ends: int) -> None:
    """What runs on behind the end of a text, where calls are compiled, teaches nothing."""
    engine, method = Engine(tiny("llama"), compiler=compiler), REFRESHED[0]
    states = [prefilled(engine, tokens(length, length), method) for length in LENGTHS]
    members = begin(engine, states, method, labels=LENGTHS)
    over = {3: ends}
    texts = generated(engine, members, 10, most=3, ended=lambda row: len(row.tokens) == over.get(row.label))
    (statistic,), extended = wanted([method]), []
    for row, state in zip(members, states, strict=True):
        read = [] if len(texts[row.label][0]) == 4 else texts[row.label][0][:9]  # the refresh came with the ninth
        whole = prefilled(engine, [*state.ids, *read], method)
        # As if it had been in the prompt, four times.
        totals = (one.recorded.totals[statistic] for one in (whole, state, row.state))
        for total, own, now in zip(*totals, strict=True):
            assert difference(now, own + 4 * (total - own)) < 10 * TOLERANCE
        extended.append(row.state)
    assert {len(texts[length][0]) for length in LENGTHS} == ({10} if not ends else {4, 10})
    assert same(members[0].experts.neurons, chosen(engine, extended, method).neurons)
    without = chosen(engine, [extended[0], extended[2]], method).neurons
    assert not same(members[0].experts.neurons, without), "a text that has ended still counts"
