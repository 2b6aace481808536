"""The selection statistics: how much each FF neuron matters for this prompt.

A statistic maps the activations of a prompt [B, S, D], with padding marked, and the block's weights to scores
[B, D]: `STATISTICS[name](z_BSD, block, counted_BS)`. It is made of pure functions: what it gathers of each stretch of
a prompt (see `griffin.gathering`), and `score`, which turns what was gathered into scores. Static statistics gather
nothing. Adding one is writing one function, or two, and one line of `STATISTICS`.

Dimensions: B = batch rows, S = positions, D = FF width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.feedforward import FeedForwardBlock
from griffin.gathering import Gathering, Places, Stretch, unit_rows

# Tokens after which a token counts half in `recency`.
_HALF_LIFE = 128


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a statistic scores a block's neurons by.

    Attributes:
        block: the block, with its weights.
        total: what the statistic's gathering came to over the prompt, B first; None without a gathering.
        draw_BD: uniform numbers that depend on the prompt and the layer only; None unless the statistic is random.
        own_text: what the gathering came to over text that the model wrote by itself, [1, ..]; None unless asked for.
    """

    block: FeedForwardBlock
    total: Tensor | None = None
    draw_BD: Tensor | None = None
    own_text: Tensor | None = None


@dataclass(frozen=True)
class Statistic:
    """A selection statistic.

    Attributes:
        score: evidence -> scores_BD, float32, larger means kept first; [1, D] where it is static.
        gathering: what is collected of the prompt; None for a statistic that does not read activations.
        random: whether `score` needs `draw_BD`.
        own_text: whether `score` needs to know the same of the model's own text (see `griffin.own_text`).
        hindsight: whether the gathering is of the tokens after the prompt: a bound for analysis, not a method, since
            it needs to know the dense continuation before the experts that generate it.
    """

    score: Callable[[Evidence], Tensor]
    gathering: Gathering | None = None
    random: bool = False
    own_text: bool = False
    hindsight: bool = False

    def __call__(
        self,
        z_BSD: Tensor,
        block: FeedForwardBlock,
        counted_BS: Tensor | None = None,
        draw_BD: Tensor | None = None,
        own_text: Tensor | None = None,
    ) -> Tensor:
        """Scores [B, D] float32, or [1, D] where static, of whole prompts.

        Args:
            z_BSD: activations, any floating type.
            block: the block that they come from.
            counted_BS: bool, False at padding; None: there is none.
            draw_BD: uniform numbers, for random statistics.
            own_text: see `Evidence`.
        """
        if counted_BS is None:
            counted_BS = torch.ones(z_BSD.shape[:2], dtype=torch.bool, device=z_BSD.device)
        places = Places(counted_BS, counted_BS.new_zeros(len(counted_BS), dtype=torch.int64))
        stretch = Stretch(z_BSD.float().masked_fill(~counted_BS.unsqueeze(-1), 0.0), places)
        total = None if self.gathering is None else self.gathering.part(stretch, block)
        return self.score(Evidence(block, total, draw_BD, own_text))


# -- what is gathered of a stretch: [B, D] float32 each -----------------------------------------------------------


def squared_relative_activations(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """sum_t (z[b, t, j] / ||z[b, t, :]||)^2, a zero row counting as zero (arXiv 2404.01365)."""
    return stretch.sum(stretch.relative_BSD.square())


def squared_relative_contributions(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """sum_t (c[b, t, j] / ||c[b, t, :]||)^2 with c = z * ||Wd[:, j]||_2, the length of what a neuron writes."""
    return stretch.sum(unit_rows(stretch.z_BSD * block.output_lengths.to(stretch.z_BSD.device)).square())


def squares(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """sum_t z[b, t, j]^2."""
    return stretch.sum(stretch.z_BSD.square())


def magnitudes(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """sum_t |z[b, t, j]|."""
    return stretch.sum(stretch.z_BSD.abs())


def largest(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """max_t |z[b, t, j]|."""
    return stretch.z_BSD.abs().amax(dim=1)


def recent_squared_relative_activations(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """As `squared_relative_activations`, token t times 2^(-a / 128), a the number of tokens after it."""
    places = stretch.places
    after_BS = places.before_B.unsqueeze(1) + places.count_B.unsqueeze(1) - 1 - places.positions_BS
    weights_BS = torch.exp2(-after_BS.to(stretch.z_BSD) / _HALF_LIFE)
    return stretch.sum(stretch.relative_BSD.square() * weights_BS.unsqueeze(-1))


# -- how stretches join, where they do not just add up ------------------------------------------------------------


def larger(before_BD: Tensor, part_BD: Tensor, places: Places) -> Tensor:
    """The largest over all stretches."""
    return torch.maximum(before_BD, part_BD)


def aged(before_BD: Tensor, part_BD: Tensor, places: Places) -> Tensor:
    """What came before has aged by as many tokens as have come since."""
    ages_B1 = torch.exp2(-places.count_B.to(before_BD) / _HALF_LIFE).unsqueeze(1)
    return before_BD * ages_B1 + part_BD


# -- scores -------------------------------------------------------------------------------------------------------


def root(evidence: Evidence) -> Tensor:
    """The square root of what was gathered: an L2 norm over the prompt. With relative activations this is GRIFFIN's
    own statistic, s[b, j] = || z[b, :, j] / ||z[b, t, :]|| ||_2 (arXiv 2404.01365)."""
    assert evidence.total is not None
    return evidence.total.sqrt()


def gathered(evidence: Evidence) -> Tensor:
    """What was gathered, as it is."""
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
    assert evidence.own_text is not None
    return _ranks(root(evidence)) + _ranks(evidence.own_text.to(_device(evidence)))


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


_relative = Gathering(squared_relative_activations)

STATISTICS: dict[str, Statistic] = {
    "griffin": Statistic(root, _relative),
    "magnitude": Statistic(magnitude),
    "wanda": Statistic(wanda, Gathering(squares)),
    "random": Statistic(random, random=True),
    "impact": Statistic(impact, _relative),
    "joint": Statistic(joint, _relative),
    "max": Statistic(gathered, Gathering(largest, join=larger)),
    "mean_abs": Statistic(gathered, Gathering(magnitudes)),  # the sum ranks as the mean does
    "recency": Statistic(root, Gathering(recent_squared_relative_activations, join=aged)),
    "glass": Statistic(glass, _relative, own_text=True),
    "oracle": Statistic(root, Gathering(squared_relative_contributions), hindsight=True),
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
