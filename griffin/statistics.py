"""The selection statistics: how much each FF neuron matters for this prompt.

A statistic is made of pure functions: `activations` says what is recorded of a prompt while it runs dense (see
`griffin.activations`), and `score` turns that into one number per neuron. Static statistics record nothing. Adding one
is writing one function, or two, and one line of `STATISTICS`.

Dimensions: B = rows of a batch, S = positions, D = FF width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
        self_generated: what the same activations came to over text that the model wrote by itself, [1, ..]; None
            unless the statistic asks for it.
    """

    block: FeedForwardBlock
    total: Tensor | None = None
    draw_BD: Tensor | None = None
    self_generated: Tensor | None = None


@dataclass(frozen=True)
class Statistic:
    """A selection statistic.

    Attributes:
        score: evidence -> scores_BD, float32, larger means kept first; [1, D] where it is static.
        activations: what is recorded of the prompt; None for a statistic that does not read activations.
        random: whether `score` needs `draw_BD`.
        self_generated: whether `score` needs the same of the model's own text (see `griffin.self_generated`).
        oracle: whether it reads the tokens after the prompt instead. Such a statistic is a bound for analysis and not a
            method, since it must know the dense continuation before the experts that generate it.
    """

    score: Callable[[Evidence], Tensor]
    activations: ActivationStatistic | None = None
    random: bool = False
    self_generated: bool = False
    oracle: bool = False

    def __call__(
        self,
        z_BSD: Tensor,
        block: FeedForwardBlock,
        counted_BS: Tensor | None = None,
        draw_BD: Tensor | None = None,
        self_generated: Tensor | None = None,
    ) -> Tensor:
        """Scores [B, D] float32, or [1, D] where static, of whole prompts.

        Args:
            z_BSD: activations, any floating type.
            block: the block that they come from.
            counted_BS: bool, False at padding; None: there is none.
            draw_BD: uniform numbers, for random statistics.
            self_generated: see `Evidence`.
        """
        z_BSD = z_BSD.float()
        if counted_BS is not None:
            z_BSD = z_BSD.masked_fill(~counted_BS.unsqueeze(-1), 0.0)
        rows, columns = z_BSD.shape[:2]
        before_B = torch.zeros(rows, dtype=torch.int64, device=z_BSD.device)
        chunk = PrefillChunk(z_BSD, TokenPositions(rows, columns, counted_BS, before_B))
        total = None if self.activations is None else self.activations.part(chunk, block)
        return self.score(Evidence(block, total, draw_BD, self_generated))


# -- what is recorded of a chunk: [B, D] float32 each ------------------------------------------------------------------


