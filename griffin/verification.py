"""Verified decoding: the experts draft some tokens, and one step of the dense model checks them all.

A pruned model is a draft model of itself: it needs no second model and no training. What the check keeps is the dense
model's text or of its distribution (`exact`), or what it finds likely enough (`threshold`). The KV cache holds entries
of the dense model only. What the check saw of the accepted tokens teaches the draft model: the compensation learns from
it, and the vocabulary grows.

The host waits for the device once a round, to read what was accepted; with `draft_tokens=auto` and steps that are not
compiled, also for the probability of each draft token.

Dimensions: k = draft tokens, T = k + 1, the tokens of a check.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from griffin.draft import DraftLength, DraftModel, DraftTokens
from griffin.engine import Engine
from griffin.kv_cache import KVCache, copied
from griffin.rows import Generation, Row


@torch.no_grad()
def decode_verified(engine: Engine, row: Row, generation: Generation, columns: int) -> None:
    """Generate one row to its end: its `tokens` and `drafts` grow."""
    began = time.perf_counter()
    assert row.state.cache is not None
    length = DraftLength(row.method.draft_tokens, row.drafts)
    # A compiled check has one length, whatever was drafted: the last token is there more than once, and discarded.
    width = length.most + 1 if engine.compiled else 0
    cache = engine.decoding_cache(1, columns + width, static=engine.compiled)
    cache.put(0, row.state.cache, row.state.length)
    cache.set_window(1, 0, row.state.length)
    first = generation.pick([row], row.state.logits_TV[-1:].float())
    row.state = replace(row.state, cache=None)
    if not generation.ends(row, int(first)):
        draft = DraftModel(engine, row)
        while _round(engine, row, draft, length, cache, generation, width):
            pass
    if row.keep_cache:
        held = copied(cache.row(0, 0, row.state.length + len(row.tokens) - 1))
        row.state = replace(row.state, cache=held)
    row.seconds += time.perf_counter() - began


def _round(
    engine: Engine, row: Row, draft: DraftModel, length: DraftLength, cache: KVCache, generation: Generation, width: int
) -> bool:
    """Draft, check (at least `width` tokens), accept, learn; whether the row goes on. Before and after, the cache ends
    before the row's last token."""
    ran = row.state.length + len(row.tokens) - 1
    with row.drafts.timed("draft"):
        drafts = draft.draft(length, cache, generation)
        cache.set_window(1, 0, ran)
    with row.drafts.timed("check"):
        latest = torch.tensor(row.tokens[-1:]).to(engine.device)
        ids_T = torch.cat([latest, *drafts.tokens])
        count = len(ids_T)
        ids_1T = torch.cat([ids_T, ids_T[-1:].expand(max(width - count, 0))]).unsqueeze(0)
        positions_1T = torch.arange(ran, ran + ids_1T.shape[1], device=engine.device).unsqueeze(0)
        if draft.learns:
            logits_1TV, groups = engine.dense.watching(ids_1T, cache, positions_BS=positions_1T)
        else:
            logits_1TV, groups = engine.dense(ids_1T, cache, positions_BS=positions_1T), []
        logits_TV = logits_1TV[0, :count].float()
        kept, own = accept(row, drafts, logits_TV, generation)
        known = draft.meet(logits_TV, own)
        (accepted, token, known_tokens, *drafted), probabilities = on_host(
            torch.cat([kept, own, known, *drafts.tokens]), drafts.probabilities
        )
    tokens = [*drafted[:accepted], token]
    length.update(probabilities, accepted)
    row.drafts.widths.append(count)
    row.drafts.drafted += len(drafts)
    row.drafts.accepted_by_check.append(0)
    cache.set_window(1, 0, ran + accepted + 1)
    draft.learn(groups, accepted + 1, known_tokens)
    for place, token in enumerate(tokens):
        row.drafts.emitted += 1
        row.drafts.accepted_by_check[-1] += place < accepted
        if generation.ends(row, token):
            return False
    return True


def on_host(numbers: Tensor, probabilities: list[Tensor]) -> tuple[list[int], list[float]]:
    """What a round gave: here the host waits for the device, once."""
    packed = torch.cat([numbers.double(), *(probability.double() for probability in probabilities)]).tolist()
    return [int(number) for number in packed[: len(numbers)]], packed[len(numbers) :]


def accept(row: Row, drafts: DraftTokens, logits_TV: Tensor, generation: Generation) -> tuple[Tensor, Tensor]:
    """How many drafts stay, and the dense model's own token behind them; [1] each, on the device.

    `exact`: while they are its best token; or speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, algorithm
    1): a token x that was drawn from q stays with probability min(1, p(x) / q(x)), and instead of the first one that
    does not, one is drawn from max(p - q, 0), normalised. `threshold`: while the dense model gives each at least a
    probability (Sirius, Zhou et al. 2024, arXiv 2409.03856). The logits are the dense model's, float32.
    """
    drafted_k = torch.cat(drafts.tokens) if drafts.tokens else logits_TV.new_empty(0, dtype=torch.int64)
    if generation.process_logits is not None:
        texts = enumerate(logits_TV)
        logits_TV = torch.stack([generation.processed(row, drafted_k[:place], logits_V) for place, logits_V in texts])
    count = len(drafted_k)
    if row.method.verification == "threshold":
        p_TV = logits_TV.softmax(dim=-1)
        stays_k = p_TV[:count].gather(1, drafted_k.unsqueeze(1)).squeeze(1) >= row.method.verification_threshold
        kept = stays_k.cumprod(0).sum().view(1)
        p_V = p_TV.index_select(0, kept)[0]
        return kept, p_V.argmax().view(1) if generation.draw is None else generation.draw(row, p_V)
    if generation.draw is None:
        best_T = logits_TV.argmax(dim=-1)
        kept = (best_T[:count] == drafted_k).cumprod(0).sum().view(1)
        return kept, best_T.index_select(0, kept)
    p_TV = logits_TV.softmax(dim=-1)
    q_kV = torch.stack(drafts.distributions) if count else p_TV[:0]
    p_k, q_k = (each.gather(1, drafted_k.unsqueeze(1)).squeeze(1) for each in (p_TV[:count], q_kV))
    keep_k = (p_k / q_k).clamp(max=1.0)
    draws = [generation.draw(row, torch.stack([1.0 - keep, keep])) for keep in keep_k]
    kept = torch.cat(draws).cumprod(0).sum().view(1) if draws else drafted_k.new_zeros(1)
    # Behind the last draft nothing is taken from p.
    q_TV = torch.cat([q_kV, torch.zeros_like(p_TV[:1])])
    p_V, residual_V = p_TV.index_select(0, kept)[0], (p_TV - q_TV).clamp(min=0.0).index_select(0, kept)[0]
    return kept, generation.draw(row, torch.where(residual_V.sum() > 0, residual_V, p_V))  # where p is q, by rounding
