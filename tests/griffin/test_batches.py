"""Masked mode: every sequence of a padded batch has its own experts, the same as it has alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from families import VARIED, tiny
from prompts import pad, prompt
from running import as_lists, difference, generate, new_tokens, step_logits
from torch import Tensor

import griffin

ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2), prompt(1, 3)]
SHORT_ROWS = [prompt(7, 0), prompt(3, 1), prompt(5, 2), prompt(1, 3)]  # with one token more, within every window


@pytest.mark.parametrize("family", VARIED)
def test_rows_of_a_left_padded_batch_generate_what_they_do_alone(family: str) -> None:
    model = tiny(family)
    ids_BS, mask_BS = pad(ROWS, "left")
    with griffin.prune(model, mode="masked") as pruner:
        batch = generate(model, ids_BS, mask_BS)
        experts = pruner.experts
        for row, ids in enumerate(ROWS):
            alone = generate(model, ids)
            assert as_lists(experts, row) == as_lists(pruner.experts)
            assert new_tokens(batch, ids_BS)[row] == new_tokens(alone, ids)[0]
            assert difference(step_logits(batch, row), step_logits(alone)) < 1e-5


def continue_batch(model: torch.nn.Module, ids_BS: Tensor, mask_BS: Tensor, next_B1: Tensor) -> Tensor:
    """A right-padded prompt and one token more, by forward calls: that token's logits [B, V]."""
    cache = model(ids_BS, attention_mask=mask_BS).past_key_values
    options = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = mask_BS.sum(dim=1, keepdim=True)
    longer_BS = torch.cat([mask_BS, torch.ones_like(next_B1)], dim=1)
    return model(next_B1, attention_mask=longer_BS, past_key_values=cache, **options).logits[:, -1]


@torch.no_grad()
@pytest.mark.parametrize("family", VARIED)
def test_rows_of_a_right_padded_batch_continue_as_they_do_alone(family: str) -> None:
    model = tiny(family)
    ids_BS, mask_BS = pad(SHORT_ROWS, "right")
    next_B1 = prompt(len(SHORT_ROWS), 4).T
    with griffin.prune(model, mode="masked") as pruner:
        batch_BV = continue_batch(model, ids_BS, mask_BS, next_B1)
        scores, experts = pruner.scores, pruner.experts
        for row, ids in enumerate(SHORT_ROWS):
            alone_1V = continue_batch(model, ids, torch.ones_like(ids), next_B1[row : row + 1])
            for batch_BD, alone_1D in zip(scores, pruner.scores, strict=True):
                assert difference(batch_BD[row], alone_1D[0]) < 1e-5
            assert as_lists(experts, row) == as_lists(pruner.experts)
            assert difference(batch_BV[row], alone_1V[0]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("statistic", ["griffin", "wanda"])
def test_what_padding_holds_does_not_matter(statistic: str) -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad(SHORT_ROWS, "right")
    other_BS = torch.where(mask_BS.bool(), ids_BS, 42)
    with griffin.prune(model, statistic=statistic, mode="masked") as pruner:
        model(ids_BS, attention_mask=mask_BS)
        expected = pruner.scores
        model(other_BS, attention_mask=mask_BS)
        assert all(torch.equal(*layer) for layer in zip(pruner.scores, expected, strict=True))


def test_static_experts_serve_a_whole_batch() -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad(ROWS, "left")
    with griffin.prune(model, statistic="magnitude", mode="masked") as pruner:
        batch = generate(model, ids_BS, mask_BS)
        assert [experts.shape[0] for experts in pruner.experts] == [1, 1, 1]
        for row, ids in enumerate(ROWS):
            assert new_tokens(batch, ids_BS)[row] == new_tokens(generate(model, ids), ids)[0]


def test_rows_of_a_batch_choose_differently() -> None:
    ids_BS, mask_BS = pad(ROWS, "left")
    with griffin.prune(tiny("llama"), mode="masked") as pruner:
        generate(tiny("llama"), ids_BS, mask_BS)
    assert len({tuple(experts_K) for experts_K in pruner.experts[0].tolist()}) == len(ROWS)


def test_compact_mode_refuses_a_batch_without_shared_experts() -> None:
    ids_BS, mask_BS = pad(ROWS[:2], "left")
    with griffin.prune(tiny("llama"), mode="compact"), pytest.raises(ValueError, match="batch has 2 prompts"):
        generate(tiny("llama"), ids_BS, mask_BS)


@torch.no_grad()
def test_a_continuation_with_other_rows_is_refused() -> None:
    model = tiny("llama")
    with griffin.prune(model, mode="masked"):
        cache = model(prompt(7).expand(2, -1)).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(ValueError, match="2 rows and its continuation 1"):
            model(prompt(1), past_key_values=cache)


@torch.no_grad()
def test_a_mask_of_another_size_is_refused() -> None:
    model = tiny("llama")
    with griffin.prune(model, mode="masked"), pytest.raises(ValueError, match=r"expected \[1, 7\]"):
        model(prompt(7), attention_mask=torch.ones(1, 6, dtype=torch.long))


@torch.no_grad()
def test_a_mask_that_hides_the_padding_is_refused() -> None:
    model = tiny("llama")
    mask = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril()
    with griffin.prune(model, mode="masked"), pytest.raises(ValueError, match="2-D attention_mask"):
        model(prompt(7), attention_mask=mask)
