"""Compensation, against the formula in float64, and in every mode and batch."""

from __future__ import annotations

from functools import partial

import pytest
import reference
import torch
from engines import chosen, prefilled
from families import LAYERS, VARIED, tiny
from running import as_lists, difference, generate, prompt, step_logits, tokens
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from griffin import COMPENSATIONS, Engine, Method, ridge
from griffin.compensation import PrunedLayer

NAMES = ["mean", "ridge"]
each_name = pytest.mark.parametrize("name", NAMES)


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


def expected_logits(model: PreTrainedModel, family: str, name: str, ids: Tensor, kept: list[list[int]]) -> Tensor:
    """[V]: the logits after the last token, z masked and the output projection's output changed by the formula."""
    _, z = reference.run(model, family, ids[:, :-1])
    handles = []
    for layer in range(LAYERS):
        change = expected_change(name, z[layer], kept[layer], reference.output_matrix(model, family, layer))
        add = partial(_add_to_last_position, kept[layer], *change)
        handles.append(reference.output_projection(model, family, layer).register_forward_hook(add))
    try:
        logits, _ = reference.run(model, family, ids, reference.Span(ids.shape[1] - 1, ids.shape[1], kept))
    finally:
        for handle in handles:
            handle.remove()
    return logits[-1]


# 40 neurons kept of 80, more than the prompt has tokens; 8 kept, fewer than that; a prompt of one token; and one of
# which only the last tokens count.
CASES = [*((family, 11, 0.5) for family in VARIED), ("llama", 11, 0.9), ("gpt2", 11, 0.9), ("llama", 1, 0.5)]


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
@each_name
@pytest.mark.parametrize(("family", "length", "sparsity"), [*CASES, ("llama", 75, 0.5), ("llama", 75, 0.9)])
def test_a_token_after_the_prompt_follows_the_formula(
    family: str, length: int, sparsity: float, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge, "ROWS", 16)
    model, ids, token = tiny(family), prompt(length), prompt(1, 1)
    with griffin.prune(model, sparsity, mode=mode, compensation=name) as pruner:
        found = model(token, past_key_values=model(ids).past_key_values).logits[0, -1]
    expected = expected_logits(model, family, name, torch.cat([ids, token], dim=1), as_lists(pruner.experts))
    assert difference(found, expected) < 2e-5


@each_name
def test_prompts_together_or_in_chunks_are_corrected_as_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "ROWS", 4)
    engine, method = Engine(tiny("llama")), Method(compensation=name)
    prompts = [tokens(length, length) for length in (17, 7, 4, 1)]
    together = griffin.prefill(engine, prompts, griffin.wanted([method]))
    for ids, state in zip(prompts, together, strict=True):
        kept_SK = torch.randn(3, 40)
        alone = chosen(engine, prefilled(engine, ids, method), method).corrections
        for (one,), (other,) in zip(chosen(engine, state, method).corrections, alone, strict=True):
            torch.testing.assert_close(one.output(kept_SK), other.output(kept_SK), rtol=1e-4, atol=1e-5)
    with griffin.prune(engine.model, method):
        whole = step_logits(generate(engine.model, prompt(21)))
        for size in (20, 5, 1):
            assert difference(step_logits(generate(engine.model, prompt(21), prefill_chunk_size=size)), whole) < 2e-5


@pytest.mark.parametrize("mode", griffin.MODES)
@each_name
def test_a_shared_correction_is_that_of_all_tokens(name: str, mode: str) -> None:
    model, ids = tiny("llama"), prompt(9)
    with griffin.prune(model, mode=mode, compensation=name, shared_experts=True):
        batch, alone = generate(model, ids.repeat(2, 1)), generate(model, ids)
    assert difference(step_logits(batch, 0), step_logits(batch, 1)) < 1e-5
    # Every token twice scales what ridge solves on both sides, and leaves means as they are.
    assert difference(step_logits(batch), step_logits(alone)) < 2e-5


def test_a_prompt_without_activations_or_with_broken_ones_stays_uncorrected() -> None:
    blocks, compensation = griffin.find_feedforward_blocks(tiny("llama")), COMPENSATIONS["ridge"]
    assert compensation is not None
    good_1TX = torch.randn(1, 5, 112)
    broken = good_1TX.index_fill(2, torch.tensor(3), torch.inf)
    totals = [torch.zeros(1, 5, 112), broken, good_1TX]
    layers = [PrunedLayer(number, total, blocks[number], torch.arange(40)) for number, total in enumerate(totals)]
    found, _ = compensation.correct(iter(layers))
    changed = [bool(found[number].output(torch.eye(40)).any()) for number in range(3)]
    assert changed == [False, False, True], "and does not keep other layers from it"
