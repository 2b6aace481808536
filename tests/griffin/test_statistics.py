"""The statistics and the aggregation of a batch, against their formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference
import torch
from families import LAYERS, VARIED, fresh, tiny
from prompts import prompt
from torch import Tensor, nn

import griffin
from griffin import STATISTICS, Engine, FeedForwardBlock, Method, aggregate
from griffin.activations import PrefillChunk, Recorded, TokenPositions
from griffin.kv_cache import KVCache
from griffin.self_generated import sample
from griffin.statistics import Evidence

SHAPES = [(1, 1, 1), (1, 1, 5), (1, 7, 1), (3, 1, 5), (3, 7, 5)]  # B, S, D
# Those that read the activations of a prompt and nothing else but weights.
PROMPT_STATISTICS = ["griffin", "wanda", "impact", "joint", "max", "mean_abs", "recency", "oracle"]
FORMULAS = [*(name for name in PROMPT_STATISTICS if name != "oracle"), "magnitude"]


def plain_block(width: int) -> FeedForwardBlock:
    torch.manual_seed(0)
    return FeedForwardBlock("mlp", (nn.Linear(4, width),), nn.Linear(width, 4), parts=1)


def activations(B: int, S: int, D: int) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(1))


def score(statistic: str, z_BSD: Tensor) -> Tensor:
    """[B, D], from the activations of a prompt."""
    return STATISTICS[statistic](z_BSD, plain_block(z_BSD.shape[-1]))


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
def test_padding_changes_nothing(statistic: str) -> None:
    z_BSD = activations(2, 3, 5)
    padded_BSD = torch.cat([torch.full((2, 4, 5), 9.0), z_BSD, torch.full((2, 1, 5), torch.nan)], dim=1)
    counted_BS = torch.tensor([4 * [False] + 3 * [True] + [False]]).expand(2, -1)
    found_BD = STATISTICS[statistic](padded_BSD, plain_block(5), counted_BS)
    torch.testing.assert_close(found_BD, score(statistic, z_BSD))


@pytest.mark.parametrize("statistic", PROMPT_STATISTICS)
def test_chunks_of_a_prompt_join_to_the_whole(statistic: str) -> None:
    chosen, block, z_BSD = STATISTICS[statistic], plain_block(5), activations(2, 7, 5)
    z_BSD[1, 4:] = 0  # the second row has four tokens, and padding behind them
    counted_BS = torch.arange(7) < torch.tensor([[7], [4]])
    assert chosen.activations is not None
    total_BD, before_B = None, torch.zeros(2, dtype=torch.int64)
    for chunk_BSD, part_BS in zip(z_BSD.split([3, 3, 1], dim=1), counted_BS.split([3, 3, 1], dim=1), strict=True):
        positions = TokenPositions(2, part_BS.shape[1], part_BS, before_B)
        part_BD = chosen.activations.part(PrefillChunk(chunk_BSD, positions), block)
        total_BD = part_BD if total_BD is None else chosen.activations.join(total_BD, part_BD, positions)
        before_B = before_B + positions.count_B
    torch.testing.assert_close(chosen.score(Evidence(block, total_BD)), chosen(z_BSD, block, counted_BS))


@pytest.mark.parametrize("statistic", PROMPT_STATISTICS)
def test_recording_leaves_the_activations_alone(statistic: str) -> None:
    z_BSD = activations(1, 3, 5)
    score(statistic, z_BSD)
    assert torch.equal(z_BSD, activations(1, 3, 5))


def test_random_scores_are_the_draw() -> None:
    draw_BD = torch.rand(2, 5)
    assert torch.equal(STATISTICS["random"](activations(2, 3, 5), plain_block(5), draw_BD=draw_BD), draw_BD)


def test_griffin_is_the_sum_that_it_always_was_to_the_bit() -> None:
    z_BSD = activations(3, 7, 5)
    norms_BS1 = torch.linalg.vector_norm(z_BSD, dim=-1, keepdim=True)
    assert torch.equal(
        score("griffin", z_BSD), torch.where(norms_BS1 > 0, z_BSD / norms_BS1, 0.0).square().sum(1).sqrt()
    )


def test_glass_adds_the_ranks_of_two_texts() -> None:
    z_BSD = torch.tensor([[[3.0, 1.0, 2.0]]])  # ranks 3, 1, 2
    found_BD = STATISTICS["glass"](
        z_BSD, plain_block(3), self_generated=torch.tensor([[0.1, 0.7, 0.2]])
    )  # ranks 1, 3, 2
    assert torch.equal(found_BD, torch.tensor([[4.0, 4.0, 4.0]]))


def test_a_models_own_text_is_sampled_once_and_its_bos_token_does_not_count() -> None:
    model = fresh("llama")
    with torch.no_grad(), griffin.prune(model, statistic="glass") as pruner:
        model(prompt(7))
        first = pruner.scores
    assert all(torch.equal(*pair) for pair in zip(sample(Engine(model)), sample(Engine(model)), strict=True))
    ids_BS = sample(Engine(model))
    assert set(ids_BS[:, 0].tolist()) == {1}
    own = [torch.zeros(80, dtype=torch.float64) for _ in range(LAYERS)]
    for ids_S in ids_BS:
        for layer, z_SD in enumerate(reference.run(model, "llama", ids_S.unsqueeze(0))[1]):
            own[layer] += reference.score("griffin", z_SD[1:], [], torch.empty(0)) ** 2
    of_prompt = reference.scores(model, "llama", "griffin", prompt(7))
    for found_1D, own_D, prompt_D in zip(first, own, of_prompt, strict=True):
        expected_D = own_D.argsort().argsort() + prompt_D.argsort().argsort() + 2
        assert float((found_1D[0] - expected_D).abs().max()) <= 2  # neighbours may change places by rounding


def test_a_model_without_a_bos_token_has_no_text_of_its_own() -> None:
    model = fresh("llama")
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id"), griffin.prune(model, statistic="glass"):
        pass
    with griffin.prune(model):  # refused before anything was changed
        pass


def test_an_oracle_cannot_generate() -> None:
    with pytest.raises(ValueError, match="statistic='oracle'"):
        griffin.prune(tiny("llama"), statistic="oracle")


@torch.no_grad()
def test_the_oracle_scores_what_comes_after_the_prompt() -> None:
    model, ids = tiny("llama"), prompt(12)
    engine, oracle = Engine(model), STATISTICS["oracle"].activations
    (state,) = griffin.prefill(engine, ids[:, :7].tolist(), [])
    # The continuation is recorded behind a prompt of which nothing is.
    nothing = Recorded(torch.zeros(1, dtype=torch.int64))
    counted_BS = (torch.arange(12) >= 7).unsqueeze(0)
    with engine.recording([oracle], nothing, 1, 12, counted_BS) as recorder:
        engine.dense(ids, KVCache(1, 12))
    state = replace(state, continuation=recorder.recorded)
    experts = griffin.choose(engine, [state], Method("oracle"))
    _, z = reference.run(model, "llama", ids)
    for layer, neurons_K in enumerate(experts.neurons):
        scores_D = reference.score("oracle", z[layer][7:], [], reference.output_matrix(model, "llama", layer))
        assert neurons_K.tolist() == reference.best(scores_D, 0.5)


@pytest.mark.parametrize("statistic", FORMULAS)
@pytest.mark.parametrize("family", VARIED)
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
