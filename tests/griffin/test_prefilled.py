"""`generate` from a dense pass that has been: as if it had run the prompts itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, ONE_PER_LAYOUT, fresh, tiny
from prompts import pad, prompt
from running import TOKENS, difference, generate, new_tokens, step_logits
from transformers import PreTrainedModel

import griffin

DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.7},
}

# The cache of plain generation forgets what a sliding window has passed, so sums have fewer terms.
SLIDING = ("gemma2", "gemma3_text")


def shared_prompts(model: PreTrainedModel, prompts: list[torch.Tensor]) -> tuple[griffin.SharedPrompt, torch.Tensor]:
    """The dense pass over prompts [1, S_i], and its logits."""
    shared = griffin.SharedPrompt(model, ["griffin"], ["ridge"])
    return shared, shared.run_each([ids_1S[0] for ids_1S in prompts])


@pytest.mark.parametrize("options", DECODINGS.values(), ids=DECODINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_dense_it_is_plain_generation(family: str, options: dict[str, Any]) -> None:
    model, ids = tiny(family), prompt(11)
    torch.manual_seed(3)
    expected = generate(model, ids, **options)
    shared, logits = shared_prompts(model, [ids])
    torch.manual_seed(3)
    with griffin.prefilled(model, logits):
        found = generate(model, ids, past_key_values=shared.fork(TOKENS), **options)
    assert torch.equal(found.sequences, expected.sequences)
    if "num_beams" in options or family in SLIDING:  # plain generation runs the prompt once for every beam
        assert difference(step_logits(found), step_logits(expected)) < 1e-5
    else:
        assert all(torch.equal(*steps) for steps in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("options", DECODINGS.values(), ids=DECODINGS)
@pytest.mark.parametrize("compensation", ["none", "ridge"])
@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_pruned_it_is_what_the_pruner_generates(
    family: str, mode: str, compensation: str, options: dict[str, Any]
) -> None:
    model, ids = tiny(family), prompt(11)
    torch.manual_seed(3)
    with griffin.prune(model, mode=mode, compensation=compensation):
        expected = generate(model, ids, **options)
    shared, logits = shared_prompts(model, [ids])
    experts = shared.experts("griffin", "topk", 0.5)
    torch.manual_seed(3)
    with shared.pruned(experts, shared.corrections(compensation, experts), mode), griffin.prefilled(model, logits):
        found = generate(model, ids, past_key_values=shared.fork(TOKENS), **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert difference(step_logits(found), step_logits(expected)) < 1e-5


@pytest.mark.parametrize("options", [DECODINGS["greedy"], DECODINGS["beams"]], ids=["greedy", "beams"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_generates_what_its_rows_do(family: str, options: dict[str, Any]) -> None:
    model, prompts = tiny(family), [prompt(length, seed=length) for length in (4, 11, 9)]
    ids, mask = pad(prompts, "left")
    shared, logits = shared_prompts(model, prompts)
    with shared.pruned(shared.experts("griffin", "topk", 0.5), None, "masked"), griffin.prefilled(model, logits):
        found = generate(model, ids, mask, past_key_values=shared.fork(TOKENS), **options)
    for row, alone in enumerate(prompts):
        with griffin.prune(model, mode="masked"):
            assert new_tokens(found, ids)[row] == new_tokens(generate(model, alone, **options), alone)[0]


@pytest.mark.parametrize("options", DECODINGS.values(), ids=DECODINGS)
def test_no_token_of_the_prompt_runs_again(options: dict[str, Any]) -> None:
    model, ids = fresh("llama"), prompt(11)
    shared, logits = shared_prompts(model, [ids])
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with griffin.prefilled(model, logits):
        generate(model, ids, past_key_values=shared.fork(TOKENS), **options)
    assert lengths == [1] * (TOKENS - 1)


def test_the_model_generates_by_itself_afterwards() -> None:
    model, ids = fresh("llama"), prompt(11)
    expected = generate(model, ids).sequences
    _, logits = shared_prompts(model, [ids])
    with pytest.raises(ZeroDivisionError), griffin.prefilled(model, logits):
        raise ZeroDivisionError
    assert torch.equal(generate(model, ids).sequences, expected)
    assert "_prefill" not in vars(model)
