"""Verified decoding: the text is the dense model's, or distributed as its texts, and the draft learns from checks."""

from __future__ import annotations

import gc
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import ref

import pytest
import reference
import torch
from engines import generated, never, tokens
from families import FAMILIES, LAYERS, VARIED, VOCABULARY, build, fresh, tiny
from running import difference
from torch import Tensor, nn
from transformers import PreTrainedModel

import griffin
from griffin import (
    Drafting,
    Engine,
    Generation,
    Method,
    Row,
    draft,
    draft_vocabulary,
    refresh,
    ridge,
    traffic,
    verification,
)
from griffin.draft import Drafts
from griffin.verification import accept_greedy, accept_sampled, accept_threshold

LIMIT = 14
LEARNING = [
    ("none", "none"),
    ("none", "experts"),
    ("mean", "none"),
    ("mean", "experts"),
    ("ridge", "none"),
    ("ridge", "compensation"),
    ("ridge", "experts"),
]
DRAFTING = [(draft_tokens, vocabulary) for draft_tokens in (1, 4, 16, "auto") for vocabulary in ("full", "prompt")]


@pytest.fixture(autouse=True)
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are chosen anew after 2, 4, 8, .. tokens, and the draft's vocabulary is a small one."""
    monkeypatch.setattr(refresh, "_FIRST", 2)
    for module in (draft_vocabulary, draft):
        monkeypatch.setattr(module, "BEST", 3)


def verified(**options: Any) -> Method:
    return Method(**({"verification": "exact"} | options))


def begun(engine: Engine, ids: Sequence[int], method: Method, label: Any = None) -> Row:
    """The row of a prompt and a method."""
    states = griffin.prefill(engine, [ids], griffin.wanted([method]), likely_tokens=method.prunes_vocabulary)
    (row,) = griffin.begin(engine, states, method, labels=[label])
    return row


def decoded(
    engine: Engine, row: Row, limit: int = LIMIT, ended: Callable[[Row], bool] = never, **options: Any
) -> list[int]:
    """The tokens of a row, picked greedily unless told otherwise."""
    generation = Generation(limit, options.pop("pick", griffin.greedy), ended, **options)
    assert list(griffin.decode(engine, [row], 1, 1, row.state.length, generation)) == [row]
    return row.tokens


@torch.no_grad()
def refuse_inexact(model: PreTrainedModel, ids: Sequence[int], text: Sequence[int]) -> None:
    """Refuse a text with a token that is not the dense model's best one there, but for rounding."""
    logits_TV = model(torch.tensor([[*ids, *text]]), use_cache=False).logits[0, len(ids) - 1 : -1]
    chosen_T = logits_TV.gather(1, torch.tensor(text).unsqueeze(1)).squeeze(1)
    assert bool((chosen_T >= logits_TV.max(dim=-1).values - 1e-5 * logits_TV.abs().max()).all())


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture(scope="module")
def half_idle() -> PreTrainedModel:
    """A model in which half of the neurons write nothing, so that Wanda's experts at 50% are the whole model."""
    model = fresh("llama")
    with torch.no_grad():
        for block in griffin.find_feedforward_blocks(model):
            block.output.weight[:, ::2] = 0.0
    return model


PERFECT = {"statistic": "wanda", "draft_vocabulary": "full"}


# -- greedy: the dense model's text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_text_is_the_dense_models(family: str) -> None:
    model, ids = tiny(family), tokens(11)
    engine = Engine(model)
    row = begun(engine, ids, verified(draft_tokens=4))
    assert len(decoded(engine, row)) == LIMIT
    refuse_inexact(model, ids, row.tokens)
    assert hooks(model) == 0


@pytest.mark.parametrize("learning", LEARNING, ids=" ".join)
@pytest.mark.parametrize("family", VARIED)
def test_so_it_is_whatever_the_draft_learns(family: str, learning: tuple[str, str]) -> None:
    model, ids, (compensation, kind) = tiny(family), tokens(11), learning
    draft_tokens, vocabulary = DRAFTING[(LEARNING.index(learning) + VARIED.index(family)) % len(DRAFTING)]
    method = verified(
        compensation=compensation, refresh=kind, draft_tokens=draft_tokens, draft_vocabulary=vocabulary, sparsity=0.3
    )
    engine = Engine(model)
    row = begun(engine, ids, method)
    assert len(decoded(engine, row)) == LIMIT
    refuse_inexact(model, ids, row.tokens)


@pytest.mark.parametrize("learning", LEARNING, ids=" ".join)
def test_and_however_it_drafts(learning: tuple[str, str]) -> None:
    model, ids, (compensation, kind), found = tiny("llama"), tokens(11), learning, []
    for draft_tokens, vocabulary in DRAFTING:
        method = verified(
            compensation=compensation, refresh=kind, draft_tokens=draft_tokens, draft_vocabulary=vocabulary
        )
        engine = Engine(model)
        row = begun(engine, ids, method)
        refuse_inexact(model, ids, decoded(engine, row))
        found.append(row)
    assert len({tuple(row.tokens) for row in found}) == 1
    assert 0 < sum(row.drafting.accepted for row in found) < sum(row.drafting.drafted for row in found)
    drafts = [max(1, row.drafting.drafted) for row in found[:6]]  # the more at a time, the more
    assert drafts[0] < drafts[2] < drafts[4]


