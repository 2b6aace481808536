"""Gathering: what statistics and compensations need to know of a prompt, collected while the model runs it dense.

A prompt may come in several stretches (chunked prefill). Each stretch gives a part, and parts are joined, so that a
prompt in stretches gives what it gives whole.

Dimensions: B = batch rows, S = positions of one forward call, D = FF width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from griffin.block_hooks import BlockHooks
from griffin.feedforward import FeedForwardBlock


@dataclass(frozen=True, eq=False)
class Places:
    """Where the tokens of a stretch stand in their prompts.

    Attributes:
        counted_BS: bool, False where a position is padding.
        before_B: tokens of each row's prompt before this stretch.
        padded: False where it is known that every position counts.
        weight: how many tokens each of these counts as, beside those of other stretches.
    """

    counted_BS: Tensor
    before_B: Tensor
    padded: bool = True
    weight: float = 1.0

    @cached_property
    def count_B(self) -> Tensor:
        """Tokens in this stretch, padding excluded, int64."""
        return self.counted_BS.sum(dim=1)

    @cached_property
    def positions_BS(self) -> Tensor:
        """Each token's number in its prompt, from 0, padding not counted; meaningless at padding. Int64."""
        return self.before_B.unsqueeze(1) + self.counted_BS.cumsum(dim=1) - 1


@dataclass(frozen=True, eq=False)
class Stretch:
    """One block's activations in a stretch of the prompts.

    Attributes:
        z_BSD: float32, rows of padding positions set to zero, so that padding counts as nothing in any sum.
        places: where its tokens stand.
    """

    z_BSD: Tensor
    places: Places

    @cached_property
    def relative_BSD(self) -> Tensor:
        """z[b, t, :] / ||z[b, t, :]||_2, a zero row staying zero (arXiv 2404.01365)."""
        return unit_rows(self.z_BSD)

    def sum(self, values_BSD: Tensor) -> Tensor:
        """[B, ..]: the sum over tokens, each counting as often as the stretch says."""
        return self.places.weight * values_BSD.sum(dim=1)


def unit_rows(z_BSD: Tensor) -> Tensor:
    """Each token's row divided by its L2 norm; a zero row stays zero."""
    norms_BS1 = torch.linalg.vector_norm(z_BSD, dim=-1, keepdim=True)
    return z_BSD / torch.where(norms_BS1 > 0, norms_BS1, 1.0)


def added(before: Tensor, part: Tensor, places: Places) -> Tensor:
    """Joins parts that are sums over tokens."""
    return before + part


@dataclass(frozen=True)
class Gathering:
    """What is collected of a prompt, block by block, in two pure functions.

    Attributes:
        part: (stretch, block) -> what this stretch gives, float32, B first.
        join: (what earlier stretches gave, this part, this stretch's places) -> what they give together.
    """

    part: Callable[[Stretch, FeedForwardBlock], Tensor]
    join: Callable[[Tensor, Tensor, Places], Tensor] = added


# Per gathering and layer, what was gathered.
Totals = dict[Gathering, list[Tensor | None]]


class Gatherer:
    """Collects the given gatherings, per layer, over the positions that count.

    Hooks are on the model while attached, and one forward call serves all gatherings.
    """

    def __init__(self, blocks: Sequence[FeedForwardBlock], gatherings: Sequence[Gathering | None]) -> None:
        self._blocks = blocks
        self._totals: Totals = {gathering: [None] * len(blocks) for gathering in gatherings if gathering is not None}
        self._hooks = BlockHooks(blocks, self._gather)
        self._places: Places | None = None

    def attach(self) -> None:
        """Gather from the next forward call on; a no-op where nothing reads activations."""
        if self._totals:
            self._hooks.attach()

    def detach(self) -> None:
        """Gather no more; what has been gathered stays."""
        self._hooks.detach()

    def expect(
        self,
        rows: int,
        positions: int,
        counted_BS: Tensor | None,
        device: torch.device | str = "cpu",
        weight: float = 1.0,
    ) -> None:
        """Announce the next forward call's shape, which of its positions count (None: all), and as how many tokens."""
        padded = counted_BS is not None
        if counted_BS is None:
            counted_BS = torch.ones(rows, positions, dtype=torch.bool, device=device)
        before_B = torch.zeros(rows, dtype=torch.int64, device=counted_BS.device)
        if self._places is not None:
            before_B = (self._places.before_B + self._places.count_B).to(counted_BS.device)
        self._places = Places(counted_BS, before_B, padded, weight)

    def reset(self) -> None:
        """Begin a new prompt."""
        self._places = None
        for totals in self._totals.values():
            totals[:] = [None] * len(totals)

    def total(self, gathering: Gathering | None, layer: int) -> Tensor | None:
        """What this gathering came to over the prompt, B first; None for None."""
        return None if gathering is None else self._totals[gathering][layer]

    def fork(self, rows: slice = slice(None)) -> Gatherer:
        """Another one that goes on from here by itself, with these of the prompts."""
        forked = Gatherer(self._blocks, list(self._totals))
        forked._totals, forked._places = self.totals(), self._places
        if rows != slice(None):
            for totals in forked._totals.values():
                totals[:] = [None if total is None else total[rows] for total in totals]
            assert self._places is not None
            forked._places = replace(
                self._places, counted_BS=self._places.counted_BS[rows], before_B=self._places.before_B[rows]
            )
        return forked

    def totals(self) -> Totals:
        """Everything that was gathered of these prompts; `reset` leaves it alone."""
        return {gathering: list(totals) for gathering, totals in self._totals.items()}

    def whole(self) -> tuple[Totals, Places]:
        """Everything that was gathered, and the place of the last stretch: where `resume` goes on."""
        assert self._places is not None
        return self.totals(), self._places

    def resume(self, totals: Totals, places: Places) -> None:
        """Go on after prompts that were gathered before, as `whole` gave them."""
        self._places = places
        for gathering, known in totals.items():
            self._totals[gathering][:] = known

    def stack(self, prompts: Sequence[tuple[Totals, Places]]) -> None:
        """Go on as if these prompts, gathered one by one as `whole` gave them, had been the rows of one batch.

        Where something was kept for the last tokens of a prompt ([B, T, ..]), short prompts get rows of zeros in front.
        """
        before_B = torch.cat([places.before_B + places.count_B for _, places in prompts])
        self._places = Places(torch.ones(len(before_B), 0, dtype=torch.bool, device=before_B.device), before_B)
        for gathering, totals in self._totals.items():
            for layer in range(len(totals)):
                rows = [part for prompt, _ in prompts if (part := prompt[gathering][layer]) is not None]
                longest = max(part.shape[1] for part in rows)
                totals[layer] = torch.cat(
                    [
                        torch.cat([part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:]), part], dim=1)
                        for part in rows
                    ]
                )

    @torch.no_grad()
    def _gather(self, layer: int, z: Tensor) -> None:
        assert self._places is not None
        places = self._places
        rows, positions = places.counted_BS.shape
        z_BSD = z.detach().reshape(rows, positions, -1).float()  # some architectures flatten B and S
        if places.padded:
            z_BSD = z_BSD.masked_fill(~places.counted_BS.to(z.device).unsqueeze(-1), 0.0)
        stretch = Stretch(z_BSD, places)
        for gathering, totals in self._totals.items():
            part, before = gathering.part(stretch, self._blocks[layer]), totals[layer]
            totals[layer] = part if before is None else gathering.join(before, part, places)
