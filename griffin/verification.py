"""Verified decoding: the experts draft some tokens, and one step of the dense model checks them all.

A pruned model is a draft of itself: it needs no second model and no training. What the check keeps is the dense model's
text (`exact`, greedy), or of its distribution (`exact`, sampling: speculative sampling, Leviathan et al. 2023,
arXiv 2211.17192), or what it finds likely enough (`threshold`: Sirius, Zhou et al. 2024, arXiv 2409.03856; not exact).
The KV cache holds entries of the dense model only, and what the check saw of the accepted tokens teaches the draft: the
compensation learns from it at every check, the vocabulary grows, and with `refresh=experts` experts are chosen anew.

One round:

    drafts = draft(..)       k steps on the experts
    check(..)                one dense step over the last token and the k drafts
    accept_..(..)            how many of the drafts stay, and one token of the dense model's own

Dimensions: k = drafted tokens, T = k + 1, the tokens of a check, V = vocabulary.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from griffin.draft import Draft, DraftLength, Drafts
from griffin.engine import Engine
from griffin.kv_cache import KVCache
from griffin.rows import Generation, Row


@torch.no_grad()
def decode_verified(engine: Engine, row: Row, generation: Generation, columns: int) -> None:
    """Generate one row to its end: its `tokens` and `drafting` grow.

    Args:
        engine: the model; whatever its mode, drafts run compact.
        row: a row whose method is verified, with experts.
        generation: how tokens are picked, and until when.
        columns: positions that prompt and text have room for.
    """
    began = time.perf_counter()
    assert row.state.cache is not None
    draft_length = DraftLength(row.method.draft_tokens, row.drafting)
    # A compiled check has one length, whatever was drafted: the last token is there more than once, and forgotten.
    checked = draft_length.most + 1 if engine.compiled is not None else None
    cache = engine.decoding_cache(1, columns + (checked or 0), verified=True)
    cache.put(0, row.state.cache, row.state.length)
    cache.show(1, 0, row.state.length)
    first = generation.pick([row], row.state.logits_TV[-1:].float())
    row.state = row.state.without_cache()
    if not _goes_on(row, int(first), generation):
        return
    draft = Draft(engine, row)
    try:
        going = True
        while going:
            for token in one_round(engine, row, draft, draft_length, cache, generation, checked):
                row.drafting.emitted += 1
                going = _goes_on(row, token, generation)
                if not going:
                    break
    finally:
        engine.use_dense()
        row.seconds += time.perf_counter() - began


def _goes_on(row: Row, token: int, generation: Generation) -> bool:
    row.tokens.append(token)
    return not generation.ended(row) and len(row.tokens) < generation.limit


def one_round(
    engine: Engine,
    row: Row,
    draft: Draft,
    length: DraftLength,
    cache: KVCache,
    generation: Generation,
    checked: int | None = None,
) -> list[int]:
    """Draft, check, accept, learn; returns the tokens that the row goes on with, at least one.

    The cache ends before the row's last token, and after the round before the last one of what is returned. `checked`
    is the number of tokens that every check has; None: as many as there are.
    """
    ran = row.state.length + len(row.tokens) - 1
    with row.drafting.timed("draft"):
        drafts = draft.run(length, cache, generation)
        cache.show(1, 0, ran)
    with row.drafting.timed("check"), engine.watching(draft.learns) as seen:
        latest = [row.tokens[-1], *drafts.tokens]
        padded = [*latest, *latest[-1:] * ((checked or len(latest)) - len(latest))]
        positions_1T = torch.arange(ran, ran + len(padded), device=engine.device).unsqueeze(0)
        logits_1TV = engine.dense(torch.tensor([padded]).to(engine.device), cache, positions_BS=positions_1T)
        logits_TV = logits_1TV[0, : len(latest)].float()
        if row.method.verification == "threshold":
            kept, own = accept_threshold(row, drafts, logits_TV, generation, row.method.verification_threshold)
        elif generation.draw is None:
            kept, own = accept_greedy(row, drafts, logits_TV, generation)
        else:
            kept, own = accept_sampled(row, drafts, logits_TV, generation)
        cache.show(1, 0, ran + kept + 1)
    row.drafting.checks += 1
    row.drafting.drafted += len(drafts)
    row.drafting.accepted += kept
    if len(drafts.chances) == len(drafts):
        length.update(drafts.chances, kept)
    else:
        length.update_lookup(kept)
    tokens = [*drafts.tokens[:kept], own]
    draft.learn(seen, kept + 1, tokens, logits_TV)
    return tokens


# -- accepting --------------------------------------------------------------------------------------------------------


def accept_greedy(row: Row, drafts: Drafts, logits_TV: Tensor, generation: Generation) -> tuple[int, int]:
    """Keep drafts while they are the dense model's best token; returns how many, and its best token behind them."""
    if generation.scores is not None:
        logits_TV = torch.stack(
            [generation.scored(row, drafts.tokens[:place], logits_V) for place, logits_V in enumerate(logits_TV)]
        )
    best = logits_TV.argmax(dim=-1).tolist()
    kept = 0
    while kept < len(drafts) and drafts.tokens[kept] == best[kept]:
        kept += 1
    return kept, best[kept]


def accept_sampled(row: Row, drafts: Drafts, logits_TV: Tensor, generation: Generation) -> tuple[int, int]:
    """Speculative sampling (arXiv 2211.17192, algorithm 1): the tokens are distributed as the dense model's.

    A token x that was drawn from q is kept with probability min(1, p(x) / q(x)); instead of the first one that is not,
    one is drawn from max(p - q, 0), normalised; behind the last one, from p.
    """
    draw = generation.draw
    assert draw is not None
    for place, token in enumerate(drafts.tokens):
        p_V = generation.scored(row, drafts.tokens[:place], logits_TV[place]).softmax(dim=-1)
        q_V = drafts.chances_V[place]
        keep = (p_V[token] / q_V[token]).clamp(max=1.0)
        if int(draw(row, torch.stack([1.0 - keep, keep]))) == 0:
            residual_V = (p_V - q_V).clamp(min=0.0)  # nothing of it may be left by rounding, where p is q
            return place, int(draw(row, torch.where(residual_V.sum() > 0, residual_V, p_V)))
    return len(drafts), int(draw(row, generation.scored(row, drafts.tokens, logits_TV[-1]).softmax(dim=-1)))


def accept_threshold(
    row: Row, drafts: Drafts, logits_TV: Tensor, generation: Generation, threshold: float
) -> tuple[int, int]:
    """Keep drafts while the dense model gives each at least a threshold (Sirius, arXiv 2409.03856). Not exact."""
    kept = 0
    while True:
        chances_V = generation.scored(row, drafts.tokens[:kept], logits_TV[kept]).softmax(dim=-1)
        if kept == len(drafts) or chances_V[drafts.tokens[kept]] < threshold:
            own = chances_V.argmax() if generation.draw is None else generation.draw(row, chances_V)
            return kept, int(own)
        kept += 1
