"""FF activations, and the statistics that are recorded of them while a model runs dense.

A prompt may run in several chunks (chunked prefill). Each chunk gives a part of an activation statistic, and parts are
joined, so that a prompt in chunks gives what it gives whole. Nothing here waits for the device.

Dimensions: B = rows of a batch, S = positions of one forward call, D = FF width, H = hidden size.
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

# Numbers of a block's activations that are looked at together: in float32 this many are 128 MiB, and a statistic makes
# two or three such tensors. Longer calls are taken in pieces, which are joined like the chunks of a prompt.
PIECE = 2**25


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
            return self.before_B.unsqueeze(1) + torch.arange(self.columns, device=self.before_B.device)
        return self.before_B.unsqueeze(1) + self.counted_BS.cumsum(dim=1) - 1

    def piece(self, begin: int, end: int) -> TokenPositions:
        """Those of some columns."""
        if self.counted_BS is None:
            before_B, counted_BS = self.before_B + begin, None
        else:
            before_B = self.before_B + self.counted_BS[:, :begin].sum(dim=1)
            counted_BS = self.counted_BS[:, begin:end]
        columns_before = self.columns_before + begin
        return TokenPositions(self.rows, end - begin, counted_BS, before_B, columns_before, self.weight)

    def to(self, device: torch.device) -> TokenPositions:
        """The same on a device."""
        if self.before_B.device == device:
            return self
        counted_BS = None if self.counted_BS is None else self.counted_BS.to(device)
        return replace(self, before_B=self.before_B.to(device), counted_BS=counted_BS)


@dataclass(frozen=True, eq=False)
class PrefillChunk:
    """One block's activations in a chunk of the prompts."""

    z_BSD: Tensor  # float32; zero at padding, so that padding counts as nothing in any sum
    positions: TokenPositions
    output_BSH: Tensor  # what the block made of them, in the model's type; at padding, anything

    @cached_property
    def relative_BSD(self) -> Tensor:
        """z[b, t, :] / ||z[b, t, :]||_2, a zero row staying zero (arXiv 2404.01365)."""
        return unit_rows(self.z_BSD)

    def written_BSH(self, block: FeedForwardBlock) -> Tensor:
        """What the neurons wrote, without the output's bias, float32; zero at padding."""
        bias, counted_BS = getattr(block.output, "bias", None), self.positions.counted_BS
        written_BSH = self.output_BSH.float() if bias is None else self.output_BSH.float() - bias.detach().float()
        return written_BSH if counted_BS is None else written_BSH.masked_fill(~counted_BS.unsqueeze(-1), 0.0)

    def sum(self, values_BSD: Tensor) -> Tensor:
        """[B, ..]: the sum over tokens, each counting as often as the chunk says."""
        return self.positions.weight * values_BSD.sum(dim=1)


def row_lengths(z_BSD: Tensor) -> Tensor:
    """The L2 norm [B, S, 1] of each token's row, float32; 1 for a zero row."""
    norms_BS1 = torch.linalg.vector_norm(z_BSD, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.where(norms_BS1 > 0, norms_BS1, 1.0)


def unit_rows(z_BSD: Tensor) -> Tensor:
    """Each token's row divided by its L2 norm; a zero row stays zero."""
    return z_BSD / row_lengths(z_BSD)


@dataclass(frozen=True)
class ActivationStatistic:
    """What is recorded of a prompt, block by block, in two pure functions.

    Attributes:
        part: (chunk, block) -> what this chunk gives, float32, B first.
        join: (what earlier chunks gave, this part, this chunk's positions) -> what they give together.
    """

    part: Callable[[PrefillChunk, FeedForwardBlock], Tensor]
    join: Callable[[Tensor, Tensor, TokenPositions], Tensor] = lambda before, part, positions: before + part


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
        rows = slice(row, row + 1)
        totals = {statistic: tuple(total[rows] for total in layers) for statistic, layers in self.totals.items()}
        return Recorded(self.tokens_B[rows], columns, totals)


class Recorder:
    """Records activation statistics of forward calls, after what was recorded before."""

    def __init__(
        self, blocks: Sequence[FeedForwardBlock], statistics: Sequence[ActivationStatistic], before: Recorded
    ) -> None:
        self._blocks, self._statistics = blocks, tuple(dict.fromkeys(statistics))
        self._before, self._positions = before, TokenPositions(len(before.tokens_B), 0, None, before.tokens_B)
        self._recorded: Recorded | None = before
        self._parts: dict[ActivationStatistic, dict[int, Tensor]] = {}

    def expect(self, rows: int, columns: int, counted_BS: Tensor | None, weight: float = 1.0) -> None:
        """Announce the next forward call: its shape, which positions count (None: all), and as how many tokens."""
        self._before = before = self.recorded
        self._positions = TokenPositions(rows, columns, counted_BS, before.tokens_B, before.columns, weight)
        self._parts = {statistic: {} for statistic in self._statistics}
        self._recorded = None

    @property
    def recorded(self) -> Recorded:
        """All that is wanted as recorded so far, the last forward call included."""
        if self._recorded is None:
            positions, before = self._positions, self._before
            totals = {}  # without what is recorded no more, which would be of the beginning only
            for statistic, parts in self._parts.items():
                earlier = before.totals.get(statistic)
                totals[statistic] = tuple(
                    part if earlier is None else statistic.join(earlier[layer], part, positions.to(part.device))
                    for layer, part in sorted(parts.items())
                )
            tokens_B = before.tokens_B + positions.count_B.to(before.tokens_B.device)
            self._recorded = Recorded(tokens_B, before.columns + positions.columns, totals)
            self._parts = {}
        return self._recorded

    @torch.no_grad()
    def record(self, layer: int, z: Tensor, output: Tensor) -> None:
        """Take in a layer's activations of the announced call, and what the block made of them."""
        positions = self._positions.to(z.device)
        # Some architectures flatten B and S.
        z_BSD = z.detach().reshape(positions.rows, positions.columns, -1)
        output_BSH = output.detach().reshape(positions.rows, positions.columns, -1)
        length = max(1, PIECE // (positions.rows * z_BSD.shape[-1]))
        for begin in range(0, positions.columns, length):
            end = min(begin + length, positions.columns)
            piece = positions.piece(begin, end) if length < positions.columns else positions
            z_piece_BSD = z_BSD[:, begin:end].float()
            if piece.counted_BS is not None:
                z_piece_BSD = z_piece_BSD.masked_fill(~piece.counted_BS.unsqueeze(-1), 0.0)
            chunk = PrefillChunk(z_piece_BSD, piece, output_BSH[:, begin:end])
            for statistic in self._statistics:
                part = statistic.part(chunk, self._blocks[layer])
                if begin:
                    part = statistic.join(self._parts[statistic][layer], part, piece)
                self._parts[statistic][layer] = part


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

    handles = [
        block.output.register_forward_pre_hook(lambda _, args, layer=layer: hook(layer, args[0]))
        for layer, block in enumerate(blocks)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def relative_activations(z_SD: Tensor) -> Tensor:
    """|z| [S, D] with every row divided by its L2 norm (arXiv 2404.01365); the column norms are GRIFFIN's scores."""
    return unit_rows(z_SD).abs()
