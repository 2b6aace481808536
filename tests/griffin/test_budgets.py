"""Budgets: the same total, shared differently."""

from __future__ import annotations

import itertools

import pytest
from families import LAYERS, ONE_PER_LAYOUT, WIDTHS, tiny
from prompts import prompt
from running import difference, generate, step_logits

import griffin
from griffin import BUDGETS, kept_per_layer


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.25, 0.5, 0.65, 0.75, 0.9, 0.999])
@pytest.mark.parametrize("widths", [[80] * 3, [1536] * 30, [2048] * 18, [64], [7, 7], [80, 160, 80, 160]])
def test_every_budget_keeps_as_many_as_the_paper(widths: list[int], sparsity: float, budget: str) -> None:
    kept = kept_per_layer(widths, sparsity, budget)
    assert sum(kept) == sum(griffin.kept_neurons(width, sparsity) for width in widths)
    assert all(1 <= count <= width for count, width in zip(kept, widths, strict=True))


def test_uniform_is_the_papers() -> None:
    assert kept_per_layer([80, 81], 0.5) == [40, 40]
    assert kept_per_layer([80, 80], [0.5, 0.25]) == [40, 60]


def test_late_keeps_more_towards_the_middle_and_spares_the_first_layer() -> None:
    kept = kept_per_layer([1000] * 11, 0.5, "late")
    assert kept[0] == 500
    assert all(one <= other for one, other in itertools.pairwise(kept[1:]))
    assert kept == [500, 380, 420, 460, 500, *6 * [540]]  # at 50%, 0.2 of the width from none to the middle


def test_a_dense_model_stays_dense() -> None:
    assert kept_per_layer([80] * 3, 0.0, "late") == [80] * 3


def test_a_budget_and_a_sparsity_for_each_layer_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="budget='late' with a sparsity for each layer"):
        griffin.prune(tiny("llama"), [0.5] * LAYERS, budget="late")


def test_an_unknown_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="budget='even': expected one of uniform, late"):
        griffin.prune(tiny("llama"), budget="even")


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_compact_equals_masked_under_a_budget(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BUDGETS, "late", lambda layers: [-1.0, 0.0, 1.0])  # its own is flat in so few layers
    model, ids = tiny(family), prompt(11)
    found = {}
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode, budget="late", compensation="ridge") as pruner:
            found[mode] = step_logits(generate(model, ids))
            counts = [experts_BK.shape[1] for experts_BK in pruner.experts]
        assert counts == kept_per_layer([WIDTHS[family]] * LAYERS, 0.5, "late")
        assert len(set(counts)) > 1
    assert difference(found["compact"], found["masked"]) < 1e-5
