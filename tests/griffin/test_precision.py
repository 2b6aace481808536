"""Half precision, and torch's gradient and inference modes."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import reference
import torch
from families import fresh, tiny
from prompts import pad, prompt
from running import as_lists, difference, generate, new_tokens, step_logits

import griffin


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype: torch.dtype, mode: str) -> None:
    model, ids = fresh("llama").to(dtype), prompt(11)
    experts = reference.experts(model, "llama", "griffin", ids, 0.5)
    tokens, logits = reference.generate(model, "llama", ids, experts, 2)
    with griffin.prune(model, mode=mode) as pruner:
        found = generate(model, ids)
    assert as_lists(pruner.experts) == experts
    assert new_tokens(found, ids)[0][:2] == tokens
    assert difference(step_logits(found)[:2], logits) < 0.05


def test_a_padded_batch_in_half_precision() -> None:
    model, rows = fresh("llama").to(torch.bfloat16), [prompt(11, 0), prompt(4, 1)]
    with griffin.prune(model, mode="masked") as pruner:
        generate(model, *pad(rows, "left"))
    for row, ids in enumerate(rows):
        scores = reference.scores(model, "llama", "griffin", ids)
        for found_BD, expected_D in zip(pruner.scores, scores, strict=True):
            assert difference(found_BD[row], expected_D) < 0.05


CONTEXTS = {"gradients": torch.enable_grad, "no gradients": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
def test_every_gradient_mode(context: type[AbstractContextManager], mode: str) -> None:
    model, ids, tokens = tiny("llama"), prompt(7), prompt(4, 1)
    experts = reference.experts(model, "llama", "griffin", ids, 0.5)
    span = reference.Span(7, 11, experts)
    expected, _ = reference.run(model, "llama", torch.cat([ids, tokens], dim=1), span)
    with context(), griffin.prune(model, mode=mode) as pruner:
        found = model(tokens, past_key_values=model(ids).past_key_values).logits[0].detach()
        assert as_lists(pruner.experts) == experts
        assert difference(found, expected[7:]) < 1e-5


@pytest.mark.parametrize("first", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("second", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("mode", griffin.MODES)
def test_prompts_in_turn_in_other_gradient_modes(
    mode: str, second: type[AbstractContextManager], first: type[AbstractContextManager]
) -> None:
    model, ids, token = tiny("llama"), prompt(7), prompt(1, 1)
    with torch.no_grad(), griffin.prune(model, mode=mode):
        expected = model(token, past_key_values=model(ids).past_key_values).logits
    with griffin.prune(model, mode=mode):
        for context in (first, second):
            with context():
                found = model(token, past_key_values=model(ids).past_key_values).logits
                assert difference(found.detach(), expected) < 1e-5


@pytest.mark.parametrize("mode", griffin.MODES)
def test_gradients_flow_through_the_experts(mode: str) -> None:
    model, ids, token = fresh("llama"), prompt(7), prompt(1, 1)
    with griffin.prune(model, mode=mode):
        model(token, past_key_values=model(ids).past_key_values).logits.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    assert float(gradient[token[0, 0]].abs().max()) > 0
