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

Dimensions: k = drafted tokens, V = vocabulary, D = FF width, K = kept neurons, H = hidden size, N = tokens that are
learned.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from griffin.activations import Recorder
from griffin.compensation import COMPENSATIONS
from griffin.correction import Correction, Fit
from griffin.draft_vocabulary import BEST
from griffin.engine import Engine
from griffin.kv_cache import KVCache
from griffin.method import MOST_DRAFTED
from griffin.prompt import choose, wanted
from griffin.refresh import WEIGHT, next_refresh
from griffin.rows import Drafting, Generation, Row
from griffin.traffic import Traffic, traffic


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
    cache = engine.decoding_cache(1, columns, verified=True)
    cache.put(0, row.state.cache, row.state.length)
    cache.show(1, 0, row.state.length)
    first = generation.pick([row], row.state.logits_TV[-1:].float())
    row.state = row.state.without_cache()
    if not _goes_on(row, int(first), generation):
        return
    draft, length = _Draft(engine, row), _DraftLength(row.method.draft_tokens, row.drafting)
    try:
        going = True
        while going:
            for token in one_round(engine, row, draft, length, cache, generation):
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
    engine: Engine, row: Row, draft: _Draft, length: _DraftLength, cache: KVCache, generation: Generation
) -> list[int]:
    """Draft, check, accept, learn; returns the tokens that the row goes on with, at least one.

    The cache ends before the row's last token, and after the round before the last one of what is returned.
    """
    clock, ran = row.drafting.seconds, row.state.length + len(row.tokens) - 1
    with _timed(clock, "draft"):
        drafts = draft.run(length, cache, generation)
        cache.show(1, 0, ran)
    with _timed(clock, "check"), engine.watching(draft.learns) as seen:
        latest_T = torch.tensor([row.tokens[-1], *drafts.tokens], device=engine.device)
        logits_TV = engine.dense(latest_T.unsqueeze(0), cache)[0].float()
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


@contextmanager
def _timed(clock: dict[str, float], part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    clock[part] += time.perf_counter() - began


# -- drafting ---------------------------------------------------------------------------------------------------------


@dataclass
class Drafts:
    """Drafted tokens.

    Attributes:
        tokens: the tokens.
        chances: what the draft gave each of them; empty where they were looked up.
        chances_V: the draft's distributions that they were drawn from; none where decoding is greedy.
    """

    tokens: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    chances_V: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)


