"""Compensation: what the dropped neurons wrote during the prompt, told to the kept ones.

Selection decides which neurons work during generation; compensation changes what the kept ones write, at the same
active parameters and the same speed of decoding. Like a statistic it needs no training and no calibration data: a
compensation gathers something of the prompt, and turns it, with the experts, into a correction of each FF block.

Dimensions: B = batch rows, S = positions, D = FF width, K = kept neurons, R = dropped neurons, H = hidden size,
T = tokens kept of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.feedforward import FeedForwardBlock, weight_out_in
from griffin.gathering import Gathering, Stretch, unit_rows
from griffin.latest_rows import joined, latest


@dataclass(frozen=True)
class Correction:
    """What is added to the output of a block that runs on its experts: z_K basis^T weights + bias.

    The change [B, K, H] of the output weights is kept as two thin factors, which are smaller.

    Attributes:
        basis_BTK: T directions in the space of the kept activations; None: those activations themselves (T = K).
        weights_BTH: what is written along each direction; None: nothing.
        bias_BH: what is written always; None: nothing.
    """

    basis_BTK: Tensor | None = None
    weights_BTH: Tensor | None = None
    bias_BH: Tensor | None = None

    @property
    def prompts(self) -> int:
        """B, the number of prompts that have a correction of their own."""
        return next(len(part) for part in (self.weights_BTH, self.bias_BH) if part is not None)

    def output(self, kept_BSK: Tensor) -> Tensor:
        """What is added [B, S, H] at these activations of the experts."""
        written_BSH = torch.zeros((), device=kept_BSK.device)
        if self.weights_BTH is not None:
            along_BST = kept_BSK if self.basis_BTK is None else kept_BSK @ self.basis_BTK.mT
            written_BSH = along_BST @ self.weights_BTH
        if self.bias_BH is not None:
            written_BSH = written_BSH + self.bias_BH.unsqueeze(1).expand(-1, kept_BSK.shape[1], -1)
        return written_BSH

    def change(self) -> Tensor | None:
        """The change [B, K, H] of what each expert writes; None: none."""
        if self.basis_BTK is None or self.weights_BTH is None:
            return self.weights_BTH
        return self.basis_BTK.mT @ self.weights_BTH


@dataclass(frozen=True)
class Compensation:
    """A compensation.

    Attributes:
        gathering: what is collected of the prompt.
        correct: (what was gathered, block, experts_BK) -> the block's correction, float32.
        share: what was gathered of several prompts -> the same of one prompt, [1, ..], made of all of their tokens.
    """

    gathering: Gathering
    share: Callable[[Tensor], Tensor]
    correct: Callable[[Tensor, FeedForwardBlock, Tensor], Correction]


# -- mean ---------------------------------------------------------------------------------------------------------


def sums_and_count(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """[B, D + 1]: sum_t z[b, t, j], and the number of tokens."""
    count_B1 = stretch.places.count_B.to(stretch.z_BSD).unsqueeze(1)
    return torch.cat([stretch.z_BSD.sum(dim=1), count_B1], dim=1)


def mean(total: Tensor, block: FeedForwardBlock, experts_BK: Tensor) -> Correction:
    """A bias: what the dropped neurons write when each has its mean activation of the prompt, Wd[:, R] mean(z_R)."""
    mean_BD = total[:, :-1] / total[:, -1:].clamp(min=1)
    dropped_BD = mean_BD.scatter(1, experts_BK, 0.0)
    return Correction(bias_BH=dropped_BD @ weight_out_in(block.output).detach().float().T)


# -- ridge --------------------------------------------------------------------------------------------------------


def latest_relative_activations(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """[B, T, D]: z[b, t, :] / ||z[b, t, :]|| of the last tokens, at most `latest_rows.ROWS`."""
    return unit_rows(latest(stretch.z_BSD, stretch.places.counted_BS))


def ridge(total: Tensor, block: FeedForwardBlock, experts_BK: Tensor) -> Correction:
    """The least-squares prediction, from the kept activations, of what the dropped neurons wrote during the prompt.

    With Z the activations of the prompt's last tokens, each row divided by its norm, and Y = Z_R Wd[:, R]^T what the
    dropped neurons wrote, the kept output weights change by

        (Z_K^T Z_K + c I)^-1 Z_K^T Y  =  Z_K^T (Z_K Z_K^T + c I)^-1 Y,   c = RIDGE * mean(diag(Z_K^T Z_K)).

    The right side is solved where there are fewer tokens than kept neurons, else the left. All in
    float32; the regularised matrix is positive definite with a condition below 1 + K / RIDGE, so Cholesky does. A row
    where it fails all the same (an empty prompt, activations that are not finite) stays uncorrected.
    """
    Z_BTD = total
    rows, positions, _ = Z_BTD.shape
    Z_K = Z_BTD.gather(2, experts_BK.unsqueeze(1).expand(rows, positions, -1))
    Z_R = Z_BTD.scatter(2, experts_BK.unsqueeze(1).expand(rows, positions, -1), 0.0)
    Y_BTH = Z_R @ weight_out_in(block.output).detach().float().T
    kept = Z_K.shape[2]
    c_B = RIDGE * Z_K.square().sum(dim=(1, 2)) / kept
    dual = positions < kept
    A = Z_K @ Z_K.mT if dual else Z_K.mT @ Z_K
    A.diagonal(dim1=1, dim2=2).add_(c_B.unsqueeze(1))
    factor, failed_B = torch.linalg.cholesky_ex(A)
    solution = torch.cholesky_solve(Y_BTH if dual else Z_K.mT @ Y_BTH, factor)
    usable_B = (failed_B == 0) & solution.isfinite().all(dim=2).all(dim=1)
    solution, Z_K = (torch.where(usable_B.view(-1, 1, 1), part, 0.0) for part in (solution, Z_K))
    return Correction(Z_K if dual else None, solution)


# Of the ridge penalty, relative to the mean square of a kept activation; from 0.3 to 2 it hardly matters.
RIDGE = 1.0

COMPENSATIONS: dict[str, Compensation | None] = {
    "none": None,
    "mean": Compensation(Gathering(sums_and_count), lambda total: total.sum(dim=0, keepdim=True), mean),
    "ridge": Compensation(
        Gathering(latest_relative_activations, join=joined), lambda total: total.flatten(0, 1).unsqueeze(0), ridge
    ),
}
