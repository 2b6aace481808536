"""The experts of many prompts at work, all of them or some.

While some of the prompts generate, their blocks compute with the neurons that any of them keeps, compacted, and each
row's own experts are masked within these. At half sparsity eight prompts together keep about three quarters of the
neurons, and compacting costs as much as two tokens, so it is done where many tokens follow and not in `pruned` alone.

Dimensions: B = rows at work, R = prompts, D = FF width, K = kept neurons, U = neurons that any row keeps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin.compaction import Compaction
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock
from griffin.in_pieces import PIECES
from griffin.masking import Mask

# Where the rows together keep more than this share of a block, it keeps all of its weights.
MOST = 0.9


class RowsAtWork:
    """The experts of prompts of which some are at work.

    Args:
        blocks: the FF blocks, in layer order.
        experts: per layer [R, K], or [1, K] for all prompts.
        corrections: per layer, what a compensation adds for these experts; None: nothing.
    """

    def __init__(
        self,
        blocks: Sequence[FeedForwardBlock],
        experts: Sequence[Tensor],
        corrections: Sequence[Correction | None] | None,
    ) -> None:
        self._blocks, self._experts = blocks, experts
        self._corrections = corrections or [None] * len(experts)

    def put_to_work(self, rows: Sequence[int], compaction: Compaction, mask: Mask) -> None:
        """The rows of the coming forward calls are these of the prompts."""
        mine = [layer if len(layer) == 1 else layer[torch.tensor(rows, device=layer.device)] for layer in self._experts]
        unions, numbers = zip(
            *(_union(layer, block.width) for layer, block in zip(mine, self._blocks, strict=True)), strict=True
        )
        compaction.detach()
        compaction.attach([union_U.unsqueeze(0) for union_U in unions])
        mask.attach(
            numbers, [one and one.of_rows(rows) for one in self._corrections], [len(union_U) for union_U in unions]
        )


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
