"""Prompts that are continued in slots, the next when one has ended: each as it is alone."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from families import FAMILIES, ONE_PER_LAYOUT, tiny
from griffin.slots import Lockstep, Slots
from prompts import prompt
from running import generate, new_tokens
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from griffin import Decoding, SharedPrompt, continue_in_turn, continue_together
from griffin.correction import together

LIMIT = 9
LENGTHS = [13, 12, 11, 7, 4, 1]  # more than the slots, the longest first, some beyond the sliding windows


def prompts() -> list[Tensor]:
    return [prompt(length, number)[0] for number, length in enumerate(LENGTHS)]


def greedy(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(dim=-1)


def ended(tokens: list[int]) -> bool:
    return tokens[-1] % 7 == 3


def until(tokens: list[int]) -> list[int]:
    return next((tokens[:length] for length in range(1, len(tokens)) if ended(tokens[:length])), tokens)


@cache
def alone(family: str, compensation: str = "none") -> list[list[int]]:
    """The tokens that each prompt gets by itself."""
    model = tiny(family)
    with griffin.prune(model, compensation=compensation):
        texts = [new_tokens(generate(model, one[None], max_new_tokens=LIMIT), one[None])[0] for one in prompts()]
    return [until(text) for text in texts]


def in_turn(
    shared: SharedPrompt,
    model: PreTrainedModel,
    slots: Slots | Lockstep,
    sparsity: float | None = 0.5,
    compensation: str = "none",
    many: Sequence[Tensor] = tuple(prompts()),
    choose: Callable[[Tensor], Tensor] = greedy,
) -> list[list[int]]:
    """The new tokens of prompts that run when there is a slot for them, in the prompts' order; None: dense."""

    def begin(row: int) -> tuple[Tensor, SharedPrompt]:
        return shared.run_each([many[row]]), shared.part(slice(0, 1))

    def choose_experts(prompt: SharedPrompt) -> tuple[list[Tensor], list[griffin.Correction | None]]:
        experts = prompt.experts("griffin", "topk", sparsity or 0.0)
        return experts, prompt.corrections(compensation, experts)

    found = dict(
        continue_in_turn(
            shared, begin, None if sparsity is None else choose_experts, slots, Decoding(LIMIT, choose, ended, model)
        )
    )
    return [found[row] for row in range(len(many))]


