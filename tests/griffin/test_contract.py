"""What holds for every architecture family: the contract of the library, against formulas written down on their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from engines import begun, prefilled, refuse_inexact, scored
from families import FAMILIES, IDS, LAYERS, WAYS, tiny, tokens
from running import ROUTED, as_lists, difference, generate, new_tokens, same, step_logits, text, unchanged
from transformers import DynamicCache

import griffin
from griffin import EXACT, RECIPE, Engine, Method, prefill, wanted

pytestmark = pytest.mark.parametrize("family", FAMILIES)

SPARSITIES: list[Any] = [0.5, 0.25, 0.9, 0.999, [0.0, 0.25, 0.75]]
RICH = Method("joint", sparsity=(0.0, 0.9, 0.3), compensation="ridge")


@torch.no_grad()
def test_a_prompt_runs_as_in_the_plain_model_to_the_bit(family: str) -> None:
    model, ids = tiny(family), tokens(13)
    state = prefilled(Engine(model), ids, RICH, keep_logits=13)
    plain = DynamicCache()  # without sliding windows, as ours
    assert torch.equal(state.logits_TV, model(torch.tensor([ids]), past_key_values=plain).logits[0])
    assert state.cache is not None
    for ours, theirs in zip(state.cache.layers, plain.layers, strict=True):
        assert same((ours.keys[:1, :, :13], ours.values[:1, :, :13]), (theirs.keys, theirs.values))


def test_prompts_that_run_together_are_what_they_are_alone(family: str) -> None:
    engine, texts = Engine(tiny(family)), [tokens(length, length) for length in (12, 5, 1, 17)]
    for ids, found in zip(texts, prefill(engine, texts, wanted([RICH])), strict=True):
        alone, rows = prefilled(engine, ids, RICH), []
        for state in (found, alone):
            (row,) = griffin.begin(engine, [state], RICH)
            rows.append(torch.cat([state.logits_TV, scored(engine, row, tokens(4))]))
        assert difference(*rows) < 2e-5


def test_prompts_are_dense_and_what_follows_runs_on_their_experts(family: str) -> None:
    model = tiny(family)
    dense = generate(model, IDS)
    sparsity = SPARSITIES[FAMILIES.index(family) % len(SPARSITIES)]
    shares = sparsity if isinstance(sparsity, list) else [sparsity] * LAYERS
    scores = reference.scores(model, family, "griffin", IDS)
    experts = [reference.best(*pair) for pair in zip(scores, shares, strict=True)]
    expected, logits = reference.generate(model, family, IDS, experts, 6)
    for mode in griffin.MODES:
        with griffin.prune(model, sparsity, mode=mode) as pruner:
            found = generate(model, IDS)
        assert as_lists(pruner.experts) == experts
        assert new_tokens(found, IDS) == [expected]
        assert difference(step_logits(found), logits) < 1e-5
        assert torch.equal(found.logits[0], dense.logits[0])
        assert difference(found.logits[1], dense.logits[1]) > 1e-3, "its input is the dense one's still"


def test_sparsity_zero_is_the_dense_model_to_the_bit(family: str, mode: str) -> None:
    dense = generate(tiny(family), IDS, max_new_tokens=10)
    with griffin.prune(tiny(family), replace(RECIPE, sparsity=0.0, budget="uniform"), mode=mode):
        pruned = generate(tiny(family), IDS, max_new_tokens=10)
    assert torch.equal(pruned.sequences, dense.sequences)
    assert same(pruned.logits, dense.logits)


@torch.no_grad()
def test_a_refresh_is_dense_and_compact_is_masked(family: str, early: None) -> None:
    """Its own logits are dense, and so is all that comes before it; what comes between is not."""
    model, following, found = tiny(family), tokens(7, 1), {}
    dense = model(torch.tensor([[*tokens(11), *following]])).logits[0, 11:]
    for mode in griffin.MODES:
        engine = Engine(model, mode=mode)
        found[mode] = scored(engine, begun(engine, tokens(11), replace(RICH, refresh="compensation")), following)
        for step in range(7):
            assert (difference(found[mode][step], dense[step]) < 2e-5) == (step in (2, 4)), step
    assert difference(found["compact"], found["masked"]) < 2e-5


def test_verified_texts_are_the_dense_models(family: str, early: None) -> None:
    with griffin.prune(tiny(family), EXACT, draft_tokens=4) as pruner:
        found = text(tiny(family), IDS, max_new_tokens=14)[0, 11:].tolist()
    assert len(found) == 14
    assert pruner.drafts[0].drafted > 0
    refuse_inexact(tiny(family), tokens(11), found)


def test_the_model_is_never_touched(family: str, way: dict[str, object]) -> None:
    """Neither when the context is left, nor within it: there only its calls are routed."""
    model = tiny(family)
    with unchanged(model):
        before = [vars(module).copy() for module in model.modules()]
        with griffin.prune(model, "griffin" if way == WAYS["compact"] else RECIPE, **way):
            text(model, IDS, max_new_tokens=10)
            for module, then in zip(model.modules(), before, strict=True):
                now = {name: value for name, value in vars(module).items() if name not in ROUTED}
                assert now.keys() == then.keys()
                assert all(now[name] is then[name] for name in then)
