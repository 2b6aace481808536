"""What a pruner tells of the last prompt: scores and experts per layer."""

from __future__ import annotations

import pytest
import torch
from families import LAYERS, tiny
from prompts import pad, prompt
from running import as_lists, generate

import griffin

ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2)]


@pytest.mark.parametrize("what", ["scores", "experts"])
def test_there_is_nothing_before_a_prompt(what: str) -> None:
    pruner = griffin.prune(tiny("llama"))
    with pytest.raises(RuntimeError, match="no prompt has run yet"):
        getattr(pruner, what)
    with pruner, pytest.raises(RuntimeError, match="no prompt has run yet"):
        getattr(pruner, what)


@pytest.mark.parametrize(
    ("statistic", "selection", "shared", "score_rows", "expert_rows"),
    [
        ("griffin", "topk", False, 3, 3),
        ("wanda", "sample", False, 3, 3),
        ("random", "topk", False, 3, 3),
        ("magnitude", "topk", False, 1, 1),
        ("magnitude", "sample", False, 1, 3),
        ("griffin", "topk", True, 1, 1),
        ("griffin", "sample", True, 1, 1),
    ],
)
def test_one_row_per_sequence_or_one_for_all(
    statistic: str, selection: str, shared: bool, score_rows: int, expert_rows: int
) -> None:
    model = tiny("llama")
    with griffin.prune(model, statistic=statistic, selection=selection, mode="masked", shared_experts=shared) as pruner:
        generate(model, *pad(ROWS, "left"))
    assert [scores.shape for scores in pruner.scores] == [(score_rows, 80)] * LAYERS
    assert [experts.shape for experts in pruner.experts] == [(expert_rows, 40)] * LAYERS


@pytest.mark.parametrize("statistic", [name for name, one in griffin.STATISTICS.items() if not one.oracle])
def test_types_and_order(statistic: str) -> None:
    with griffin.prune(tiny("llama"), statistic=statistic) as pruner:
        generate(tiny("llama"), ROWS[0])
    for scores_BD, experts_BK in zip(pruner.scores, pruner.experts, strict=True):
        assert scores_BD.dtype == torch.float32
        assert not scores_BD.requires_grad
        assert experts_BK.dtype == torch.int64
        assert bool((experts_BK.diff(dim=1) > 0).all())
        # The experts are those of these scores.
        assert set(experts_BK[0].tolist()) == set(scores_BD[0].topk(40).indices.tolist())


def test_they_are_those_of_the_last_prompt() -> None:
    model = tiny("llama")
    with griffin.prune(model) as pruner:
        generate(model, ROWS[0])
        first = as_lists(pruner.experts)
        generate(model, ROWS[1])
        second = as_lists(pruner.experts)
    assert first != second == as_lists(pruner.experts)  # and can be read after the context


@torch.no_grad()
def test_they_can_be_read_before_the_first_generated_token() -> None:
    model, token = tiny("llama"), prompt(1, 1)
    with griffin.prune(model) as pruner:
        cache = model(ROWS[0]).past_key_values
        early = as_lists(pruner.experts)
        model(token, past_key_values=cache)
        assert as_lists(pruner.experts) == early


@torch.no_grad()
def test_a_prompt_that_follows_starts_anew() -> None:
    model = tiny("llama")
    with griffin.prune(model, mode="masked") as pruner:
        model(torch.cat([prompt(5, 4), prompt(5, 5)]))
        assert len(pruner.experts[0]) == 2
        model(ROWS[0])
        assert len(pruner.experts[0]) == 1
