"""Ridge compensation: the kept neurons learn, by recursive least squares, what the dropped ones wrote.

It needs no training and no calibration data, and decoding is as fast as without it.

The rows that it learns from are the last tokens of the prompt, each two neighbours added to one row: memory and the
cost of solving are bounded, whatever the length of the prompt, and neighbours are so alike that a row for two of them
says nearly as much as two rows (docs/selection.md). What is generated later is learned by the same step. Nothing here
waits for the device.

Dimensions: K = kept neurons, the most of any layer (zeros stand for those that others have less), X = D + H, T = rows
of the prompt, N = rows that are learned at a time, M = rows that were learned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from griffin.activations import ActivationStatistic, PrefillChunk, row_lengths
from griffin.feedforward import FeedForwardBlock

# The ridge penalty relative to the mean energy of a kept neuron; smaller ones overfit (docs/selection.md).
RIDGE = 1.0

ROWS = 512
TOKENS_PER_ROW = 2

# Rows that were learned behind the prompt and that a fit remembers; what it forgets can be learned anew.
LEARNED = 512


def latest_rows(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """The last rows [T, D + H] that a chunk's tokens are in, at most `ROWS`: sums of z / ||z|| over the tokens of a
    row, and of what the block wrote over ||z||. Rows go by positions in the prompt, however it is chunked.
    """
    first, end = chunk.tokens.start // TOKENS_PER_ROW, -(-chunk.tokens.stop // TOKENS_PER_ROW)
    begin = max(chunk.tokens.start, (end - ROWS) * TOKENS_PER_ROW)
    z_SD, written_SH = (values[begin - chunk.tokens.start :].float() for values in (chunk.z_SD, chunk.output_SH))
    if (bias := getattr(block.output, "bias", None)) is not None:
        written_SH = written_SH - bias.detach().float()
    scaled_SX = torch.cat([z_SD, written_SH], dim=-1) / row_lengths(z_SD)
    before, behind = begin - max(first, end - ROWS) * TOKENS_PER_ROW, end * TOKENS_PER_ROW - chunk.tokens.stop
    return pad(scaled_SX, (0, 0, before, behind)).view(-1, TOKENS_PER_ROW, scaled_SX.shape[1]).sum(dim=1)


def joined_rows(before_TX: Tensor, part_TX: Tensor, tokens: range) -> Tensor:
    """The last rows of a prompt, from those of its beginning and of the chunk that follows."""
    begun = tokens.start % TOKENS_PER_ROW > 0  # the chunk goes on in the last row
    if begun and len(part_TX) == -(-tokens.stop // TOKENS_PER_ROW) - tokens.start // TOKENS_PER_ROW:
        part_TX = torch.cat([part_TX[:1] + before_TX[-1:], part_TX[1:]])
        before_TX = before_TX[:-1]
    return torch.cat([before_TX, part_TX])[-ROWS:]


# What is recorded for each compensation.
COMPENSATIONS = {"none": None, "ridge": ActivationStatistic(latest_rows, joined_rows)}


@dataclass(frozen=True, eq=False)
class Correction:
    """What is added to the output of a block at the kept activations z_K: z_K basis^T weights, float32. Two factors
    take less memory than the change [K, H] of the output weights."""

    basis_NK: Tensor  # N directions in the space of the kept activations
    weights_NH: Tensor  # what is written along each direction

    def output(self, kept_SK: Tensor) -> Tensor:
        """What is added [S, H] at these kept activations."""
        return (kept_SK @ self.basis_NK.T) @ self.weights_NH


@dataclass(eq=False)
class _Memory:
    """Rows that were learned, so many of them: fits that follow each other append to the same ones."""

    rows_LMK: Tensor
    filled: int = 0


class RidgeFit:
    """A fit of some layers at once that can go on learning: P = (sum of z_K z_K^T + c I)^-1 = I / c - basis^T basis."""

    def __init__(self, layers: Sequence[int], neurons: Sequence[Tensor]) -> None:
        self.layers, self.sizes = tuple(layers), [len(neurons_K) for neurons_K in neurons]
        self._neurons_LK = pad_sequence(list(neurons), batch_first=True)
        places_K = torch.arange(max(self.sizes), device=neurons[0].device)
        self._size_L = torch.stack([places_K.new_full((), size) for size in self.sizes])
        self._absent_L1K = (places_K >= self._size_L.unsqueeze(1)).unsqueeze(1)
        self._penalty_L11: Tensor | None = None
        self._prompt_LTK: Tensor | None = None
        self._memory = _Memory(torch.empty(len(self.layers), 0, len(places_K), device=places_K.device))
        self._count = 0

    def kept(self, z_LND: Tensor) -> Tensor:
        """The kept ones [L, N, K] of these activations."""
        index_LNK = self._neurons_LK.unsqueeze(1).expand(-1, z_LND.shape[1], -1)
        return z_LND.gather(2, index_LNK).masked_fill_(self._absent_L1K, 0.0)

    def learn(
        self, kept_LNK: Tensor, target_LNH: Tensor, written: Callable[[int, Tensor], Tensor]
    ) -> tuple[Iterator[tuple[int, Correction]], RidgeFit]:
        """Learn N more rows. The first time, of a prompt, this is the ridge solution of them all.

        With U = Z_new P and S = I + Z_new P Z_new^T = F F^T, the solution gains U^T S^-1 error = basis^T weights, and P
        loses basis^T basis, for basis = F^-1 U and weights = F^-1 error. All in float32: S is positive definite with a
        condition of at most 1 + K / RIDGE. Where a layer's step is not finite all the same (no token, activations that
        are not finite), it learns nothing.

        The error is target - written(Z_new), and writing is linear: weights = F^-1 target - written(F^-1 Z_new).

        Args:
            kept_LNK: the kept activations, each row over the length of all activations of its token.
            target_LNH: what the block wrote there, on the same scale.
            written: (layer, kept activations [N, K]) -> what its kept neurons write [N, H] as they are.

        Returns:
            Layer by layer, what is to be added to what the kept neurons write: each is made when it is asked for, so
            that a layer's weights are read and changed at one time; and the fit that has learned it.
        """
        penalty_L11 = self._penalty_L11
        if penalty_L11 is None:
            penalty_L11 = (RIDGE * kept_LNK.square().sum(dim=(1, 2)) / self._size_L).view(-1, 1, 1)
        if self._prompt_LTK is None and kept_LNK.shape[1] > kept_LNK.shape[2]:
            # As many rows as kept neurons say the same: Z = Q R, and Z^T Z = R^T R.
            turn_LNK, kept_LNK = torch.linalg.qr(kept_LNK)
            target_LNH = turn_LNK.mT @ target_LNH
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
        basis_LNK, inputs_LNK = inverse_LNN @ through_LNK, inverse_LNN @ kept_LNK
        target_LNH = inverse_LNN @ target_LNH
        finite_L11 = (basis_LNK.isfinite().all((1, 2)) & target_LNH.isfinite().all((1, 2))).view(-1, 1, 1)
        basis_LNK, target_LNH = (torch.where(finite_L11, values, 0.0) for values in (basis_LNK, target_LNH))
        inputs_LNK = torch.where(finite_L11, inputs_LNK, 0.0)
        learned = copy.copy(self)
        learned._penalty_L11 = penalty_L11
        learned._remember(basis_LNK)
        layers = zip(self.layers, self.sizes, basis_LNK, inputs_LNK, target_LNH, strict=True)
        return (
            (layer, Correction(basis_NK[:, :size], target_NH - written(layer, inputs_NK[:, :size]).float()))
            for layer, size, basis_NK, inputs_NK, target_NH in layers
        ), learned

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


def fit_prompt(
    layers: Iterable[tuple[int, Tensor, Tensor, Tensor]], written: Callable[[int, Tensor], Tensor]
) -> tuple[dict[int, Correction], tuple[RidgeFit, ...]]:
    """By layer, the least-squares prediction, from the kept activations, of what the dropped neurons wrote during the
    prompt: (Z_K^T Z_K + c I)^-1 Z_K^T Y for Y = Z_R Wd[:, R]^T and c = RIDGE * mean(diag(Z_K^T Z_K)); and the fit that
    gave it, by device.

    Args:
        layers: those that drop neurons: number, kept neurons [K], what was recorded of them [T, K], and what the block
            wrote [T, H].
        written: as in `RidgeFit.learn`.
    """
    devices: dict[torch.device, list[tuple[int, Tensor, Tensor, Tensor]]] = {}
    for layer in layers:
        devices.setdefault(layer[1].device, []).append(layer)
    corrections: dict[int, Correction] = {}
    fits: list[RidgeFit] = []
    for group in devices.values():
        numbers, neurons, kept, targets = zip(*group, strict=True)
        padded = [pad(kept_TK, (0, max(map(len, neurons)) - kept_TK.shape[1])) for kept_TK in kept]
        learned, fit = RidgeFit(numbers, neurons).learn(torch.stack(padded), torch.stack(targets), written)
        corrections |= learned
        fits.append(fit)
    return corrections, tuple(fits)
