"""From scores to experts, how the layers share what is kept, and random draws."""

from __future__ import annotations

import itertools

import pytest
import torch
from families import LAYERS, tiny
from running import as_lists, pad, prompt, text
from torch import Tensor

import griffin
from griffin import BUDGETS, SELECTIONS, kept_neurons, kept_per_layer, select

DRAWS = 20_000
TOLERANCE = 0.02  # about four standard deviations of a difference of two frequencies


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_kept_neurons_round_down_to_at_least_one() -> None:
    cases = ((1, 0.0, 1), (1, 0.99, 1), (80, 0.0, 80), (80, 0.5, 40), (7, 0.5, 3), (80, 0.999, 1))
    assert all(kept_neurons(width, sparsity) == kept for width, sparsity, kept in cases)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_experts_are_distinct_ascending_and_in_range(selection: str) -> None:
    assert select(torch.tensor([[0.5]]), 1, selection, torch.tensor([[0.5]])).tolist() == [[0]]
    assert select(uniform(2, 5), 5, selection, uniform(2, 5)).tolist() == [[0, 1, 2, 3, 4]] * 2
    for kept in (2, 3, 7):
        scores_BD = uniform(50, 12)
        found_BK = select(scores_BD, kept, selection, uniform(50, 12, seed=1))
        assert torch.equal(found_BK, select(scores_BD, kept, selection, uniform(50, 12, seed=1)))
        assert (found_BK.shape, found_BK.dtype) == ((50, kept), torch.int64)
        assert bool((found_BK.diff(dim=1) > 0).all())
        assert (int(found_BK.min()) >= 0, int(found_BK.max()) < 12) == (True, True)
        certain = {"topk": kept, "sample": 0, "topk_sample": kept // 2}[selection]
        for found_K, best_K in zip(found_BK, scores_BD.topk(certain).indices, strict=True):
            assert set(best_K.tolist()) <= set(found_K.tolist())


def subset_frequencies(experts_BK: Tensor) -> Tensor:
    """How often each set of six neurons came up, indexed by the set's bits."""
    return torch.bincount((2**experts_BK).sum(dim=1), minlength=2**6) / len(experts_BK)


def test_samples_are_distributed_as_multinomial_ones_without_replacement() -> None:
    scores_D = torch.tensor([1.0, 8.0, 2.0, 0.5, 4.0, 0.25])
    torch.manual_seed(0)
    expected = {"sample": torch.multinomial(scores_D.expand(DRAWS, -1), 4)}
    rest_D = scores_D.index_fill(0, torch.tensor([1, 4]), 0.0)  # the best two are certain
    drawn = torch.multinomial(rest_D.expand(DRAWS, -1), 2)
    expected["topk_sample"] = torch.cat([torch.tensor([[1, 4]]).expand(DRAWS, -1), drawn], dim=1)
    for selection, expected_BK in expected.items():
        found_BK = select(scores_D.unsqueeze(0), 4, selection, uniform(DRAWS, 6, seed=1))
        frequencies = subset_frequencies(found_BK), subset_frequencies(expected_BK)
        torch.testing.assert_close(*frequencies, rtol=0, atol=TOLERANCE)


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


def test_what_cannot_be_selected_is_refused() -> None:
    with pytest.raises(ValueError, match=r"selection='best'.*topk, sample, topk_sample"):
        select(uniform(1, 4), 2, "best")
    for kept in (0, 5, -1):
        with pytest.raises(ValueError, match=f"kept={kept}: expected 1 to 4"):
            select(uniform(1, 4), kept)
    for selection in ("sample", "topk_sample"):
        with pytest.raises(ValueError, match="needs random numbers"):
            select(uniform(1, 4), 2, selection)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("widths", [[80] * 3, [1536] * 30, [2048] * 18, [64], [7, 7], [80, 160, 80, 160]])
def test_every_budget_keeps_as_many_as_the_paper(widths: list[int], budget: str) -> None:
    for sparsity in (0.0, 0.01, 0.25, 0.5, 0.65, 0.75, 0.9, 0.999):
        kept = kept_per_layer(widths, sparsity, budget)
        assert sum(kept) == sum(kept_neurons(width, sparsity) for width in widths)
        assert all(1 <= count <= width for count, width in zip(kept, widths, strict=True))


def test_late_keeps_more_towards_the_middle_and_spares_the_first_layer() -> None:
    kept = kept_per_layer([1000] * 11, 0.5, "late")
    assert all(one <= other for one, other in itertools.pairwise(kept[1:]))
    assert kept == [500, 380, 420, 460, 500, *6 * [540]]  # at 50%, 0.2 of the width from none to the middle
    assert kept_per_layer([80, 80], [0.5, 0.25]) == [40, 60]


ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2), prompt(1, 3)]
STOCHASTIC = [("random", "topk"), ("griffin", "sample"), ("griffin", "topk_sample"), ("magnitude", "sample")]


def drawn(statistic: str, selection: str, ids: Tensor, **options: object) -> list[list[int]]:
    """Each layer's experts for a prompt alone."""
    with torch.no_grad(), griffin.prune(tiny("llama"), statistic=statistic, selection=selection, **options) as pruner:
        tiny("llama")(ids)
    return as_lists(pruner.experts)


@pytest.mark.parametrize(("statistic", "selection"), STOCHASTIC)
def test_a_prompt_draws_the_same_in_any_batch_order_mode_and_chunking(statistic: str, selection: str) -> None:
    model, before = tiny("llama"), torch.get_rng_state()
    alone = [drawn(statistic, selection, ids) for ids in ROWS]
    assert drawn(statistic, selection, ROWS[0], mode="masked") == alone[0]
    with griffin.prune(model, statistic=statistic, selection=selection, mode="masked") as pruner:
        text(model, *pad(ROWS, "left"))
        assert [as_lists(pruner.experts, row) for row in range(4)] == alone
        ids_BS, mask_BS = pad(ROWS, "right")
        with torch.no_grad():
            model(ids_BS, attention_mask=mask_BS)
        assert [as_lists(pruner.experts, row) for row in range(4)] == alone
        text(model, ROWS[0], prefill_chunk_size=5)
        assert as_lists(pruner.experts) == alone[0]
        with pytest.raises(ValueError, match="input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ROWS[0]))
    assert all(one != other for one, other in zip(alone[0], drawn(statistic, selection, ROWS[0], seed=1), strict=True))
    assert all(one != other for one, other in zip(*alone[:2], strict=True)), "another prompt draws others"
    assert len({tuple(experts) for experts in alone[0]}) == LAYERS, "and so does another layer"
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"


@torch.no_grad()
def test_every_neuron_has_the_same_chance() -> None:
    rows, model = 400, tiny("llama")
    ids_BS = torch.randint(2, 97, (rows, 3), generator=torch.Generator().manual_seed(0))
    with griffin.prune(model, statistic="random", mode="masked") as pruner:
        model(ids_BS)
    for experts_BK in pruner.experts:
        frequencies_D = torch.bincount(experts_BK.flatten(), minlength=80) / rows
        # One half each; the standard deviation of a frequency is 0.025.
        assert float((frequencies_D - 0.5).abs().max()) < 0.11
