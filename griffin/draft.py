"""The draft of verified decoding: what the experts write, how long they write, and what they learn from checks.

Dimensions: k = drafted tokens, V = vocabulary, D = FF width, K = kept neurons, H = hidden size, T = tokens of a check,
N = tokens that are learned.
"""

from __future__ import annotations

from collections.abc import Sequence
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

# A fit learns from so many tokens or more at a time: what that costs hardly depends on their number (measured in
# docs/verified-decoding.md).
LEARN_EVERY = 4

# Of prompt lookup: so many last tokens must have stood before, more of them rather than fewer; and so many that
# followed are drafted where `draft_tokens` does not say.
_NGRAMS = (3, 2)
LOOKED_UP = 8

# Tokens and rounds of looked-up drafts that a row starts from.
_LOOKUP_PRIOR = (6.0, 2.0)

# Of `draft_tokens=auto`: what a row starts from, as sums over drafts of what the draft gave them, those accepted, and
# their number; and what is left of such sums after a round, so that what is long past is forgotten.
_PRIOR = (4.0, 3.5, 5.0)
_MEMORY = 0.95


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


class Draft:
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
            corrections[0].fit if corrections and learns else None for corrections in experts.corrections
        ]

    @property
    def learns(self) -> bool:
        """Whether it needs the activations of checks."""
        return any(self._fits) or self._row.method.refresh == "experts"

    @property
    def bytes(self) -> int:
        """That one step of it reads."""
        return self._traffic.draft(len(self._engine.vocabulary.tokens_N) if self._prunes_vocabulary else None)

    def run(self, length: DraftLength, cache: KVCache, generation: Generation) -> Drafts:
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
        at = self._row.state.length + len(self._row.tokens) - 1 + len(drafts)
        position_11 = torch.arange(at, at + 1, device=latest_11.device).unsqueeze(0)
        logits_N = self._engine.forward(latest_11, cache, positions_BS=position_11)[0, -1].float()
        if not self._prunes_vocabulary:
            logits_V = logits_N
        else:
            logits_V = logits_N.new_full((self._traffic.vocabulary,), -torch.inf)
            logits_V.index_copy_(0, self._engine.vocabulary.tokens_N, logits_N)
        scores_V = generation.scored(self._row, drafts.tokens, logits_V)
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
        drafting, method = self._row.drafting, self._row.method
        with drafting.timed("learn"):
            if self._prunes_vocabulary:
                best = logits_TV.topk(min(BEST, logits_TV.shape[1]), dim=-1).indices.flatten()
                self._engine.vocabulary.add(torch.cat([best, torch.tensor(tokens, device=best.device)]))
            if any(self._fits):
                # Copies: a captured graph writes to the same memory again.
                self._unlearned.append([(z[:accepted].clone(), output[:accepted].clone()) for z, output in seen])
                if sum(len(check[0][0]) for check in self._unlearned) >= LEARN_EVERY:
                    for layer, fit in enumerate(self._fits):
                        if fit is not None:
                            z_ND, output_NH = map(
                                torch.cat, zip(*(check[layer] for check in self._unlearned), strict=True)
                            )
                            self._fits[layer] = self._learn_layer(layer, fit, z_ND, output_NH)
                    self._unlearned = []
        if method.refresh == "experts":
            with drafting.timed("choose"):
                self._unread.append([z[:accepted].float().clone() for z, _ in seen])
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


def look_up(tokens: Sequence[int], most: int) -> list[int]:
    """Up to `most` tokens that followed where the last tokens stood before, the latest time; empty if they did not
    (prompt lookup decoding, Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding)."""
    for size in _NGRAMS:
        last = list(tokens[-size:])
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - 1] == last[-1] and list(tokens[end - size : end]) == last:
                return list(tokens[end : end + most])
    return []


class DraftLength:
    """How many tokens are drafted: a fixed number, or as long as another one is worth its cost.

    With `auto`, the draft's own probabilities, corrected by how often they held so far, say how likely all drafts of a
    round are accepted. One more token is worth it while the tokens that it is expected to give, for its share c of a
    dense step, are more than what the row gets for a dense step's cost on average.

    Args:
        draft_tokens: the number, or `auto`.
        drafting: what became of the row's drafts so far.

    Attributes:
        most: tokens that a round drafts at most.
        looked_up: how many tokens are drafted where they cost nothing.
    """

    def __init__(self, draft_tokens: int | str, drafting: Drafting) -> None:
        self._fixed = draft_tokens if isinstance(draft_tokens, int) else None
        self.most = MOST_DRAFTED if self._fixed is None else self._fixed
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
