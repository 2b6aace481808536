"""Compensation: the kept neurons make up for what the dropped ones wrote during the prompt.

Selection decides which neurons work during generation; compensation changes what the kept ones write, at the same
active parameters and the same speed of decoding. Like a statistic it needs no training and no calibration data: a
compensation records something of the prompt, and turns it, with the experts, into a correction of each FF block.
Adding one is writing one function, or two, and one line of `COMPENSATIONS`.

Dimensions: B = rows of a batch, D = FF width, K = kept neurons, H = hidden size, X = D + H, T = rows of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from griffin.activations import ActivationStatistic, PrefillChunk
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock
from griffin.ridge import RidgeFit, joined_rows, latest_rows


@dataclass(frozen=True, eq=False)
class PrunedLayer:
    """What a compensation makes a correction of one layer from."""

    layer: int
    total: Tensor  # what was recorded, [1, ..], on the block's device
    block: FeedForwardBlock  # its weights are there until the next layer's are asked for
    neurons_K: Tensor  # the kept ones


Corrected = tuple[dict[int, Correction], tuple[RidgeFit, ...]]


@dataclass(frozen=True)
class Compensation:
    """A compensation.

    Attributes:
        activations: what is recorded of the prompt.
        share: what was recorded of several prompts -> the same of one prompt, [1, ..], made of all of their tokens.
        correct: the pruned layers, one after the other -> by layer, its correction, float32; and the fits that they
            were made by, where they can go on learning.
        learns: whether they can.
    """

    activations: ActivationStatistic
    share: Callable[[Sequence[Tensor]], Tensor]
    correct: Callable[[Iterable[PrunedLayer]], Corrected]
    learns: bool = False


def sums_and_count(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """[B, D + H + 1]: sum_t z[b, t, j], the sum of what was written, and the number of tokens."""
    count_B1 = chunk.positions.count_B.to(chunk.z_BSD).unsqueeze(1)
    sums = chunk.sum(chunk.z_BSD), chunk.sum(chunk.written_BSH(block)), chunk.positions.weight * count_B1
    return torch.cat(sums, dim=1)


def mean(layers: Iterable[PrunedLayer]) -> Corrected:
    """A bias: what the dropped neurons write when each has its mean activation of the prompt, Wd[:, R] mean(z_R)."""
    found: dict[int, Correction] = {}
    for pruned in layers:
        width, neurons_K = pruned.block.width, pruned.neurons_K
        mean_X = pruned.total[0, :-1] / pruned.total[0, -1].clamp(min=1)
        kept_1H = pruned.block.written(mean_X[:width].index_select(0, neurons_K).unsqueeze(0), neurons_K)
        found[pruned.layer] = Correction(bias_H=mean_X[width:] - kept_1H[0])
    return found, ()


def ridge(layers: Iterable[PrunedLayer]) -> Corrected:
    """The least-squares prediction, from the kept activations, of what the dropped neurons wrote during the prompt:
    (Z_K^T Z_K + c I)^-1 Z_K^T Y for Y = Z_R Wd[:, R]^T and c = RIDGE * mean(diag(Z_K^T Z_K)); see `griffin.ridge`."""
    devices: dict[torch.device, list[tuple[int, Tensor, Tensor, Tensor]]] = {}
    for pruned in layers:
        rows_TX, width, neurons_K = pruned.total[0], pruned.block.width, pruned.neurons_K
        kept_TK = rows_TX[:, :width].index_select(1, neurons_K)
        error_TH = rows_TX[:, width:] - pruned.block.written(kept_TK, neurons_K)
        devices.setdefault(kept_TK.device, []).append((pruned.layer, neurons_K, kept_TK, error_TH))
    found: dict[int, Correction] = {}
    fits: list[RidgeFit] = []
    for group in devices.values():
        numbers, neurons, kept, errors = zip(*group, strict=True)
        padded = [functional.pad(kept_TK, (0, max(map(len, neurons)) - kept_TK.shape[1])) for kept_TK in kept]
        corrections, fit = RidgeFit(numbers, neurons).learn(torch.stack(padded), torch.stack(errors))
        found |= corrections
        fits.append(fit)
    return found, tuple(fits)


def prompts_together(totals: Sequence[Tensor]) -> Tensor:
    """Rows of several prompts [1, T, X], the last ones of each, as the rows of one."""
    return torch.cat(list(totals), dim=1)


COMPENSATIONS: dict[str, Compensation | None] = {
    "none": None,
    "mean": Compensation(
        ActivationStatistic(sums_and_count), lambda totals: torch.stack(list(totals)).sum(dim=0), mean
    ),
    "ridge": Compensation(ActivationStatistic(latest_rows, join=joined_rows), prompts_together, ridge, learns=True),
}