class _Draft:
    """The pruned model as it stands: its experts, what they have learned, and its vocabulary.

    Args:
        engine: the model.
        row: whose method it is.
    """

    def __init__(self, engine: Engine, row: Row) -> None:
        self._engine, self._row = engine, row
        assert row.experts is not None
        self._prompt = row.state.ids
        self._kept = [len(neurons_K) for neurons_K in row.experts.neurons]
        self._traffic: Traffic = traffic(engine.model, self._kept)
        self._prunes_vocabulary = row.method.prunes_vocabulary
        if self._prunes_vocabulary:
            assert row.state.likely is not None
            engine.vocabulary.begin(row.state.likely)
        # Per layer, z [N, D] of the accepted tokens of each check that have not joined the statistics, and z with the
        # block's output [N, H] of those that no fit has learned.
        self._unread: list[list[Tensor]] = []
        self._unlearned: list[list[tuple[Tensor, Tensor]]] = []
        self._chosen_at = 0
        self._load()

    def _load(self) -> None:
        experts = self._row.experts
        assert experts is not None
        self._engine.draft(experts)
        learns = self._row.method.refresh != "none" and COMPENSATIONS[self._row.method.compensation] is not None
        self._fits: list[Fit | None] = [
            corrections[-1].fit if corrections and learns else None for corrections in experts.corrections
        ]

    @property
    def learns(self) -> bool:
        """Whether it needs the activations of checks."""
        return any(self._fits) or self._row.method.refresh == "experts"

    @property
    def bytes(self) -> int:
        """That one step of it reads."""
        return self._traffic.draft(len(self._engine.vocabulary.tokens_N) if self._prunes_vocabulary else None)

    def run(self, length: _DraftLength, cache: KVCache, generation: Generation) -> Drafts:
        """Draft tokens behind the row's last one."""
        engine, row, drafts = self._engine, self._row, Drafts()
        most = min(MOST_DRAFTED, generation.limit - len(row.tokens) - 1)
        cost = self.bytes / self._traffic.dense
        if row.method.prompt_lookup and length.lookup_pays(cost):
            found = look_up([*self._prompt, *row.tokens], min(most, length.looked_up))
            if found:
                row.drafting.looked_up += len(found)
                return self._looked_up(found, generation)
        if not length.more(drafts.chances, most, cost):
            return drafts
        engine.resume_draft()
        if self._prunes_vocabulary:
            engine.vocabulary.on()
        latest_11 = torch.tensor([row.tokens[-1:]], device=engine.device)
        while length.more(drafts.chances, most, cost):
            logits_V = self._logits(latest_11, cache, drafts, generation)
            chances_V = logits_V.softmax(dim=-1)
            if generation.draw is None:
                token = chances_V.argmax().view(1)
            else:
                token = generation.draw(row, chances_V)
                drafts.chances_V.append(chances_V)
            chance, number = chances_V[token], int(token)
            row.drafting.draft_bytes += self.bytes
            latest_11 = token.view(1, 1)
            drafts.tokens.append(number)
            drafts.chances.append(float(chance))
        return drafts

    def _looked_up(self, tokens: list[int], generation: Generation) -> Drafts:
        """Drafts that cost nothing, each drawn from a distribution that has no other token."""
        if generation.draw is None:
            return Drafts(tokens)
        chances_kV = torch.zeros(len(tokens), self._traffic.vocabulary, device=self._engine.device)
        chances_kV[range(len(tokens)), tokens] = 1.0
        return Drafts(tokens, chances_V=list(chances_kV))

    def _logits(self, latest_11: Tensor, cache: KVCache, drafts: Drafts, generation: Generation) -> Tensor:
        logits_N = self._engine.forward(latest_11, cache)[0, -1].float()
        if not self._prunes_vocabulary:
            logits_V = logits_N
        else:
            logits_V = logits_N.new_full((self._traffic.vocabulary,), -torch.inf)
            logits_V.index_copy_(0, self._engine.vocabulary.tokens_N, logits_N)
        scores_V = _scores(self._row, drafts.tokens, logits_V, generation)
        if self._prunes_vocabulary:  # where none of its tokens is allowed, whatever is drafted is a guess
            scores_V = torch.where(scores_V.max() == -torch.inf, 0.0, scores_V)
        return scores_V

    # -- learning -----------------------------------------------------------------------------------------------------

    def learn(
        self, seen: Sequence[tuple[Tensor, Tensor]], accepted: int, tokens: Sequence[int], logits_TV: Tensor
    ) -> None:
        """Learn from a check.

        Args:
            seen: per layer, z [T, D] and what the block made of it [T, H]; empty where nothing is learned of them.
            accepted: how many of the checked tokens stay; the first ones.
            tokens: what the row goes on with.
            logits_TV: the dense model's.
        """
        clock, method = self._row.drafting.seconds, self._row.method
        with _timed(clock, "learn"):
            if self._prunes_vocabulary:
                best = logits_TV.topk(min(BEST, logits_TV.shape[1]), dim=-1).indices.flatten()
                self._engine.vocabulary.add(torch.cat([best, torch.tensor(tokens, device=best.device)]))
            if any(self._fits):
                self._unlearned.append([(z[:accepted], output[:accepted]) for z, output in seen])
                if sum(len(check[0][0]) for check in self._unlearned) >= LEARN_EVERY:
                    for layer, fit in enumerate(self._fits):
                        if fit is not None:
                            z_ND, output_NH = map(
                                torch.cat, zip(*(check[layer] for check in self._unlearned), strict=True)
                            )
                            self._fits[layer] = self._learn_layer(layer, fit, z_ND, output_NH)
                    self._unlearned = []
        if method.refresh == "experts":
            with _timed(clock, "choose"):
                self._unread.append([z[:accepted].float() for z, _ in seen])
                ran = [*self._row.tokens, *tokens[:-1]]
                if len(ran) >= next_refresh(self._chosen_at):
                    self._choose(ran)

    def _learn_layer(self, layer: int, fit: Fit, z_ND: Tensor, output_NH: Tensor) -> Fit:
        """One step of recursive least squares; the error is what the dense block wrote and the draft's does not."""
        experts = self._row.experts
        assert experts is not None
        kept_NK = z_ND.index_select(1, experts.neurons[layer])
        error_NH = (output_NH - self._engine.draft_output(layer, kept_NK)).float()
        norms_N1 = torch.linalg.vector_norm(z_ND.float(), dim=-1, keepdim=True)
        scale_N1 = WEIGHT**0.5 / torch.where(norms_N1 > 0, norms_N1, 1.0)
        basis_NK, weights_NH, learned = fit.step(scale_N1 * kept_NK.float(), scale_N1 * error_NH)
        self._engine.draft_learns(layer, Correction(basis_NK, weights_NH))
        return learned

    def _choose(self, ran: Sequence[int]) -> None:
        """New experts, from the prompt and all that was accepted: new tokens, all of which have run."""
        engine, row = self._engine, self._row
        layers = [torch.cat(rows) for rows in zip(*self._unread, strict=True)]
        read = ran[self._chosen_at :]
        self._unread, self._unlearned, self._chosen_at = [], [], len(ran)
        recorder = Recorder(engine.blocks, wanted([row.method]))
        recorder.begin(row.state.recorded)
        recorder.expect(1, len(layers[0]), None, WEIGHT)
        for layer, z_ND in enumerate(layers):
            recorder.record(layer, z_ND)
        row.state = row.state.extended(read, recorder.recorded)
        row.experts = choose(engine, row.states, row.method, row.seed)
        self._load()


