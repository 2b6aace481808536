"""Refresh: what was generated is read again by the dense model, and experts or compensation follow it."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from engines import begun, generated, prefilled, refuse_parting, ridge_solution, scored
from families import LAYERS, tiny
from running import as_lists, difference, generate, new_tokens, pad, prompt, same, step_logits, tokens
from torch import Tensor

import griffin
from griffin import Engine, Experts, Method, Row, begin, refresh, ridge

TOKENS = 12
KINDS = ["experts", "compensation"]
pytestmark = pytest.mark.usefixtures("early")
each_kind = pytest.mark.parametrize("kind", KINDS)


def method(kind: str, **options: Any) -> Method:
    return Method(**({"compensation": "ridge", "refresh": kind} | options))


def experts_of(row: Row) -> Experts:
    assert row.experts is not None
    return row.experts


def test_refreshes_are_rare_and_a_given_text_is_read_in_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = [refresh.next_refresh(generated) for generated in (0, 7, 8, 9, 16, 31, 32, 127)]
    assert found == [8, 8, 16, 16, 32, 32, 64, 128]
    assert refresh.call_ends(8) == [0, 8]
    assert refresh.call_ends(9) == [0, 8, 9]
    assert refresh.call_ends(40) == [0, 8, 9, 16, 17, 32, 33, 40]


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("statistic", ["griffin", "max", "recency", "magnitude", "random"])
def test_new_experts_are_those_of_the_longer_prompt(statistic: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With generated tokens that count as others do, refreshing is generating from prompt and text."""
    monkeypatch.setattr("griffin.batch.WEIGHT", 1.0)
    engine, ids, following = Engine(tiny("llama"), mode=mode), tokens(11), tokens(6, 1)
    row = begun(engine, ids, method("experts", statistic=statistic))
    found = scored(engine, row, following)[5]
    longer = prefilled(engine, [*ids, *following[:5]], method("none", statistic=statistic))
    if statistic != "random":  # whose draw is the prompt's still
        (expected,) = begin(engine, [longer], method("none", statistic=statistic))
        assert same(experts_of(row).neurons, experts_of(expected).neurons)
        assert difference(found, scored(engine, expected, following[5:])[0]) < 2e-5
    else:
        assert same(experts_of(row).neurons, experts_of(begun(engine, ids, row.method)).neurons)


def test_a_generated_token_counts_as_several_and_scores_can_be_read() -> None:
    model, ids = tiny("llama"), prompt(5)
    with griffin.prune(model, refresh="experts") as pruner:
        sequences = generate(model, ids, max_new_tokens=4).sequences
    _, z = reference.run(model, "llama", sequences[:, :8])  # the last token has not run
    for layer in range(LAYERS):
        counts_S1 = torch.tensor([[1.0]] * 5 + [[refresh.WEIGHT]] * 3).double()
        expected_D = (counts_S1 * (z[layer] / z[layer].norm(dim=-1, keepdim=True)).square()).sum(dim=0).sqrt()
        assert difference(pruner.scores[layer][0], expected_D) < 1e-6
        assert pruner.experts[layer][0].tolist() == reference.best(expected_D, 0.5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, (0.5, 0.0, 0.9)])  # fewer rows than kept neurons, and more
@pytest.mark.parametrize("piece", [128, 2])  # of what is read at a time
def test_what_is_learned_is_the_ridge_solution(
    piece: int, sparsity: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("griffin.batch.PIECE", piece)
    ids, following = tokens(21), tokens(12, 1)
    for mode in griffin.MODES:
        engine = Engine(tiny(family), mode=mode)
        row = begun(engine, ids, method("compensation", sparsity=sparsity))
        scored(engine, row, following)
        for layer, kept_K in enumerate(experts_of(row).neurons):
            if len(kept_K) == 80:
                assert not experts_of(row).corrections[layer]
                continue
            found = sum(one.output(torch.eye(len(kept_K))) for one in experts_of(row).corrections[layer])
            expected_KH = ridge_solution(family, [*ids, *following[:9]], 21, kept_K, layer)
            assert difference(found, expected_KH) < 1e-5


def test_the_rows_kept_bound_what_joins_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "ROWS", 4)
    engine = Engine(tiny("llama"))
    row = begun(engine, tokens(11), method("experts"))
    scored(engine, row, tokens(TOKENS, 1))
    totals = [total for layers in row.state.recorded.totals.values() for total in layers]
    assert {total.shape[1] for total in totals if total.dim() == 3} == {4}