@pytest.mark.parametrize("sparsity", [(0.9, 0.0, 0.5), (0.0, 0.0, 0.0125), 0.999, 0.0125])
def test_the_draft_may_keep_one_neuron_or_all_of_a_layer(sparsity: Any) -> None:
    model, ids = tiny("llama"), tokens(11)
    for compensation, kind in LEARNING:
        engine = Engine(model)
        row = begun(engine, ids, verified(sparsity=sparsity, compensation=compensation, refresh=kind, draft_tokens=4))
        refuse_inexact(model, ids, decoded(engine, row))


@pytest.mark.parametrize("mode", [*griffin.MODES, "whole"])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_prompts_of_any_length_in_any_mode(length: int, mode: str) -> None:
    """Whole caches are those of compiled engines."""
    model, ids = tiny("gemma2"), tokens(length)
    engine = Engine(model, mode="auto" if mode == "whole" else mode, compiled=model if mode == "whole" else None)
    row = begun(engine, ids, verified(compensation="ridge", refresh="compensation", draft_tokens=4))
    refuse_inexact(model, ids, decoded(engine, row))
    assert engine._caches[True].whole == (mode == "whole")


def test_a_tied_embedding_is_whole_where_tokens_are_looked_up() -> None:
    model = build(
        "llama", hidden_size=32, intermediate_size=80, num_hidden_layers=2, vocab_size=97, tie_word_embeddings=True
    )
    assert model.lm_head.weight is model.get_input_embeddings().weight
    engine, ids = Engine(model), tokens(11)
    refuse_inexact(model, ids, decoded(engine, begun(engine, ids, verified(draft_tokens=4))))
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_short_texts(limit: int) -> None:
    engine, ids = Engine(tiny("llama")), tokens(11)
    row = begun(engine, ids, verified(draft_tokens=4))
    assert len(decoded(engine, row, limit)) == limit
    refuse_inexact(engine.model, ids, row.tokens)
    # Behind the first token, which the prompt gives; the last one is a check's own, with nothing drafted for it.
    assert (row.drafting.checks, row.drafting.drafted) == {1: (0, 0), 2: (1, 0)}.get(limit, (row.drafting.checks, 1))


def test_what_is_drafted_of_nothing_is_accepted(half_idle: PreTrainedModel) -> None:
    """A draft that is the dense model: a check gives k + 1 tokens, of as many as are left to generate."""
    for draft_tokens, limit, checks in ((4, 21, 4), (4, 13, 3), (1, 8, 4), (16, 18, 1), (16, 19, 2)):
        engine = Engine(half_idle)
        row = begun(engine, tokens(11), verified(draft_tokens=draft_tokens, **PERFECT))
        decoded(engine, row, limit)
        done = row.drafting
        assert (done.checks, done.drafted, done.accepted, done.emitted) == (
            checks,
            limit - 1 - checks,
            limit - 1 - checks,
            limit - 1,
        )
        refuse_inexact(half_idle, tokens(11), row.tokens)


def test_bytes_and_seconds_are_those_of_the_drafts(half_idle: PreTrainedModel) -> None:
    engine = Engine(half_idle)
    row = begun(engine, tokens(11), verified(draft_tokens=4, **PERFECT))
    before = row.seconds
    decoded(engine, row)
    assert row.drafting.draft_bytes == row.drafting.drafted * traffic(half_idle, [40] * LAYERS).pruned
    assert 0 < sum(row.drafting.seconds.values()) < row.seconds - before
    assert row.drafting.seconds["choose"] == 0.0


