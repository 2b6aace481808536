"""Ridge compensation: the kept neurons learn, by least squares, what the dropped ones wrote.

The rows that it learns from are the last tokens of the prompt, each two neighbours added to one row: memory and the
cost of solving are bounded, whatever the length of the prompt, and neighbours are so alike that a row for two of them
says nearly as much as two rows (measured in docs/selection.md). Nothing here waits for the device.

Dimensions: B = rows of a batch, S = positions, D = FF width, K = kept neurons, R = dropped neurons, H = hidden size,
T = rows kept of the prompt, N = rows that are learned later.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from griffin.activations import PrefillChunk, TokenPositions, unit_rows
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock, weight_out_in

# The ridge penalty relative to the mean energy of a kept neuron; smaller ones overfit (docs/selection.md).
RIDGE = 1.0

ROWS = 512
TOKENS_PER_ROW = 2

# Rows that were learned later and that a fit remembers; what it forgets can be learned anew.
LEARNED = 512


# -- what is recorded of the prompt -----------------------------------------------------------------------------------


def latest_rows(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """The last rows of the prompts as far as they have come, from a chunk's tokens alone.

    Rows go by token positions in the prompt, so that a prompt in chunks gives what it gives whole.

    Returns:
        [B, T, D] sums of z / ||z|| over the tokens of a row, times the root of what a token counts as; the last row
        last. T is what the longest prompt may have, but at most `ROWS`. What is not in the chunk is zero.
    """
    positions, z_BSD = chunk.positions, chunk.z_BSD
    length = _length(positions)
    row_BS = positions.positions_BS // TOKENS_PER_ROW + length - 1 - _last_row(positions).unsqueeze(1)
    if positions.counted_BS is None and positions.columns > length * TOKENS_PER_ROW:  # earlier tokens are in no row
        row_BS, z_BSD = row_BS[:, -length * TOKENS_PER_ROW :], z_BSD[:, -length * TOKENS_PER_ROW :]
    counted_BS = row_BS >= 0 if positions.counted_BS is None else (row_BS >= 0) & positions.counted_BS
    rows, _, width = z_BSD.shape
    prompt_B1 = torch.arange(rows, device=z_BSD.device).unsqueeze(1)
    # What counts in no row goes into one more, which is cut off: selecting tokens would wait for the device.
    target_BS = torch.where(counted_BS, prompt_B1 * length + row_BS, rows * length)
    sums = z_BSD.new_zeros(rows * length + 1, width)
    sums.index_add_(0, target_BS.flatten(), (positions.weight**0.5 * unit_rows(z_BSD)).flatten(0, 1))
    return sums[:-1].view(rows, length, width)


def joined_rows(before_BTD: Tensor, part_BTD: Tensor, positions: TokenPositions) -> Tensor:
    """The last rows of the prompts, from those of their beginning and those of the chunk that follows."""
    before = replace(positions, columns=0, counted_BS=None)
    come_B = _last_row(positions) - _last_row(before)  # rows begun since, by which the earlier ones move up
    earlier, length = before_BTD.shape[1], part_BTD.shape[1]
    source_BT = torch.arange(length, device=come_B.device) + come_B.unsqueeze(1) + earlier - length
    there_BT1 = ((source_BT >= 0) & (source_BT < earlier)).unsqueeze(-1)
    index_BTD = source_BT.clamp(0, earlier - 1).unsqueeze(-1).expand(-1, -1, before_BTD.shape[2])
    return torch.where(there_BT1, before_BTD.gather(1, index_BTD), 0.0) + part_BTD


def _last_row(positions: TokenPositions) -> Tensor:
    """[B] int64: the number of the row that the last token is in, -1 before the first token."""
    return (positions.before_B + positions.count_B - 1).div(TOKENS_PER_ROW, rounding_mode="floor")


def _length(positions: TokenPositions) -> int:
    columns = positions.columns_before + positions.columns
    return min(ROWS, max(1, -(-columns // TOKENS_PER_ROW)))


# -- solving ----------------------------------------------------------------------------------------------------------


def ridge(total_1TD: Tensor, block: FeedForwardBlock, experts_K: Tensor) -> Correction:
    """The least-squares prediction, from the kept activations, of what the dropped neurons wrote during the prompt.

    With Z the rows of the prompt and Y = Z_R Wd[:, R]^T what the dropped neurons wrote, the kept output weights change
    by

        (Z_K^T Z_K + c I)^-1 Z_K^T Y  =  Z_K^T (Z_K Z_K^T + c I)^-1 Y,   c = RIDGE * mean(diag(Z_K^T Z_K)).

    The right side is solved where there are fewer rows than kept neurons, else the left. All in float32: the
    regularised matrix is positive definite with a condition of at most 1 + K / RIDGE, so an inverse from its Cholesky
    factor does, and is faster than solving for H right sides. Where that fails all the same (no token, activations
    that are not finite), the answer is no change.
    """
    Z_TD, weights_HD = total_1TD[0], weight_out_in(block.output).detach()
    dropped_R = _dropped(experts_K, weights_HD.shape[1])
    kept_TK = Z_TD.index_select(1, experts_K)
    wrote_TH = Z_TD.index_select(1, dropped_R) @ weights_HD.index_select(1, dropped_R).float().T
    dual = kept_TK.shape[0] < kept_TK.shape[1]
    gram = kept_TK @ kept_TK.T if dual else kept_TK.T @ kept_TK
    penalty = RIDGE * gram.diagonal().sum() / len(experts_K)  # both forms have the same trace
    gram.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(gram)
    eye = torch.eye(len(gram), device=gram.device)
    inverse = torch.cholesky_inverse(torch.where(failed == 0, factor, eye))
    solution = inverse @ (wrote_TH if dual else kept_TK.T @ wrote_TH)
    usable = (failed == 0) & solution.isfinite().all()
    solution = torch.where(usable, solution, 0.0)
    nothing_MK = kept_TK[:0]
    if not dual:
        return Correction(eye, solution, fit=RidgeFit(None, inverse, penalty, nothing_MK))
    rows_TK = torch.where(usable, kept_TK, 0.0)
    return Correction(rows_TK, solution, fit=RidgeFit(rows_TK, inverse, penalty, nothing_MK))


def learn(before: tuple[Correction, ...], rows_ND: Tensor, block: FeedForwardBlock, experts_K: Tensor) -> Correction:
    """What comes on top of earlier corrections when more rows are learned with the same penalty and experts.

    The sum is the ridge solution of all rows together, at the cost of the new ones (recursive least squares).

    Args:
        before: the corrections so far. The first has the fit; the bases of the others are what it has learned since.
        rows_ND: the new rows; a zero row teaches nothing.
        block: the block.
        experts_K: its experts, as they were.
    """
    kept_NK = rows_ND.index_select(1, experts_K)
    error_NH = rows_ND.index_fill(1, experts_K, 0.0) @ weight_out_in(block.output).detach().float().T
    for correction in before:
        if (predicted_NH := correction.output(kept_NK)) is not None:
            error_NH = error_NH - predicted_NH
    fit = before[0].fit
    assert isinstance(fit, RidgeFit)
    learned = [correction.basis_TK for correction in before[1:] if correction.basis_TK is not None]
    fit = replace(fit, learned_MK=torch.cat([fit.learned_MK, *learned])[-LEARNED:])
    basis_NK, weights_NH, _ = fit.step(kept_NK, error_NH)
    return Correction(basis_NK, weights_NH)


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """The inverse P = (Z_K^T Z_K + c I)^-1 of a fit, in the form that it was solved in.

    Attributes:
        rows_TK: Z_K, where the inverse is of Z_K Z_K^T + c I [T, T]; None where it is P itself [K, K].
        inverse: either.
        penalty: c, a scalar.
        learned_MK: what later rows took from P, which is P - learned^T learned now; the newest `LEARNED` of them.
    """

    rows_TK: Tensor | None
    inverse: Tensor
    penalty: Tensor
    learned_MK: Tensor

    def step(self, kept_NK: Tensor, error_NH: Tensor) -> tuple[Tensor, Tensor, RidgeFit]:
        """Learn N more rows (recursive least squares).

        With U = Z_new P and S = I + Z_new P Z_new^T, the solution gains U^T S^-1 error and P loses U^T S^-1 U.

        Args:
            kept_NK: the kept neurons' activations.
            error_NH: what the correction so far leaves of what the dropped neurons wrote.

        Returns:
            The step of the solution as basis [N, K] and weights [N, H], zeros where it is not finite; the fit after it.
        """
        through_NK = self._through(kept_NK)
        gain_NN = kept_NK @ through_NK.T
        gain_NN.diagonal().add_(1.0)
        factor_NN, _ = torch.linalg.cholesky_ex(gain_NN)
        basis_NK = torch.linalg.solve_triangular(factor_NN, through_NK, upper=False)
        weights_NH = torch.linalg.solve_triangular(factor_NN, error_NH, upper=False)
        usable = basis_NK.isfinite().all() & weights_NH.isfinite().all()
        basis_NK, weights_NH = torch.where(usable, basis_NK, 0.0), torch.where(usable, weights_NH, 0.0)
        learned_MK = torch.cat([self.learned_MK, basis_NK])[-LEARNED:]
        return basis_NK, weights_NH, replace(self, learned_MK=learned_MK)

    def _through(self, kept_NK: Tensor) -> Tensor:
        """Z_new P [N, K], with all that was learned so far (Woodbury's identity)."""
        if self.rows_TK is None:
            through_NK = kept_NK @ self.inverse
        else:
            along_NT = (kept_NK @ self.rows_TK.T) @ self.inverse
            through_NK = (kept_NK - along_NT @ self.rows_TK) / self.penalty
        return through_NK - (kept_NK @ self.learned_MK.T) @ self.learned_MK


def _dropped(experts_K: Tensor, width: int) -> Tensor:
    """[R] int64, ascending: the neurons that are not kept. Their number is known, so nothing waits for the device."""
    kept_D = torch.zeros(width, dtype=torch.int8, device=experts_K.device).index_fill_(0, experts_K, 1)
    return kept_D.argsort(stable=True)[: width - len(experts_K)]