def test_a_fit_has_bounded_memory_and_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "LEARNED", 4)
    fit = ridge.RidgeFit([0], [torch.arange(8)])
    for _ in range(20):
        known = fit
        corrections, fit = fit.learn(torch.randn(1, 3, 8), torch.randn(1, 3, 5))
        assert bool(corrections[0].output(torch.eye(8)).isfinite().all())
        more = torch.randn(1, 2, 8), torch.randn(1, 2, 5)
        expected, _ = fit.learn(*more)
        known.learn(torch.randn(1, 3, 8), torch.randn(1, 3, 5))  # something else, from where this one came
        found, _ = fit.learn(*more)
        assert torch.equal(found[0].output(torch.eye(8)), expected[0].output(torch.eye(8)))
    memory = sum(one.numel() for one in vars(fit).values() if isinstance(one, Tensor) and one.dim() == 3)
    assert memory < 8 * (2 * 4 + 3 + 8)


def test_rows_that_share_experts_learn_once_when_the_first_of_them_has_ended() -> None:
    engine, one = Engine(tiny("llama")), method("compensation")
    states = griffin.prefill(engine, [tokens(7, seed) for seed in range(3)], griffin.wanted([one]))
    rows = begin(engine, states, one, labels=range(3))
    texts = generated(engine, rows, 4, most=3, ended=lambda row: row.label == 0)
    assert [len(texts[label][0]) for label in range(3)] == [1, 4, 4]
    # The one refresh so far has added a correction of each of the two rows to the prompt's.
    assert {len(corrections) for row in rows[1:] for corrections in experts_of(row).corrections} == {3}


@pytest.mark.parametrize("mode", griffin.MODES)
def test_experts_are_put_to_work_again_without_what_was_learned_since(mode: str) -> None:
    """Those of a prompt, and those that have learned: one after the other, and in two rows beside each other."""
    engine, one = Engine(tiny("llama"), mode=mode), method("compensation", sparsity=(0.5, 0.0, 0.5))
    before = begun(engine, tokens(11), one)
    experts = [experts_of(before)]
    scored(engine, before, tokens(3, 1))
    experts.append(experts_of(before))
    for given in experts:

        def row(label: int, given: Experts = given) -> Row:
            (made,) = begin(engine, [prefilled(engine, tokens(9, label), one)], one, labels=[label], experts=given)
            return made

        alone = [generated(engine, [row(label)], TOKENS)[label] for label in (0, 1, 0, 1)]
        together = generated(engine, [row(0), row(1)], TOKENS, most=2)
        for label in range(2):
            refuse_parting(alone[label], alone[label + 2])
            refuse_parting(together[label], alone[label])


@pytest.mark.parametrize("mode", griffin.MODES)
@each_kind
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generate_is_the_engines_decoding_and_scoring(family: str, kind: str, mode: str) -> None:
    model, ids, engine = tiny(family), prompt(11), Engine(tiny(family), mode=mode)
    with griffin.prune(model, method(kind), mode=mode) as pruner:
        output = generate(model, ids, max_new_tokens=TOKENS, output_scores=True)
        assert same(output.scores, output.logits)
    row = begun(engine, tokens(11), method(kind))
    ((text, _),) = generated(engine, [row], TOKENS).values()
    assert new_tokens(output, ids) == [text]
    assert as_lists(pruner.experts) == as_lists(experts_of(row).neurons, None)
    found = scored(engine, begun(engine, tokens(11), method(kind)), text[:-1])
    assert difference(step_logits(output)[1:], found) < 2e-5


@each_kind
@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "gemma2"])  # one for each way to tell positions
def test_a_left_padded_batch_equals_its_rows_and_may_share_experts(family: str, kind: str) -> None:
    model, prompts, found = tiny(family), [prompt(length, length) for length in (11, 4, 7)], []
    ids_BS, mask_BS = pad(prompts)
    with griffin.prune(model, method(kind), mode="masked") as pruner:
        batch, experts = generate(model, ids_BS, mask_BS), pruner.experts
        for row, ids in enumerate(prompts):
            alone = generate(model, ids)
            assert new_tokens(batch, ids_BS)[row] == new_tokens(alone, ids)[0]
            assert difference(step_logits(batch, row), step_logits(alone)) < 5e-5
            assert as_lists(experts, row) == as_lists(pruner.experts)
    for mode in griffin.MODES:
        with griffin.prune(model, method(kind), mode=mode, shared_experts=True) as pruner:
            found.append(generate(model, ids_BS, mask_BS, max_new_tokens=TOKENS))
        assert {len(experts) for experts in pruner.experts} == {1}
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert all(difference(*steps) < 5e-5 for steps in zip(found[0].logits, found[1].logits, strict=True))
    with griffin.prune(model, method(kind)), pytest.raises(ValueError, match="batch has 3 prompts"):
        generate(model, ids_BS, mask_BS)