@pytest.mark.parametrize("place", [0, 1, 3, 5, 6])
def test_a_text_may_end_anywhere_in_a_round(half_idle: PreTrainedModel, place: int) -> None:
    engine, asked = Engine(half_idle), Counter[int]()

    def ended(row: Row) -> bool:
        asked[len(row.tokens)] += 1
        return len(row.tokens) == place + 1

    whole = decoded(engine, begun(engine, tokens(11), verified(draft_tokens=4, **PERFECT)))
    row = begun(engine, tokens(11), verified(draft_tokens=4, **PERFECT))
    assert decoded(engine, row, ended=ended) == whole[: place + 1]
    assert row.drafting.emitted == place
    assert asked == Counter(range(1, place + 2)), "once for each token"
    assert row.drafting.checks == -(-place // 5)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_verified_rows_beside_others(most: int) -> None:
    """Some rows end soon, so that verified rows come while others are in the middle of their texts."""
    model = tiny("llama")
    methods = [
        Method(compensation="ridge"),
        Method(sparsity=0.0),
        verified(draft_tokens=4),
        Method("wanda"),
        verified(compensation="ridge", refresh="compensation", draft_tokens=4),
        Method(compensation="ridge", refresh="compensation"),
    ]

    def ended(row: Row) -> bool:
        return row.label in (1, 3) and len(row.tokens) == 4

    def run(numbers: Sequence[int], most: int) -> dict[int, list[int]]:
        engine = Engine(model)
        rows = (begun(engine, tokens(5 + number, number), methods[number], number) for number in numbers)
        generation = Generation(LIMIT, griffin.greedy, ended)
        return {row.label: row.tokens for row in griffin.decode(engine, rows, len(numbers), most, 10, generation)}

    alone = {number: run([number], 1)[number] for number in range(6)}
    together = run(range(6), most)
    assert together == alone
    for number in (1, 2, 4):
        refuse_inexact(model, tokens(5 + number, number), together[number])


def test_a_rule_about_scores_holds_for_drafts_and_checks() -> None:
    """No token comes twice: scores depend on all tokens before, drafts included."""
    model, ids = tiny("llama"), tokens(11)
    seen: list[list[int]] = []

    def scores(row: Row, drafted: Sequence[int], logits_V: Tensor) -> Tensor:
        seen.append([*row.tokens, *drafted])
        return logits_V.index_fill(0, torch.tensor(seen[-1]), -torch.inf)

    engine = Engine(model)
    found = decoded(engine, begun(engine, ids, verified(sparsity=0.1, draft_tokens=4)), scores=scores)
    expected: list[int] = []
    for _ in range(LIMIT):
        logits_V = model(torch.tensor([[*ids, *expected]])).logits[0, -1].detach()
        expected.append(int(logits_V.index_fill(0, torch.tensor(expected, dtype=torch.int64), -torch.inf).argmax()))
    assert found == expected
    assert max(map(len, seen)) == LIMIT - 1


# -- the KV cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("family", VARIED)
def test_the_kv_cache_is_the_dense_models(family: str, whole: bool) -> None:
    model, ids = tiny(family), tokens(11)
    engine = Engine(model, compiled=model if whole else None)
    row = begun(engine, ids, verified(compensation="ridge", refresh="experts", draft_tokens=4, sparsity=0.3))
    ran = [*ids, *decoded(engine, row)[:-1]]
    (dense,) = griffin.prefill(engine, [ran], [])
    for found, expected in zip(engine._caches[True].layers, dense.cache.layers, strict=True):
        assert found.end == len(ran), "the last token has not run"
        for name in ("keys", "values"):
            ours, theirs = (getattr(layer, name)[:1, :, : len(ran)] for layer in (found, expected))
            assert difference(ours, theirs) < 1e-5


# -- learning ---------------------------------------------------------------------------------------------------------


def folded(engine: Engine, layer: int, kept_K: Tensor) -> Tensor:
    """[K, H]: what each kept neuron of the draft writes."""
    eye_KK = torch.eye(len(kept_K))
    return engine.draft_output(layer, eye_KK) - engine.draft_output(layer, torch.zeros_like(eye_KK))


@torch.no_grad()
@pytest.mark.parametrize("draft_tokens", [1, 4, 16])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])  # fewer rows than kept neurons, and more
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("every", [1, LIMIT - 1])  # at every check, and all at once
def test_what_is_learned_is_the_ridge_solution_of_all_rows(
    every: int, family: str, sparsity: float, draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft, "LEARN_EVERY", every)
    model, ids = tiny(family), tokens(21)
    engine = Engine(model)
    method = verified(compensation="ridge", refresh="compensation", sparsity=sparsity, draft_tokens=draft_tokens)
    row = begun(engine, ids, method)
    ran = torch.tensor([[*ids, *decoded(engine, row)[:-1]]])
    _, z = reference.run(model, family, ran)
    for layer in range(LAYERS):
        kept_K = row.experts.neurons[layer]
        weights_HD = reference.output_matrix(model, family, layer)
        unit_SD = z[layer] / z[layer].norm(dim=-1, keepdim=True)
        prompt_rows = torch.stack([unit_SD[i : min(i + 2, 21)].sum(dim=0) for i in range(0, 21, 2)])
        rows_TD = torch.cat([prompt_rows, refresh.WEIGHT**0.5 * unit_SD[21:]])
        dropped_D = torch.ones(rows_TD.shape[1], dtype=torch.bool).index_fill_(0, kept_K, False)
        penalty = ridge.RIDGE * prompt_rows[:, kept_K].square().sum() / len(kept_K)
        gram_KK = rows_TD[:, kept_K].T @ rows_TD[:, kept_K] + penalty * torch.eye(len(kept_K)).double()
        wrote_TH = rows_TD[:, dropped_D] @ weights_HD[:, dropped_D].T
        expected_KH = torch.linalg.solve(gram_KK, rows_TD[:, kept_K].T @ wrote_TH)
        assert difference(folded(engine, layer, kept_K) - weights_HD[:, kept_K].T, expected_KH) < 1e-5


