"""The draft model of verified decoding: what the experts write, and what they learn from checks.

Dimensions: k = draft tokens, V = vocabulary, C = rows of its output embedding, D = FF width, H = hidden size,
L = layers, N = tokens that are learned, T = tokens of a check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from griffin.batch import record
from griffin.choosing import choose
from griffin.draft_length import DraftLength, look_up
from griffin.draft_vocabulary import BEST
from griffin.engine import Engine
from griffin.kv_cache import KVCache
from griffin.prompt import wanted
from griffin.refresh import Seen, learn, next_refresh, to_learn
from griffin.ridge import RidgeFit
from griffin.rows import Generation, Row
from griffin.traffic import Traffic, traffic

# A fit learns from so many tokens or more at a time: what that costs hardly depends on their number (measured in
# docs/verified-decoding.md).
LEARN_EVERY = 4


@dataclass
class DraftTokens:
    """Tokens that were drafted in a round. They stay on the device."""

    tokens: list[Tensor] = field(default_factory=list)  # [1] each, int64
    probabilities: list[Tensor] = field(default_factory=list)  # [1] each; none where they were looked up
    distributions: list[Tensor] = field(default_factory=list)  # [V] that they were drawn from; none in greedy decoding

    def __len__(self) -> int:
        return len(self.tokens)


class DraftModel:
    """The pruned model as it stands: its experts, what they have learned, and its vocabulary."""

    def __init__(self, engine: Engine, row: Row) -> None:
        self._engine, self._row = engine, row
        assert row.experts is not None
        self._traffic: Traffic = traffic(engine.model, [len(neurons_K) for neurons_K in row.experts.neurons])
        self._vocabulary = engine.draft if row.method.prunes_vocabulary else None
        if self._vocabulary is not None:
            assert row.state.likely is not None
            self._vocabulary.begin(row.state.likely)
            row.state = row.state if row.keep_cache else replace(row.state, likely=None)
        self._recorder = engine.dense.recorder(wanted([row.method]), row.state.recorded)
        self._chosen_at = 0  # tokens
        self._load()

    def _load(self) -> None:
        experts = self._row.experts
        assert experts is not None
        self._engine.compact.load(experts)
        self._fits: list[RidgeFit] = list(experts.fits) if self._row.method.refresh != "none" else []
        # By fit, what it has not learned: kept activations [L, N, K] and what the blocks wrote there [L, N, H].
        self._unlearned: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self._fits]
        if self._row.method.refresh != "experts":  # its memory can go: the weights are loaded, and learn
            self._row.experts = replace(experts, corrections=((),) * len(experts.corrections), fits=())

    @property
    def learns(self) -> bool:
        """Whether it needs the activations of checks."""
        return bool(self._fits) or self._row.method.refresh == "experts"

    @property
    def bytes(self) -> int:
        """That one step of it reads."""
        return self._traffic.draft(None if self._vocabulary is None else self._vocabulary.used)

    # -- drafting -----------------------------------------------------------------------------------------------------

    def draft(self, length: DraftLength, cache: KVCache, generation: Generation) -> DraftTokens:
        """Draft tokens behind the row's last one."""
        row, drafts = self._row, DraftTokens()
        most = min(length.most, generation.max_new_tokens - len(row.tokens) - 1)
        cost = self.bytes / self._traffic.dense
        if row.method.prompt_lookup and length.lookup_pays(cost):
            tokens = look_up([*row.state.ids, *row.tokens], min(most, length.looked_up))
            if tokens:
                row.drafts.looked_up += len(tokens)
                return self._looked_up(tokens, generation)
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

    def _looked_up(self, tokens: list[int], generation: Generation) -> DraftTokens:
        """Drafts that cost nothing, each drawn from a distribution that has no other token."""
        tokens_k = torch.tensor(tokens).to(self._engine.device)
        drafts = DraftTokens(list(torch.split(tokens_k, 1)))
        if generation.draw is not None:
            size = self._row.state.logits_TV.shape[-1]
            drafts.distributions = list(torch.nn.functional.one_hot(tokens_k, size).float())
        return drafts

    def _step(
        self, latest_11: Tensor, cache: KVCache, drafts: DraftTokens, generation: Generation
    ) -> tuple[Tensor, Tensor]:
        """One token behind the latest one, and its probability, [1] each."""
        row, vocabulary = self._row, self._vocabulary
        at = row.state.length + len(row.tokens) - 1 + len(drafts)
        position_11 = torch.arange(at, at + 1, device=latest_11.device).unsqueeze(0)
        view = self._engine.compact if vocabulary is None else vocabulary
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

    # -- learning -----------------------------------------------------------------------------------------------------

    def meet(self, logits_TV: Tensor, token: Tensor) -> Tensor:
        """Have the vocabulary take in what a check found likely, and the token [1] that it picked itself."""
        if self._vocabulary is None:
            return token.new_zeros(1)
        best = logits_TV.topk(min(BEST, logits_TV.shape[1]), dim=-1).indices.flatten()
        self._vocabulary.add(torch.cat([best, token]))
        return self._vocabulary.count.view(1).to(token.device)

    def learn(self, groups: Sequence[Seen], accepted: int, tokens: Sequence[int], known: int) -> None:
        """Learn from a check."""
        row = self._row
        with row.drafts.timed("learn"):
            if self._vocabulary is not None:
                self._vocabulary.use(known)
            for place, (fit, unlearned) in enumerate(zip(self._fits, self._unlearned, strict=True)):
                seen = next(group for group in groups if fit.layers[0] in group.by_layer)
                unlearned.append(to_learn(fit, seen, accepted))
                if sum(kept_LNK.shape[1] for kept_LNK, _ in unlearned) >= LEARN_EVERY:
                    kept_LNK, target_LNH = (torch.cat(parts, dim=1) for parts in zip(*unlearned, strict=True))
                    written = self._engine.compact.written
                    corrections, self._fits[place] = learn(fit, kept_LNK, target_LNH, written)
                    self._engine.compact.learn(corrections)
                    unlearned.clear()
        if row.method.refresh == "experts":
            with row.drafts.timed("choose"):
                record(self._recorder, groups, accepted)
                ran = len(row.tokens) + len(tokens) - 1
                if ran >= next_refresh(self._chosen_at):
                    self._chosen_at = ran
                    row.state = replace(row.state, recorded=self._recorder.recorded)
                    row.experts = choose(self._engine, row.states, row.method, row.seed)
                    self._load()
