"""From scores to experts, and how the layers share what is kept."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import LAYERS, WIDTHS, tiny
from prompts import prompt
from running import difference, generate, step_logits
from torch import Tensor

import griffin
from griffin import BUDGETS, SELECTIONS, kept_neurons, kept_per_layer, select

DRAWS = 20_000
TOLERANCE = 0.02  # about four standard deviations of a difference of two frequencies


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def subset_frequencies(experts_BK: Tensor, width: int) -> Tensor:
    """How often each set of neurons came up, indexed by the set's bits."""
    codes_B = (2**experts_BK).sum(dim=1)
    return torch.bincount(codes_B, minlength=2**width) / len(codes_B)


@pytest.mark.parametrize(
    ("width", "sparsity", "kept"),
    [(1, 0.0, 1), (1, 0.99, 1), (80, 0.0, 80), (80, 0.5, 40), (7, 0.5, 3), (80, 0.999, 1)],
)
def test_kept_neurons_round_down_to_at_least_one(width: int, sparsity: float, kept: int) -> None:
    assert kept_neurons(width, sparsity) == kept


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_single_neuron_is_kept(selection: str) -> None:
    assert select(torch.tensor([[0.5]]), 1, selection, torch.tensor([[0.5]])).tolist() == [[0]]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_keeping_all_neurons_keeps_each_once(selection: str) -> None:
    assert select(uniform(2, 5), 5, selection, uniform(2, 5)).tolist() == [[0, 1, 2, 3, 4]] * 2


def test_topk_keeps_the_largest_scores_in_ascending_order() -> None:
    assert select(torch.tensor([[3.0, 0.0, 5.0, 4.0], [1.0, 2.0, 0.0, 0.5]]), 2).tolist() == [[2, 3], [0, 1]]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_experts_are_distinct_ascending_and_in_range(selection: str) -> None:
    experts_BK = select(uniform(50, 12), 7, selection, uniform(50, 12, seed=1))
    assert experts_BK.shape == (50, 7)
    assert experts_BK.dtype == torch.int64
    assert bool((experts_BK.diff(dim=1) > 0).all())
    assert int(experts_BK.min()) >= 0
    assert int(experts_BK.max()) < 12


def test_sample_is_distributed_as_multinomial_without_replacement() -> None:
    scores_1D = torch.tensor([[8.0, 4.0, 2.0, 1.0, 0.5, 0.25]])
    torch.manual_seed(0)
    expected_BK = torch.multinomial(scores_1D.expand(DRAWS, -1), 3, replacement=False)
    found_BK = select(scores_1D, 3, "sample", uniform(DRAWS, 6, seed=1))
    torch.testing.assert_close(
        subset_frequencies(found_BK, 6), subset_frequencies(expected_BK, 6), rtol=0, atol=TOLERANCE
    )


def test_topk_sample_draws_the_second_half_from_the_rest() -> None:
    scores_D = torch.tensor([1.0, 8.0, 2.0, 0.5, 4.0, 0.25])
    torch.manual_seed(0)
    rest_D = scores_D.clone()
    rest_D[[1, 4]] = 0  # the best two are certain
    drawn_BK = torch.multinomial(rest_D.expand(DRAWS, -1), 2, replacement=False)
    expected_BK = torch.cat([torch.tensor([[1, 4]]).expand(DRAWS, -1), drawn_BK], dim=1)
    found_BK = select(scores_D.unsqueeze(0), 4, "topk_sample", uniform(DRAWS, 6, seed=1))
    torch.testing.assert_close(
        subset_frequencies(found_BK, 6), subset_frequencies(expected_BK, 6), rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("kept", [2, 3, 6, 7])
def test_topk_sample_contains_the_best_half(kept: int) -> None:
    scores_BD = uniform(50, 12)
    found_BK = select(scores_BD, kept, "topk_sample", uniform(50, 12, seed=1))
    for found_K, best_K in zip(found_BK, scores_BD.topk(kept // 2).indices, strict=True):
        assert set(best_K.tolist()) <= set(found_K.tolist())


@pytest.mark.parametrize("selection", SELECTIONS)
def test_with_too_few_positive_scores_all_of_them_are_kept(selection: str) -> None:
    scores_1D = torch.zeros(1, 8)
    scores_1D[0, [2, 5]] = torch.tensor([1e-6, 3.0])
    for experts_K in select(scores_1D.expand(100, -1), 4, selection, uniform(100, 8, seed=1)).tolist():
        assert {2, 5} < set(experts_K)
        assert len(set(experts_K)) == 4


@pytest.mark.parametrize(("extreme", "kept"), [(0.0, [1, 2]), (1 - 2**-24, [0, 3])])
def test_the_ends_of_the_uniform_range_lose_and_win(extreme: float, kept: list[int]) -> None:
    # Their Gumbel noise is minus infinity, and the largest there is.
    assert select(torch.ones(1, 4), 2, "sample", torch.tensor([[extreme, 0.5, 0.5, extreme]])).tolist() == [kept]


@pytest.mark.parametrize("selection", ["sample", "topk_sample"])
def test_one_score_row_serves_every_row_of_the_draw(selection: str) -> None:
    scores_1D, draw_BD = uniform(1, 12), uniform(5, 12, seed=1)
    found_BK = select(scores_1D, 4, selection, draw_BD)
    assert torch.equal(found_BK, select(scores_1D.expand(5, -1), 4, selection, draw_BD))
    assert len({tuple(experts_K) for experts_K in found_BK.tolist()}) > 1


def test_the_same_draw_selects_the_same() -> None:
    assert torch.equal(*(select(uniform(3, 12), 4, "sample", uniform(3, 12)) for _ in range(2)))


def test_an_unknown_selection_names_the_known() -> None:
    with pytest.raises(ValueError, match=r"selection='best'.*topk, sample, topk_sample"):
        select(uniform(1, 4), 2, "best")


@pytest.mark.parametrize("kept", [0, 5, -1])
def test_kept_out_of_range_is_refused(kept: int) -> None:
    with pytest.raises(ValueError, match=f"kept={kept}: expected 1 to 4"):
        select(uniform(1, 4), kept)


@pytest.mark.parametrize("selection", ["sample", "topk_sample"])
def test_sampling_without_a_draw_is_refused(selection: str) -> None:
    with pytest.raises(ValueError, match="needs random numbers"):
        select(uniform(1, 4), 2, selection)


# -- budgets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("widths", [[80] * 3, [1536] * 30, [2048] * 18, [64], [7, 7], [80, 160, 80, 160]])
def test_every_budget_keeps_as_many_as_the_paper(widths: list[int], budget: str) -> None:
    for sparsity in (0.0, 0.01, 0.25, 0.5, 0.65, 0.75, 0.9, 0.999):
        kept = kept_per_layer(widths, sparsity, budget)
        assert sum(kept) == sum(kept_neurons(width, sparsity) for width in widths)
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


@pytest.mark.parametrize("family", ["llama", "bloom"])
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
