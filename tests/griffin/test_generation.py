"""What pruned generation computes, in every architecture family: dense prompts, and experts from then on."""

from __future__ import annotations

import pytest
import reference
import torch
from families import FAMILIES, tiny
from prompts import prompt
from running import TOKENS, as_lists, difference, generate, new_tokens, step_logits

import griffin


@pytest.mark.parametrize(("family", "mode"), [*((family, "compact") for family in FAMILIES), ("llama", "masked")])
def test_sparsity_zero_is_bit_identical_to_dense(family: str, mode: str) -> None:
    model, ids = tiny(family), prompt(11)
    dense = generate(model, ids, max_new_tokens=3)
    with griffin.prune(model, sparsity=0.0, compensation="ridge", mode=mode):
        pruned = generate(model, ids, max_new_tokens=3)
    assert torch.equal(pruned.sequences, dense.sequences)
    assert all(torch.equal(*steps) for steps in zip(pruned.logits, dense.logits, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_follows_the_reference(family: str) -> None:
    model, ids = tiny(family), prompt(11)
    experts = reference.experts(model, family, "griffin", ids, sparsity=0.5)
    tokens, logits = reference.generate(model, family, ids, experts, TOKENS)
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode) as pruner:
            found = generate(model, ids)
        assert as_lists(pruner.experts) == experts
        assert new_tokens(found, ids) == [tokens]
        assert difference(step_logits(found), logits) < 1e-5


@pytest.mark.parametrize("mode", griffin.MODES)
def test_only_the_first_generated_token_is_dense(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    dense = generate(model, ids)
    with griffin.prune(model, mode=mode):
        pruned = generate(model, ids)
    assert torch.equal(pruned.logits[0], dense.logits[0])
    # The second step has the same input as the dense one, so a difference is the work of the experts.
    assert difference(pruned.logits[1], dense.logits[1]) > 1e-3


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("sparsity", [0.25, 0.9, 0.999])
def test_other_sparsities_follow_the_reference(sparsity: float, mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    scores = reference.scores(model, "llama", "griffin", ids)
    kept = max(1, int(80 * (1 - sparsity)))
    experts = [sorted(scores_D.topk(kept).indices.tolist()) for scores_D in scores]
    tokens, logits = reference.generate(model, "llama", ids, experts, TOKENS)
    with griffin.prune(model, sparsity=sparsity, mode=mode) as pruner:
        found = generate(model, ids)
    assert as_lists(pruner.experts) == experts
    assert new_tokens(found, ids) == [tokens]
    assert difference(step_logits(found), logits) < 1e-5


@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_prompt_of_one_token(mode: str) -> None:
    model, ids = tiny("llama"), prompt(1)
    experts = reference.experts(model, "llama", "griffin", ids, sparsity=0.5)
    tokens, _ = reference.generate(model, "llama", ids, experts, TOKENS)
    with griffin.prune(model, mode=mode) as pruner:
        assert new_tokens(generate(model, ids), ids) == [tokens]
    assert as_lists(pruner.experts) == experts


@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_prompt_of_embeddings(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model, mode=mode) as pruner:
        expected = new_tokens(generate(model, ids), ids)
        experts = as_lists(pruner.experts)
        embeddings = model.get_input_embeddings()(ids)
        found = model.generate(
            inputs_embeds=embeddings, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False
        )
    assert found.tolist() == expected  # without ids there is no prompt to repeat
    assert as_lists(pruner.experts) == experts
