"""Compensation, against the formula in float64, and in every mode, batch, layout and chunking."""

from __future__ import annotations

import pytest
import reference
import torch
from families import FAMILIES, LAYERS, ONE_PER_LAYOUT, fresh, tiny
from prompts import pad, prompt
from running import as_lists, difference, generate, new_tokens, step_logits
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from griffin.compensation import RIDGE
from griffin.sketch import ROWS, signs

NAMES = ["mean", "ridge"]


def expected_change(name: str, z_SD: Tensor, kept: list[int], output_HD: Tensor) -> tuple[Tensor, Tensor]:
    """What compensation changes, by the formulas and in float64: output weights of the kept [K, H], and bias [H]."""
    positions, width = z_SD.shape
    dropped = [neuron for neuron in range(width) if neuron not in set(kept)]
    weights_RH = output_HD[:, dropped].T
    nothing_KH, nothing_H = torch.zeros(len(kept), len(output_HD)).double(), torch.zeros(len(output_HD)).double()
    if name == "mean":
        return nothing_KH, z_SD[:, dropped].mean(dim=0) @ weights_RH
    rows = torch.zeros(min(positions, ROWS), width, dtype=torch.float64)
    for position in range(positions):
        length = float(z_SD[position].norm())
        sign = int(signs(torch.tensor(position)))
        rows[position % ROWS] += sign * z_SD[position] / length if length > 0 else 0
    kept_TK, wrote_TH = rows[:, kept], rows[:, dropped] @ weights_RH
    gram_KK = kept_TK.T @ kept_TK
    penalty = RIDGE * gram_KK.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    return torch.linalg.solve(gram_KK + penalty, kept_TK.T @ wrote_TH), nothing_H


@torch.no_grad()
def expected_logits(
    model: PreTrainedModel, family: str, name: str, ids: Tensor, token: Tensor, sparsity: float = 0.5
) -> Tensor:
    """[V]: the logits after one more token, z masked and the output projection's output changed by the formula."""
    _, z = reference.run(model, family, ids)
    kept = reference.experts(model, family, "griffin", ids, sparsity)
    handles = []
    for layer in range(LAYERS):
        output_HD = reference.output_matrix(model, family, layer)
        change_KH, bias_H = expected_change(name, z[layer], kept[layer], output_HD)

        def add(_: object, args: tuple[Tensor], out: Tensor, layer: int = layer, change: Tensor = change_KH, bias: Tensor = bias_H) -> Tensor:
            last = args[0].reshape(ids.shape[1] + 1, -1)[-1].double()
            flat = out.reshape(ids.shape[1] + 1, -1).clone()
            flat[-1] += (last[kept[layer]] @ change + bias).float()
            return flat.reshape(out.shape)

        handles.append(reference.output_projection(model, family, layer).register_forward_hook(add))
    try:
        longer = torch.cat([ids, token], dim=1)
        logits, _ = reference.run(model, family, longer, reference.Span(ids.shape[1], longer.shape[1], kept))
    finally:
        for handle in handles:
            handle.remove()
    return logits[-1]


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_after_the_prompt_follows_the_formula(family: str, name: str, mode: str) -> None:
    model, ids, token = tiny(family), prompt(11), prompt(1, 1)
    with griffin.prune(model, mode=mode, compensation=name):
        found = model(token, past_key_values=model(ids).past_key_values).logits[0, -1]
    assert difference(found, expected_logits(model, family, name, ids, token)) < 1e-5
