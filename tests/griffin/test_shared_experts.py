"""One expert set for a whole batch: s = sum_i s_i / sqrt(S_i)."""

from __future__ import annotations

import pytest
import reference
import torch
from families import LAYERS, tiny
from prompts import pad, prompt
from running import TOKENS, as_lists, difference, generate, new_tokens, step_logits
from torch import Tensor
from transformers import PreTrainedModel

import griffin

ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2), prompt(1, 3)]


def aggregated(model: PreTrainedModel, family: str, statistic: str) -> list[Tensor]:
    """Each layer's scores [D], by the formula."""
    rows = [reference.scores(model, family, statistic, ids) for ids in ROWS]
    return [
        torch.stack([scores[layer] / ids.shape[1] ** 0.5 for scores, ids in zip(rows, ROWS, strict=True)]).sum(dim=0)
        for layer in range(LAYERS)
    ]


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_batch_shares_the_aggregated_experts(family: str, mode: str) -> None:
    model = tiny(family)
    ids_BS, mask_BS = pad(ROWS, "left")
    scores = aggregated(model, family, "griffin")
    experts = [reference.best(scores_D, 0.5) for scores_D in scores]
    with griffin.prune(model, mode=mode, shared_experts=True) as pruner:
        batch = generate(model, ids_BS, mask_BS)
    assert as_lists(pruner.experts) == experts
    for found_1D, scores_D in zip(pruner.scores, scores, strict=True):
        assert found_1D.shape[0] == 1
        assert difference(found_1D[0], scores_D) < 1e-5
    for row, ids in enumerate(ROWS):
        tokens, logits = reference.generate(model, family, ids, experts, TOKENS)
        assert new_tokens(batch, ids_BS)[row] == tokens
        assert difference(step_logits(batch, row), logits) < 1e-5


def test_wanda_aggregates_in_the_same_way() -> None:
    model = tiny("llama")
    with griffin.prune(model, statistic="wanda", shared_experts=True) as pruner:
        generate(model, *pad(ROWS, "left"))
    for found_1D, scores_D in zip(pruner.scores, aggregated(model, "llama", "wanda"), strict=True):
        assert difference(found_1D[0], scores_D) < 1e-5


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("statistic", ["magnitude", "random"])
def test_statistics_without_activations_share_too(statistic: str, mode: str) -> None:
    model = tiny("llama")
    with griffin.prune(model, statistic=statistic, mode=mode, shared_experts=True) as pruner:
        generate(model, *pad(ROWS, "left"))
    assert [experts.shape for experts in pruner.experts] == [(1, 40)] * LAYERS


@pytest.mark.parametrize("selection", griffin.SELECTIONS)
def test_modes_agree_on_shared_experts(selection: str) -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad(ROWS, "left")
    outputs = []
    for mode in griffin.MODES:
        with griffin.prune(model, selection=selection, mode=mode, shared_experts=True) as pruner:
            outputs.append((new_tokens(generate(model, ids_BS, mask_BS), ids_BS), as_lists(pruner.experts)))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_batch_of_one_shares_with_itself(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model, mode=mode):
        expected = generate(model, ids)
    with griffin.prune(model, mode=mode, shared_experts=True):
        assert torch.equal(generate(model, ids).sequences, expected.sequences)
