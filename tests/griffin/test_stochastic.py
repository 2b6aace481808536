"""Random statistics and selections follow from the seed, the layer and the prompt, and from nothing else."""

from __future__ import annotations

import pytest
import torch
from families import LAYERS, tiny
from prompts import pad, prompt
from running import as_lists, generate
from torch import Tensor

import griffin

ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2), prompt(1, 3)]
STOCHASTIC = [
    ("random", "topk"),
    ("griffin", "sample"),
    ("griffin", "topk_sample"),
    ("magnitude", "sample"),
    ("random", "topk_sample"),
]
each_stochastic = pytest.mark.parametrize(("statistic", "selection"), STOCHASTIC)


def chosen(statistic: str, selection: str, ids: Tensor, seed: int = 0) -> list[list[int]]:
    """Each layer's experts for a prompt alone."""
    model = tiny("llama")
    with torch.no_grad(), griffin.prune(model, statistic=statistic, selection=selection, seed=seed) as pruner:
        model(ids)
    return as_lists(pruner.experts)


@each_stochastic
def test_the_same_seed_draws_the_same(statistic: str, selection: str) -> None:
    assert chosen(statistic, selection, ROWS[0]) == chosen(statistic, selection, ROWS[0])


@each_stochastic
def test_another_seed_draws_others(statistic: str, selection: str) -> None:
    first, second = (chosen(statistic, selection, ROWS[0], seed=seed) for seed in (0, 1))
    assert all(one != other for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize(("statistic", "selection"), [("random", "topk"), ("magnitude", "sample")])
def test_another_prompt_draws_others(statistic: str, selection: str) -> None:
    first, second = (chosen(statistic, selection, ids) for ids in ROWS[:2])  # static scores: the draw alone differs
    assert all(one != other for one, other in zip(first, second, strict=True))


@each_stochastic
def test_a_row_of_a_batch_draws_what_it_draws_alone(statistic: str, selection: str) -> None:
    model = tiny("llama")
    with griffin.prune(model, statistic=statistic, selection=selection, mode="masked") as pruner:
        generate(model, *pad(ROWS, "left"))
    for row, ids in enumerate(ROWS):
        assert as_lists(pruner.experts, row) == chosen(statistic, selection, ids)


@each_stochastic
def test_a_right_padded_row_draws_what_it_draws_alone(statistic: str, selection: str) -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad(ROWS, "right")
    with torch.no_grad(), griffin.prune(model, statistic=statistic, selection=selection, mode="masked") as pruner:
        model(ids_BS, attention_mask=mask_BS)
    for row, ids in enumerate(ROWS):
        assert as_lists(pruner.experts, row) == chosen(statistic, selection, ids)


@each_stochastic
def test_a_prompt_in_chunks_draws_what_it_draws_whole(statistic: str, selection: str) -> None:
    model = tiny("llama")
    with griffin.prune(model, statistic=statistic, selection=selection) as pruner:
        generate(model, ROWS[0], prefill_chunk_size=5)
    assert as_lists(pruner.experts) == chosen(statistic, selection, ROWS[0])


def test_earlier_prompts_do_not_matter() -> None:
    model, found = tiny("llama"), []
    with griffin.prune(model, statistic="random") as pruner:
        for ids in ROWS:
            generate(model, ids)
            found.append(as_lists(pruner.experts))
    assert found == [chosen("random", "topk", ids) for ids in ROWS]


@pytest.mark.parametrize("seed", [0, 1])
def test_layers_draw_differently(seed: int) -> None:
    assert len({tuple(experts) for experts in chosen("random", "topk", ROWS[0], seed)}) == LAYERS


def test_the_modes_draw_the_same() -> None:
    model, experts = tiny("llama"), []
    for mode in griffin.MODES:
        with griffin.prune(model, statistic="griffin", selection="sample", mode=mode) as pruner:
            generate(model, ROWS[0])
        experts.append(as_lists(pruner.experts))
    assert experts[0] == experts[1]


@each_stochastic
def test_torchs_own_generator_is_left_alone(statistic: str, selection: str) -> None:
    before = torch.get_rng_state()
    chosen(statistic, selection, ROWS[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_neuron_has_the_same_chance() -> None:
    rows = 400
    ids_BS = torch.randint(2, 97, (rows, 3), generator=torch.Generator().manual_seed(0))
    model = tiny("llama")
    with torch.no_grad(), griffin.prune(model, statistic="random", mode="masked") as pruner:
        model(ids_BS)
    for experts_BK in pruner.experts:
        frequencies_D = torch.bincount(experts_BK.flatten(), minlength=80) / rows
        # One half each; the standard deviation of a frequency is 0.025.
        assert float((frequencies_D - 0.5).abs().max()) < 0.11


def test_topk_sample_keeps_the_best_half_of_the_prompts_scores() -> None:
    model = tiny("llama")
    with torch.no_grad(), griffin.prune(model, selection="topk_sample") as pruner:
        model(ROWS[0])
    for scores_1D, experts_1K in zip(pruner.scores, pruner.experts, strict=True):
        best, top = set(scores_1D[0].topk(20).indices.tolist()), set(scores_1D[0].topk(40).indices.tolist())
        assert best <= set(experts_1K[0].tolist())
        assert set(experts_1K[0].tolist()) != top


@each_stochastic
def test_a_prompt_without_ids_is_refused(statistic: str, selection: str) -> None:
    model = tiny("llama")
    embeddings = model.get_input_embeddings()(ROWS[0])
    with griffin.prune(model, statistic=statistic, selection=selection), pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=embeddings)
