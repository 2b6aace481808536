"""The draft of verified decoding: what it learns, its vocabulary, and how many tokens it drafts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import reference
import torch
from engines import LEARNING, LIMIT, PERFECT, begun, chosen, decoded, generated, prefilled, ridge_solution, verified
from families import LAYERS, VOCABULARY, build, tiny, tokens
from running import difference, same
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

import griffin
from griffin import DraftStatistics, Engine, Method, Row, draft, draft_vocabulary
from griffin.draft import DraftLength
from griffin.draft_vocabulary import find_likely
from griffin.kv_cache import KVCache

pytestmark = pytest.mark.usefixtures("early", "no_gradients")
RIDGE = ("ridge", "compensation")


def folded(engine: Engine, layer: int, count: int) -> Tensor:
    """[K, H]: what each kept neuron of the draft writes."""
    eye_KK = torch.eye(count)
    return engine.compact().written(layer, eye_KK) - engine.compact().written(layer, torch.zeros_like(eye_KK))


@pytest.mark.parametrize("draft_tokens", [1, 4, 16])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])  # fewer rows than kept neurons, and more
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("every", [1, LIMIT - 1])  # at every check, and all at once
def test_it_learns_the_ridge_solution(
    every: int, family: str, sparsity: float, draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "LEARN_EVERY", every)
    engine, ids = Engine(tiny(family)), tokens(21)
    row = begun(engine, ids, verified(RIDGE, sparsity=sparsity, draft_tokens=draft_tokens))
    ran = [*ids, *decoded(engine, row)[:-1]]
    for layer, kept_K in enumerate(row.experts.neurons):
        weights_HK = reference.output_matrix(tiny(family), family, layer)[:, kept_K]
        expected_KH = ridge_solution(family, ran, 21, kept_K, layer)
        assert difference(folded(engine, layer, len(kept_K)) - weights_HK.T, expected_KH) < 1e-5


@pytest.mark.parametrize("learning", LEARNING, ids=" ".join)
def test_only_what_is_to_be_learned_is_and_experts_are_put_to_work_again_without_it(learning: tuple[str, str]) -> None:
    engine, ids, method = Engine(tiny("gpt2"), mode="compact"), tokens(11), verified(learning, draft_tokens=4)
    state, plain = prefilled(engine, ids, method), Method(compensation=learning[0])
    experts, logits, found = chosen(engine, state, method), [], []
    for verify in (False, True, False, True, False):
        if verify:
            decoded(engine, Row(state, method, experts))
        else:
            logits.append(generated(engine, [Row(state, plain, experts)], LIMIT)[None][1])
        found.append([folded(engine, layer, 40) for layer in range(LAYERS)])
    gathered, learned, again, relearned, last = found
    assert same(logits, logits[:1] * 3)
    assert same([*again, *last], [*gathered, *gathered])
    assert same(learned, relearned), "it learned the same again"
    assert same(learned, gathered) == (learning != RIDGE)


@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])  # untied, tied, with a bias
def test_its_logits_are_those_of_its_tokens(family: str, compiler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_vocabulary, "CAPACITY", 90)
    engine = Engine(tiny(family), compiler=compiler)
    engine.compact().load(chosen(engine, prefilled(engine, tokens(9), Method()), Method()))
    ids_1S, view = torch.tensor([tokens(5)]), engine.draft()
    whole_SV = engine.compact()(ids_1S, KVCache(1, 8))[0]
    cases = (([5], [], 1), ([7, 3, 3, 50], [3, 8, 8, 96], 5), ([1, 2], [*range(VOCABULARY)], 90), ([9], [], 1))
    for begins, joins, count in cases:
        view.begin(torch.tensor(begins))
        view.add(torch.tensor(joins, dtype=torch.int64))
        assert (int(view.count), view.used) == (count, 90 if compiler else len({*begins}))
        view.use(int(view.count))
        assert set(view.tokens_C.tolist()) - {VOCABULARY} <= {*begins, *joins}
        logits_SC = view(ids_1S, KVCache(1, 8))[0]
        found = torch.stack([view.spread(view.allowed(one)) for one in logits_SC])
        have = found.isfinite()
        assert have.sum(dim=1).tolist() == [count] * 5
        assert count == 90 or set(have[0].nonzero().flatten().tolist()) == {*begins, *joins}
        assert difference(found[have], whole_SV[have]) < 1e-5
    assert torch.equal(engine.compact()(ids_1S, KVCache(1, 8))[0], whole_SV)


def test_an_output_embedding_that_is_not_linear_is_refused() -> None:
    model = build("gpt2", n_embd=16, n_inner=32, n_layer=1, n_head=2, n_positions=64, vocab_size=VOCABULARY)
    model.lm_head = nn.Sequential(model.lm_head)
    for prune in (Engine(model).draft, lambda: griffin.prune(model, verification="exact")):
        with pytest.raises(griffin.UnsupportedModelError, match="expected draft_vocabulary=full"):
            prune()


@pytest.mark.parametrize("positions", [0, 1, 32, 33, 128, 129, 300])
def test_the_best_tokens_of_every_sampled_position_are_likely(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_vocabulary, "BEST", 32)
    torch.manual_seed(0)
    head, hidden = nn.Linear(8, 1000, bias=False), torch.randn(positions, 8)
    stride = next(stride for stride in range(1, positions + 2) if len(range(0, positions, stride)) <= 128)
    best = head(hidden[::stride]).argsort(dim=-1, descending=True)[:, :32]
    found = find_likely(head, hidden)
    assert set(found.tolist()) == set(best.flatten().tolist())
    assert len(found) == len(best) * 32
    assert sorted(find_likely(nn.Linear(8, 3), torch.randn(1, 8)).tolist()) == [0, 1, 2], "of a small vocabulary all"
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = find_likely(nn.Linear(8, 97, device="meta"), hidden)
    assert (len(found), found.device) == (len(best) * 32, hidden.device), "the head may be on another device"


def likely(engine: Engine, ids: Sequence[int], **options: Any) -> set[int]:
    return {*prefilled(engine, ids, likely_tokens=True, **options).likely.tolist()}


@pytest.mark.parametrize("length", [1, 2, 40])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt_350m", "cohere", "granite", "phi"])
def test_a_prompt_makes_tokens_likely(family: str, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where logits are capped or scaled after the embedding, or hidden states projected before it."""
    monkeypatch.setattr(draft_vocabulary, "BEST", 1)
    engine, ids = Engine(tiny(family)), tokens(length)
    best = engine.model(torch.tensor([ids])).logits[0].argmax(dim=-1).tolist()
    assert likely(engine, ids) == {*ids, *best}
    for before in range(1, length, 13):
        assert likely(engine, ids, prefix=prefilled(engine, ids[:before], likely_tokens=True)) == {*ids, *best}
    assert prefilled(engine, ids).likely is None, "unless it is asked for"
    texts = [ids, tokens(41, 1)]
    states = griffin.prefill(engine, texts, [], prompt_lengths=[length, 3], likely_tokens=True)
    for state, text in zip(states, (ids, texts[1][:3]), strict=True):
        assert set(state.likely.tolist()) == likely(engine, text), "padding and what follows make nothing likely"


