"""Products of a few tokens with a matrix, a piece of its rows at a time.

On a CPU, few tokens take up to half as long that way as in one product: a stack of small products is shared among
threads better than one large and flat one. Of many tokens one product makes the most.

Dimensions: T = tokens, R = rows of the matrix, H = its columns, P = pieces.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor, nn

from griffin.in_place import can_read

FEW = 32  # tokens, from 2; of more one product is about as fast
PIECES = 4


def dot_products(tokens_TH: Tensor, matrix_RH: Tensor) -> Tensor:
    """[T, R]: the products of each token with each row: an input projection."""
    pieces = gcd(len(matrix_RH), PIECES)
    rows_PRH = matrix_RH.view(pieces, -1, matrix_RH.shape[1])
    products_PTR = torch.bmm(tokens_TH.expand(pieces, -1, -1), rows_PRH.transpose(1, 2))
    return products_PTR.transpose(0, 1).flatten(1)


def weighted_sums(activations_TR: Tensor, matrix_RH: Tensor) -> Tensor:
    """[T, H]: the sums of the rows, weighted by each token's activations: an output projection."""
    pieces = gcd(len(matrix_RH), PIECES)
    rows_PRH = matrix_RH.view(pieces, -1, matrix_RH.shape[1])
    activations_PTR = activations_TR.view(len(activations_TR), pieces, -1).transpose(0, 1)
    return torch.bmm(activations_PTR, rows_PRH).sum(dim=0)


@contextlib.contextmanager
def in_pieces(module: nn.Module | None) -> Iterator[None]:
    """A linear module multiplies few tokens, but more than one, in pieces, where that is faster: on a CPU.

    Args:
        module: such as a model's output embedding, often its largest matrix; None and other modules stay as they are.
    """
    # Whoever gave the module a forward of its own wants it called, as accelerate does.
    if type(module) is not nn.Linear or not can_read(module.weight) or "forward" in vars(module):
        yield
        return

    def forward(x: Tensor) -> Tensor:
        if not 1 < x.numel() // x.shape[-1] <= FEW:
            return nn.Linear.forward(module, x)
        products = dot_products(x.flatten(0, -2), module.weight).view(*x.shape[:-1], -1)
        return products if module.bias is None else products + module.bias

    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
