"""The selection statistics: how much each FF neuron matters for this prompt.

A statistic is made of pure functions: `activations` says what is recorded of a prompt while it runs dense (see
`griffin.activations`), and `score` turns that into one number per neuron. Adding one is one entry of `STATISTICS`, or
of `TOKEN_STATISTICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from griffin.activations import ActivationStatistic, unit_rows
from griffin.feedforward import FeedForwardBlock


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a statistic scores a block's neurons by."""

    block: FeedForwardBlock  # with its weights
    total: Tensor | None = None  # what the statistic's activations came to over the prompt, if it records any
    draw_D: Tensor | None = None  # uniform numbers by prompt and layer, for a random statistic

    @property
    def recorded(self) -> Tensor:
        """What was recorded."""
        return cast(Tensor, self.total)

    @property
    def root(self) -> Tensor:
        """The square root of what was recorded: an L2 norm over the prompt."""
        return self.recorded.sqrt()

    @property
    def output_lengths(self) -> Tensor:
        """||Wd[:, j]||_2."""
        return self.block.output_lengths.to(self.recorded.device)


@dataclass(frozen=True)
class Statistic:
    """A selection statistic. An oracle reads the tokens after the prompt instead: it is a bound for analysis and not a
    method, since it must know the dense continuation before the experts that generate it."""

    score: Callable[[Evidence], Tensor]  # scores_D, float32, larger means kept first
    activations: ActivationStatistic | None = None  # what is recorded of the prompt; None for a static one
    random: bool = False  # whether `score` needs `draw_D`
    oracle: bool = False

    @property
    def name(self) -> str:
        """As in `STATISTICS`; of a statistic of one's own, the name of its function."""
        return next((name for name, statistic in STATISTICS.items() if statistic is self), self.score.__name__)


RELATIVE = ActivationStatistic(lambda chunk, block: chunk.relative_SD.square().sum(dim=0))

STATISTICS: dict[str, Statistic] = {
    # s[j] = || z[:, j] / ||z[t, :]|| ||_2 over t, a zero row counting as zero (arXiv 2404.01365).
    "griffin": Statistic(lambda evidence: evidence.root, RELATIVE),
    # Static: ||Wg[j]|| * ||Wu[j]||, or ||W1[j]|| in a plain block.
    "magnitude": Statistic(lambda evidence: evidence.block.input_norms),
    # |W| * ||x|| (arXiv 2306.11695) summed over a neuron's output column: ||Wd[:, j]||_1 * ||z[:, j]||_2.
    "wanda": Statistic(
        lambda evidence: evidence.root * evidence.block.output_norms.to(evidence.recorded.device),
        ActivationStatistic(lambda chunk, block: chunk.z_SD.square().sum(dim=0)),
    ),
    # The floor that any statistic must beat.
    "random": Statistic(lambda evidence: cast(Tensor, evidence.draw_D), random=True),
    # griffin[j] * ||Wd[:, j]||_2: the length of what a neuron writes.
    "impact": Statistic(lambda evidence: evidence.root * evidence.output_lengths, RELATIVE),
    # The geometric mean of griffin and impact.
    "joint": Statistic(lambda evidence: evidence.root * evidence.output_lengths.sqrt(), RELATIVE),
    # The relative size of what a neuron writes, c = z * ||Wd[:, j]||_2, over the tokens after the prompt.
    "oracle": Statistic(
        lambda evidence: evidence.root,
        ActivationStatistic(
            lambda chunk, block: unit_rows(chunk.z_SD * block.output_lengths.to(chunk.z_SD.device)).square().sum(dim=0)
        ),
        oracle=True,
    ),
}


def aggregate(scores: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """One score vector [D] for prompts of S_i tokens that share their experts: s = sum_i s_i / sqrt(S_i), padding
    excluded (arXiv 2404.01365)."""
    weighted = [scores_D / max(length, 1) ** 0.5 for scores_D, length in zip(scores, lengths, strict=True)]
    return torch.stack(weighted).sum(dim=0)


@dataclass(frozen=True)
class TokenStatistic:
    """What scores the neurons of each token by itself: (z_SD, |act(gate)|_SD or None, block) -> scores_SD, float32.

    With `gate`, which asks for |act(gate)|, what is kept is known before the up projection runs, so that only the gate
    is read whole; else before the output projection runs. Published methods need a kernel for it; here they run masked,
    for quality only: they show what one choice for the whole prompt gives away.
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
    """|act(gate)| [S, D] float32, from z = act(gate) * up; 0 where up is 0, since z is; |z| where a block has no up."""
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