def test_a_token_outside_of_the_vocabulary_costs_a_rejection_only(half_idle: PreTrainedModel) -> None:
    """The draft is the dense model on part of its vocabulary: what is rejected is what it does not have."""
    engine, ids = Engine(half_idle), tokens(11)
    text = decoded(engine, begun(engine, ids, verified(draft_tokens=1, **PERFECT)))
    for known, accepted in ((set(text), 1), ({1} - {text[1]}, 0)):
        row = begun(engine, ids, verified(statistic="wanda", draft_tokens=1))
        row.state = replace(row.state, likely=torch.tensor(sorted(known)))  # instead of the prompt's
        assert decoded(engine, row, 3) == text[:3]
        assert (row.drafts.drafted, row.drafts.accepted) == (1, accepted)


def test_the_vocabulary_grows_with_the_text_and_is_forgotten_with_it() -> None:
    engine, sizes = Engine(tiny("llama")), []
    for _ in range(2):
        row = begun(engine, tokens(11), verified(draft_tokens=4))
        before = set(row.state.likely.tolist())
        decoded(engine, row)
        found = set(engine.draft().tokens_C.tolist())
        assert before | set(row.tokens[1:]) <= found
        assert before < found < set(range(VOCABULARY))
        sizes.append(len(found))
    assert sizes[0] == sizes[1]


def test_auto_drafts_while_it_is_worth_its_cost_and_learns_from_what_became_of_its_drafts() -> None:
    length, good, bad, other = (DraftLength("auto", DraftStatistics()) for _ in range(4))
    assert length.more([], 16, 0.1)
    assert length.more([0.9], 16, 0.1)
    assert not length.more([0.9, 0.01], 16, 0.1), "the draft is unsure"
    assert not length.more([], 16, 1.0), "a draft is as dear as the dense model"
    assert not length.more([1.0] * 16, 16, 0.001)
    assert 16 > length.planned(16, 0.1) > length.planned(16, 0.4) >= length.planned(16, 1.0) == 0
    length.update([0.9, 0.5, 0.8, 0.1], 1)
    other.update([0.9, 0.5], 1)
    assert vars(length) == vars(other), "drafts behind a rejected one say nothing"
    for _ in range(20):
        good.update([0.9] * 4, 4)
        bad.update([0.9] * 4, 0)
    assert good.more([0.9] * 3, 16, 0.3)
    assert not bad.more([0.9] * 3, 16, 0.3)