@pytest.mark.parametrize("slots", [1, 2, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_gets_the_tokens_that_it_gets_alone(family: str, slots: int) -> None:
    model = tiny(family)
    shared = SharedPrompt(model, ["griffin"])
    assert in_turn(shared, model, shared.slots(LENGTHS, slots, LIMIT)) == alone(family)


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_all_at_once_in_lockstep(family: str) -> None:
    model = tiny(family)
    shared = SharedPrompt(model, ["griffin"])
    assert in_turn(shared, model, shared.lockstep(LENGTHS, LIMIT)) == alone(family)


def test_a_prompt_runs_when_there_is_a_slot_for_it() -> None:
    # Else the caches of all prompts would be held at once.
    model, came = tiny("llama"), []
    shared = SharedPrompt(model, [])
    ran = itertools.count()

    def begin(row: int) -> tuple[Tensor, SharedPrompt]:
        next(ran)
        return shared.run_each([prompts()[row]]), shared.part(slice(0, 1))

    texts = continue_in_turn(
        shared, begin, None, shared.slots(LENGTHS, 2, LIMIT), Decoding(LIMIT, greedy, ended, model)
    )
    for ended_already, (row, _) in enumerate(texts):
        came.append(row)
        assert next(copy.copy(ran)) <= ended_already + 2
    assert sorted(came) == list(range(len(LENGTHS)))
    assert came != sorted(came), "as they end"


def test_prompts_end_at_different_times() -> None:
    # Else the test above would not show that one takes the slot of another.
    lengths = {len(tokens) for family in FAMILIES for tokens in alone(family)}
    assert len(lengths) > 4
    assert {1, LIMIT} <= lengths


@pytest.mark.parametrize("compensation", ["mean", "ridge"])
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_each_has_its_own_correction(family: str, compensation: str) -> None:
    model = tiny(family)
    shared = SharedPrompt(model, ["griffin"], [compensation])
    found = in_turn(shared, model, shared.slots(LENGTHS, 2, LIMIT), compensation=compensation)
    assert found == alone(family, compensation)


def test_corrections_of_long_and_short_prompts_go_together() -> None:
    # A prompt of more tokens than twice the kept neurons has its correction in another form.
    model = tiny("llama")
    shared = SharedPrompt(model, ["griffin"], ["ridge"])
    forms, outputs, given = [], [], []
    for length in (200, 9, 30):
        shared.run_each([prompt(length, length)[0]])
        experts = shared.experts("griffin", "topk", 0.5)
        (correction,) = shared.corrections("ridge", experts)[:1]
        assert correction is not None
        kept_1SK = torch.randn(1, 4, experts[0].shape[1])
        given.append((correction, kept_1SK))
        forms.append(correction.basis_BTK is None)
        outputs.append(correction.output(kept_1SK))
    assert forms == [True, False, False]
    joined = together([correction for correction, _ in given])
    assert joined is not None
    found = joined.output(torch.cat([kept for _, kept in given]))
    torch.testing.assert_close(found, torch.cat(outputs))


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_prompts_that_ran_one_by_one_go_on_together(family: str) -> None:
    model = tiny(family)
    shared, found = SharedPrompt(model, ["griffin"], ["ridge"]), []
    for rows in (slice(0, 2), slice(2, 6)):
        some = prompts()[rows]
        logits, parts = zip(*((shared.run_each([one]), shared.part(slice(0, 1))) for one in some), strict=True)
        joined = shared.joined(parts)
        experts = joined.experts("griffin", "topk", 0.5)
        slots, decoding = joined.lockstep(LENGTHS[rows], LIMIT), Decoding(LIMIT, greedy, ended, model)
        with joined.pruned(experts, joined.corrections("ridge", experts), "masked"):
            found += continue_together(joined, torch.cat(logits), slots, decoding)
    assert found == alone(family, "ridge")


@pytest.mark.parametrize("statistic", [name for name, one in griffin.STATISTICS.items() if not one.hindsight])
@pytest.mark.parametrize("compensation", ["none", "ridge"])
def test_joined_prompts_are_those_of_one_run(statistic: str, compensation: str) -> None:
    whole, shared = (SharedPrompt(tiny("llama"), [statistic], [compensation]) for _ in range(2))
    whole.run_each(prompts())
    parts = []
    for one in prompts():
        shared.run_each([one])
        parts.append(shared.part(slice(0, 1)))
    joined = shared.joined(parts)
    for options in ({}, {"shared_experts": True}):
        experts = whole.experts(statistic, "sample", 0.5, **options)
        found = joined.experts(statistic, "sample", 0.5, **options)
        assert all(torch.equal(*layer) for layer in zip(found, experts, strict=True))
        expected = whole.corrections(compensation, experts, **options)
        for one, other in zip(joined.corrections(compensation, found, **options), expected, strict=True):
            assert (one is None) == (other is None) == (compensation == "none")
            assert one is None or other is None or torch.equal(one.change(), other.change())


def test_rows_shorter_than_those_that_wait() -> None:
    # Slots do not need the longest first.
    model = tiny("llama")
    shared = SharedPrompt(model, ["griffin"])
    slots = shared.slots(LENGTHS[::-1], 2, LIMIT)
    assert in_turn(shared, model, slots, many=prompts()[::-1]) == alone("llama")[::-1]


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.9])  # all, nearly all and few of the neurons at work
@pytest.mark.parametrize("how", ["an error", "no more wanted"])
def test_the_model_is_as_it_was_however_it_ends(sparsity: float, how: str) -> None:
    model = tiny("llama")
    weights = dict(model.named_parameters())
    shared = SharedPrompt(model, ["griffin"])

    def ended(tokens: list[int]) -> bool:
        return len(tokens) == 3 if how == "no more wanted" else len(tokens) > 1 and 1 / 0 > 0

    def begin(row: int) -> tuple[Tensor, SharedPrompt]:
        return shared.run_each([prompts()[row]]), shared.part(slice(0, 1))

    def choose_experts(prompt: SharedPrompt) -> tuple[list[Tensor], list[griffin.Correction | None]]:
        return prompt.experts("griffin", "topk", sparsity), [None] * 3

    slots = shared.slots(LENGTHS, 2, LIMIT)
    texts = continue_in_turn(shared, begin, choose_experts, slots, Decoding(LIMIT, greedy, ended, model))
    with (
        contextlib.closing(texts),
        contextlib.nullcontext() if how == "no more wanted" else pytest.raises(ZeroDivisionError),
    ):
        assert len(next(texts)[1]) == 3
    assert all(weights[name] is parameter for name, parameter in model.named_parameters())
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in vars(module)


