"""One dense pass, continued by several methods: equal to running each row and each method alone."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, ONE_PER_LAYOUT, VOCABULARY, tiny
from torch import Tensor
from transformers import DynamicCache

import griffin

LENGTHS = torch.tensor([12, 7, 9, 3])
# The last position only, as in the paper's classification; and several positions, ragged on both sides.
PROMPTS = {"last": LENGTHS - 1, "ragged": torch.tensor([6, 7, 2, 1])}


def rows() -> Tensor:
    return torch.randint(2, VOCABULARY, (4, int(LENGTHS.max())), generator=torch.Generator().manual_seed(1))


def continuations(ids: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    lengths = LENGTHS - prompts
    padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)
    for row, (start, length) in enumerate(zip(prompts.tolist(), lengths.tolist(), strict=True)):
        padded[row, :length] = ids[row, start : start + length]
    return padded, lengths


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_continued_as_it_is_alone(family: str, prompts: Tensor) -> None:
    model, ids = tiny(family), rows()
    shared = griffin.SharedPrompt(model, ["griffin", "wanda"])
    dense = shared.run(ids, prompts)
    assert torch.equal(dense, model(ids).logits)  # right padding and the hooks change no bit

    padded, lengths = continuations(ids, prompts)
    again = shared.continued(padded, lengths, None)
    for statistic in ("griffin", "wanda"):
        experts = shared.experts(statistic, "topk", 0.5)
        pruned = shared.continued(padded, lengths, experts)
        for row, (start, length) in enumerate(zip(prompts.tolist(), lengths.tolist(), strict=True)):
            if length == 0:
                continue
            alone = ids[row : row + 1, : start + length]
            with griffin.prune(model, 0.5, statistic, mode="masked") as pruner:
                cache = model(alone[:, :start], use_cache=True).past_key_values
                expected = model(alone[:, start:], past_key_values=cache).logits[0]
                assert all(torch.equal(one[0], many[row]) for one, many in zip(pruner.experts, experts, strict=True))
            torch.testing.assert_close(pruned[row, :length], expected, rtol=1e-4, atol=2e-5)
            torch.testing.assert_close(again[row, :length], dense[row, start : start + length], rtol=1e-4, atol=2e-5)


def test_methods_do_not_disturb_each_other() -> None:
    model, ids, prompts = tiny("llama"), rows(), PROMPTS["ragged"]
    padded, lengths = continuations(ids, prompts)
    both = griffin.SharedPrompt(model, ["griffin", "magnitude", "random"])
    both.run(ids, prompts)
    first = both.continued(padded, lengths, both.experts("griffin", "topk", 0.5))
    both.continued(padded, lengths, both.experts("magnitude", "topk", 0.75))
    both.continued(padded, lengths, both.experts("random", "sample", 0.25))
    assert torch.equal(both.continued(padded, lengths, both.experts("griffin", "topk", 0.5)), first)

    alone = griffin.SharedPrompt(model, ["griffin"])
    alone.run(ids, prompts)
    assert torch.equal(alone.continued(padded, lengths, alone.experts("griffin", "topk", 0.5)), first)


def test_sparsity_0_is_bit_identical_to_dense() -> None:
    model, ids, prompts = tiny("gemma3_text"), rows(), PROMPTS["ragged"]
    padded, lengths = continuations(ids, prompts)
    shared = griffin.SharedPrompt(model, ["griffin"])
    shared.run(ids, prompts)
    assert torch.equal(
        shared.continued(padded, lengths, shared.experts("griffin", "topk", 0.0)),
        shared.continued(padded, lengths, None),
    )


def test_the_model_is_left_as_it_was_after_an_exception() -> None:
    model, ids, prompts = tiny("llama"), rows(), PROMPTS["last"]
    shared = griffin.SharedPrompt(model, ["griffin"])
    with pytest.raises(IndexError):
        shared.run(ids + 10 * VOCABULARY, prompts)
    shared.run(ids, prompts)
    with pytest.raises(IndexError):
        shared.continued(ids[:, :1] + 10 * VOCABULARY, LENGTHS - prompts, shared.experts("griffin", "topk", 0.5))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_only_the_last_column_of_logits() -> None:
    model, ids = tiny("llama"), rows()
    shared = griffin.SharedPrompt(model, [])
    last = shared.run(ids, LENGTHS - 1, last=1)
    torch.testing.assert_close(last, model(ids).logits[:, -1:])


@pytest.mark.parametrize("compensation", griffin.COMPENSATIONS)
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_prompts_run_each_by_itself_are_continued_together(family: str, compensation: str) -> None:
    model, ids = tiny(family), rows()
    following, lengths = ids[:, :3], torch.tensor([3, 3, 3, 3])
    shared = griffin.SharedPrompt(model, ["griffin", "random"], [compensation])
    prompts = [ids[row, :length] for row, length in enumerate(LENGTHS.tolist())]
    logits = shared.run_each(prompts)
    experts = shared.experts("griffin", "topk", 0.5)
    drawn = shared.experts("random", "sample", 0.5)
    together = shared.continued(following, lengths, experts, shared.corrections(compensation, experts))
    for row, prompt in enumerate(prompts):
        alone = griffin.SharedPrompt(model, ["griffin", "random"], [compensation])
        dense = alone.run(prompt[None], LENGTHS[row : row + 1], last=1)
        assert torch.equal(logits[row], dense[0, -1])
        own = alone.experts("griffin", "topk", 0.5)
        assert all(torch.equal(one[0], many[row]) for one, many in zip(own, experts, strict=True))
        assert all(
            torch.equal(one[0], many[row])
            for one, many in zip(alone.experts("random", "sample", 0.5), drawn, strict=True)
        )
        expected = alone.continued(following[row : row + 1], lengths[:1], own, alone.corrections(compensation, own))
        torch.testing.assert_close(together[row], expected[0], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("room", [0, 2, 5])  # five tokens follow: all beyond the room, some, none
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_with_room_is_a_cache(family: str, room: int) -> None:
    model, ids = tiny(family), rows()[:1]
    shared = griffin.SharedPrompt(model, [])
    shared.run(ids, torch.tensor([ids.shape[1]]))
    roomy, plain = shared.fork(room), DynamicCache()
    model(ids, past_key_values=plain, use_cache=True)
    for step in range(5):
        assert roomy.get_seq_length() == plain.get_seq_length() == ids.shape[1] + step
        token = ids[:, step : step + 1]
        expected = model(token, past_key_values=plain, use_cache=True).logits
        assert torch.equal(model(token, past_key_values=roomy, use_cache=True).logits, expected)
    assert shared.fork(room).get_seq_length() == ids.shape[1], "a fork grows by itself"