def squared_relative_activations(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """sum_t (z[b, t, j] / ||z[b, t, :]||)^2, a zero row counting as zero (arXiv 2404.01365)."""
    return chunk.sum(chunk.relative_BSD.square())


def squared_relative_contributions(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """sum_t (c[b, t, j] / ||c[b, t, :]||)^2 with c = z * ||Wd[:, j]||_2, the length of what a neuron writes."""
    return chunk.sum(unit_rows(chunk.z_BSD * block.output_lengths.to(chunk.z_BSD.device)).square())


def squares(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """sum_t z[b, t, j]^2."""
    return chunk.sum(chunk.z_BSD.square())


def magnitudes(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """sum_t |z[b, t, j]|."""
    return chunk.sum(chunk.z_BSD.abs())


def largest(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """max_t |z[b, t, j]|."""
    return chunk.z_BSD.abs().amax(dim=1)


def recent_squared_relative_activations(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """As `squared_relative_activations`, token t times 2^(-a / 128), a the number of tokens after it."""
    positions = chunk.positions
    after_BS = positions.before_B.unsqueeze(1) + positions.count_B.unsqueeze(1) - 1 - positions.positions_BS
    weights_BS = torch.exp2(-after_BS.to(chunk.z_BSD) / _HALF_LIFE)
    return chunk.sum(chunk.relative_BSD.square() * weights_BS.unsqueeze(-1))


# -- how chunks join, where they do not just add up --------------------------------------------------------------------


def larger(before_BD: Tensor, part_BD: Tensor, positions: TokenPositions) -> Tensor:
    """The largest over all chunks."""
    return torch.maximum(before_BD, part_BD)


def aged(before_BD: Tensor, part_BD: Tensor, positions: TokenPositions) -> Tensor:
    """What came before has aged by as many tokens as have come since."""
    ages_B1 = torch.exp2(-positions.count_B.to(before_BD) / _HALF_LIFE).unsqueeze(1)
    return before_BD * ages_B1 + part_BD


# -- scores ------------------------------------------------------------------------------------------------------------


def root(evidence: Evidence) -> Tensor:
    """The square root of what was recorded: an L2 norm over the prompt. With relative activations this is GRIFFIN's
    own statistic, s[b, j] = || z[b, :, j] / ||z[b, t, :]|| ||_2 (arXiv 2404.01365)."""
    assert evidence.total is not None
    return evidence.total.sqrt()


def recorded(evidence: Evidence) -> Tensor:
    """What was recorded, as it is."""
    assert evidence.total is not None
    return evidence.total


def impact(evidence: Evidence) -> Tensor:
    """GRIFFIN's statistic times the length of what a neuron writes: s[b, j] = griffin[b, j] * ||Wd[:, j]||_2."""
    return root(evidence) * evidence.block.output_lengths.to(_device(evidence))


def joint(evidence: Evidence) -> Tensor:
    """The geometric mean of GRIFFIN's statistic and impact: s[b, j] = griffin[b, j] * ||Wd[:, j]||_2^0.5."""
    return root(evidence) * evidence.block.output_lengths.to(_device(evidence)).sqrt()


def wanda(evidence: Evidence) -> Tensor:
    """Wanda's metric |W| * ||x|| (arXiv 2306.11695) summed over a neuron's output column, on this prompt.

    s[b, j] = ||Wd[:, j]||_1 * ||z[b, :, j]||_2.
    """
    return root(evidence) * evidence.block.output_norms.to(_device(evidence))


def glass(evidence: Evidence) -> Tensor:
    """The sum of two ranks: of GRIFFIN's statistic on the prompt, and on text that the model wrote by itself.

    A reconstruction from the description of GLASS (arXiv 2508.14302), not its code: equal weights, ranks from 1.
    """
    assert evidence.self_generated is not None
    return _ranks(root(evidence)) + _ranks(evidence.self_generated.to(_device(evidence)))


def magnitude(evidence: Evidence) -> Tensor:
    """The static baseline: s[j] = ||Wg[j]|| * ||Wu[j]||, or ||W1[j]|| in a plain block, as [1, D]."""
    return evidence.block.input_norms.unsqueeze(0)


def random(evidence: Evidence) -> Tensor:
    """Uniform scores: the floor that any statistic must beat."""
    assert evidence.draw_BD is not None
    return evidence.draw_BD


def _ranks(scores_BD: Tensor) -> Tensor:
    """[B, D] float32: 1 for the smallest to D for the largest of each row."""
    return scores_BD.argsort(dim=-1, stable=True).argsort(dim=-1).float() + 1


def _device(evidence: Evidence) -> torch.device:
    assert evidence.total is not None
    return evidence.total.device


RELATIVE = ActivationStatistic(squared_relative_activations)

STATISTICS: dict[str, Statistic] = {
    "griffin": Statistic(root, RELATIVE),
    "magnitude": Statistic(magnitude),
    "wanda": Statistic(wanda, ActivationStatistic(squares)),
    "random": Statistic(random, random=True),
    "impact": Statistic(impact, RELATIVE),
    "joint": Statistic(joint, RELATIVE),
    "max": Statistic(recorded, ActivationStatistic(largest, join=larger)),
    "mean_abs": Statistic(recorded, ActivationStatistic(magnitudes)),  # the sum ranks as the mean does
    "recency": Statistic(root, ActivationStatistic(recent_squared_relative_activations, join=aged)),
    "glass": Statistic(glass, RELATIVE, self_generated=True),
    "oracle": Statistic(root, ActivationStatistic(squared_relative_contributions), oracle=True),
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
