"""Ridge compensation: the kept neurons learn, by least squares, what the dropped ones wrote.

Dimensions: B = prompts, D = FF width, K = kept neurons, R = dropped neurons, H = hidden size, T = rows kept of the
prompt, N = rows that are learned later.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock, weight_out_in
from griffin.gathering import Stretch
from griffin.latest_rows import latest

# The ridge penalty relative to the mean energy of a kept neuron; smaller ones overfit (docs/selection.md).
RIDGE = 1.0


def latest_relative_activations(stretch: Stretch, block: FeedForwardBlock) -> Tensor:
    """[B, T, D]: z[b, t, :] / ||z[b, t, :]|| of the prompt's last tokens, neighbours added (`griffin.latest_rows`)."""
    return latest(stretch.z_BSD, stretch.places)


def one_prompt(total_BTD: Tensor) -> Tensor:
    """[1, B * T, D]: the rows of several prompts as those of one."""
    return total_BTD.flatten(0, 1).unsqueeze(0)


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
    bases = [fit.rows_TK for fit, _ in solved if fit.rows_TK is not None]
    return Correction(
        torch.stack(bases) if bases else None,
        torch.stack([solution for _, solution in solved]),
        fits=tuple(fit for fit, _ in solved),
    )


def learned(before: Sequence[Correction], rows_BND: Tensor, block: FeedForwardBlock, experts_BK: Tensor) -> Correction:
    """What comes on top of earlier corrections when more rows are learned with the same penalty and experts.

    The sum is the ridge solution of all rows together, at the cost of the new ones (recursive least squares).

    Args:
        before: the prompts' corrections so far, the one with the fits first.
        rows_BND: the new rows; a zero row teaches nothing.
        block: the block.
        experts_BK: its experts, as they were.
    """
    weights_HD = weight_out_in(block.output).detach().float()
    experts_BNK = experts_BK.unsqueeze(1).expand(-1, rows_BND.shape[1], -1)
    kept_BNK = rows_BND.gather(2, experts_BNK)
    error_BNH = rows_BND.scatter(2, experts_BNK, 0.0) @ weights_HD.T
    for correction in before:
        error_BNH = error_BNH - correction.output(kept_BNK)
    steps = [fit.update(kept, error) for fit, kept, error in zip(before[0].fits, kept_BNK, error_BNH, strict=True)]
    return Correction(torch.stack([basis for basis, _ in steps]), torch.stack([weights for _, weights in steps]))


class RidgeFit:
    """The inverse P = (Z_K^T Z_K + c I)^-1 of one prompt's fit, in the form that it was solved in.

    Args:
        rows_TK: Z_K, where the inverse is of Z_K Z_K^T + c I [T, T]; None where it is P itself [K, K].
        inverse: either.
        penalty: c, a scalar.
    """

    def __init__(self, rows_TK: Tensor | None, inverse: Tensor, penalty: Tensor) -> None:
        self.rows_TK = rows_TK
        self._inverse = inverse
        self._penalty = penalty
        self._learned: list[tuple[Tensor, Tensor]] = []  # per update, U = Z_new P and (I + Z_new P Z_new^T)^-1

    def update(self, kept_NK: Tensor, error_NH: Tensor) -> tuple[Tensor, Tensor]:
        """Learn N more rows.

        Args:
            kept_NK: the kept neurons' activations.
            error_NH: what the correction so far leaves of what the dropped neurons wrote.

        Returns:
            The step of the solution as basis [N, K] and weights [N, H]; zeros where it is not finite.
        """
        basis_NK = self._through(kept_NK)
        gain_NN = kept_NK @ basis_NK.T
        gain_NN.diagonal().add_(1.0)
        inverse_NN = torch.linalg.inv_ex(gain_NN).inverse
        weights_NH = inverse_NN @ error_NH
        usable = basis_NK.isfinite().all() & inverse_NN.isfinite().all() & weights_NH.isfinite().all()
        basis_NK, inverse_NN, weights_NH = (
            torch.where(usable, part, 0.0) for part in (basis_NK, inverse_NN, weights_NH)
        )
        self._learned.append((basis_NK, inverse_NN))
        return basis_NK, weights_NH

    def _through(self, kept_NK: Tensor) -> Tensor:
        """Z_new P [N, K], with all that was learned so far (Woodbury's identity)."""
        if self.rows_TK is None:
            through_NK = kept_NK @ self._inverse
        else:
            along_NT = (kept_NK @ self.rows_TK.T) @ self._inverse
            through_NK = (kept_NK - along_NT @ self.rows_TK) / self._penalty
        for basis_MK, inverse_MM in self._learned:
            through_NK = through_NK - (kept_NK @ basis_MK.T) @ inverse_MM @ basis_MK
        return through_NK


def _ridge(Z_TD: Tensor, weights_HD: Tensor, experts_K: Tensor) -> tuple[RidgeFit, Tensor]:
    """One prompt's fit, and its weights [T, H] along the fit's rows, or [K, H] where it has none.

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
    penalty = RIDGE * gram.diagonal().sum() / len(experts_K)  # both forms have the same trace
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    factor = torch.where(failed == 0, factor, torch.eye(len(gram), device=gram.device))
    inverse = torch.cholesky_inverse(factor)
    solution = inverse @ (wrote_TH if dual else kept_TK.T @ wrote_TH)
    usable = (failed == 0) & solution.isfinite().all()
    fit = RidgeFit(torch.where(usable, kept_TK, 0.0) if dual else None, inverse, penalty)
    return fit, torch.where(usable, solution, 0.0)
