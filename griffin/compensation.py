"""Compensation: what the dropped neurons wrote during the prompt, told to the kept ones.

Selection decides which neurons work during generation; compensation changes what the kept ones write, at the same
active parameters and the same speed of decoding. Like a statistic it needs no training and no calibration data: a
compensation gathers something of the prompt, and turns it, with the experts, into a correction of each FF block.

Dimensions: B = batch rows, S = positions, D = FF width, K = kept neurons, R = dropped neurons, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock, weight_out_in
from griffin.gathering import Gathering, Stretch
from griffin.latest_rows import joined
from griffin.ridge import latest_relative_activations, learned, one_prompt, ridge


@dataclass(frozen=True)
class Compensation:
    """A compensation.

    Attributes:
        gathering: what is collected of the prompt.
        correct: (what was gathered, block, experts_BK) -> the block's correction, float32.
        share: what was gathered of several prompts -> the same of one prompt, [1, ..], made of all of their tokens.
        learn: (corrections so far, rows of what has been generated since, block, experts_BK) -> what comes on top of
            them; None: it cannot go on learning.
    """

    gathering: Gathering
    share: Callable[[Tensor], Tensor]
    correct: Callable[[Tensor, FeedForwardBlock, Tensor], Correction]
    learn: Callable[[Sequence[Correction], Tensor, FeedForwardBlock, Tensor], Correction] | None = None


def sums_and_count(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """[B, D + 1]: sum_t z[b, t, j], and the number of tokens."""
    count_B1 = stretch.places.count_B.to(stretch.z_BSD).unsqueeze(1)
    return torch.cat([stretch.sum(stretch.z_BSD), stretch.places.weight * count_B1], dim=1)


def mean(total: Tensor, block: FeedForwardBlock, experts_BK: Tensor) -> Correction:
    """A bias: what the dropped neurons write when each has its mean activation of the prompt, Wd[:, R] mean(z_R)."""
    mean_BD = total[:, :-1] / total[:, -1:].clamp(min=1)
    dropped_BD = mean_BD.scatter(1, experts_BK, 0.0)
    return Correction(bias_BH=dropped_BD @ weight_out_in(block.output).detach().float().T)


COMPENSATIONS: dict[str, Compensation | None] = {
    "none": None,
    "mean": Compensation(Gathering(sums_and_count), lambda total: total.sum(dim=0, keepdim=True), mean),
    "ridge": Compensation(Gathering(latest_relative_activations, join=joined), one_prompt, ridge, learned),
}
