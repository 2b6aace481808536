"""Prompts that are continued in slots, the next when one has ended: each as it is alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from families import FAMILIES, ONE_PER_LAYOUT, tiny
from prompts import prompt
from running import generate, new_tokens
from torch import Tensor

import griffin
from griffin import SharedPrompt, continue_prompts

LIMIT = 9
LENGTHS = [13, 12, 11, 7, 4, 1]  # more than the slots, the longest first, some beyond the sliding windows


def prompts() -> list[Tensor]:
    return [prompt(length, number)[0] for number, length in enumerate(LENGTHS)]


def greedy(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(dim=-1)


def ends_at(token: int) -> Callable[[list[int]], bool]:
    return lambda tokens: tokens[-1] % 7 == token


def until(tokens: list[int], ended: Callable[[list[int]], bool]) -> list[int]:
    return next((tokens[:length] for length in range(1, len(tokens)) if ended(tokens[:length])), tokens)


def alone(family: str, ended: Callable[[list[int]], bool], compensation: str = "none") -> list[list[int]]:
    model = tiny(family)
    with griffin.prune(model, compensation=compensation):
        texts = [new_tokens(generate(model, one[None], max_new_tokens=LIMIT), one[None])[0] for one in prompts()]
    return [until(text, ended) for text in texts]


@pytest.mark.parametrize("slots", [1, 2, 4, 6])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_gets_the_tokens_that_it_gets_alone(family: str, slots: int) -> None:
    model, ended = tiny(family), ends_at(3)
    shared = SharedPrompt(model, ["griffin"])
    logits = shared.run_each(prompts())
    with shared.pruned(shared.experts("griffin", "topk", 0.5), None, "masked"):
        found = continue_prompts(shared, logits, shared.slots(slots, LIMIT), LIMIT, greedy, ended, model)
    assert found == alone(family, ended)


def test_prompts_end_at_different_times() -> None:
    # Else the test above would not show that one takes the slot of another.
    lengths = {len(tokens) for family in FAMILIES for tokens in alone(family, ends_at(3))}
    assert len(lengths) > 4
    assert {1, LIMIT} <= lengths


@pytest.mark.parametrize("compensation", ["mean", "ridge"])
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_each_has_its_own_correction(family: str, compensation: str) -> None:
    model, ended = tiny(family), ends_at(3)
    shared = SharedPrompt(model, ["griffin"], [compensation])
    logits = shared.run_each(prompts())
    experts = shared.experts("griffin", "topk", 0.5)
    with shared.pruned(experts, shared.corrections(compensation, experts), "masked"):
        found = continue_prompts(shared, logits, shared.slots(2, LIMIT), LIMIT, greedy, ended, model)
    assert found == alone(family, ended, compensation)


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_a_part_goes_on_in_lockstep_by_itself(family: str) -> None:
    model, ended = tiny(family), ends_at(3)
    shared = SharedPrompt(model, ["griffin"], ["ridge"])
    logits, found = shared.run_each(prompts()), []
    for rows in (slice(0, 2), slice(2, 6)):
        part = shared.part(rows)
        experts = part.experts("griffin", "topk", 0.5)
        with part.pruned(experts, part.corrections("ridge", experts), "masked"):
            found += continue_prompts(part, logits[rows], part.lockstep(LIMIT), LIMIT, greedy, ended, model)
    assert found == alone(family, ended, "ridge")


def test_rows_shorter_than_those_that_wait() -> None:
    # Slots do not need the longest first.
    model, ended = tiny("llama"), ends_at(3)
    shared = SharedPrompt(model, ["griffin"])
    logits = shared.run_each(prompts()[::-1])
    with shared.pruned(shared.experts("griffin", "topk", 0.5), None, "masked"):
        found = continue_prompts(shared, logits, shared.slots(2, LIMIT), LIMIT, greedy, ended, model)
    assert found == alone("llama", ended)[::-1]


@pytest.mark.parametrize("statistic", ["magnitude", "griffin"])
@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.9])  # all, nearly all and few of the neurons at work
def test_compact_weights_go_when_the_context_ends(sparsity: float, statistic: str) -> None:
    model = tiny("llama")
    weights = dict(model.named_parameters())
    shared = SharedPrompt(model, [statistic])
    logits = shared.run_each(prompts())

    def broken(tokens: list[int]) -> bool:
        return len(tokens) > 1 and 1 / 0 > 0

    with (
        pytest.raises(ZeroDivisionError),
        shared.pruned(shared.experts(statistic, "topk", sparsity), None, "masked"),
    ):
        continue_prompts(
            shared, logits, shared.slots(2, 3), 3, greedy, lambda tokens: len(tokens) > 1 and 1 / 0 > 0, model
        )
    assert all(weights[name] is parameter for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_sparsity_0_is_bit_identical_to_dense() -> None:
    model, seen = tiny("llama"), []

    def choose(logits_BV: Tensor) -> Tensor:
        seen.append(logits_BV)
        return greedy(logits_BV)

    for experts in (None, [torch.arange(80).expand(len(LENGTHS), -1)] * 3):
        shared = SharedPrompt(model, ["griffin"])
        logits = shared.run_each(prompts())
        with shared.pruned(experts, None, "masked"):
            continue_prompts(shared, logits, shared.slots(3, LIMIT), LIMIT, choose, ends_at(3), model)
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
