"""The draft model of verified decoding: what the experts write, and what they learn from checks.

Dimensions: k = draft tokens, T = tokens of a check, C = rows of its output embedding, N = tokens that are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from griffin.draft_vocabulary import BEST
from griffin.engine import Engine
from griffin.kv_cache import KVCache
from griffin.method import MOST_DRAFTED
from griffin.refresh import Seen, to_learn
from griffin.ridge import RidgeFit
from griffin.rows import DraftStatistics, Generation, Row, Traffic, traffic

# Tokens that a fit learns from at a time, at least: their number hardly costs anything (docs/verified-decoding.md).
LEARN_EVERY = 8

# Of `draft_tokens=auto`: the sums that a row starts from, of the probabilities that the draft gave its tokens, of those
# accepted, and of all; and what is left of them after a round.
_PRIOR = (4.0, 3.5, 5.0)
_MEMORY = 0.95


@dataclass
class DraftTokens:
    """Tokens that were drafted in a round. They stay on the device."""

    tokens: list[Tensor] = field(default_factory=list)  # [1] each, int64
    probabilities: list[Tensor] = field(default_factory=list)  # [1] each
    distributions: list[Tensor] = field(default_factory=list)  # [V] that they were drawn from; none in greedy decoding

    def __len__(self) -> int:
        return len(self.tokens)


class DraftModel:
    """The pruned model as it stands: its experts, what they have learned, and its vocabulary."""

    def __init__(self, engine: Engine, row: Row) -> None:
        self._engine, self._row = engine, row
        assert row.experts is not None
        self._traffic: Traffic = traffic(
            engine.model, [len(neurons_K) for neurons_K in row.experts.neurons], quantization=row.method.quantization
        )
        self._vocabulary = engine.draft(row.method.quantization) if row.method.prunes_vocabulary else None
        if self._vocabulary is not None:
            assert row.state.likely is not None
            self._vocabulary.begin(row.state.likely)
            row.state = row.state if row.keep_cache else replace(row.state, likely=None)
        self._compact = engine.compact(row.method.quantization)
        self._compact.load(row.experts)
        if self._vocabulary is None:
            self._compact.quantize_head()
        self._fits: list[RidgeFit] = list(row.experts.fits) if row.method.refresh != "none" else []
        # By fit, what it has not learned: kept activations [L, N, K] and what the blocks wrote there [L, N, H].
        self._unlearned: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._fits]
        self.learns = bool(self._fits)  # and needs the activations of checks
        # The memory of corrections can go: the weights are loaded, and learn.
        row.experts = replace(row.experts, corrections=((),) * len(row.experts.corrections), fits=())

    @property
    def bytes(self) -> int:
        """That one step of it reads."""
        rows = None if self._vocabulary is None else self._vocabulary.used
        return self._traffic.draft(rows) + self._compact.learned_bytes

    def draft(self, length: DraftLength, cache: KVCache, generation: Generation) -> DraftTokens:
        """Draft tokens behind the row's last one."""
        row, drafts = self._row, DraftTokens()
        most = min(length.most, generation.max_new_tokens - len(row.tokens) - 1)
        cost = self.bytes / self._traffic.dense
        # Where calls are compiled, the host does not wait for the draft's probabilities.
        planned = length.planned(most, cost) if self._engine.compiled else None
        probabilities: list[float] = []
        latest_11 = torch.tensor([row.tokens[-1:]]).to(self._engine.device)
        while len(drafts) < planned if planned is not None else length.more(probabilities, most, cost):
            token, probability = self._step(latest_11, cache, drafts, generation)
            row.drafts.draft_bytes += self.bytes
            latest_11 = token.view(1, 1)
            drafts.tokens.append(token)
            drafts.probabilities.append(probability)
            if planned is None:
                probabilities.append(0.0 if length.fixed else float(probability))
        return drafts

    def _step(
        self, latest_11: Tensor, cache: KVCache, drafts: DraftTokens, generation: Generation
    ) -> tuple[Tensor, Tensor]:
        """One token behind the latest one, and its probability, [1] each."""
        row, vocabulary = self._row, self._vocabulary
        at = row.state.length + len(row.tokens) - 1 + len(drafts)
        position_11 = torch.arange(at, at + 1, device=latest_11.device).unsqueeze(0)
        view = self._compact if vocabulary is None else vocabulary
        logits = view(latest_11, cache, positions_BS=position_11)[0, -1].float()
        if vocabulary is not None:
            logits = vocabulary.allowed(logits)
            if generation.draw is None and generation.process_logits is None:
                probability, place = logits.softmax(dim=-1).max(dim=-1, keepdim=True)
                return vocabulary.tokens_C[place], probability
            logits = vocabulary.spread(logits)
        drafted_k = torch.cat(drafts.tokens) if drafts.tokens else None
        logits_V = generation.processed(row, drafted_k, logits)
        if vocabulary is not None:  # where none of its tokens is allowed, whatever is drafted is a guess
            logits_V = torch.where(logits_V.max() == -torch.inf, 0.0, logits_V)
        probabilities_V = logits_V.softmax(dim=-1)
        if generation.draw is None:
            probability, token = probabilities_V.max(dim=-1, keepdim=True)
            return token, probability
        token = generation.draw(row, probabilities_V)
        drafts.distributions.append(probabilities_V)
        return token, probabilities_V[token]

    def meet(self, logits_TV: Tensor, token: Tensor) -> Tensor:
        """Have the vocabulary take in what a check found likely, and its own token; how many it has then, [1] each."""
        if self._vocabulary is None:
            return token.new_zeros(1)
        best = logits_TV.topk(min(BEST, logits_TV.shape[1]), dim=-1).indices.flatten()
        self._vocabulary.add(torch.cat([best, token]))
        return self._vocabulary.count.view(1).to(token.device)

    def learn(self, groups: Sequence[Seen], accepted: int, known: int) -> None:
        """Learn from a check."""
        with self._row.drafts.timed("learn"):
            if self._vocabulary is not None:
                self._vocabulary.use(known)
            for place, (fit, unlearned) in enumerate(zip(self._fits, self._unlearned, strict=True)):
                unlearned.append(to_learn(fit, groups, accepted))
                if sum(kept_LNK.shape[1] for kept_LNK, _ in unlearned) >= LEARN_EVERY:
                    kept_LNK, target_LNH = (torch.cat(parts, dim=1) for parts in zip(*unlearned, strict=True))
                    corrections, self._fits[place] = fit.learn(kept_LNK, target_LNH, self._compact.written)
                    self._compact.learn(corrections)
                    unlearned.clear()


