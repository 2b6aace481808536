"""Verified decoding: the text is the dense model's, whatever the draft learns and however it drafts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engines import LEARNING, LIMIT, PERFECT, begun, decoded, prefilled, refuse_inexact, uncompiled, verified
from families import LAYERS, tiny
from running import difference, tokens
from transformers import PreTrainedModel

import griffin
from griffin import Engine, Generation, Method, Row, decode, traffic

DRAFTING = [(number, vocabulary) for number in (1, 4, 16, "auto") for vocabulary in ("full", "prompt")]
pytestmark = pytest.mark.usefixtures("early")
each_learning = pytest.mark.parametrize("learning", LEARNING, ids=" ".join)


@each_learning
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_text_is_the_dense_models_however_it_drafts(family: str, learning: tuple[str, str]) -> None:
    for ids, look_up in ((tokens(11), False), (tokens(6) * 3, True)):
        found = []
        for number, vocabulary in DRAFTING:
            engine, options = Engine(tiny(family)), {"draft_tokens": number, "draft_vocabulary": vocabulary}
            row = begun(engine, ids, verified(learning, prompt_lookup=look_up, **options))
            assert len(decoded(engine, row)) == LIMIT
            refuse_inexact(engine.model, ids, row.tokens)
            found.append(row.drafts)
        assert 0 < sum(drafts.accepted for drafts in found) <= sum(drafts.drafted for drafts in found)
        assert look_up or found[0].drafted < found[2].drafted < found[4].drafted, "the more at a time, the more"


@pytest.mark.parametrize("sparsity", [(0.9, 0.0, 0.5), (0.0, 0.0, 0.0125), 0.999, 0.0125])
@each_learning
def test_the_draft_may_keep_one_neuron_or_all_of_a_layer(learning: tuple[str, str], sparsity: Any) -> None:
    engine, ids = Engine(tiny("llama")), tokens(11)
    refuse_inexact(engine.model, ids, decoded(engine, begun(engine, ids, verified(learning, sparsity=sparsity))))


@pytest.mark.parametrize("mode", [*griffin.MODES, "static"])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_prompts_of_any_length_in_any_mode_fill_the_cache_as_the_dense_model_does(length: int, mode: str) -> None:
    """Static caches are those of compiled engines."""
    compiler, ids = uncompiled if mode == "static" else None, tokens(length)
    engine = Engine(tiny("gemma2"), mode="auto" if mode == "static" else mode, compiler=compiler)
    for learning in LEARNING[-2:]:
        row = begun(engine, ids, verified(learning, draft_tokens=4, sparsity=0.3))
        refuse_inexact(engine.model, ids, decoded(engine, row))
        cache = engine.decoding_cache(1, 1, verified=True, static=mode == "static")
        ran = [*ids, *row.tokens[:-1]]
        dense = prefilled(engine, ran).cache
        for found, expected in zip(cache.layers, dense.layers, strict=True):
            for name in ("keys", "values"):
                ours, theirs = (getattr(layer, name)[:1, :, : len(ran)] for layer in (found, expected))
                assert difference(ours, theirs) < 1e-5


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_short_texts(limit: int) -> None:
    engine, ids = Engine(tiny("llama")), tokens(11)
    row = begun(engine, ids, verified(draft_tokens=4))
    assert len(decoded(engine, row, limit)) == limit
    refuse_inexact(engine.model, ids, row.tokens)
    # Behind the first token, which the prompt gives; the last one is a check's own, with nothing drafted for it.
    assert (row.drafts.checks, row.drafts.drafted) == {1: (0, 0), 2: (1, 0)}.get(limit, (row.drafts.checks, 1))


def test_what_is_drafted_of_nothing_is_accepted(half_idle: PreTrainedModel) -> None:
    """A draft that is the dense model: a check gives k + 1 tokens, of as many as are left to generate."""
    for draft_tokens, limit, checks in ((4, 21, 4), (4, 13, 3), (1, 8, 4), (16, 18, 1), (16, 19, 2)):
        engine = Engine(half_idle)
        row = begun(engine, tokens(11), verified(draft_tokens=draft_tokens, **PERFECT))
        before = row.seconds
        decoded(engine, row, limit)
        done, drafted = row.drafts, limit - 1 - checks
        assert (done.checks, done.drafted, done.accepted, done.emitted) == (checks, drafted, drafted, limit - 1)
        refuse_inexact(half_idle, tokens(11), row.tokens)
        assert done.draft_bytes == drafted * traffic(half_idle, [40] * LAYERS).pruned
        assert 0 < sum(done.seconds.values()) < row.seconds - before
        assert done.seconds["choose"] == 0.0


@pytest.mark.parametrize("place", [0, 1, 3, 5, 6])
def test_a_text_may_end_anywhere_in_a_round(half_idle: PreTrainedModel, place: int) -> None:
    engine, asked = Engine(half_idle), Counter[int]()

    def ended(row: Row) -> bool:
        asked[len(row.tokens)] += 1
        return len(row.tokens) == place + 1

    whole = decoded(engine, begun(engine, tokens(11), verified(draft_tokens=4, **PERFECT)))
    row = begun(engine, tokens(11), verified(draft_tokens=4, **PERFECT))
    assert decoded(engine, row, ended=ended) == whole[: place + 1]
    checks = -(-place // 5)
    assert (row.drafts.checks, row.drafts.emitted) == (checks, place)
    assert row.drafts.accepted == place - place // 5 <= row.drafts.emitted, "all but the dense model's own"
    assert asked == Counter(range(1, place + 2)), "once for each token"


@pytest.mark.parametrize("most", [1, 2, 4])
def test_verified_rows_beside_others(most: int) -> None:
    """Some rows end soon, so that verified rows come while others are in the middle of their texts."""
    learning = verified(("ridge", "compensation"), draft_tokens=4)
    methods = [Method(compensation="ridge"), Method(sparsity=0.0), verified(draft_tokens=4), Method("wanda"), learning]
    methods += [Method(compensation="ridge", refresh="compensation")]
    generation = Generation(LIMIT, lambda row: row.label in (1, 3) and len(row.tokens) == 4)

    def run(numbers: Sequence[int], most: int) -> dict[int, list[int]]:
        engine = Engine(tiny("llama"))
        rows = (begun(engine, tokens(5 + number, number), methods[number], number) for number in numbers)
        return {row.label: row.tokens for row in decode(engine, rows, generation, batch_size=most)}

    together = run(range(6), most)
    assert together == {number: run([number], 1)[number] for number in range(6)}
    for number in (1, 2, 4):
        refuse_inexact(tiny("llama"), tokens(5 + number, number), together[number])


@torch.no_grad()
def test_verified_by_a_threshold_a_row_may_leave_the_dense_text() -> None:
    model, ids, kept = tiny("llama"), tokens(11), []
    for threshold in (0.999, 1e-6):
        engine, options = Engine(model), {"verification": "threshold", "verification_threshold": threshold}
        row = begun(engine, ids, verified(draft_tokens=4, **options))
        assert len(decoded(engine, row)) == LIMIT
        p_TV = model(torch.tensor([[*ids, *row.tokens]])).logits[0, len(ids) - 1 : -1].softmax(dim=-1)
        p_T = p_TV.gather(1, torch.tensor(row.tokens).unsqueeze(1))
        assert threshold == 0.999 or bool((p_T > threshold * 0.999).all())
        kept.append(row.drafts.accepted)
    assert kept[0] < kept[1]
