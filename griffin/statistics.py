"""The selection statistics: how much each FF neuron matters for this prompt.

A statistic is two small pure functions. `gather` reads the activations of a stretch of the prompt and returns
what to add up; sums over stretches make chunked prefill and whole prefill the same thing. `score` turns the sum
into scores. Static statistics gather nothing. Adding a statistic is writing these functions and one line of
`STATISTICS`.

Dimensions: B = batch rows, S = positions, D = FF width. Activations arrive in float32 with the rows of padding
positions set to zero, so padding counts as nothing in any sum.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.feedforward import FeedForwardBlock


@dataclass(frozen=True)
class Statistic:
    """A selection statistic.

    Attributes:
        score: (total_BD, block, draw_BD) -> scores_BD, float32, larger means kept first. `total_BD` is the sum of
            what `gather` returned over the prompt, None without a `gather`. `draw_BD` holds uniform numbers that
            depend on the prompt and the layer only, None unless `random`.
        gather: z_BSD -> part_BD, or None for a statistic that does not read the activations.
        random: whether `score` needs `draw_BD`.
    """

    score: Callable[[Tensor | None, FeedForwardBlock, Tensor | None], Tensor]
    gather: Callable[[Tensor], Tensor] | None = None
    random: bool = False


def sum_of_squared_relative_activations(z_BSD: Tensor) -> Tensor:
    """sum_t (z[b, t, j] / ||z[b, t, :]||)^2, a zero row counting as zero (arXiv 2404.01365).

    Args:
        z_BSD: activations, float32.

    Returns:
        [B, D] float32.
    """
    norms_BS1 = torch.linalg.vector_norm(z_BSD, dim=-1, keepdim=True)
    return torch.where(norms_BS1 > 0, z_BSD / norms_BS1, 0.0).square_().sum(dim=1)


def sum_of_squares(z_BSD: Tensor) -> Tensor:
    """sum_t z[b, t, j]^2.

    Args:
        z_BSD: activations, float32.

    Returns:
        [B, D] float32.
    """
    return z_BSD.square().sum(dim=1)


def griffin(total_BD: Tensor | None, block: FeedForwardBlock, draw_BD: Tensor | None) -> Tensor:
    """GRIFFIN: the L2 norm over the prompt of a neuron's relative activations (arXiv 2404.01365)."""
    assert total_BD is not None
    return total_BD.sqrt()


def wanda(total_BD: Tensor | None, block: FeedForwardBlock, draw_BD: Tensor | None) -> Tensor:
    """Wanda's metric |W| * ||x|| (arXiv 2306.11695) summed over a neuron's output column, on this prompt.

    s[b, j] = ||Wd[:, j]||_1 * ||z[b, :, j]||_2.
    """
    assert total_BD is not None
    return total_BD.sqrt() * block.output_norms.to(total_BD.device)


def magnitude(total_BD: Tensor | None, block: FeedForwardBlock, draw_BD: Tensor | None) -> Tensor:
    """The static baseline: s[j] = ||Wg[j]|| * ||Wu[j]||, or ||W1[j]|| in a plain block, as [1, D]."""
    return block.input_norms.unsqueeze(0)


def random(total_BD: Tensor | None, block: FeedForwardBlock, draw_BD: Tensor | None) -> Tensor:
    """Uniform scores: the floor that any statistic must beat."""
    assert draw_BD is not None
    return draw_BD


STATISTICS: dict[str, Statistic] = {
    "griffin": Statistic(griffin, gather=sum_of_squared_relative_activations),
    "magnitude": Statistic(magnitude),
    "wanda": Statistic(wanda, gather=sum_of_squares),
    "random": Statistic(random, random=True),
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