def test_only_what_is_to_be_learned_is() -> None:
    engine, ids = Engine(tiny("llama")), tokens(21)
    for compensation, kind in (("none", "none"), ("mean", "experts"), ("ridge", "none")):
        row = begun(engine, ids, verified(compensation=compensation, refresh=kind))
        decoded(engine, row)
        learned = [folded(engine, layer, row.experts.neurons[layer]) for layer in range(LAYERS)]
        engine.draft(row.experts)
        for layer in range(LAYERS):
            assert torch.equal(learned[layer], folded(engine, layer, row.experts.neurons[layer]))
        engine.use_dense()


def test_experts_are_put_to_work_again_without_what_they_learned() -> None:
    model, ids = tiny("gpt2"), tokens(11)
    method = verified(compensation="ridge", refresh="compensation", draft_tokens=4)
    engine, plain = Engine(model, mode="compact"), Method(compensation="ridge")
    state = begun(engine, ids, method).state
    experts = griffin.choose(engine, [state], method)
    other = Engine(model)
    other.draft(experts)
    gathered = [folded(other, layer, experts.neurons[layer]) for layer in range(LAYERS)]
    other.use_dense()
    (_, alone) = generated(engine, [Row([state], 0, plain, experts)], 1, LIMIT)[None]
    decoded(engine, Row([state], 0, method, experts))
    assert not all(
        torch.equal(folded(engine, layer, experts.neurons[layer]), gathered[layer]) for layer in range(LAYERS)
    )
    (_, again) = generated(engine, [Row([state], 0, plain, experts)], 1, LIMIT)[None]
    assert torch.equal(again, alone)
    decoded(engine, Row([state], 0, method, experts))
    engine.draft(experts)
    for layer in range(LAYERS):
        assert torch.equal(folded(engine, layer, experts.neurons[layer]), gathered[layer])
    engine.use_dense()


