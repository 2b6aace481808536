"""Compensation, against the formula in float64, and in every mode, batch and chunking."""

from __future__ import annotations

from functools import partial

import pytest
import reference
import torch
from families import LAYERS, VARIED, tiny
from prompts import pad, prompt
from running import as_lists, difference, generate, new_tokens, step_logits
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from griffin import COMPENSATIONS, Engine, Method, ridge

NAMES = ["mean", "ridge"]


def expected_change(name: str, z_SD: Tensor, kept: list[int], output_HD: Tensor) -> tuple[Tensor, Tensor]:
    """What compensation changes, by the formulas and in float64: output weights of the kept [K, H], and bias [H]."""
    dropped = [neuron for neuron in range(z_SD.shape[1]) if neuron not in set(kept)]
    weights_RH = output_HD[:, dropped].T
    nothing_KH, nothing_H = torch.zeros(len(kept), len(output_HD)).double(), torch.zeros(len(output_HD)).double()
    if name == "mean":
        return nothing_KH, z_SD[:, dropped].mean(dim=0) @ weights_RH
    unit = [z_D / max(float(z_D.norm()), 1e-300) for z_D in z_SD]
    pairs = [torch.stack(unit[start : start + 2]).sum(dim=0) for start in range(0, len(unit), 2)]
    rows = torch.stack(pairs[-ridge.ROWS :])
    kept_TK, wrote_TH = rows[:, kept], rows[:, dropped] @ weights_RH
    gram_KK = kept_TK.T @ kept_TK
    penalty = ridge.RIDGE * gram_KK.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    return torch.linalg.solve(gram_KK + penalty, kept_TK.T @ wrote_TH), nothing_H


def _add_to_last_position(
    kept: list[int], change_KH: Tensor, bias_H: Tensor, _: object, args: tuple[Tensor], output: Tensor
) -> Tensor:
    changed = output.clone()
    last_D, last_H = (x.reshape(-1, x.shape[-1])[-1] for x in (args[0], changed))
    last_H += last_D[kept].double() @ change_KH + bias_H
    return changed


@torch.no_grad()
def expected_logits(
    model: PreTrainedModel, family: str, name: str, ids: Tensor, token: Tensor, kept: list[list[int]]
) -> Tensor:
    """[V]: the logits after one more token, z masked and the output projection's output changed by the formula."""
    _, z = reference.run(model, family, ids)
    handles = []
    for layer in range(LAYERS):
        output_HD = reference.output_matrix(model, family, layer)
        change_KH, bias_H = expected_change(name, z[layer], kept[layer], output_HD)
        add = partial(_add_to_last_position, kept[layer], change_KH, bias_H)
        handles.append(reference.output_projection(model, family, layer).register_forward_hook(add))
    try:
        longer = torch.cat([ids, token], dim=1)
        logits, _ = reference.run(model, family, longer, reference.Span(ids.shape[1], longer.shape[1], kept))
    finally:
        for handle in handles:
            handle.remove()
    return logits[-1]


# 40 neurons kept of 80, more than the prompt has tokens; 8 kept, fewer than that; and a prompt of one token.
CASES = [*((family, 11, 0.5) for family in VARIED), ("llama", 11, 0.9), ("gpt2", 11, 0.9), ("llama", 1, 0.5)]


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("family", "length", "sparsity"), CASES)
def test_a_token_after_the_prompt_follows_the_formula(
    family: str, length: int, sparsity: float, name: str, mode: str
) -> None:
    model, ids, token = tiny(family), prompt(length), prompt(1, 1)
    with griffin.prune(model, sparsity, mode=mode, compensation=name) as pruner:
        found = model(token, past_key_values=model(ids).past_key_values).logits[0, -1]
    assert difference(found, expected_logits(model, family, name, ids, token, as_lists(pruner.experts))) < 2e-5


@torch.no_grad()
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_only_the_last_tokens_of_a_long_prompt_count(sparsity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "ROWS", 16)
    model, ids, token = tiny("llama"), prompt(75), prompt(1, 1)
    with griffin.prune(model, sparsity, compensation="ridge") as pruner:
        found = model(token, past_key_values=model(ids).past_key_values).logits[0, -1]
    assert difference(found, expected_logits(model, "llama", "ridge", ids, token, as_lists(pruner.experts))) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_compensation_changes_what_is_generated(name: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model):
        plain = step_logits(generate(model, ids))
    with griffin.prune(model, compensation=name):
        compensated = step_logits(generate(model, ids))
    assert torch.equal(plain[0], compensated[0])  # the prompt runs dense
    assert difference(compensated[1], plain[1]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["llama", "opt"])  # its output projection has no bias of its own, or has one
