"""The selection statistics: how much each FF neuron matters for this prompt.

A statistic is made of pure functions: `activations` says what is recorded of a prompt while it runs dense (see
`griffin.activations`), and `score` turns that into one number per neuron. Static statistics record nothing. Adding one
is one entry of `STATISTICS`, or of `TOKEN_STATISTICS`.

Dimensions: B = rows of a batch, S = positions, D = FF width, K = kept neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from griffin.activations import ActivationStatistic, PrefillChunk, TokenPositions, unit_rows
from griffin.feedforward import FeedForwardBlock

# Tokens after which a token counts half in `recency`.
_HALF_LIFE = 128


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a statistic scores a block's neurons by.

    Attributes:
        block: the block, with its weights.
        total: what the statistic's activations came to over the prompt, B first; None where it records none.
        draw_BD: uniform numbers that depend on the prompt and the layer only; None unless the statistic is random.
    """

    block: FeedForwardBlock
    total: Tensor | None = None
    draw_BD: Tensor | None = None

    @property
    def root(self) -> Tensor:
        """The square root of what was recorded: an L2 norm over the prompt."""
        return self.recorded.sqrt()

    @property
    def recorded(self) -> Tensor:
        """What was recorded."""
        assert self.total is not None
        return self.total


@dataclass(frozen=True)
class Statistic:
    """A selection statistic.

    Attributes:
        score: evidence -> scores_BD, float32, larger means kept first; [1, D] where it is static.
        activations: what is recorded of the prompt; None for a statistic that does not read activations.
        random: whether `score` needs `draw_BD`.
        oracle: whether it reads the tokens after the prompt instead. Such a statistic is a bound for analysis and not a
            method, since it must know the dense continuation before the experts that generate it.
    """

    score: Callable[[Evidence], Tensor]
    activations: ActivationStatistic | None = None
    random: bool = False
    oracle: bool = False

    @property
    def name(self) -> str:
        """As in `STATISTICS`; of a statistic of one's own, the name of its function."""
        return next((name for name, statistic in STATISTICS.items() if statistic is self), self.score.__name__)


# -- what is recorded of a chunk: [B, D] float32 each ------------------------------------------------------------------