@pytest.mark.parametrize("draft_tokens", [1, 4])
def test_new_experts_are_those_of_the_prompt_and_all_that_was_accepted(
    draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []

    def look(engine: Engine, states: Any, *args: Any) -> Any:
        chosen.append((states[0], griffin.choose(engine, states, *args)))
        return chosen[-1][1]

    monkeypatch.setattr(draft, "choose", look)
    model, ids = tiny("llama"), tokens(11)
    engine = Engine(model)
    row = begun(engine, ids, verified(refresh="experts", draft_tokens=draft_tokens))
    _, z = reference.run(model, "llama", torch.tensor([[*ids, *decoded(engine, row)]]))
    assert len(chosen) >= 2
    assert row.experts is chosen[-1][1]
    for state, experts in chosen:
        assert state.ids == (*ids, *row.tokens)[: len(state.ids)], "random selections go by what was read"
        length = state.recorded.columns
        assert len(ids) < length == len(state.ids)
        counts_S1 = torch.tensor([[1.0]] * len(ids) + [[refresh.WEIGHT]] * (length - len(ids))).double()
        for layer in range(LAYERS):
            unit_SD = z[layer][:length] / z[layer][:length].norm(dim=-1, keepdim=True)
            expected_D = (counts_S1 * unit_SD.square()).sum(dim=0).sqrt()
            assert experts.neurons[layer].tolist() == reference.best(expected_D, 0.5)


def test_experts_are_chosen_anew_after_8_16_32_tokens(
    half_idle: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "_FIRST", 8)
    lengths: list[int] = []

    def look(engine: Engine, states: Any, *args: Any) -> Any:
        lengths.append(states[0].recorded.columns - 11)
        return griffin.choose(engine, states, *args)

    monkeypatch.setattr(draft, "choose", look)
    engine = Engine(half_idle)
    decoded(engine, begun(engine, tokens(11), verified(refresh="experts", draft_tokens=4, **PERFECT)), 41)
    assert lengths == [10, 20, 35], "at the ends of the rounds of five tokens that come next"


# -- the draft's vocabulary -------------------------------------------------------------------------------------------


def test_a_token_outside_of_the_vocabulary_costs_a_rejection_only(half_idle: PreTrainedModel) -> None:
    """The draft is the dense model on part of its vocabulary: what is rejected is what it does not have."""
    engine, ids = Engine(half_idle), tokens(11)
    text = decoded(engine, begun(engine, ids, verified(draft_tokens=1, **PERFECT)))
    for likely, accepted in ((set(text), 1), ({1} - {text[1]}, 0)):
        row = begun(engine, ids, verified(statistic="wanda", draft_tokens=1))
        row.state = griffin.PromptState(
            **vars(row.state) | {"likely": torch.tensor(sorted(likely))}  # instead of the prompt's
        )
        assert decoded(engine, row, 3) == text[:3]
        assert (row.drafting.drafted, row.drafting.accepted) == (1, accepted)


def test_the_vocabulary_grows_with_the_text_and_is_forgotten_with_it() -> None:
    engine, sizes = Engine(tiny("llama")), []
    for _ in range(2):
        row = begun(engine, tokens(11), verified(draft_tokens=4))
        likely = set(row.state.likely.tolist())
        decoded(engine, row)
        found = set(engine.vocabulary.tokens_N.tolist())
        assert likely | set(row.tokens[1:]) <= found
        assert likely < found < set(range(VOCABULARY))
        sizes.append(len(found))
    assert sizes[0] == sizes[1]


def test_a_draft_without_any_allowed_token_is_a_guess() -> None:
    """Scores that forbid the whole vocabulary of the draft leave no distribution: neither nan nor an error follows."""
    model, ids, allowed = tiny("llama"), tokens(11), {}

    def scores(row: Row, drafted: Sequence[int], logits_V: Tensor) -> Tensor:
        mask_V = torch.ones(VOCABULARY, dtype=torch.bool)
        mask_V[allowed["tokens"]] = False
        return logits_V.masked_fill(mask_V, -torch.inf)

    for draw in (None, drawing(0)):
        for draft_tokens in (4, "auto"):
            engine = Engine(model)
            row = begun(engine, ids, verified(draft_tokens=draft_tokens))
            allowed["tokens"] = [min(set(range(VOCABULARY)) - set(row.state.likely.tolist()))]
            decoded(engine, row, 8, scores=scores, draw=draw)
            assert row.tokens[1:] == allowed["tokens"] * 7
            assert row.drafting.drafted > 0


# -- how many are drafted ---------------------------------------------------------------------------------------------


def test_a_fixed_number_is_drafted_unless_fewer_are_left() -> None:
    length = draft.DraftLength(4, Drafting())
    assert [length.more([0.0] * done, 16, 1.0) for done in range(6)] == [True] * 4 + [False] * 2
    assert [length.more([1.0] * done, 2, 1.0) for done in range(4)] == [True] * 2 + [False] * 2
    assert not length.more([], 0, 0.1)


def test_auto_drafts_while_it_is_worth_its_cost() -> None:
    length = draft.DraftLength("auto", Drafting())
    assert length.more([], 16, 0.1)
    assert length.more([0.9], 16, 0.1)
    assert not length.more([0.9, 0.01], 16, 0.1), "the draft is unsure"
    assert not length.more([], 16, 1.0), "a draft is as dear as the dense model"
    assert not length.more([1.0] * 16, 16, 0.001)


def test_auto_learns_from_what_became_of_its_drafts() -> None:
    done = Drafting()
    good, bad = draft.DraftLength("auto", done), draft.DraftLength("auto", done)
    for _ in range(20):
        good.update([0.9] * 4, 4)
        bad.update([0.9] * 4, 0)
    chances = [0.9] * 3
    assert good.more(chances, 16, 0.3)
    assert not bad.more(chances, 16, 0.3)


def test_drafts_behind_a_rejected_one_say_nothing() -> None:
    one, other = (draft.DraftLength("auto", Drafting()) for _ in range(2))
    one.update([0.9, 0.5, 0.8, 0.1], 1)
    other.update([0.9, 0.5], 1)
    assert vars(one) == vars(other)


# -- accepting, by hand -----------------------------------------------------------------------------------------------


def hand(chances: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(chances).log()


def some_row() -> Row:
    return Row([], 0, verified(), None, tokens=[0])


GREEDY = Generation(9, griffin.greedy, never)
P = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]]


@pytest.mark.parametrize(
    ("drafted", "expected"),
    [([], (0, 0)), ([0], (1, 2)), ([1], (0, 0)), ([0, 2], (2, 1)), ([0, 1], (1, 2)), ([2, 2], (0, 0))],
)
def test_greedy_keeps_the_best(drafted: list[int], expected: tuple[int, int]) -> None:
    assert accept_greedy(some_row(), Drafts(drafted), hand(P[: len(drafted) + 1]), GREEDY) == expected


@pytest.mark.parametrize(
    ("drafted", "threshold", "expected"),
    [
        ([], 0.1, (0, 0)),
        ([2], 0.15, (1, 2)),
        ([2], 0.25, (0, 0)),
        ([1, 0], 0.05, (2, 1)),
        ([1, 0], 0.15, (1, 2)),
        ([1, 0], 0.35, (0, 0)),
    ],
)
def test_a_threshold_keeps_what_is_likely_enough(
    drafted: list[int], threshold: float, expected: tuple[int, int]
) -> None:
    logits_TV = hand(P[: len(drafted) + 1])
    assert accept_threshold(some_row(), Drafts(drafted), logits_TV, GREEDY, threshold) == expected


def test_a_threshold_keeps_what_just_reaches_it() -> None:
    logits_TV = torch.zeros(2, 4)  # a chance of 0.25 each, to the bit
    for threshold, kept in ((0.25, 1), (0.2501, 0)):
        assert accept_threshold(some_row(), Drafts([3]), logits_TV, GREEDY, threshold)[0] == kept


