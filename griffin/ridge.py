"""Ridge compensation: the kept neurons learn, by recursive least squares, what the dropped ones wrote.

The rows that it learns from are the last tokens of the prompt, each two neighbours added to one row: memory and the
cost of solving are bounded, whatever the length of the prompt, and neighbours are so alike that a row for two of them
says nearly as much as two rows (measured in docs/selection.md). What is generated later is learned by the same step.
Nothing here waits for the device.

Dimensions: L = layers, B = rows of a batch, S = positions, D = FF width, K = kept neurons, the most of any layer (rows
of zeros stand for those that others have less), H = hidden size, X = D + H, T = rows of the prompt, N = rows that are
learned at a time, M = rows that were learned.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from griffin.activations import PrefillChunk, TokenPositions, row_lengths
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock

# The ridge penalty relative to the mean energy of a kept neuron; smaller ones overfit (docs/selection.md).
RIDGE = 1.0

ROWS = 512
TOKENS_PER_ROW = 2

# Rows that were learned behind the prompt and that a fit remembers; what it forgets can be learned anew.
LEARNED = 512


# -- what is recorded of the prompt -----------------------------------------------------------------------------------


def latest_rows(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """The last rows of the prompts as far as they have come, from a chunk's tokens alone.

    Rows go by token positions in the prompt, so that a prompt in chunks gives what it gives whole.

    Returns:
        [B, T, D + H] sums of z / ||z|| over the tokens of a row, and of what the block wrote over ||z||, times the root
        of what a token counts as; the last row last. T is what the longest prompt may have, but at most `ROWS`.
        What is not in the chunk is zero.
    """
    positions = chunk.positions
    length = _length(positions)
    row_BS = positions.positions_BS // TOKENS_PER_ROW + length - 1 - _last_row(positions).unsqueeze(1)
    scale_BS1 = positions.weight**0.5 / row_lengths(chunk.z_BSD)
    scaled_BSX = torch.cat([scale_BS1 * chunk.z_BSD, scale_BS1 * chunk.written_BSH(block)], dim=-1)
    if positions.counted_BS is None and positions.columns > length * TOKENS_PER_ROW:  # earlier tokens are in no row
        row_BS, scaled_BSX = row_BS[:, -length * TOKENS_PER_ROW :], scaled_BSX[:, -length * TOKENS_PER_ROW :]
    counted_BS = row_BS >= 0 if positions.counted_BS is None else (row_BS >= 0) & positions.counted_BS
    rows, _, width = scaled_BSX.shape
    prompt_B1 = torch.arange(rows, device=scaled_BSX.device).unsqueeze(1)
    # What counts in no row goes into one more, which is cut off: selecting tokens would wait for the device.
    target_BS = torch.where(counted_BS, prompt_B1 * length + row_BS, rows * length)
    sums = scaled_BSX.new_zeros(rows * length + 1, width)
    sums.index_add_(0, target_BS.flatten(), scaled_BSX.flatten(0, 1))
    return sums[:-1].view(rows, length, width)


def joined_rows(before_BTX: Tensor, part_BTX: Tensor, positions: TokenPositions) -> Tensor:
    """The last rows of the prompts, from those of their beginning and those of the chunk that follows."""
    before = replace(positions, columns=0, counted_BS=None)
    come_B = _last_row(positions) - _last_row(before)  # rows begun since, by which the earlier ones move up
    earlier, length = before_BTX.shape[1], part_BTX.shape[1]
    source_BT = torch.arange(length, device=come_B.device) + come_B.unsqueeze(1) + earlier - length
    there_BT1 = ((source_BT >= 0) & (source_BT < earlier)).unsqueeze(-1)
    index_BTX = source_BT.clamp(0, earlier - 1).unsqueeze(-1).expand(-1, -1, before_BTX.shape[2])
    return torch.where(there_BT1, before_BTX.gather(1, index_BTX), 0.0) + part_BTX


def _last_row(positions: TokenPositions) -> Tensor:
    """[B] int64: the number of the row that the last token is in, -1 before the first token."""
    return (positions.before_B + positions.count_B - 1).div(TOKENS_PER_ROW, rounding_mode="floor")


def _length(positions: TokenPositions) -> int:
    columns = positions.columns_before + positions.columns
    return min(ROWS, max(1, -(-columns // TOKENS_PER_ROW)))


# -- solving ----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Memory:
    """Rows that were learned, and how many of them there are: fits that follow each other append to the same ones."""

    rows_LMK: Tensor
    filled: int = 0


class RidgeFit:
    """A fit of some layers at once that can go on learning: P = (sum of z_K z_K^T + c I)^-1 = I / c - basis^T basis."""

    def __init__(self, layers: Sequence[int], neurons: Sequence[Tensor]) -> None:
        self.layers, self._sizes = tuple(layers), [len(neurons_K) for neurons_K in neurons]
        self._neurons_LK = pad_sequence(list(neurons), batch_first=True)
        places_K = torch.arange(max(self._sizes), device=neurons[0].device)
        self._size_L = torch.stack([places_K.new_full((), size) for size in self._sizes])
        self._absent_L1K = (places_K >= self._size_L.unsqueeze(1)).unsqueeze(1)
        self._penalty_L11: Tensor | None = None
        self._prompt_LTK: Tensor | None = None
        self._memory = _Memory(torch.empty(len(self.layers), 0, len(places_K), device=places_K.device))
        self._count = 0

    def kept(self, z_LND: Tensor) -> Tensor:
        """The kept ones [L, N, K] of these activations."""
        index_LNK = self._neurons_LK.unsqueeze(1).expand(-1, z_LND.shape[1], -1)
        return z_LND.gather(2, index_LNK).masked_fill_(self._absent_L1K, 0.0)

    def of_layer(self, place: int, kept_LNK: Tensor) -> Tensor:
        """The kept activations [N, K] of one of the layers, without the zeros."""
        return kept_LNK[place, :, : self._sizes[place]]

    def learn(self, kept_LNK: Tensor, error_LNH: Tensor) -> tuple[dict[int, Correction], RidgeFit]:
        """Learn N more rows. The first time, of a prompt, this is the ridge solution of them all.

        With U = Z_new P and S = I + Z_new P Z_new^T = F F^T, the solution gains U^T S^-1 error = basis^T weights, and P
        loses basis^T basis, for basis = F^-1 U and weights = F^-1 error. All in float32: S is positive definite with a
        condition of at most 1 + K / RIDGE. Where a layer's step is not finite all the same (no token, activations that
        are not finite), it learns nothing.

        Args:
            kept_LNK: the kept activations, each row over the length of all activations of its token.
            error_LNH: what the block wrote there and the kept neurons do not, on the same scale.

        Returns:
            By layer, what is to be added to what the kept neurons write; and the fit that has learned it, since this
            one stays as it is.
        """
        penalty_L11 = self._penalty_L11
        if penalty_L11 is None:
            penalty_L11 = (RIDGE * kept_LNK.square().sum(dim=(1, 2)) / self._size_L).view(-1, 1, 1)
        if self._prompt_LTK is None and kept_LNK.shape[1] > kept_LNK.shape[2]:
            # As many rows as kept neurons say the same: Z = Q R, and Z^T Z = R^T R.
            turn_LNK, kept_LNK = torch.linalg.qr(kept_LNK)
            error_LNH = turn_LNK.mT @ error_LNH
        through_LNK = kept_LNK / penalty_L11
        for known_LMK in (self._prompt_LTK, self._learned_LMK):
            if known_LMK is not None and known_LMK.shape[1]:
                through_LNK = torch.baddbmm(through_LNK, kept_LNK @ known_LMK.mT, known_LMK, alpha=-1)
        gain_LNN = kept_LNK @ through_LNK.mT
        gain_LNN.diagonal(dim1=1, dim2=2).add_(1.0)
        factor_LNN, _ = torch.linalg.cholesky_ex(gain_LNN)
        eye_NN = torch.eye(gain_LNN.shape[1], device=gain_LNN.device)
        # An inverse and products take less time than solving for K and H right sides.
        inverse_LNN = torch.linalg.solve_triangular(factor_LNN, eye_NN.expand_as(factor_LNN), upper=False)
        basis_LNK, weights_LNH = inverse_LNN @ through_LNK, inverse_LNN @ error_LNH
        finite_L11 = (basis_LNK.isfinite().all((1, 2)) & weights_LNH.isfinite().all((1, 2))).view(-1, 1, 1)
        basis_LNK, weights_LNH = torch.where(finite_L11, basis_LNK, 0.0), torch.where(finite_L11, weights_LNH, 0.0)
        learned = copy.copy(self)
        learned._penalty_L11 = penalty_L11
        learned._remember(basis_LNK)
        corrections = {
            layer: Correction(basis_LNK[place, :, :size], weights_LNH[place])
            for place, (layer, size) in enumerate(zip(self.layers, self._sizes, strict=True))
        }
        return corrections, learned

    @property
    def _learned_LMK(self) -> Tensor:
        """The newest `LEARNED` rows behind the prompt's."""
        return self._memory.rows_LMK[:, max(self._count - LEARNED, 0) : self._count]

    def _remember(self, basis_LNK: Tensor) -> None:
        """Append rows to what is remembered: in place, where no other fit has appended to the same memory."""
        if self._prompt_LTK is None:
            self._prompt_LTK = basis_LNK
            return
        basis_LNK, before_LMK = basis_LNK[:, -LEARNED:], self._learned_LMK
        layers, more, width = basis_LNK.shape
        if self._memory.filled != self._count or self._count + more > self._memory.rows_LMK.shape[1]:
            self._count = before_LMK.shape[1]
            room = min(2 * LEARNED, 2 * (self._count + more))
            self._memory = _Memory(basis_LNK.new_empty(layers, room, width))
            self._memory.rows_LMK[:, : self._count] = before_LMK
        self._memory.rows_LMK[:, self._count : self._count + more] = basis_LNK
        self._count = self._memory.filled = self._count + more
