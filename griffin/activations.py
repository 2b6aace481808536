"""FF activations: hooks that see them, and the statistics that are recorded of them while the model runs dense.

A prompt may run in several chunks (chunked prefill). Each chunk gives a part of an activation statistic, and parts are
joined, so that a prompt in chunks gives what it gives whole. Nothing here waits for the device.

Dimensions: B = rows of a batch, S = positions of one forward call, D = FF width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from griffin.feedforward import FeedForwardBlock, find_feedforward_blocks


class BlockHooks:
    """Hooks on the output projection of every FF block, whose input is z: the one place where activations are seen.

    Args:
        blocks: the FF blocks, in layer order.
    """

    def __init__(self, blocks: Sequence[FeedForwardBlock]) -> None:
        self._blocks = blocks
        self._handles: list[Any] = []

    def attach(
        self,
        before: Callable[[int, Tensor], Tensor | None],
        after: Callable[[int, Tensor, Tensor], Tensor | None] | None = None,
    ) -> None:
        """Put the hooks on, unless they are on.

        The functions are not kept when the hooks are off: whoever has the hooks and gives methods of its own would
        form a reference cycle with them, and its memory would not go at once.

        Args:
            before: called as `before(layer, z)` before the projection runs; what it returns, if anything, replaces z.
            after: called as `after(layer, z, output)` with that z; what it returns, if anything, replaces the output.
        """
        if self._handles:
            return
        for layer, block in enumerate(self._blocks):
            self._handles.append(
                block.output.register_forward_pre_hook(lambda _, args, layer=layer: before(layer, args[0]))
            )
            if after is not None:
                self._handles.append(
                    block.output.register_forward_hook(lambda _, args, out, layer=layer: after(layer, args[0], out))
                )

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


# -- what is recorded -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TokenPositions:
    """Where the tokens of a chunk stand in their prompts.

    Attributes:
        rows: B.
        columns: S.
        counted_BS: bool, False where a position is padding; None: there is no padding.
        before_B: int64, tokens of each row's prompt before this chunk.
        columns_before: columns of the chunks before this one. No row has more tokens than columns, so the sizes of what
            is recorded follow from it, without asking the device.
        weight: how many tokens each of these counts as, beside those of other chunks.
    """

    rows: int
    columns: int
    counted_BS: Tensor | None
    before_B: Tensor
    columns_before: int = 0
    weight: float = 1.0

    @cached_property
    def count_B(self) -> Tensor:
        """Tokens in this chunk, padding excluded, int64."""
        if self.counted_BS is None:
            return torch.full_like(self.before_B, self.columns)
        return self.counted_BS.sum(dim=1)

    @cached_property
    def positions_BS(self) -> Tensor:
        """Each token's number in its prompt, from 0, padding not counted; meaningless at padding. Int64."""
        if self.counted_BS is None:
            within_S = torch.arange(self.columns, device=self.before_B.device)
            return self.before_B.unsqueeze(1) + within_S
        return self.before_B.unsqueeze(1) + self.counted_BS.cumsum(dim=1) - 1

    def piece(self, begin: int, end: int) -> TokenPositions:
        """Those of some columns."""
        if (begin, end) == (0, self.columns):
            return self
        counted_BS = self.counted_BS
        earlier: Any = begin if counted_BS is None else counted_BS[:, :begin].sum(dim=1)
        return replace(
            self,
            columns=end - begin,
            counted_BS=None if counted_BS is None else counted_BS[:, begin:end],
            before_B=self.before_B + earlier,
            columns_before=self.columns_before + begin,
        )


# Numbers of a block's activations that are looked at together: in float32 this many are 128 MiB, and a statistic makes
# two or three such tensors. Longer calls are taken in pieces, which are joined like the chunks of a prompt.
PIECE = 2**25


@dataclass(frozen=True, eq=False)
class PrefillChunk:
    """One block's activations in a chunk of the prompts.

    Attributes:
        z_BSD: float32. The rows of padding positions are zero, so that padding counts as nothing in any sum.
        positions: where its tokens stand.
    """

    z_BSD: Tensor
    positions: TokenPositions

    @cached_property
    def relative_BSD(self) -> Tensor:
        """z[b, t, :] / ||z[b, t, :]||_2, a zero row staying zero (arXiv 2404.01365)."""
        return unit_rows(self.z_BSD)

    def sum(self, values_BSD: Tensor) -> Tensor:
        """[B, ..]: the sum over tokens, each counting as often as the chunk says."""
        return self.positions.weight * values_BSD.sum(dim=1)


def unit_rows(z_BSD: Tensor) -> Tensor:
    """Each token's row divided by its L2 norm; a zero row stays zero."""
    norms_BS1 = torch.linalg.vector_norm(z_BSD, dim=-1, keepdim=True)
    return z_BSD / torch.where(norms_BS1 > 0, norms_BS1, 1.0)


def added(before: Tensor, part: Tensor, positions: TokenPositions) -> Tensor:
    """Joins parts that are sums over tokens."""
    return before + part


def listed(before: Tensor, part: Tensor, positions: TokenPositions) -> Tensor:
    """Joins parts that have an entry for each token, [B, S, ..]."""
    return torch.cat([before, part], dim=1)


@dataclass(frozen=True)
class ActivationStatistic:
    """What is recorded of a prompt, block by block, in two pure functions.

    Attributes:
        part: (chunk, block) -> what this chunk gives, float32, B first.
        join: (what earlier chunks gave, this part, this chunk's positions) -> what they give together.
    """

    part: Callable[[PrefillChunk, FeedForwardBlock], Tensor]
    join: Callable[[Tensor, Tensor, TokenPositions], Tensor] = added