def test_a_threshold_draws_its_own_token_where_tokens_are_drawn() -> None:
    drawn: list[list[float]] = []

    def draw(row: Row, chances_V: Tensor) -> Tensor:
        drawn.append(chances_V.tolist())
        return torch.tensor([1])

    generation = Generation(9, griffin.greedy, never, draw=draw)
    assert accept_threshold(some_row(), Drafts([2]), hand(P[:2]), generation, 0.5) == (0, 1)
    assert accept_threshold(some_row(), Drafts([0]), hand(P[:2]), generation, 0.5) == (1, 1)
    assert drawn == [pytest.approx(P[0]), pytest.approx(P[1])]


def test_verified_by_a_threshold_a_row_may_leave_the_dense_text() -> None:
    model, ids = tiny("llama"), tokens(11)
    kept = []
    for threshold in (0.999, 1e-6):
        engine = Engine(model)
        row = begun(engine, ids, verified(verification="threshold", verification_threshold=threshold, draft_tokens=4))
        assert len(decoded(engine, row)) == LIMIT
        chances_TV = model(torch.tensor([[*ids, *row.tokens]])).logits[0, len(ids) - 1 : -1].softmax(dim=-1)
        assert bool((chances_TV.gather(1, torch.tensor(row.tokens).unsqueeze(1)) > threshold * 0.999).all()) or (
            threshold == 0.999
        )
        kept.append(row.drafting.accepted)
    assert kept[0] < kept[1]


# -- prompt lookup ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 8, [4, 9, 1, 2, 3]),  # to the end of the text
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),
        ([7, 2, 3, 5, 1, 2, 3, 4, 8, 2, 3], 1, [4]),  # the latest of two
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1, [4]),  # more tokens before fewer
        ([1, 2, 3, 4], 8, []),
        ([3, 4, 4], 8, []),  # one token is too few
        ([5, 5, 5, 5], 2, [5]),
        ([1], 8, []),
        ([1, 2, 3, 1, 2], 0, []),
    ],
)
def test_what_followed_is_looked_up(text: list[int], most: int, expected: list[int]) -> None:
    assert draft.look_up(text, most) == expected


@pytest.mark.parametrize("learning", LEARNING, ids=" ".join)
def test_texts_are_dense_whoever_drafts(learning: tuple[str, str]) -> None:
    compensation, kind = learning
    for ids in (tokens(11), tokens(6) * 3):
        rows = []
        for prompt_lookup in (False, True):
            engine = Engine(tiny("llama"))
            method = verified(compensation=compensation, refresh=kind, prompt_lookup=prompt_lookup)
            rows.append(begun(engine, ids, method))
            refuse_inexact(engine.model, ids, decoded(engine, rows[-1], 40))
        assert rows[0].tokens == rows[1].tokens


def test_lookups_pause_while_they_bring_less_than_the_experts() -> None:
    drafting = Drafting(checks=10, drafted=30, accepted=30, emitted=40)
    length = draft.DraftLength("auto", drafting)
    assert length.lookup_pays(0.3)  # tried first
    for _ in range(5):
        length.update_lookup(0)
    assert not length.lookup_pays(0.3)
    drafting.emitted = 11  # now the experts bring next to nothing
    assert length.lookup_pays(0.3)


def test_drafts_that_are_looked_up_read_nothing() -> None:
    model, ids = tiny("llama"), tokens(6) * 3
    engine = Engine(model)
    row = begun(engine, ids, verified(prompt_lookup=True, draft_tokens=4))
    row.tokens.append(ids[0])  # as if the dense model repeated its prompt
    by_experts = draft.Draft(engine, row)
    length = draft.DraftLength(4, row.drafting)
    for draw in (None, drawing(0)):
        drafts = by_experts.run(
            length, engine.decoding_cache(1, 40, verified=True), Generation(LIMIT, griffin.greedy, never, draw=draw)
        )
        assert (drafts.tokens, drafts.chances) == (ids[1:5], [])
        assert [int(chances_V.argmax()) for chances_V in drafts.chances_V] == ([] if draw is None else ids[1:5])
    assert row.drafting.draft_bytes == 0
    engine.use_dense()


# -- sampling: the dense model's distribution -------------------------------------------------------------------------


