"""Drift: how far the text that is being generated has moved from what its experts were chosen from.

The activations of the kept neurons are there anyway. Once in a few tokens their profile is compared with the one that
the experts were chosen by; where it has become less alike than it was just after the choice, `refresh=drift` chooses
anew. The idea is DART's (arXiv 2601.22632), which looks at attention instead; this is not its code.

Dimensions: K = kept neurons, D = FF width, T = tokens of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from griffin.activations import unit_rows

# Tokens of a profile, and by what share its likeness must have fallen (docs/selection.md).
WINDOW = 8
FALL = 0.02


@dataclass
class Drift:
    """What has been seen of a row since its experts were chosen.

    Attributes:
        reference: per layer, the root mean squares [K] of the kept neurons in what the experts were chosen from; their
            scale means nothing.
        begun: whether some of the generated text was part of that. Else the experts are those of a prompt, and
            generated text is so unlike a prompt that they are chosen anew after the first tokens.
        likeness: of the first tokens after the choice; None: they have not come yet.
        due: whether experts should be chosen anew.
    """

    reference: Sequence[Tensor]
    begun: bool
    likeness: float | None = None
    due: bool = False
    _tokens: int = 0
    _squares: list[Tensor] = field(default_factory=list)

    def see(self, kept: Sequence[Tensor]) -> None:
        """Take in the activations of the kept neurons [T, K] of each layer. The host waits for the device once in
        `WINDOW` tokens."""
        squares = [unit_rows(kept_TK.float()).square().sum(dim=0) for kept_TK in kept]
        before = self._squares or [torch.zeros_like(squares_K) for squares_K in squares]
        self._squares = [old + new for old, new in zip(before, squares, strict=True)]
        self._tokens += len(kept[0])
        if self._tokens < WINDOW:
            return
        likeness = float(
            torch.stack(
                [
                    torch.cosine_similarity(squares_K.sqrt(), reference_K, dim=0).to(squares[0].device)
                    for squares_K, reference_K in zip(self._squares, self.reference, strict=True)
                ]
            ).mean()
        )
        if self.likeness is None:
            self.likeness = likeness
        self.due = not self.begun or likeness < self.likeness * (1 - FALL)
        self._tokens, self._squares = 0, []