@dataclass(frozen=True, eq=False)
class Recorded:
    """What was recorded of prompts, as rows of a batch. Immutable: recording more gives another one.

    Attributes:
        tokens_B: int64, how many tokens of each row have been recorded.
        columns: an upper bound of `tokens_B` that the host knows.
        totals: per activation statistic and layer, what it came to, B first.
    """

    tokens_B: Tensor
    columns: int = 0
    totals: Mapping[ActivationStatistic, tuple[Tensor, ...]] = field(default_factory=dict)

    def row(self, row: int, columns: int) -> Recorded:
        """One of the rows by itself; at most so many of its columns are tokens."""
        totals = {
            statistic: tuple(total[row : row + 1] for total in layers) for statistic, layers in self.totals.items()
        }
        return Recorded(self.tokens_B[row : row + 1], columns, totals)


class Recorder:
    """Records activation statistics of the forward calls that are made while it is attached.

    Args:
        blocks: the FF blocks, in layer order.
        wanted: what to record; one forward call serves all of them.
    """

    def __init__(self, blocks: Sequence[FeedForwardBlock], wanted: Sequence[ActivationStatistic]) -> None:
        self._blocks, self._wanted = blocks, tuple(dict.fromkeys(wanted))
        self._hooks = BlockHooks(blocks)

    def begin(self, before: Recorded) -> None:
        """Go on after what was recorded before."""
        self._before = before
        self._recorded: Recorded | None = before
        self._parts: dict[ActivationStatistic, dict[int, Tensor]] = {}

    def expect(self, rows: int, columns: int, counted_BS: Tensor | None, weight: float = 1.0) -> None:
        """Announce the next forward call: its shape, which positions count (None: all), and as how many tokens."""
        self._before = before = self.recorded
        self._positions = TokenPositions(rows, columns, counted_BS, before.tokens_B, before.columns, weight)
        self._parts = {statistic: {} for statistic in self._wanted}
        self._recorded = None

    def attach(self) -> None:
        """Record from the next forward call on."""
        if self._wanted:
            self._hooks.attach(self.record)

    def detach(self) -> None:
        """Record no more."""
        self._hooks.detach()

    @property
    def recorded(self) -> Recorded:
        """All that is wanted as recorded so far, the last forward call included."""
        if self._recorded is None:
            positions, before = self._positions, self._before
            totals = {}  # without what is recorded no more, which would be of the beginning only
            for statistic, parts in self._parts.items():
                earlier = before.totals.get(statistic)
                totals[statistic] = tuple(
                    part if earlier is None else statistic.join(earlier[layer], part, _on(positions, part.device))
                    for layer, part in sorted(parts.items())
                )
            tokens_B = before.tokens_B + positions.count_B.to(before.tokens_B.device)
            self._recorded = Recorded(tokens_B, before.columns + positions.columns, totals)
            self._parts = {}
        return self._recorded

    @torch.no_grad()
    def record(self, layer: int, z: Tensor) -> None:
        """Take in a layer's activations of the announced call."""
        positions = _on(self._positions, z.device)
        z_BSD = z.detach().reshape(positions.rows, positions.columns, -1)  # some architectures flatten B and S
        length = max(1, PIECE // (positions.rows * z_BSD.shape[-1]))
        for begin in range(0, positions.columns, length):
            end = min(begin + length, positions.columns)
            piece, z_piece_BSD = positions.piece(begin, end), z_BSD[:, begin:end].float()
            if piece.counted_BS is not None:
                z_piece_BSD = z_piece_BSD.masked_fill(~piece.counted_BS.unsqueeze(-1), 0.0)
            chunk = PrefillChunk(z_piece_BSD, piece)
            for statistic in self._wanted:
                part = statistic.part(chunk, self._blocks[layer])
                if begin:
                    part = statistic.join(self._parts[statistic][layer], part, piece)
                self._parts[statistic][layer] = part


def _on(positions: TokenPositions, device: torch.device) -> TokenPositions:
    if positions.before_B.device == device:
        return positions
    counted_BS = positions.counted_BS
    return replace(
        positions,
        before_B=positions.before_B.to(device),
        counted_BS=None if counted_BS is None else counted_BS.to(device),
    )


# -- looking at activations -------------------------------------------------------------------------------------------


@contextmanager
def record_activations(model: nn.Module, look: Callable[[int, Tensor], Any]) -> Iterator[list[list[Any]]]:
    """Call `look(layer, z_SD)` in every FF block of every forward call, and keep what it returns.

    Activations of long texts are large, so only what `look` makes of them is kept. Nothing of the model changes; the
    hooks are off again when the context ends.

    Args:
        model: a `transformers` causal language model with dense FF blocks, run with batches of one row.
        look: takes the layer and its activations [S, D] in float32, on the model's device.

    Yields:
        Per layer, what `look` returned in each forward call so far.

    Raises:
        UnsupportedModelError: as `find_feedforward_blocks`.
    """
    blocks = find_feedforward_blocks(model)
    seen: list[list[Any]] = [[] for _ in blocks]

    @torch.no_grad()
    def hook(layer: int, z: Tensor) -> None:
        seen[layer].append(look(layer, z.detach().reshape(-1, z.shape[-1]).float()))

    hooks = BlockHooks(blocks)
    hooks.attach(hook)
    try:
        yield seen
    finally:
        hooks.detach()


def relative_activations(z_SD: Tensor) -> Tensor:
    """|z| with every row divided by its L2 norm, a zero row staying zero (arXiv 2404.01365).

    Args:
        z_SD: activations, float32.

    Returns:
        [S, D] float32, 0 to 1; the column norms are GRIFFIN's scores.
    """
    return unit_rows(z_SD).abs()