def drawing(seed: int) -> Callable[[Row, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda row, chances_N: torch.multinomial(chances_N, 1, generator=generator)


def surprise(counts: Counter[tuple[int, int]], expected: dict[tuple[int, int], float]) -> float:
    """The p-value of the chi-square test; outcomes that are expected less than five times are one outcome."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    often = [pair for pair, chance in expected.items() if chance * total >= 5]
    seen = [counts[pair] for pair in often]
    chances = [expected[pair] for pair in often]
    if len(often) < len(expected):
        seen, chances = [*seen, total - sum(seen)], [*chances, 1 - sum(chances)]
    statistic = sum((n - total * chance) ** 2 / (total * chance) for n, chance in zip(seen, chances, strict=True))
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), torch.tensor(statistic / 2)))


N = 6
P_TABLE = torch.rand(N + 1, N, generator=torch.Generator().manual_seed(1)).square().add(0.02)
Q_TABLE = torch.rand(N + 1, N, generator=torch.Generator().manual_seed(2)).square().add(0.02)
Q_TABLE[0, 3] = 0.0  # as where the draft's vocabulary lacks a token
P_TABLE[0, 4] = 0.0  # as where a rule forbids one
P_TABLE, Q_TABLE = (table / table.sum(dim=-1, keepdim=True) for table in (P_TABLE, Q_TABLE))
PAIRS = {(a, b): float(P_TABLE[0, a] * P_TABLE[1 + a, b]) for a in range(N) for b in range(N) if a != 4}


def two_tokens(accept: Callable[..., tuple[int, int]], samples: int, drafts: int = 2) -> Counter[tuple[int, int]]:
    """The first two tokens of rounds of drafts from tables: row 0 for the first token, row 1 + t behind a token t."""
    draw, row = drawing(0), some_row()
    generation = Generation(9, griffin.greedy, never, draw=draw)
    logits, found = P_TABLE.log(), Counter[tuple[int, int]]()
    for _ in range(samples):
        text: list[int] = []
        while len(text) < 2:
            before, made = text[-1] + 1 if text else 0, Drafts()
            places = [before]
            for _ in range(drafts):
                made.chances_V.append(Q_TABLE[places[-1]])
                made.tokens.append(int(draw(row, made.chances_V[-1])))
                places.append(1 + made.tokens[-1])
            kept, own = accept(row, made, logits[places], generation)
            text += [*made.tokens[:kept], own]
        found[text[0], text[1]] += 1
    return found


def test_sampled_texts_are_distributed_as_the_dense_models() -> None:
    assert surprise(two_tokens(accept_sampled, 20_000), PAIRS) > 1e-3


@pytest.mark.parametrize("drafts", [0, 1])
def test_so_they_are_with_fewer_drafts(drafts: int) -> None:
    assert surprise(two_tokens(accept_sampled, 4_000, drafts), PAIRS) > 1e-3


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("int(draw(row, torch.stack([1.0 - keep, keep]))) == 0", "False"),
        ("(p_V - q_V).clamp(min=0.0)", "p_V"),
        ("p_V[token] / q_V[token]", "q_V[token] / p_V[token]"),
        ("logits_TV[-1]", "logits_TV[0]"),
    ],
    ids=["all are accepted", "instead of a rejected one, any", "upside down", "the wrong place"],
)
def test_a_rule_that_is_broken_on_purpose_is_found(right: str, wrong: str) -> None:
    source, names = inspect.getsource(accept_sampled), dict(vars(verification))
    assert source.count(right) == 1
    exec(source.replace(right, wrong), names)
    found = [two_tokens(names["accept_sampled"], 2_000, drafts) for drafts in (1, 2)]
    assert any(not set(one) <= set(PAIRS) or surprise(one, PAIRS) < 1e-3 for one in found)


def test_a_rejection_by_rounding_draws_from_the_dense_distribution() -> None:
    """Where p is q but for rounding, nothing is left of p - q."""
    p_V = torch.tensor([0.25, 0.25, 0.5])
    asked: list[Tensor] = []

    def draw(row: Row, chances_N: Tensor) -> Tensor:
        asked.append(chances_N)
        return torch.tensor([0])

    generation = Generation(9, griffin.greedy, never, draw=draw)
    drafts = Drafts([1], [0.25], [p_V])
    assert accept_sampled(some_row(), drafts, p_V.log().expand(2, -1), generation) == (0, 0)
    assert torch.allclose(asked[-1], p_V)


@pytest.fixture(scope="module")
def smallest() -> PreTrainedModel:
    return build(
        "llama", hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )


@torch.no_grad()
@pytest.mark.parametrize(("vocabulary", "prompt_lookup"), [("full", False), ("prompt", False), ("prompt", True)])
def test_texts_of_the_whole_loop_are_distributed_as_the_dense_models(
    smallest: PreTrainedModel, vocabulary: str, prompt_lookup: bool
) -> None:
    """Two tokens behind a given one, of five that are allowed, some of which the draft's vocabulary lacks."""
    allowed, first = [2, 9, 17, 26, 33], 11
    ids = (
        [7, 5, first, 9, 17, 7, 5] if prompt_lookup else [3, 7, 5]
    )  # what follows the first token is found, or drafted
    mask_V = torch.ones(40, dtype=torch.bool).index_fill_(0, torch.tensor(allowed), False)

    def scores(row: Row, drafted: Sequence[int], logits_V: Tensor) -> Tensor:
        return (logits_V / 1.5).masked_fill(mask_V, -torch.inf)

    expected = {}
    for a in allowed:
        logits_TV = smallest(torch.tensor([[*ids, first, a]])).logits[0]
        p, then = (scores(some_row(), [], logits_V).softmax(dim=-1) for logits_V in logits_TV[-2:])
        expected.update({(a, b): float(p[a] * then[b]) for b in allowed})
    engine = Engine(smallest)
    method = verified(sparsity=0.75, draft_tokens=2, draft_vocabulary=vocabulary, prompt_lookup=prompt_lookup)
    state = begun(engine, ids, method).state
    experts = griffin.choose(engine, [state], method)

    def run(samples: int, draw: Callable[[Row, Tensor], Tensor]) -> tuple[Counter[tuple[int, int]], float]:
        found, accepted, drafted = Counter[tuple[int, int]](), 0, 0
        for _ in range(samples):
            row = Row([state], 0, method, experts)
            text = decoded(engine, row, 4, pick=lambda rows, logits_BV: torch.tensor([first]), scores=scores, draw=draw)
            found[text[1], text[2]] += 1
            accepted, drafted = accepted + row.drafting.accepted, drafted + row.drafting.drafted
        return found, accepted / drafted

    found, share = run(800, drawing(0))
    assert 0.1 < share < 0.9
    assert surprise(found, expected) > 1e-3
    right = drawing(0)
    found, share = run(200, lambda row, chances: torch.tensor([1]) if len(chances) == 2 else right(row, chances))
    assert share == 1.0
    assert surprise(found, expected) < 1e-3, "where all is accepted"


# -- what is left behind ----------------------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counting frees memory."""
    gc.disable()
    yield
    gc.enable()


METHODS = [
    verified(draft_tokens=4, compensation=compensation, refresh=kind, draft_vocabulary=vocabulary)
    for (compensation, kind), vocabulary in zip(LEARNING[1::2] + LEARNING[5:6], ("full", "prompt") * 2, strict=True)
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_a_row_is_forgotten_at_once_and_nothing_grows(no_collector: None, method: Method) -> None:
    engine, counts = Engine(tiny("llama")), []
    for number in range(6):
        row = begun(engine, tokens(9, number), method)
        watched = [ref(row), ref(row.state), ref(row.state.cache), ref(row.experts)]
        decoded(engine, row)
        assert watched[2]() is None, "the prompt's cache was copied"
        watched.append(ref(row.experts))
        del row
        left = [one for one in watched if one() is not None and one() is not engine._compact._loaded]
        assert not left
        counts.append(sum(type(thing) in (Tensor, nn.Parameter) for thing in gc.get_objects()))
    assert counts[2] == counts[5]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["none", "compensation", "experts"])
def test_weights_and_caches_keep_their_addresses(family: str, kind: str) -> None:
    model = fresh(family)
    engine, method, found = Engine(model), verified(compensation="ridge", refresh=kind, draft_tokens=4), []
    projections = [module for block in engine.blocks for module in (*block.inputs, block.output)]

    def look(*_: Any) -> None:
        if engine._on is not None:
            caches = [buffer for layer in engine._caches[True].layers for buffer in (layer.keys, layer.values)]
            weights = [weight for module in projections for weight in module.parameters()]
            found.append([memory.data_ptr() for memory in (*weights, *caches)])

    handle = model.register_forward_pre_hook(look)
    for length in (9, 12, 5, 7):
        generation = Generation(LIMIT, griffin.greedy, never)
        list(griffin.decode(engine, [begun(engine, tokens(length), method)], 1, 1, 12, generation))
    handle.remove()
    assert len(found) > 8
    assert all(one == found[0] for one in found)


def test_the_model_is_dense_when_a_row_has_ended() -> None:
    """Whoever is given the row may run the model. The last round, of 8 tokens, has chosen new experts."""
    model = fresh("llama")
    dense, engine = dict(model.named_parameters()), Engine(model)
    rows = (begun(engine, tokens(9), verified(refresh="experts"), label) for label in range(2))
    for _ in griffin.decode(engine, rows, 2, 1, 9, Generation(9, griffin.greedy, never)):
        assert all(weight is dense[name] for name, weight in model.named_parameters())
        assert hooks(model) == 0


@pytest.mark.parametrize("call", [2, 6, 7, 11])  # 1 is the prompt, 6 the first check, 11 the second
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_an_error_in_the_middle_leaves_the_model_as_it_was(
    no_collector: None, half_idle: PreTrainedModel, method: Method, call: int
) -> None:
    before, calls = dict(half_idle.named_parameters()), 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise MemoryError

    engine = Engine(half_idle)
    expected = decoded(engine, begun(engine, tokens(11), method))
    handle = engine.blocks[1].output.register_forward_hook(fail)
    row = begun(engine, tokens(11), method)
    watched = ref(row)
    failed = False
    try:
        decoded(engine, row)
    except MemoryError:
        failed = True
    handle.remove()
    assert failed
    assert hooks(half_idle) == 0
    assert {name: weight for name, weight in half_idle.named_parameters() if weight is before[name]} == before
    del row
    assert watched() is None
    assert decoded(engine, begun(engine, tokens(11), method)) == expected
