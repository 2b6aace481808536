"""Corrections: what a compensation adds to the output of a block that runs on its experts.

Dimensions: S = positions, K = kept neurons, H = hidden size, T = directions, N = rows that are learned later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Fit(Protocol):
    """A least-squares fit that can go on learning (see `griffin.ridge`)."""

    def step(self, kept_NK: Tensor, error_NH: Tensor) -> tuple[Tensor, Tensor, Fit]: ...


@dataclass(frozen=True, eq=False)
class Correction:
    """What is added to the output of a block at the kept activations z_K: z_K basis^T weights + bias.

    The change [K, H] of the output weights is kept as two thin factors, which take less memory in large models.

    Attributes:
        basis_TK: T directions in the space of the kept activations; None: nothing depends on them.
        weights_TH: what is written along each direction.
        bias_H: what is written always; None: nothing.
        fit: what the correction was fitted by, where it can go on learning.
    """

    basis_TK: Tensor | None = None
    weights_TH: Tensor | None = None
    bias_H: Tensor | None = None
    fit: Fit | None = None

    def output(self, kept_SK: Tensor) -> Tensor | None:
        """What is added [S, H] at these kept activations; None: nothing."""
        added = None
        if self.basis_TK is not None and self.weights_TH is not None:
            added = (kept_SK @ self.basis_TK.T) @ self.weights_TH
        if self.bias_H is not None:
            added = self.bias_H.expand(len(kept_SK), -1) if added is None else added + self.bias_H
        return added

    def change(self) -> Tensor | None:
        """The change [K, H] of what each kept neuron writes; None: there is none."""
        if self.basis_TK is None or self.weights_TH is None:
            return None
        return self.basis_TK.T @ self.weights_TH
