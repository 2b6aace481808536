"""Verified decoding: the text is the dense model's however it drafts, or distributed as that; what a check keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engines import LEARNING, LIMIT, PERFECT, begun, chosen, decoded, prefilled, refuse_inexact, verified
from families import LAYERS, VOCABULARY, build, tiny, tokens
from torch import Tensor
from transformers import PreTrainedModel

from griffin import Engine, Generation, Method, Row, traffic
from griffin.draft import DraftTokens
from griffin.verification import accept

DRAFTING: list[dict[str, Any]] = [
    *({"draft_vocabulary": name, "draft_tokens": most} for most in (1, 4, 16, "auto") for name in ("full", "prompt")),
    # It may keep one neuron or all of a layer.
    *({"sparsity": sparsity} for sparsity in ((0.9, 0.0, 0.5), (0.0, 0.0, 0.0125), 0.999, 0.0125)),
]
pytestmark = pytest.mark.usefixtures("early", "no_gradients")


@pytest.mark.parametrize("learning", LEARNING, ids=" ".join)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_text_is_the_dense_models_however_it_drafts(family: str, learning: tuple[str, str]) -> None:
    for ids in (tokens(11), tokens(1)):
        found = []
        for options in DRAFTING:
            engine = Engine(tiny(family))
            row = begun(engine, ids, verified(learning, **options))
            assert len(decoded(engine, row)) == LIMIT
            refuse_inexact(engine.model, ids, row.tokens)
            found.append(row.drafts)
        assert 0 < sum(drafts.accepted for drafts in found) <= sum(drafts.drafted for drafts in found)
        assert found[0].drafted < found[2].drafted < found[4].drafted, "the more at a time, the more"


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


P = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]]


def drawing(seed: int) -> Callable[[Row, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda row, p_N: torch.multinomial(p_N, 1, generator=generator)


def accepted(drafted: Sequence[int], p_TV: Tensor, method: Method, draw: Any = None, q: Any = ()) -> tuple[int, int]:
    """How many of some drafts, drawn from q, stay, and the dense model's own token."""
    made = DraftTokens([torch.tensor([token]) for token in drafted], [], list(q))
    kept, own = accept(Row(None, method, None, tokens=[0]), made, p_TV.log(), Generation(9, draw=draw))
    return int(kept), int(own)


LIKELY = [([], 0.1, 0, 0), ([2], 0.15, 1, 2), ([2], 0.25, 0, 0)]
LIKELY += [([1, 0], 0.05, 2, 1), ([1, 0], 0.15, 1, 2), ([1, 0], 0.35, 0, 0)]


def test_a_threshold_keeps_what_is_likely_enough() -> None:
    for drafted, least, kept, own in LIKELY:
        method = verified(verification="threshold", verification_threshold=least)
        drawn: list[list[float]] = []
        for draw in (None, lambda row, p_V, drawn=drawn: drawn.append(p_V.tolist()) or p_V.argmax().view(1)):
            assert accepted(drafted, torch.tensor(P[: len(drafted) + 1]), method, draw) == (kept, own)
        assert drawn == [pytest.approx(P[kept])], "its own token alone is drawn"
    for least, kept in ((0.25, 1), (0.2501, 0)):
        method = verified(verification="threshold", verification_threshold=least)
        assert accepted([3], torch.ones(2, 4), method)[0] == kept  # 0.25 each, to the bit


def test_a_rejection_by_rounding_draws_from_the_dense_distribution() -> None:
    """Where p is q but for rounding, nothing is left of p - q."""
    p_V, asked = torch.tensor([0.25, 0.25, 0.5]), []
    draw = lambda row, p_N: asked.append(p_N) or torch.tensor([0])  # noqa: E731
    assert accepted([1], p_V.expand(2, -1), verified(), draw, [p_V]) == (0, 0)
    assert torch.allclose(asked[-1], p_V)


def surprise(counts: Counter[tuple[int, int]], expected: dict[tuple[int, int], float]) -> float:
    """The p-value of the chi-square test; outcomes that are expected less than five times are one outcome."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    often = [pair for pair, share in expected.items() if share * total >= 5]
    seen, shares = [counts[pair] for pair in often], [expected[pair] for pair in often]
    if len(often) < len(expected):
        seen, shares = [*seen, total - sum(seen)], [*shares, 1 - sum(shares)]
    statistic = sum((n - total * share) ** 2 / (total * share) for n, share in zip(seen, shares, strict=True))
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), torch.tensor(statistic / 2)))


@pytest.mark.parametrize("vocabulary", ["full", "prompt"])
def test_texts_are_distributed_as_the_dense_models(vocabulary: str) -> None:
    """Two tokens behind a given one, of five that are allowed, some of which the draft's vocabulary lacks."""
    allowed, first = [2, 9, 17, 26, 33], 11
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    smallest = build("llama", **sizes, vocab_size=40)
    ids = [3, 7, 5]

    def scores(rows: Sequence[Row], drafted: Sequence[Tensor | None], logits_BV: Tensor) -> Tensor:
        begins = bool(rows) and not rows[0].tokens and drafted[0] is None
        mask_V = torch.ones(40, dtype=torch.bool).index_fill_(0, torch.tensor([first] if begins else allowed), False)
        return (logits_BV / 1.5).masked_fill(mask_V, -torch.inf)

    expected = {}
    for a in allowed:
        logits_TV = smallest(torch.tensor([[*ids, first, a]])).logits[0]
        p, then = scores([], [], logits_TV[-2:]).softmax(dim=-1)
        expected.update({(a, b): float(p[a] * then[b]) for b in allowed})
    engine = Engine(smallest)
    method = verified(sparsity=0.75, draft_tokens=2, draft_vocabulary=vocabulary)
    state = prefilled(engine, ids, method)
    experts = chosen(engine, state, method)
    found, draw, accepted, drafted = Counter[tuple[int, int]](), drawing(0), 0, 0
    for _ in range(800):
        row = Row(state, method, experts)
        text = decoded(engine, row, 4, process_logits=scores, draw=draw)
        assert text[0] == first
        found[text[1], text[2]] += 1
        accepted, drafted = accepted + row.drafts.accepted, drafted + row.drafts.drafted
    assert 0.1 < accepted / drafted < 0.9
    assert surprise(found, expected) > 1e-3


def test_a_draft_without_any_allowed_token_is_a_guess() -> None:
    """Scores that forbid the whole vocabulary of the draft leave no distribution: neither nan nor an error follows."""
    for draw in (None, drawing(0)):
        for draft_tokens in (4, "auto"):
            engine = Engine(tiny("llama"))
            row = begun(engine, [5, 6, 7], verified(draft_tokens=draft_tokens))
            (only, *_) = {*range(VOCABULARY)} - {*row.state.likely.tolist()}
            mask_V = torch.ones(VOCABULARY, dtype=torch.bool).index_fill_(0, torch.tensor([only]), False)
            process = lambda rows, drafted, logits_BV, mask_V=mask_V: logits_BV.masked_fill(mask_V, -torch.inf)  # noqa: E731
            assert decoded(engine, row, 8, process_logits=process, draw=draw) == [only] * 8
            assert row.drafts.drafted > 0
