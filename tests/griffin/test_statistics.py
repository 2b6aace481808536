"""The statistics and the aggregation of a batch, against their formulas."""

from __future__ import annotations

import pytest
import reference
import torch
from families import FAMILIES, LAYERS, fresh, tiny
from prompts import prompt
from torch import Tensor, nn

import griffin
from griffin import STATISTICS, FeedForwardBlock, aggregate

SHAPES = [(1, 1, 1), (1, 1, 5), (1, 7, 1), (3, 1, 5), (3, 7, 5)]  # B, S, D
PROMPT_STATISTICS = ["griffin", "wanda"]  # those that read the activations
FORMULAS = ["griffin", "wanda", "magnitude"]


def plain_block(width: int) -> FeedForwardBlock:
    torch.manual_seed(0)
    return FeedForwardBlock("mlp", (nn.Linear(4, width),), nn.Linear(width, 4), parts=1)


def activations(B: int, S: int, D: int) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))


def score(statistic: str, *stretches_BSD: Tensor) -> Tensor:
    """[B, D], from the activations of a prompt in one or more stretches."""
    chosen = STATISTICS[statistic]
    total_BD = None if chosen.gather is None else torch.stack([chosen.gather(z) for z in stretches_BSD]).sum(dim=0)
    return chosen.score(total_BD, plain_block(stretches_BSD[0].shape[-1]), None)


def reference_score(statistic: str, z_SD: Tensor) -> Tensor:
    block = plain_block(z_SD.shape[-1])
    return reference.score(
        statistic, z_SD.double(), [block.inputs[0].weight.double()], block.output.weight.detach().double()
    )


@pytest.mark.parametrize("statistic", PROMPT_STATISTICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_prompt_statistics_follow_their_formulas(statistic: str, shape: tuple[int, int, int]) -> None:
    z_BSD = activations(*shape)
    expected_BD = torch.stack([reference_score(statistic, z_SD) for z_SD in z_BSD])
    torch.testing.assert_close(score(statistic, z_BSD).double(), expected_BD, rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [1, 5])
def test_magnitude_follows_its_formula(width: int) -> None:
    z_BSD = activations(1, 1, width)
    expected_1D = reference_score("magnitude", z_BSD[0]).unsqueeze(0)
    torch.testing.assert_close(score("magnitude", z_BSD).double(), expected_1D, rtol=1e-5, atol=0)


def test_a_single_neuron_has_relative_activation_one() -> None:
    assert score("griffin", torch.tensor([[[-3.0]]])).item() == 1.0


def test_griffin_ignores_how_large_a_token_is() -> None:
    z_BSD = activations(1, 3, 5)
    scaled_BSD = z_BSD * torch.tensor([1e-3, 1.0, 1e3]).view(1, 3, 1)
    torch.testing.assert_close(score("griffin", scaled_BSD), score("griffin", z_BSD))


@pytest.mark.parametrize("statistic", PROMPT_STATISTICS)
def test_a_zero_row_counts_as_zero(statistic: str) -> None:
    assert torch.equal(score(statistic, torch.zeros(1, 2, 5)), torch.zeros(1, 5))


@pytest.mark.parametrize("statistic", PROMPT_STATISTICS)
def test_padding_set_to_zero_changes_nothing(statistic: str) -> None:
    z_BSD = activations(2, 3, 5)
    padded_BSD = torch.cat([torch.zeros(2, 4, 5), z_BSD, torch.zeros(2, 1, 5)], dim=1)
    torch.testing.assert_close(score(statistic, padded_BSD), score(statistic, z_BSD))


@pytest.mark.parametrize("statistic", PROMPT_STATISTICS)
def test_stretches_of_a_prompt_sum_to_the_whole(statistic: str) -> None:
    z_BSD = activations(2, 7, 5)
    torch.testing.assert_close(score(statistic, *z_BSD.split([3, 3, 1], dim=1)), score(statistic, z_BSD))


@pytest.mark.parametrize("statistic", PROMPT_STATISTICS)
def test_gathering_leaves_the_activations_alone(statistic: str) -> None:
    z_BSD = activations(1, 3, 5)
    score(statistic, z_BSD)
    assert torch.equal(z_BSD, activations(1, 3, 5))


def test_random_scores_are_the_draw() -> None:
    draw_BD = torch.rand(2, 5)
    assert torch.equal(STATISTICS["random"].score(None, plain_block(5), draw_BD), draw_BD)


@pytest.mark.parametrize("statistic", FORMULAS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_models_scores_follow_the_formulas(family: str, statistic: str) -> None:
    model, ids = tiny(family), prompt(7)
    with torch.no_grad(), griffin.prune(model, statistic=statistic) as pruner:
        model(ids)
    for found_1D, expected_D in zip(pruner.scores, reference.scores(model, family, statistic, ids), strict=True):
        torch.testing.assert_close(found_1D[0].double(), expected_D, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("statistic", FORMULAS)
def test_half_precision_is_scored_in_float32(statistic: str, dtype: torch.dtype) -> None:
    model, ids = fresh("llama"), prompt(7)
    for layer in range(LAYERS):  # so that squares of activations overflow in float16
        reference.output_projection(model, "llama", layer).weight.data *= 1e-2
        model.get_submodule(reference.module_name("llama", layer)).up_proj.weight.data *= 1e3
    model = model.to(dtype)
    with torch.no_grad(), griffin.prune(model, statistic=statistic) as pruner:
        model(ids)
    _, z = reference.run(model, "llama", ids)
    assert max(float(z_SD.abs().max()) for z_SD in z) > 256
    expected = reference.score_layers(model, "llama", statistic, z)
    for found_1D, expected_D in zip(pruner.scores, expected, strict=True):
        assert found_1D.dtype == torch.float32
        torch.testing.assert_close(found_1D[0].double(), expected_D, rtol=1e-5, atol=0)


def test_one_sequence_aggregates_to_its_scaled_scores() -> None:
    torch.testing.assert_close(aggregate(torch.tensor([[2.0, 4.0]]), torch.tensor([4])), torch.tensor([[1.0, 2.0]]))


def test_aggregation_weighs_by_the_root_of_the_prompt_length() -> None:
    scores_BD, lengths = activations(3, 1, 5).squeeze(1).abs(), [1, 4, 7]
    expected_D = sum(scores_D / length**0.5 for scores_D, length in zip(scores_BD, lengths, strict=True))
    torch.testing.assert_close(aggregate(scores_BD, torch.tensor(lengths)), expected_D.unsqueeze(0))
