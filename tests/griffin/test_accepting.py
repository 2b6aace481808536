"""Which drafts a check keeps: by hand, and that sampled texts are distributed as the dense model's."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engines import chosen, decoded, prefilled, verified
from families import VOCABULARY, build, tiny
from torch import Tensor
from transformers import PreTrainedModel

from griffin import Engine, Generation, Method, Row, verification
from griffin.draft import DraftTokens
from griffin.rows import never
from griffin.verification import accept

Draw = Callable[[Row, Tensor], Tensor]
P = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.3, 0.6, 0.1]]


def drawing(seed: int) -> Draw:
    generator = torch.Generator().manual_seed(seed)
    return lambda row, p_N: torch.multinomial(p_N, 1, generator=generator)


def drafts(tokens: Sequence[int], *distributions: Tensor) -> DraftTokens:
    return DraftTokens([torch.tensor([token]) for token in tokens], [], list(distributions))


def accepted(
    made: DraftTokens, p_TV: Tensor, method: Method, draw: Draw | None = None, rule: Any = accept
) -> tuple[int, int]:
    """How many drafts stay, and the dense model's own token."""
    kept, own = rule(Row([], 0, method, None, tokens=[0]), made, p_TV.log(), Generation(9, never, None, draw))
    return int(kept), int(own)


def threshold(least: float) -> Method:
    return verified(verification="threshold", verification_threshold=least)


GREEDY = [([], 0, 0), ([0], 1, 2), ([1], 0, 0), ([0, 2], 2, 1), ([0, 1], 1, 2), ([2, 2], 0, 0)]
LIKELY = [([], 0.1, 0, 0), ([2], 0.15, 1, 2), ([2], 0.25, 0, 0)]
LIKELY += [([1, 0], 0.05, 2, 1), ([1, 0], 0.15, 1, 2), ([1, 0], 0.35, 0, 0)]


def test_greedy_keeps_the_best_and_a_threshold_what_is_likely_enough() -> None:
    for drafted, kept, own in GREEDY:
        assert accepted(drafts(drafted), torch.tensor(P[: len(drafted) + 1]), verified()) == (kept, own)
    for drafted, least, kept, own in LIKELY:
        assert accepted(drafts(drafted), torch.tensor(P[: len(drafted) + 1]), threshold(least)) == (kept, own)


def test_a_threshold_keeps_what_just_reaches_it_and_draws_its_own_token_where_tokens_are_drawn() -> None:
    for least, kept in ((0.25, 1), (0.2501, 0)):
        assert accepted(drafts([3]), torch.ones(2, 4), threshold(least))[0] == kept  # 0.25 each, to the bit
    drawn: list[list[float]] = []

    def draw(row: Row, p_V: Tensor) -> Tensor:
        drawn.append(p_V.tolist())
        return torch.tensor([1])

    assert accepted(drafts([2]), torch.tensor(P[:2]), threshold(0.5), draw) == (0, 1)
    assert accepted(drafts([0]), torch.tensor(P[:2]), threshold(0.5), draw) == (1, 1)
    assert drawn == [pytest.approx(P[0]), pytest.approx(P[1])]


def test_a_rejection_by_rounding_draws_from_the_dense_distribution() -> None:
    """Where p is q but for rounding, nothing is left of p - q."""
    p_V, asked = torch.tensor([0.25, 0.25, 0.5]), []

    def draw(row: Row, p_N: Tensor) -> Tensor:
        asked.append(p_N)
        return torch.tensor([0])

    assert accepted(drafts([1], p_V), p_V.expand(2, -1), verified(), draw) == (0, 0)
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


N = 6
P_TABLE = torch.rand(N + 1, N, generator=torch.Generator().manual_seed(1)).square().add(0.02)
Q_TABLE = torch.rand(N + 1, N, generator=torch.Generator().manual_seed(2)).square().add(0.02)
Q_TABLE[0, 3] = 0.0  # as where the draft's vocabulary lacks a token
P_TABLE[0, 4] = 0.0  # as where a rule forbids one
P_TABLE, Q_TABLE = (table / table.sum(dim=-1, keepdim=True) for table in (P_TABLE, Q_TABLE))
PAIRS = {(a, b): float(P_TABLE[0, a] * P_TABLE[1 + a, b]) for a in range(N) for b in range(N) if a != 4}