class DraftLength:
    """A fixed number, or as many as are worth their cost.

    With `auto`, the draft's own probabilities, corrected by how often they held so far, say how likely all drafts of a
    round are accepted. One more is worth it while the tokens that it is expected to give, for its share (`cost`) of a
    dense step, are more than what the row gets for that on average.
    """

    def __init__(self, draft_tokens: int | str, drafts: DraftStatistics) -> None:
        self.fixed = isinstance(draft_tokens, int)
        self.most = draft_tokens if isinstance(draft_tokens, int) else MOST_DRAFTED
        self._drafts = drafts
        self._believed, self._accepted, self._checked = _PRIOR

    def more(self, probabilities: Sequence[float], most: int, cost: float) -> bool:
        """Whether to draft one more token."""
        if self.fixed or len(probabilities) >= most:
            return len(probabilities) < most
        all_accepted = 1.0
        for probability in probabilities:
            all_accepted *= min(1.0, probability * self._accepted / self._believed)
        return all_accepted * self._accepted / self._checked > self._rate(cost) * cost

    def planned(self, most: int, cost: float) -> int:
        """How many to draft, where the draft's probabilities are not to be waited for: as if each were the mean."""
        mean, number = self._believed / self._checked, 0
        while self.more([mean] * number, most, cost):
            number += 1
        return number

    def _rate(self, cost: float) -> float:
        """Tokens that the row gets for a dense step's cost."""
        done = self._drafts
        return (done.emitted + 2.0) / (done.checks + cost * done.drafted + 1.0 + cost)

    def update(self, probabilities: Sequence[float], accepted: int) -> None:
        """Take in what became of a round: the drafts behind a rejected one were not checked."""
        checked = probabilities[: accepted + 1]
        seen = (sum(checked), accepted, len(checked))
        before = (self._believed, self._accepted, self._checked)
        self._believed, self._accepted, self._checked = (
            prior + _MEMORY * (value - prior) + new for prior, value, new in zip(_PRIOR, before, seen, strict=True)
        )
