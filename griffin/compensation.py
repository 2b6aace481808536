"""Compensation: the kept neurons make up for what the dropped ones wrote during the prompt.

Selection decides which neurons work during generation; compensation changes what the kept ones write, at the same
active parameters and the same speed of decoding. Like a statistic it needs no training and no calibration data: a
compensation records something of the prompt, and turns it, with the experts, into a correction of each FF block.
Adding one is writing one function, or two, and one line of `COMPENSATIONS`.

Dimensions: B = rows of a batch, S = positions, D = FF width, K = kept neurons, H = hidden size, T = directions,
N = rows that are learned later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.activations import ActivationStatistic, PrefillChunk
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock, weight_out_in
from griffin.ridge import joined_rows, latest_rows, learn, ridge


@dataclass(frozen=True)
class Compensation:
    """A compensation.

    Attributes:
        activations: what is recorded of the prompt.
        share: what was recorded of several prompts -> the same of one prompt, [1, ..], made of all of their tokens.
        correct: (what was recorded of one prompt [1, ..], block, experts_K) -> the block's correction, float32.
        learn: (corrections so far, relative activations of later tokens [N, D], block, experts_K) -> the correction
            that comes on top of them; None: it cannot go on learning.
    """

    activations: ActivationStatistic
    share: Callable[[Tensor], Tensor]
    correct: Callable[[Tensor, FeedForwardBlock, Tensor], Correction]
    learn: Callable[[tuple[Correction, ...], Tensor, FeedForwardBlock, Tensor], Correction] | None = None


def sums_and_count(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """[B, D + 1]: sum_t z[b, t, j], and the number of tokens."""
    count_B1 = chunk.positions.count_B.to(chunk.z_BSD).unsqueeze(1)
    return torch.cat([chunk.sum(chunk.z_BSD), chunk.positions.weight * count_B1], dim=1)


def mean(total: Tensor, block: FeedForwardBlock, experts_K: Tensor) -> Correction:
    """A bias: what the dropped neurons write when each has its mean activation of the prompt, Wd[:, R] mean(z_R)."""
    mean_D = total[0, :-1] / total[0, -1].clamp(min=1)
    dropped_D = mean_D.scatter(0, experts_K, 0.0)
    return Correction(bias_H=weight_out_in(block.output).detach().float() @ dropped_D)


COMPENSATIONS: dict[str, Compensation | None] = {
    "none": None,
    "mean": Compensation(ActivationStatistic(sums_and_count), lambda total: total.sum(dim=0, keepdim=True), mean),
    "ridge": Compensation(
        ActivationStatistic(latest_rows, join=joined_rows),
        lambda total_BTD: total_BTD.flatten(0, 1).unsqueeze(0),
        ridge,
        learn,
    ),
}
