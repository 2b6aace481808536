"""Corrections: what a compensation adds to the output of a block that runs on its experts.

Dimensions: B = prompts, S = positions, K = kept neurons, H = hidden size, T = directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Fit(Protocol):
    """One prompt's least-squares fit, which can go on learning (`griffin.ridge`)."""

    def update(self, kept_NK: Tensor, error_NH: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Correction:
    """What is added to the output of a block that runs on its experts: z_K basis^T weights + bias.

    The change [B, K, H] of the output weights is kept as two thin factors, which are smaller.

    Attributes:
        basis_BTK: T directions in the space of the kept activations; None: those activations themselves (T = K).
        weights_BTH: what is written along each direction; None: nothing.
        bias_BH: what is written always; None: nothing.
        fits: what each prompt's correction was fitted by, where it can go on learning and is going to.
    """

    basis_BTK: Tensor | None = None
    weights_BTH: Tensor | None = None
    bias_BH: Tensor | None = None
    fits: tuple[Fit, ...] = ()

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


def together(corrections: Sequence[Correction | None]) -> Correction | None:
    """The corrections of several prompts, each by one way to compensate, as those of the rows of a batch."""
    given = [correction for correction in corrections if correction is not None]
    if not given:
        return None
    biases = [one.bias_BH for one in given if one.bias_BH is not None]
    bases = [one.basis_BTK for one in given if one.basis_BTK is not None]
    weights = [one.weights_BTH for one in given if one.weights_BTH is not None]
    if 0 < len(bases) < len(given):
        # Prompts of many tokens have no basis: theirs is the kept activations.
        kept = bases[0].shape[2]
        every = torch.eye(kept, device=bases[0].device).unsqueeze(0)
        bases = [every if one.basis_BTK is None else one.basis_BTK for one in given]
    directions = max((one.shape[1] for one in weights), default=0)
    return Correction(
        torch.cat([_longer(one, directions) for one in bases]) if bases else None,
        torch.cat([_longer(one, directions) for one in weights]) if weights else None,
        torch.cat(biases) if biases else None,
    )


def _longer(directions: Tensor, count: int) -> Tensor:
    """[B, count, ..]: zeros behind."""
    return torch.nn.functional.pad(directions, (0, 0, 0, count - directions.shape[1]))
