"""The experts of many prompts at work, all of them or some.

While some of the prompts generate, their blocks compute with the neurons that any of them keeps, compacted, and each
row's own experts are masked within these. At half sparsity eight prompts together keep about three quarters of the
neurons, and compacting costs as much as two tokens, so it is done where many tokens follow and not in the masked
mode of everything else.

Dimensions: B = rows at work, D = FF width, K = kept neurons, U = neurons that any row keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin.compaction import Compaction
from griffin.correction import Correction, together
from griffin.feedforward import FeedForwardBlock
from griffin.in_pieces import PIECES
from griffin.masking import Mask

# Where the rows together keep more than this share of a block, it keeps all of its weights.
MOST = 0.9


class RowsAtWork:
    """The experts of the prompts that are at work, as prompts come and go.

    Args:
        blocks: the FF blocks, in layer order.
        compaction: of these blocks.
        mask: of these blocks.
    """

    def __init__(self, blocks: Sequence[FeedForwardBlock], compaction: Compaction, mask: Mask) -> None:
        self._blocks, self._compaction, self._mask = blocks, compaction, mask
        self._chosen: dict[int, tuple[list[Tensor], list[Correction | None]]] = {}

    def add(self, row: int, experts: list[Tensor], corrections: list[Correction | None]) -> None:
        """What a prompt is to work with.

        Args:
            row: the prompt's number.
            experts: per layer, [1, K].
            corrections: per layer, what a compensation adds for these experts; None: nothing.
        """
        self._chosen[row] = experts, corrections

    def put_to_work(self, rows: Sequence[int]) -> None:
        """The rows of the coming forward calls are these of the prompts. Others have ended; without experts, dense."""
        self._chosen = {row: self._chosen[row] for row in rows if row in self._chosen}
        if not self._chosen:
            return
        experts, corrections = zip(*self._chosen.values(), strict=True)
        unions, numbers = zip(
            *(
                _union(torch.cat(layer), block.width)
                for layer, block in zip(zip(*experts, strict=True), self._blocks, strict=True)
            ),
            strict=True,
        )
        self._compaction.detach()
        self._compaction.attach([union_U.unsqueeze(0) for union_U in unions])
        self._mask.attach(
            numbers,
            [together(layer) for layer in zip(*corrections, strict=True)],
            [len(union_U) for union_U in unions],
        )

    def detach(self) -> None:
        """All forward calls are dense again, until rows are put to work."""
        self._mask.detach()
        self._compaction.detach()


def _union(experts_BK: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The neurons [U] that any row keeps, ascending, and the experts [B, K] as numbers among them.

    A few more fill U up to a multiple of `PIECES`, which products with the neurons' weights can be cut into.
    """
    kept_D = torch.zeros(width, dtype=torch.bool, device=experts_BK.device)
    kept_D[experts_BK.flatten()] = True
    kept_D[(~kept_D).nonzero()[: -int(kept_D.sum()) % PIECES]] = True
    union_U = kept_D.nonzero().squeeze(1)
    if len(union_U) > MOST * width:
        return torch.arange(width, device=experts_BK.device), experts_BK
    return union_U, (kept_D.cumsum(0) - 1)[experts_BK]
