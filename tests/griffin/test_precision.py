"""Half precision, and torch's gradient and inference modes."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import reference
import torch
from families import fresh, tiny
from prompts import pad, prompt
from running import as_lists, difference, generate, new_tokens, step_logits
from torch import Tensor
from transformers import PreTrainedModel

import griffin
from griffin import Engine, Method


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


ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2)]
METHODS = {
    "ridge": Method("magnitude", compensation="ridge"),
    "mean": Method("magnitude", compensation="mean"),
    "refreshed experts": Method("magnitude", compensation="ridge", refresh="experts"),
    "refreshed compensation": Method("magnitude", compensation="ridge", refresh="compensation"),
}


def scored(model: PreTrainedModel, method: Method, mode: str, prompts: list[Tensor]) -> list[Tensor]:
    """Per row, its logits [C, V] after each token of the same continuation: all rows run in one batch."""
    engine, following = Engine(model, mode=mode), prompt(10, 4)[0].tolist()
    rows = []
    for ids in prompts:
        rows += griffin.begin(engine, griffin.prefill(engine, ids.tolist(), griffin.wanted([method])), method)
    logits = [logits_CV for _, logits_CV in griffin.score(engine, [(row, following) for row in rows], len(rows))]
    engine.unload()
    return logits


@pytest.mark.parametrize(("mode", "prompts"), [("compact", ROWS[:1]), ("masked", ROWS)], ids=["compact", "masked rows"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_corrections_and_refresh_in_bfloat16_are_close_to_float32(
    family: str, method: Method, mode: str, prompts: list[Tensor]
) -> None:
    # The same weights in both, and so the same experts: what differs is rounding on the way.
    model = fresh(family).to(torch.bfloat16)
    found = scored(model, method, mode, prompts)
    expected = scored(model.float(), method, mode, prompts)
    for found_CV, expected_CV in zip(found, expected, strict=True):
        assert found_CV.dtype == torch.bfloat16
        assert bool(found_CV.isfinite().all())
        assert float((found_CV.float() - expected_CV).norm() / expected_CV.norm()) < 0.05


@pytest.mark.parametrize("refresh", ["none", "compensation"])
def test_a_padded_batch_generates_in_bfloat16(refresh: str) -> None:
    model = fresh("llama").to(torch.bfloat16)
    ids_BS, mask_BS = pad(ROWS, "left")
    with griffin.prune(model, mode="masked", compensation="ridge", refresh=refresh):
        batch = generate(model, ids_BS, mask_BS, max_new_tokens=10)
    assert all(bool(step.isfinite().all()) for step in batch.logits)
    assert new_tokens(batch, ids_BS)[0] != new_tokens(batch, ids_BS)[1]


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
def test_prompts_in_turn_in_other_gradient_modes(
    second: type[AbstractContextManager], first: type[AbstractContextManager]
) -> None:
    model, ids, token = tiny("llama"), prompt(7), prompt(1, 1)
    with torch.no_grad(), griffin.prune(model):
        expected = model(token, past_key_values=model(ids).past_key_values).logits
    with griffin.prune(model):  # its buffers last from prompt to prompt
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