def two_tokens(rule: Any, samples: int, count: int = 2) -> Counter[tuple[int, int]]:
    """The first two tokens of rounds of drafts from tables: row 0 for the first token, row 1 + t behind a token t."""
    draw, found = drawing(0), Counter[tuple[int, int]]()
    row: Any = None
    for _ in range(samples):
        text: list[int] = []
        while len(text) < 2:
            places, tokens = [text[-1] + 1 if text else 0], []
            for _ in range(count):
                tokens.append(int(draw(row, Q_TABLE[places[-1]])))
                places.append(1 + tokens[-1])
            made = drafts(tokens, *Q_TABLE[places[:-1]])
            kept, own = accepted(made, P_TABLE[places], verified(), draw, rule)
            text += [*tokens[:kept], own]
        found[text[0], text[1]] += 1
    return found


@pytest.mark.parametrize(("samples", "count"), [(8_000, 2), (4_000, 1), (4_000, 0)])
def test_sampled_texts_are_distributed_as_the_dense_models(samples: int, count: int) -> None:
    assert surprise(two_tokens(accept, samples, count), PAIRS) > 1e-3


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("torch.stack([1.0 - keep, keep])", "torch.stack([0.0 * keep, 1.0 + keep])"),
        ("(p_TV - q_TV).clamp(min=0.0)", "p_TV"),
        ("(p_k / q_k)", "(q_k / p_k)"),
        ("(p_TV - q_TV).clamp(min=0.0).index_select(0, kept)[0]", "(p_TV - q_TV).clamp(min=0.0)[0]"),
    ],
    ids=["all are accepted", "instead of a rejected one, any", "upside down", "the wrong place"],
)
def test_a_rule_that_is_broken_on_purpose_is_found(right: str, wrong: str) -> None:
    source, names = inspect.getsource(accept), dict(vars(verification))
    assert source.count(right) == 1
    exec("from __future__ import annotations\n" + source.replace(right, wrong), names)
    found = [two_tokens(names["accept"], 2_000, count) for count in (1, 2)]
    assert any(not set(one) <= set(PAIRS) or surprise(one, PAIRS) < 1e-3 for one in found)


@pytest.fixture(scope="module")
def smallest() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return build("llama", **sizes, vocab_size=40)


@torch.no_grad()
@pytest.mark.parametrize(("vocabulary", "prompt_lookup"), [("full", False), ("prompt", False), ("prompt", True)])
def test_so_are_texts_of_the_whole_loop(smallest: PreTrainedModel, vocabulary: str, prompt_lookup: bool) -> None:
    """Two tokens behind a given one, of five that are allowed, some of which the draft's vocabulary lacks."""
    allowed, first = [2, 9, 17, 26, 33], 11
    # What follows the first token is found, or drafted.
    ids = [7, 5, first, 9, 17, 7, 5] if prompt_lookup else [3, 7, 5]

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
    method = verified(sparsity=0.75, draft_tokens=2, draft_vocabulary=vocabulary, prompt_lookup=prompt_lookup)
    state = prefilled(engine, ids, method)
    experts = chosen(engine, state, method)

    def run(samples: int, draw: Draw) -> tuple[Counter[tuple[int, int]], float]:
        found, kept, drafted = Counter[tuple[int, int]](), 0, 0
        for _ in range(samples):
            row = Row([state], 0, method, experts)
            text = decoded(engine, row, 4, process_logits=scores, draw=draw)
            assert text[0] == first
            found[text[1], text[2]] += 1
            kept, drafted = kept + row.drafts.accepted, drafted + row.drafts.drafted
        return found, kept / drafted

    found, share = run(800, drawing(0))
    assert 0.1 < share < 0.9
    assert surprise(found, expected) > 1e-3
    right = drawing(0)
    found, share = run(200, lambda row, p_N: torch.tensor([1]) if len(p_N) == 2 else right(row, p_N))
    assert share == 1.0
    assert surprise(found, expected) < 1e-3, "where all is accepted"


def test_a_draft_without_any_allowed_token_is_a_guess() -> None:
    """Scores that forbid the whole vocabulary of the draft leave no distribution: neither nan nor an error follows."""
    for draw in (None, drawing(0)):
        for draft_tokens in (4, "auto"):
            engine, method = Engine(tiny("llama")), verified(draft_tokens=draft_tokens)
            state = prefilled(engine, [5, 6, 7], method, keep_logits=1)
            assert state.likely is not None
            (only, *_) = {*range(VOCABULARY)} - {*state.likely.tolist()}
            mask_V = torch.ones(VOCABULARY, dtype=torch.bool).index_fill_(0, torch.tensor([only]), False)
            row = Row([state], 0, method, chosen(engine, state, method))
            process = lambda rows, drafted, logits_BV, mask_V=mask_V: logits_BV.masked_fill(mask_V, -torch.inf)  # noqa: E731
            assert decoded(engine, row, 8, process_logits=process, draw=draw) == [only] * 8
            assert row.drafts.drafted > 0
