"""How many tokens are drafted before a check."""

from __future__ import annotations

from collections.abc import Sequence

from griffin.method import MOST_DRAFTED
from griffin.rows import DraftStatistics

# Of prompt lookup: so many last tokens must have stood before, more of them rather than fewer; and so many that
# followed are drafted where `draft_tokens` does not say.
_NGRAMS = (3, 2)
LOOKED_UP = 8

# Tokens and rounds of looked-up drafts that a row starts from.
_LOOKUP_PRIOR = (6.0, 2.0)

# Of `draft_tokens=auto`: what a row starts from, as sums over drafts of the probability that the draft gave them, of
# those accepted, and their number; and what is left of such sums after a round, so that what is long past is forgotten.
_PRIOR = (4.0, 3.5, 5.0)
_MEMORY = 0.95


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
    """A fixed number, or as long as another token is worth its cost.

    With `auto`, the draft's own probabilities, corrected by how often they held so far, say how likely all drafts of a
    round are accepted. One more token is worth it while the tokens that it is expected to give, for its share c of a
    dense step, are more than what the row gets for a dense step's cost on average.
    """

    def __init__(self, draft_tokens: int | str, drafts: DraftStatistics) -> None:
        self.fixed = isinstance(draft_tokens, int)
        self.most = draft_tokens if isinstance(draft_tokens, int) else MOST_DRAFTED
        self.looked_up = draft_tokens if isinstance(draft_tokens, int) else LOOKED_UP
        self._drafts = drafts
        self._believed, self._accepted, self._checked = _PRIOR
        self._lookup = _LOOKUP_PRIOR

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
        drafted = done.drafted - done.looked_up
        return (done.emitted + 2.0) / (done.checks + cost * drafted + 1.0 + cost)

    def lookup_pays(self, cost: float) -> bool:
        """Whether a check of what is looked up has lately brought more tokens than the row gets for its cost."""
        tokens, rounds = self._lookup
        return tokens > rounds * self._rate(cost)

    def update_lookup(self, accepted: int) -> None:
        """Take in what became of a round whose drafts were looked up."""
        self._lookup = (_MEMORY * self._lookup[0] + accepted + 1, _MEMORY * self._lookup[1] + 1)

    def update(self, probabilities: Sequence[float], accepted: int) -> None:
        """Take in what became of a round: the drafts behind a rejected one were not checked."""
        checked = probabilities[: accepted + 1]
        seen = (sum(checked), accepted, len(checked))
        before = (self._believed, self._accepted, self._checked)
        self._believed, self._accepted, self._checked = (
            prior + _MEMORY * (value - prior) + new for prior, value, new in zip(_PRIOR, before, seen, strict=True)
        )
