"""What is recorded of a prompt and learned from it, against the formulas: statistics, compensation and its refresh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from engines import begun, chosen, generated, prefilled, refuse_parting, ridge_solution, scored
from families import ONE_PER_LAYOUT, REFRESHED, VARIED, WIDTHS, fresh, prompt, tiny, tokens
from running import TOLERANCE, as_lists, difference, generate, step_logits
from torch import Tensor
from torch.nn import functional

import griffin
from griffin import STATISTICS, TOKEN_STATISTICS, Engine, Method, find_feedforward_blocks, refresh, ridge
from griffin.statistics import gate_activations

pytestmark = pytest.mark.usefixtures("early", "no_gradients")
FORMULAS = [name for name in STATISTICS if name not in ("oracle", "random")]


@pytest.mark.parametrize("statistic", FORMULAS)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((name, torch.float32) for name in ("phi3", "opt", "gpt2")), ("llama", torch.float16), ("llama", torch.bfloat16)],
)
def test_scores_follow_the_formulas_in_float32(family: str, dtype: torch.dtype, statistic: str) -> None:
    model, ids = fresh(family), prompt(7)
    for block in find_feedforward_blocks(model) if family == "llama" else ():
        block.output.weight.data *= 1e-2
        block.inputs[1].weight.data *= 1e3  # so that squares of activations overflow in float16
    model.get_input_embeddings().weight.data[ids[0, 0]] = 0.0  # without biases its activations are zero
    model = model.to(dtype)
    with griffin.prune(model, statistic=statistic) as pruner:
        model(ids)
    _, z = reference.run(model, family, ids)
    assert family != "llama" or max(float(z_SD.abs().max()) for z_SD in z) > 256
    assert family != "phi3" or not z[0][0].any()
    for found_1D, expected_D in zip(pruner.scores, reference.score_layers(model, family, statistic, z), strict=True):
        assert found_1D.dtype == torch.float32
        torch.testing.assert_close(found_1D[0].double(), expected_D, rtol=1e-5, atol=1e-6 * float(expected_D.max()))


def test_the_oracle_scores_what_comes_after_the_prompt() -> None:
    model, engine, oracle = tiny("llama"), Engine(tiny("llama")), Method("oracle", compensation="ridge")
    statistic = STATISTICS["oracle"].activations
    assert statistic not in griffin.wanted([oracle]), "the prompt is not what it reads"
    state = prefilled(engine, tokens(7), oracle)
    (later,) = griffin.prefill(engine, [tokens(5, 1)], [statistic])
    experts = chosen(engine, replace(state, continuation=later.recorded), oracle)
    expected = reference.scores(model, "llama", "oracle", prompt(5, 1))
    assert as_lists(experts.neurons, None) == [reference.best(scores_D, 0.5) for scores_D in expected]


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_what_is_seen_gives_the_scores_of_pruning_and_changes_nothing(family: str) -> None:
    model, ids = tiny(family), prompt(9)
    view, seen = griffin.record_activations(model, lambda layer, z_SD: (layer, z_SD))
    assert torch.equal(view(ids).logits, model(ids).logits)
    view(ids[:, :2])
    with griffin.prune(model) as pruner:
        model(ids)
    for layer, ((whole, part), scores_BD) in enumerate(zip(seen, pruner.scores, strict=True)):
        assert (whole[0], part[0]) == (layer, layer)
        assert (whole[1].shape, part[1].shape) == ((9, WIDTHS[family]), (2, WIDTHS[family]))
        torch.testing.assert_close(griffin.relative_activations(whole[1]).square().sum(dim=0).sqrt(), scores_BD[0])
    found = griffin.relative_activations(torch.tensor([[3.0, -4.0], [0.0, 0.0]]))
    assert torch.equal(found, torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


SPARSITY = 0.6
GATED = ("llama", "phi3")
LIMIT = 8


def by_token(statistic: str, family: str) -> reference.ByToken:
    """Each token's own neurons, by the formulas."""

    def keeps(layer: int, z_SD: Tensor, first_SD: Tensor) -> Tensor:
        scores_SD = z_SD.abs()
        if statistic == "cats" and family in GATED:
            scores_SD = functional.silu(first_SD).abs()
        elif statistic == "wina":
            scores_SD = scores_SD * reference.output_matrix(tiny(family), family, layer).norm(dim=0)
        kept = griffin.kept_neurons(z_SD.shape[1], SPARSITY)
        return scores_SD >= scores_SD.topk(kept, dim=-1).values[:, -1:]

    return keeps


