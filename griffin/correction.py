"""Corrections: what a compensation adds to the output of a block that runs on its experts.

Dimensions: S = positions, K = kept neurons, H = hidden size, T = directions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Correction:
    """What is added to the output of a block at the kept activations z_K: z_K basis^T weights + bias.

    The change [K, H] of the output weights is kept as two thin factors, which take less memory in large models.

    Attributes:
        basis_TK: T directions in the space of the kept activations; None: nothing depends on them.
        weights_TH: what is written along each direction.
        bias_H: what is written always; None: nothing.
    """

    basis_TK: Tensor | None = None
    weights_TH: Tensor | None = None
    bias_H: Tensor | None = None

    def output(self, kept_SK: Tensor) -> Tensor:
        """What is added [S, H] at these kept activations."""
        added = kept_SK.new_zeros(()) if self.bias_H is None else self.bias_H.expand(len(kept_SK), -1)
        if self.basis_TK is not None and self.weights_TH is not None:
            added = added + (kept_SK @ self.basis_TK.T) @ self.weights_TH
        return added