def test_prompts_do_not_disturb_each_other(family: str, name: str) -> None:
    model = tiny(family)
    with griffin.prune(model, compensation=name):
        first = step_logits(generate(model, prompt(11)))
        generate(model, prompt(7, 1))
        assert torch.equal(step_logits(generate(model, prompt(11))), first)


@pytest.mark.parametrize("statistic", ["griffin", "magnitude"])  # its own experts for every row; one set for all
@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_left_padded_batch_are_corrected_as_they_are_alone(name: str, statistic: str) -> None:
    model, rows = tiny("llama"), [prompt(7, 0), prompt(4, 1), prompt(1, 3)]
    ids_BS, mask_BS = pad(rows, "left")
    with griffin.prune(model, statistic=statistic, mode="masked", compensation=name):
        batch = generate(model, ids_BS, mask_BS)
        for row, ids in enumerate(rows):
            alone = generate(model, ids)
            assert new_tokens(batch, ids_BS)[row] == new_tokens(alone, ids)[0]
            assert difference(step_logits(batch, row), step_logits(alone)) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_prompts_that_run_together_are_corrected_as_they_are_alone(name: str) -> None:
    engine, method = Engine(tiny("llama")), Method(compensation=name)
    prompts = [prompt(length, length)[0].tolist() for length in (7, 4, 1)]
    together = griffin.prefill(engine, prompts, griffin.wanted([method]))
    for ids, state in zip(prompts, together, strict=True):
        (alone,) = griffin.prefill(engine, [ids], griffin.wanted([method]))
        found, expected = (griffin.choose(engine, [one], method).corrections for one in (state, alone))
        for (one,), (other,) in zip(found, expected, strict=True):
            activations_SK = torch.randn(3, 40)
            torch.testing.assert_close(one.output(activations_SK), other.output(activations_SK), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_chunks_is_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "ROWS", 8)
    model, ids = tiny("llama"), prompt(21)
    with griffin.prune(model, compensation=name):
        whole = generate(model, ids)
        for size in (20, 5, 1):
            chunked = generate(model, ids, prefill_chunk_size=size)
            assert difference(step_logits(chunked), step_logits(whole)) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_in_chunks(name: str) -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad([prompt(11, 0), prompt(3, 1)], "left")  # the second row's first chunk is padding only
    with griffin.prune(model, mode="masked", compensation=name):
        whole = generate(model, ids_BS, mask_BS)
        chunked = generate(model, ids_BS, mask_BS, prefill_chunk_size=5)
    for row in range(2):
        assert difference(step_logits(chunked, row), step_logits(whole, row)) < 2e-5


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("name", NAMES)
def test_a_shared_correction_is_that_of_all_tokens(name: str, mode: str) -> None:
    model, ids = tiny("llama"), prompt(9)
    twice = ids.repeat(2, 1)
    with griffin.prune(model, mode=mode, compensation=name, shared_experts=True):
        batch = generate(model, twice)
        assert difference(step_logits(batch, 0), step_logits(batch, 1)) < 1e-5
        alone = generate(model, ids)
        # Every token twice scales what ridge solves on both sides, and leaves means as they are.
        assert difference(step_logits(batch), step_logits(alone)) < 2e-5


@pytest.mark.parametrize("name", NAMES)
def test_beams_of_one_prompt_count_it_once(name: str) -> None:
    model, ids, found = tiny("llama"), prompt(9), []
    for mode in griffin.MODES:
        with griffin.prune(model, compensation=name, mode=mode):
            found.append(generate(model, ids, num_return_sequences=2, num_beams=2).sequences)
    assert torch.equal(*found)


def test_a_prompt_without_activations_stays_uncorrected() -> None:
    block = griffin.find_feedforward_blocks(tiny("llama"))[0]
    compensation = COMPENSATIONS["ridge"]
    assert compensation is not None
    broken = torch.randn(1, 5, 80).index_fill(2, torch.tensor(3), torch.inf)
    for total in (torch.zeros(1, 5, 80), broken):
        assert not compensation.correct(total, block, torch.arange(40)).change().any()