@pytest.mark.parametrize("family", [*GATED, "gpt2"])
@pytest.mark.parametrize("statistic", TOKEN_STATISTICS)
def test_tokens_choose_as_the_reference_does_beside_rows_of_other_methods(family: str, statistic: str) -> None:
    model, method = tiny(family), Method(statistic, sparsity=SPARSITY)
    engine, methods = Engine(model), [method, method, Method(), Method(sparsity=0.0)]
    rows = [begun(engine, tokens(9, seed), one, seed) for seed, one in enumerate(methods)]
    found = generated(engine, rows, LIMIT, most=4)
    with griffin.prune(model, method, mode="masked") as pruner:
        output = generate(model, prompt(9), max_new_tokens=LIMIT)
        for what in ("scores", "experts"):
            with pytest.raises(RuntimeError):
                getattr(pruner, what)
    found["prune"] = output.sequences[0, 9:].tolist(), step_logits(output)
    for label, seed in ((0, 0), (1, 1), ("prune", 0)):
        expected = reference.generate(model, family, prompt(9, seed), by_token(statistic, family), LIMIT)
        refuse_parting(found[label], expected)


def test_the_gate_is_found_from_what_it_was_multiplied_with() -> None:
    gate_SD, up_SD = torch.randn(3, 5), torch.randn(3, 5)
    up_SD[1, 2] = 0.0
    expected = gate_SD.abs().index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(0.0))
    assert difference(gate_activations(gate_SD * up_SD, up_SD), expected) < TOLERANCE


@pytest.mark.parametrize("sparsity", [0.5, 0.9, (0.5, 0.0, 0.9)])  # fewer rows than kept neurons, and more
# Of the longest prompt only the last tokens count.
@pytest.mark.parametrize(
    ("family", "length"), [("llama", 1), *((name, 21) for name in VARIED), ("llama", 75), ("gpt2", 75)]
)
def test_the_ridge_solution_is_learned(
    family: str, length: int, sparsity: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a prompt, and of what follows it, up to the refresh with the ninth token."""
    monkeypatch.setattr("griffin.decoding.PIECE", 2 if length == 21 else 128)  # of what is read at a time
    monkeypatch.setattr(ridge, "ROWS", 16)
    ids, following = tokens(length), tokens(12, 1)
    for mode in griffin.MODES:
        engine = Engine(tiny(family), mode=mode)
        row = begun(engine, ids, Method(sparsity=sparsity, **REFRESHED))
        for text in (ids, [*ids, *following[:9]]):
            layers = zip(row.experts.neurons, row.experts.corrections, strict=True)
            for layer, (kept_K, corrections) in enumerate(layers):
                assert bool(corrections) == (len(kept_K) < WIDTHS[family])
                if corrections:
                    found = sum(one.output(torch.eye(len(kept_K))) for one in corrections)
                    assert difference(found, ridge_solution(family, text, length, kept_K, layer)) < 1e-5
            if text is ids:
                scored(engine, row, following)


def test_a_prompt_without_activations_or_with_broken_ones_stays_uncorrected() -> None:
    blocks, good_TX = griffin.find_feedforward_blocks(tiny("llama")), torch.randn(5, 112)
    rows = [torch.zeros(5, 112), good_TX.index_fill(1, torch.tensor(3), torch.inf), good_TX]
    layers = ((number, torch.arange(40), rows_TX[:, :40], rows_TX[:, 80:]) for number, rows_TX in enumerate(rows))
    found, _ = ridge.fit_prompt(
        layers, lambda layer, kept_NK: kept_NK @ blocks[layer].output_columns(torch.arange(40)).T
    )
    changed = [bool(found[number].output(torch.eye(40)).any()) for number in range(3)]
    assert changed == [False, False, True], "and does not keep other layers from it"


def test_refreshes_are_rare_and_a_given_text_is_read_in_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = [refresh.next_refresh(generated) for generated in (0, 7, 8, 9, 16, 31, 32, 127)]
    assert found == [8, 8, 16, 16, 32, 32, 64, 128]
    assert refresh.call_ends(40) == [0, 8, 9, 16, 17, 32, 33, 40]


def test_a_fit_has_bounded_memory_and_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "LEARNED", 4)
    fit = ridge.RidgeFit([0], [torch.arange(8)])

    def learn(fit: ridge.RidgeFit, rows: int) -> tuple[Tensor, ridge.RidgeFit]:
        generator = torch.Generator().manual_seed(rows)
        more = (torch.randn(1, rows, width, generator=generator) for width in (8, 5))
        corrections, learned = fit.learn(*more, lambda layer, kept_NK: kept_NK.new_zeros(len(kept_NK), 5))
        return dict(corrections)[0].output(torch.eye(8)), learned

    for _ in range(20):
        known = fit
        correction, fit = learn(fit, 3)
        assert bool(correction.isfinite().all())
        expected, _ = learn(fit, 2)
        learn(known, 3)  # something else, from where this one came
        assert torch.equal(learn(fit, 2)[0], expected)
    tensors = [one for one in [*vars(fit).values(), fit._memory.rows_LMK] if isinstance(one, Tensor) and one.dim() == 3]
    assert sum(one.numel() for one in tensors) < 8 * (2 * 4 + 3 + 8)
