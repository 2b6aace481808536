"""Products with some rows of a matrix, read where they are: what decoding one token needs, with nothing copied.

On a CPU two operations of torch do it at the speed of memory. A sampled product (`torch.sparse.sampled_addmm`) is the
dot product of the token with each row that a sparse pattern names; a weighted bag (`embedding_bag`) is the sum of the
rows that it names. Both take one token at a time, so that many tokens at once are better off with a copy.

The rows are dealt out in pieces, for threads to share. Their number is fixed: a sum's rounding depends on the rows
alone, neither on the threads nor on where the matrix is.

Dimensions: D = rows of the matrix, H = its columns, K = rows that are read.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

PIECES = 16


def can_read(matrix_DH: Tensor) -> bool:
    """Whether rows of this matrix can be read in place: on a CPU, in a precision that sampled products have."""
    return matrix_DH.device.type == "cpu" and matrix_DH.dtype in (torch.float32, torch.float64)


class DotProducts:
    """The products of one token [H] with some rows: an input projection.

    Args:
        matrix_DH: row-major; it is read in every call.
        rows_K: which rows, ascending.
        bias_K: what is added to each product; None: nothing.
    """

    def __init__(self, matrix_DH: Tensor, rows_K: Tensor, bias_K: Tensor | None) -> None:
        self._matrix_HD, self._bias_K = matrix_DH.T, bias_K
        _announce_sparse_tensors()
        self._pattern = torch.sparse_csr_tensor(
            _begins(len(rows_K)),
            rows_K,
            matrix_DH.new_zeros(len(rows_K)),
            size=(PIECES, len(matrix_DH)),
            check_invariants=False,
        )

    def __call__(self, token_H: Tensor) -> Tensor:
        """[K]."""
        tokens = token_H.expand(PIECES, -1)
        products_K: Tensor = torch.sparse.sampled_addmm(self._pattern, tokens, self._matrix_HD, beta=0.0).values()
        return products_K if self._bias_K is None else products_K + self._bias_K


class WeightedSum:
    """The sum of some rows, weighted by one token's activations [K]: an output projection.

    Args:
        matrix_DH: row-major; it is read in every call.
        rows_K: which rows.
        bias_H: what is added to the sum; None: nothing.
    """

    def __init__(self, matrix_DH: Tensor, rows_K: Tensor, bias_H: Tensor | None) -> None:
        self._matrix_DH, self._rows_K, self._bias_H = matrix_DH, rows_K, bias_H
        self._begins = _begins(len(rows_K))[:-1]

    def __call__(self, activations_K: Tensor) -> Tensor:
        """[H]."""
        sums = functional.embedding_bag(
            self._rows_K, self._matrix_DH, self._begins, mode="sum", per_sample_weights=activations_K
        )
        sum_H = sums.sum(dim=0)
        return sum_H if self._bias_H is None else sum_H + self._bias_H


@cache
def _begins(rows: int) -> Tensor:
    """[PIECES + 1]: where each piece of so many rows begins, and where the last one ends."""
    with torch.inference_mode(False):
        return torch.arange(PIECES + 1) * rows // PIECES


@cache
def _announce_sparse_tensors() -> None:
    """Torch says once per process that these tensors are in beta; whoever prunes need not know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        torch.zeros(1, 1).to_sparse_csr()
