"""FF activations, and the statistics that are recorded of them while a model runs dense.

A prompt may run in several chunks (chunked prefill). Each chunk gives a part of an activation statistic, and parts are
joined, so that a prompt in chunks gives what it gives whole. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from griffin.feedforward import FeedForwardBlock, find_feedforward_blocks
from griffin.views import view_of

# Numbers of a block's activations that are looked at together: in float32 this many are 128 MiB, and a statistic makes
# two or three such tensors. Longer calls are taken in pieces, which are joined like the chunks of a prompt.
PIECE = 2**25


@dataclass(frozen=True, eq=False)
class PrefillChunk:
    """One block's activations in a chunk of a prompt."""

    z_SD: Tensor  # float32
    output_SH: Tensor  # what the block made of them, in the model's type
    tokens: range  # which tokens of the prompt these are

    @cached_property
    def relative_SD(self) -> Tensor:
        """z[t, :] / ||z[t, :]||_2, a zero row staying zero (arXiv 2404.01365)."""
        return unit_rows(self.z_SD)


def row_lengths(z_SD: Tensor) -> Tensor:
    """The L2 norm [.., S, 1] of each row, float32; 1 for a zero row."""
    norms_S1 = torch.linalg.vector_norm(z_SD, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.where(norms_S1 > 0, norms_S1, 1.0)


def unit_rows(z_SD: Tensor) -> Tensor:
    """Each token's row divided by its L2 norm; a zero row stays zero."""
    return z_SD / row_lengths(z_SD)


@dataclass(frozen=True)
class ActivationStatistic:
    """What is recorded of a prompt, block by block, in two pure functions: `part(chunk, block)` is what a chunk gives,
    float32, and `join(before, part, tokens)` what earlier chunks and this one, of these tokens, give together."""

    part: Callable[[PrefillChunk, FeedForwardBlock], Tensor]
    join: Callable[[Tensor, Tensor, range], Tensor] = lambda before, part, tokens: before + part


@dataclass(frozen=True)
class Recorded:
    """What was recorded of a prompt: of how many tokens, and per statistic and layer what it came to."""

    tokens: int = 0
    totals: Mapping[ActivationStatistic, tuple[Tensor, ...]] = field(default_factory=dict)


class Recorder:
    """Records activation statistics of the prompts in a batch, call after call, behind what was recorded before."""

    def __init__(
        self,
        blocks: Sequence[FeedForwardBlock],
        statistics: Sequence[ActivationStatistic],
        before_B: Sequence[Recorded],
    ) -> None:
        self._blocks = blocks
        self._totals_B = [
            {statistic: dict(enumerate(before.totals.get(statistic, ()))) for statistic in statistics}
            for before in before_B
        ]
        self._tokens_B = [range(before.tokens) for before in before_B]
        self._columns_B: Sequence[slice | Tensor] = ()

    def expect(self, columns_B: Sequence[slice | Tensor], counts_B: Sequence[int]) -> None:
        """Announce the next forward call: of each row, which columns are tokens and no padding, and how many."""
        self._columns_B = columns_B
        self._tokens_B = [
            range(tokens.stop, tokens.stop + count) for tokens, count in zip(self._tokens_B, counts_B, strict=True)
        ]

    @property
    def recorded_B(self) -> list[Recorded]:
        """What was recorded of each prompt, the last forward call included."""
        return [
            Recorded(tokens.stop, {statistic: tuple(layers.values()) for statistic, layers in totals.items()})
            for tokens, totals in zip(self._tokens_B, self._totals_B, strict=True)
        ]

    @torch.no_grad()
    def record(self, layer: int, z: Tensor, output: Tensor) -> None:
        """Take in a layer's activations of the announced call, and what the block made of them."""
        rows = len(self._columns_B)
        # Some architectures flatten B and S.
        z_BSD, output_BSH = (given.detach().reshape(rows, -1, given.shape[-1]) for given in (z, output))
        for row, (columns, tokens) in enumerate(zip(self._columns_B, self._tokens_B, strict=True)):
            z_SD, output_SH = z_BSD[row][columns], output_BSH[row][columns]
            size = max(1, PIECE // z_SD.shape[1])
            for begin in range(0, len(tokens), size):
                piece = slice(begin, begin + size)
                chunk = PrefillChunk(z_SD[piece].float(), output_SH[piece], tokens[piece])
                for statistic, totals in self._totals_B[row].items():
                    part, before = statistic.part(chunk, self._blocks[layer]), totals.get(layer)
                    totals[layer] = part if before is None else statistic.join(before, part, chunk.tokens)


def record_activations(model: nn.Module, look: Callable[[int, Tensor], Any]) -> tuple[Any, list[list[Any]]]:
    """A view of a model, for batches of one row, and per layer what `look` returned in each call so far: every FF block
    calls it with its layer and activations [S, D], float32, which themselves are too large to keep. Raises what
    `find_feedforward_blocks` does."""
    view = view_of(model)
    blocks = find_feedforward_blocks(view)
    seen: list[list[Any]] = [[] for _ in blocks]

    def hook(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[layer].append(look(layer, args[0].detach().reshape(-1, args[0].shape[-1]).float()))

    for layer, block in enumerate(blocks):
        block.output.register_forward_pre_hook(partial(hook, layer))
    return view, seen


def relative_activations(z_SD: Tensor) -> Tensor:
    """|z| [S, D], each row over its L2 norm (arXiv 2404.01365); the column norms are GRIFFIN's scores."""
    return unit_rows(z_SD).abs()
