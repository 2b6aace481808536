"""Looking at activations: what is seen is z, and nothing of the model changes."""

from __future__ import annotations

import pytest
import torch
from families import ONE_PER_LAYOUT, WIDTHS, tiny
from prompts import prompt

import griffin
from griffin import record_activations, relative_activations


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_what_is_seen_gives_the_scores_of_pruning(family: str) -> None:
    model, ids = tiny(family), prompt(9)
    with torch.no_grad():
        before = model(ids).logits
        with record_activations(model, lambda layer, z_SD: (layer, z_SD)) as seen:
            during = model(ids).logits
        after = model(ids).logits
    assert torch.equal(before, during)
    assert torch.equal(before, after)
    assert [len(calls) for calls in seen] == [1] * len(seen)
    with griffin.prune(model, 0.5) as pruner, torch.no_grad():
        model(ids)
        scores = pruner.scores
    for layer, (calls, scores_BD) in enumerate(zip(seen, scores, strict=True)):
        place, z_SD = calls[0]
        assert place == layer
        assert z_SD.shape == (9, WIDTHS[family])
        torch.testing.assert_close(relative_activations(z_SD).square().sum(dim=0).sqrt(), scores_BD[0])


def test_every_call_is_kept_in_order_and_none_after_the_context() -> None:
    model = tiny("llama")
    with torch.no_grad():
        with record_activations(model, lambda layer, z_SD: len(z_SD)) as seen:
            model(torch.tensor([[2, 3, 4]]))
            model(torch.tensor([[5]]))
        model(torch.tensor([[6, 7]]))
    assert seen == [[3, 1]] * len(seen)


def test_hooks_are_off_after_an_exception() -> None:
    model = tiny("llama")
    with pytest.raises(ZeroDivisionError), record_activations(model, lambda layer, z_SD: 1 / 0):
        model(torch.tensor([[2]]))
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_relative_activations_are_rows_of_norm_one_and_zero_stays_zero() -> None:
    found = relative_activations(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    assert torch.equal(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
