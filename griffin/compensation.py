"""Compensation: what the dropped neurons wrote during the prompt, told to the kept ones.

Selection decides which neurons work during generation; compensation changes what the kept ones write, at the same
active parameters and the same speed of decoding. Like a statistic it needs no training and no calibration data: a
compensation gathers something of the prompt, and turns it, with the experts, into a correction of each FF block.

Dimensions: B = batch rows, S = positions, D = FF width, K = kept neurons, R = dropped neurons, H = hidden size,
T = rows kept of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.feedforward import FeedForwardBlock, weight_out_in
from griffin.gathering import Gathering, Stretch
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
    """[B, T, D]: z[b, t, :] / ||z[b, t, :]|| of the prompt's last tokens, neighbours added (`griffin.latest_rows`)."""
    return latest(stretch.z_BSD, stretch.places)


def ridge(total: Tensor, block: FeedForwardBlock, experts_BK: Tensor) -> Correction:
    """The least-squares prediction, from the kept activations, of what the dropped neurons wrote during the prompt.

    With Z the activations of the prompt's last tokens, each divided by its norm and neighbours added, and
    Y = Z_R Wd[:, R]^T what the dropped neurons wrote, the kept output weights change by

        (Z_K^T Z_K + c I)^-1 Z_K^T Y  =  Z_K^T (Z_K Z_K^T + c I)^-1 Y,   c = RIDGE * mean(diag(Z_K^T Z_K)).

    The right side is solved where there are fewer rows than kept neurons, else the left. Prompt by prompt, since a
    prompt's matrices are large enough to keep the device busy.
    """
    weights_HD = weight_out_in(block.output).detach()
    solved = [_ridge(Z_TD, weights_HD, experts_K) for Z_TD, experts_K in zip(total, experts_BK, strict=True)]
    bases = [basis for basis, _ in solved if basis is not None]
    return Correction(torch.stack(bases) if bases else None, torch.stack([solution for _, solution in solved]))


def _ridge(Z_TD: Tensor, weights_HD: Tensor, experts_K: Tensor) -> tuple[Tensor | None, Tensor]:
    """One prompt's basis [T, K] and weights [T, H], or None and weights [K, H].

    All in float32: the regularised matrix is positive definite with a condition of at most 1 + K / RIDGE, so an
    inverse from its Cholesky factor does, and is faster than solving for H right sides. Where that fails all the same
    (no token, activations that are not finite), the answer is no change.
    """
    dropped = torch.ones(weights_HD.shape[1], dtype=torch.bool, device=experts_K.device)
    dropped_R = dropped.index_fill_(0, experts_K, False).nonzero().squeeze(1)
    kept_TK = Z_TD.index_select(1, experts_K)
    wrote_TH = Z_TD.index_select(1, dropped_R) @ weights_HD.index_select(1, dropped_R).float().T
    dual = kept_TK.shape[0] < kept_TK.shape[1]
    gram = kept_TK @ kept_TK.T if dual else kept_TK.T @ kept_TK
    gram.diagonal().add_(RIDGE * gram.diagonal().sum() / len(experts_K))  # both forms have the same trace
    factor, failed = torch.linalg.cholesky_ex(gram)
    factor = torch.where(failed == 0, factor, torch.eye(len(gram), device=gram.device))
    solution = torch.cholesky_inverse(factor) @ (wrote_TH if dual else kept_TK.T @ wrote_TH)
    usable = (failed == 0) & solution.isfinite().all()
    return torch.where(usable, kept_TK, 0.0) if dual else None, torch.where(usable, solution, 0.0)


# The ridge penalty relative to the mean energy of a kept neuron; smaller ones overfit (docs/selection.md).
RIDGE = 1.0

COMPENSATIONS: dict[str, Compensation | None] = {
    "none": None,
    "mean": Compensation(Gathering(sums_and_count), lambda total: total.sum(dim=0, keepdim=True), mean),
    "ridge": Compensation(
        Gathering(latest_relative_activations, join=joined), lambda total: total.flatten(0, 1).unsqueeze(0), ridge
    ),
}