# A fit learns from so many tokens or more at a time: what that costs hardly depends on their number (measured in
# docs/verified-decoding.md).
LEARN_EVERY = 4

# Of prompt lookup: so many last tokens must have stood before, more of them rather than fewer; and so many that
# followed are drafted where `draft_tokens` does not say.
_NGRAMS = (3, 2)
LOOKED_UP = 8

# Tokens and rounds of looked-up drafts that a row starts from.
_LOOKUP_PRIOR = (6.0, 2.0)


def look_up(tokens: Sequence[int], most: int) -> list[int]:
    """Up to `most` tokens that followed where the last tokens stood before, the latest time; empty if they did not
    (prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding)."""
    for size in _NGRAMS:
        last = list(tokens[-size:])
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - 1] == last[-1] and list(tokens[end - size : end]) == last:
                return list(tokens[end : end + most])
    return []


# Of `draft_tokens=auto`: what a row starts from, as sums over drafts of what the draft gave them, those accepted, and
# their number; and what is left of such sums after a round, so that what is long past is forgotten.
_PRIOR = (4.0, 3.5, 5.0)
_MEMORY = 0.95


class _DraftLength:
    """How many tokens are drafted: a fixed number, or as long as another one is worth its cost.

    With `auto`, the draft's own probabilities, corrected by how often they held so far, say how likely all drafts of a
    round are accepted. One more token is worth it while the tokens that it is expected to give, for its share c of a
    dense step, are more than what the row gets for a dense step's cost on average.

    Args:
        draft_tokens: the number, or `auto`.
        drafting: what became of the row's drafts so far.

    Attributes:
        looked_up: how many tokens are drafted where they cost nothing.
    """

    def __init__(self, draft_tokens: int | str, drafting: Drafting) -> None:
        self._fixed = draft_tokens if isinstance(draft_tokens, int) else None
        self._drafting = drafting
        self._believed, self._accepted, self._checked = _PRIOR
        self._lookup = _LOOKUP_PRIOR
        self.looked_up = LOOKED_UP if self._fixed is None else self._fixed

    def more(self, chances: Sequence[float], most: int, cost: float) -> bool:
        """Whether to draft one more token.

        Args:
            chances: what the draft gave the tokens so far.
            most: tokens at most.
            cost: of drafting one, in dense steps.
        """
        if len(chances) >= most:
            return False
        if self._fixed is not None:
            return len(chances) < self._fixed
        all_accepted = 1.0
        for chance in chances:
            all_accepted *= min(1.0, chance * self._accepted / self._believed)
        return all_accepted * self._accepted / self._checked > self._rate(cost) * cost

    def _rate(self, cost: float) -> float:
        """Tokens that the row gets for a dense step's cost."""
        done = self._drafting
        drafted = done.drafted - done.looked_up
        return (done.emitted + 2.0) / (done.checks + cost * drafted + 1.0 + cost)

    def lookup_pays(self, cost: float) -> bool:
        """Whether a check of what is looked up has lately brought more tokens than the row gets for its cost."""
        tokens, rounds = self._lookup
        return tokens > rounds * self._rate(cost)

    def update_lookup(self, accepted: int) -> None:
        """Take in what became of a round whose drafts were looked up."""
        self._lookup = (_MEMORY * self._lookup[0] + accepted + 1, _MEMORY * self._lookup[1] + 1)

    def update(self, chances: Sequence[float], accepted: int) -> None:
        """Take in what became of a round: the drafts behind a rejected one were not checked."""
        checked = chances[: accepted + 1]
        seen = (sum(checked), accepted, len(checked))
        before = (self._believed, self._accepted, self._checked)
        self._believed, self._accepted, self._checked = (
            prior + _MEMORY * (value - prior) + new for prior, value, new in zip(_PRIOR, before, seen, strict=True)
        )