def test_sparsity_0_is_bit_identical_to_dense() -> None:
    model, seen = tiny("llama"), []

    def choose(logits_BV: Tensor) -> Tensor:
        seen.append(logits_BV)
        return greedy(logits_BV)

    for sparsity in (None, 0.0):
        shared = SharedPrompt(model, ["griffin"])
        in_turn(shared, model, shared.slots(LENGTHS, 3, LIMIT), sparsity, choose=choose)
    dense, pruned = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(*step) for step in zip(dense, pruned, strict=True))


# -- the beginning that prompts share -----------------------------------------------------------------------------

STATISTICS = [name for name, one in griffin.STATISTICS.items() if not one.hindsight]


def begun(length: int = 5) -> tuple[Tensor, list[Tensor]]:
    """A beginning, and prompts of which all but one have it."""
    beginning = prompt(length, 9)[0]
    return beginning, [torch.cat([beginning, one]) for one in prompts()[:4]] + prompts()[4:5]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_go_on_from_their_beginning(family: str) -> None:
    model, (beginning, many) = tiny(family), begun()
    whole, shared = SharedPrompt(model, ["griffin"], ["ridge"]), SharedPrompt(model, ["griffin"], ["ridge"])
    torch.testing.assert_close(shared.run_each(many, beginning), whole.run_each(many), rtol=1e-4, atol=1e-4)
    experts = whole.experts("griffin", "topk", 0.5)
    assert all(torch.equal(*layer) for layer in zip(shared.experts("griffin", "topk", 0.5), experts, strict=True))
    following, lengths = torch.stack([one[:1] for one in many]), torch.ones(len(many), dtype=torch.long)
    found, expected = (
        one.continued(following, lengths, experts, one.corrections("ridge", experts)) for one in (shared, whole)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("statistic", STATISTICS)
def test_every_statistic_goes_on_from_the_beginning(statistic: str) -> None:
    model, (beginning, many) = tiny("llama"), begun()
    whole, shared = SharedPrompt(model, [statistic]), SharedPrompt(model, [statistic])
    whole.run_each(many)
    shared.run_each(many, beginning)
    for selection in ("topk", "sample"):
        expected = whole.experts(statistic, selection, 0.5)
        assert all(
            torch.equal(*layer) for layer in zip(shared.experts(statistic, selection, 0.5), expected, strict=True)
        )


def test_a_prompt_runs_the_same_whatever_runs_with_it() -> None:
    model, (beginning, many) = tiny("llama"), begun()
    shared = SharedPrompt(model, ["griffin"])
    together = shared.run_each(many, beginning)
    other = prompt(3, 8)[0]
    for row, one in enumerate(many):
        shared.run_each([torch.cat([other, one])], other)  # another beginning in between
        assert torch.equal(shared.run_each([one], beginning)[0], together[row])


def test_the_beginning_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (beginning, many) = tiny("llama"), begun()
    lengths = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, **more: lengths.append(ids.shape[1]) or forward(ids, **more))
    shared = SharedPrompt(model, [])
    for _ in range(2):
        shared.run_each([*many, torch.cat([beginning, prompt(60, 7)[0]])], beginning)
    assert lengths == [5, *2 * [13, 12, 11, 7, 4, 65]], "what is long runs whole"