def squared_relative_activations(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """sum_t (z[b, t, j] / ||z[b, t, :]||)^2, a zero row counting as zero (arXiv 2404.01365)."""
    return chunk.sum(chunk.relative_BSD.square())


def squared_relative_contributions(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """sum_t (c[b, t, j] / ||c[b, t, :]||)^2 with c = z * ||Wd[:, j]||_2, the length of what a neuron writes."""
    return chunk.sum(unit_rows(chunk.z_BSD * block.output_lengths.to(chunk.z_BSD.device)).square())


def recent_squared_relative_activations(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """As `squared_relative_activations`, token t times 2^(-a / 128), a the number of tokens after it."""
    positions = chunk.positions
    after_BS = positions.before_B.unsqueeze(1) + positions.count_B.unsqueeze(1) - 1 - positions.positions_BS
    weights_BS = torch.exp2(-after_BS.to(chunk.z_BSD) / _HALF_LIFE)
    return chunk.sum(chunk.relative_BSD.square() * weights_BS.unsqueeze(-1))


def aged(before_BD: Tensor, part_BD: Tensor, positions: TokenPositions) -> Tensor:
    """Joins parts of `recency`: what came before has aged by as many tokens as have come since."""
    return before_BD * torch.exp2(-positions.count_B.to(before_BD) / _HALF_LIFE).unsqueeze(1) + part_BD


def _lengths(evidence: Evidence) -> Tensor:
    """[D]: ||Wd[:, j]||_2."""
    return evidence.block.output_lengths.to(evidence.recorded.device)


RELATIVE = ActivationStatistic(squared_relative_activations)

STATISTICS: dict[str, Statistic] = {
    # s[b, j] = || z[b, :, j] / ||z[b, t, :]|| ||_2 over t (arXiv 2404.01365).
    "griffin": Statistic(lambda evidence: evidence.root, RELATIVE),
    # Static, as [1, D]: ||Wg[j]|| * ||Wu[j]||, or ||W1[j]|| in a plain block.
    "magnitude": Statistic(lambda evidence: evidence.block.input_norms.unsqueeze(0)),
    # |W| * ||x|| (arXiv 2306.11695) summed over a neuron's output column: ||Wd[:, j]||_1 * ||z[b, :, j]||_2.
    "wanda": Statistic(
        lambda evidence: evidence.root * evidence.block.output_norms.to(evidence.recorded.device),
        ActivationStatistic(lambda chunk, block: chunk.sum(chunk.z_BSD.square())),
    ),
    # The floor that any statistic must beat.
    "random": Statistic(lambda evidence: cast(Tensor, evidence.draw_BD), random=True),
    # griffin[b, j] * ||Wd[:, j]||_2: the length of what a neuron writes.
    "impact": Statistic(lambda evidence: evidence.root * _lengths(evidence), RELATIVE),
    # The geometric mean of griffin and impact.
    "joint": Statistic(lambda evidence: evidence.root * _lengths(evidence).sqrt(), RELATIVE),
    # max_t |z[b, t, j]|.
    "max": Statistic(
        lambda evidence: evidence.recorded,
        ActivationStatistic(
            lambda chunk, block: chunk.z_BSD.abs().amax(dim=1), lambda before, part, _: torch.maximum(before, part)
        ),
    ),
    # sum_t |z[b, t, j]|, which ranks as the mean does.
    "mean_abs": Statistic(
        lambda evidence: evidence.recorded, ActivationStatistic(lambda chunk, block: chunk.sum(chunk.z_BSD.abs()))
    ),
    "recency": Statistic(
        lambda evidence: evidence.root, ActivationStatistic(recent_squared_relative_activations, aged)
    ),
    "oracle": Statistic(
        lambda evidence: evidence.root, ActivationStatistic(squared_relative_contributions), oracle=True
    ),
}


def aggregate(scores_BD: Tensor, lengths_B: Tensor) -> Tensor:
    """One score vector for a batch that shares its experts: s = sum_i s_i / sqrt(S_i).

    Args:
        scores_BD: scores of each sequence.
        lengths_B: prompt length of each sequence in tokens, padding excluded.

    Returns:
        [1, D] (GRIFFIN's rule for batches, arXiv 2404.01365).
    """
    weights_B1 = lengths_B.clamp(min=1).to(scores_BD).rsqrt().unsqueeze(1)
    return (scores_BD * weights_B1).sum(dim=0, keepdim=True)


# -- statistics of single tokens ---------------------------------------------------------------------------------------
#
# Every generated token keeps its own neurons, as published methods do that need a kernel for it. Here they run masked,
# for quality only: they show what one choice for the whole prompt gives away.


@dataclass(frozen=True)
class TokenStatistic:
    """What scores the neurons of each token by itself.

    Attributes:
        score: (z_SD, |act(gate)|_SD, block) -> scores_SD, float32; the K largest of each token are kept. The gate is
            None unless it is asked for.
        gate: whether `score` reads |act(gate)|. Such a statistic knows what it keeps before the up projection runs, so
            that only the gate is read whole; the others know it before the output projection runs.
    """

    score: Callable[[Tensor, Tensor | None, FeedForwardBlock], Tensor]
    gate: bool = False

    @property
    def name(self) -> str:
        """As in `TOKEN_STATISTICS`; of a statistic of one's own, the name of its function."""
        return next((name for name, statistic in TOKEN_STATISTICS.items() if statistic is self), self.score.__name__)

    def skippable(self, block: FeedForwardBlock) -> float:
        """The share of a dropped neuron's weights that need not be read: those behind what it is known from."""
        matrices = len(block.inputs) * block.parts + 1
        return (2 if self.gate and matrices > 2 else 1) / matrices


TOKEN_STATISTICS: dict[str, TokenStatistic] = {
    # |z|: TEAL (arXiv 2408.14690), the largest instead of those above a threshold.
    "teal": TokenStatistic(lambda z_SD, gate_SD, block: z_SD.abs()),
    # |z| * ||Wd[:, j]||_2, the length of what a neuron writes (WINA, arXiv 2505.19427).
    "wina": TokenStatistic(lambda z_SD, gate_SD, block: z_SD.abs() * block.output_lengths.to(z_SD.device)),
    # |act(gate)| (CATS, arXiv 2404.08763; Sirius's fine-grained sparsity, arXiv 2409.03856).
    "cats": TokenStatistic(lambda z_SD, gate_SD, block: cast(Tensor, gate_SD), gate=True),
}


def gate_activations(z_SD: Tensor, up_SD: Tensor | None) -> Tensor:
    """|act(gate)| [S, D] float32, from z = act(gate) * up, whatever the activation function; 0 where up is 0, since z
    is. In a plain block, which has no up projection, it is |z|.
    """
    if up_SD is None:
        return z_SD.abs().float()
    size_SD = up_SD.abs().float()
    return (z_SD.abs().float() / size_SD).masked_fill(size_SD == 0, 0.0)


@dataclass(frozen=True)
class TokenChoice:
    """How each token of a row chooses its neurons."""

    statistic: TokenStatistic
    kept: tuple[int, ...]

    def dropped(self, layer: int, block: FeedForwardBlock, z_SD: Tensor, up_SD: Tensor | None) -> Tensor:
        """Which neurons each token drops [S, D], bool."""
        gate_SD = gate_activations(z_SD, up_SD) if self.statistic.gate else None
        scores_SD = self.statistic.score(z_SD.float(), gate_SD, block)
        best_SK = scores_SD.topk(self.kept[layer], dim=-1).indices
        dropped_SD = torch.ones_like(z_SD, dtype=torch.bool)
        return dropped_SD.scatter_(1, best_SK, False)
