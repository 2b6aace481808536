"""The arguments of `prune`: sparsity for all layers or per layer, and names that must be known."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import pytest
import reference
from families import LAYERS, tiny
from prompts import prompt
from running import TOKENS, as_lists, difference, generate, new_tokens, step_logits

import griffin


@pytest.mark.parametrize(
    ("sparsity", "kept"),
    [
        (0, [80, 80, 80]),
        (0.5, [40, 40, 40]),
        (0.999, [1, 1, 1]),
        ([0.0, 0.5, 0.75], [80, 40, 20]),
        ((0.25, 0, 0.99), [60, 80, 1]),
    ],
)
def test_the_right_number_of_neurons_is_kept(sparsity: Any, kept: list[int]) -> None:
    with griffin.prune(tiny("llama"), sparsity=sparsity) as pruner:
        generate(tiny("llama"), prompt(7))
    assert pruner.kept == kept
    assert [experts.shape for experts in pruner.experts] == [(1, k) for k in kept]


@pytest.mark.parametrize("mode", griffin.MODES)
def test_sparsity_per_layer_follows_the_reference(mode: str) -> None:
    model, ids, sparsity = tiny("llama"), prompt(11), [0.0, 0.25, 0.75]
    scores = reference.scores(model, "llama", "griffin", ids)
    experts = [reference.best(scores_D, value) for scores_D, value in zip(scores, sparsity, strict=True)]
    tokens, logits = reference.generate(model, "llama", ids, experts, TOKENS)
    with griffin.prune(model, sparsity=sparsity, mode=mode) as pruner:
        found = generate(model, ids)
    assert as_lists(pruner.experts) == experts
    assert new_tokens(found, ids) == [tokens]
    assert difference(step_logits(found), logits) < 1e-5


@pytest.mark.parametrize("sparsity", [[], [0.5], [0.5] * (LAYERS - 1), [0.5] * (LAYERS + 1)])
def test_one_value_per_layer_is_needed(sparsity: list[float]) -> None:
    with pytest.raises(ValueError, match=f"sparsity has {len(sparsity)} values.*each of {LAYERS} layers"):
        griffin.prune(tiny("llama"), sparsity=sparsity)


@pytest.mark.parametrize("sparsity", [1, 1.0, 1.5, -0.1, math.nan, [0.5, 0.5, 1.0], [0.5, -1e-9, 0.5]])
def test_sparsity_out_of_range_is_refused(sparsity: Any) -> None:
    with pytest.raises(ValueError, match="expected 0 <= sparsity < 1"):
        griffin.prune(tiny("llama"), sparsity=sparsity)


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("statistic", griffin.STATISTICS),
        ("selection", griffin.SELECTIONS),
        ("mode", griffin.MODES),
        ("compensation", griffin.COMPENSATIONS),
        ("budget", griffin.BUDGETS),
        ("refresh", griffin.REFRESHES),
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(key: str, allowed: Collection[str]) -> None:
    with pytest.raises(ValueError, match=f"{key}='nonesuch'.*{', '.join(allowed)}"):
        griffin.prune(tiny("llama"), **{key: "nonesuch"})


def test_the_defaults_are_griffin_at_one_half_compact() -> None:
    model, ids = tiny("llama"), prompt(7)
    options = {"sparsity": 0.5, "statistic": "griffin", "selection": "topk", "mode": "compact"}
    with griffin.prune(model, **options) as explicit:
        expected = generate(model, ids)
    with griffin.prune(model) as default:
        found = generate(model, ids)
    assert default.mode == explicit.mode
    assert as_lists(default.experts) == as_lists(explicit.experts)
    assert difference(step_logits(found), step_logits(expected)) == 0