# -- accepting --------------------------------------------------------------------------------------------------------


def accept_greedy(row: Row, drafts: Drafts, logits_TV: Tensor, generation: Generation) -> tuple[int, int]:
    """Keep drafts while they are the dense model's best token; returns how many, and its best token behind them."""
    if generation.scores is not None:
        logits_TV = torch.stack(
            [_scores(row, drafts.tokens[:place], logits_V, generation) for place, logits_V in enumerate(logits_TV)]
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
        p_V = _scores(row, drafts.tokens[:place], logits_TV[place], generation).softmax(dim=-1)
        q_V = drafts.chances_V[place]
        keep = (p_V[token] / q_V[token]).clamp(max=1.0)
        if int(draw(row, torch.stack([1.0 - keep, keep]))) == 0:
            residual_V = (p_V - q_V).clamp(min=0.0)  # nothing of it may be left by rounding, where p is q
            return place, int(draw(row, torch.where(residual_V.sum() > 0, residual_V, p_V)))
    return len(drafts), int(draw(row, _scores(row, drafts.tokens, logits_TV[-1], generation).softmax(dim=-1)))


def accept_threshold(
    row: Row, drafts: Drafts, logits_TV: Tensor, generation: Generation, threshold: float
) -> tuple[int, int]:
    """Keep drafts while the dense model gives each at least a threshold (Sirius, arXiv 2409.03856). Not exact."""
    kept = 0
    while True:
        chances_V = _scores(row, drafts.tokens[:kept], logits_TV[kept], generation).softmax(dim=-1)
        if kept == len(drafts) or chances_V[drafts.tokens[kept]] < threshold:
            own = chances_V.argmax() if generation.draw is None else generation.draw(row, chances_V)
            return kept, int(own)
        kept += 1


def _scores(row: Row, drafted: Sequence[int], logits_V: Tensor, generation: Generation) -> Tensor:
    return logits_V if generation.scores is None else generation.scores(row, drafted, logits_V)
