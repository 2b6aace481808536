"""The last rows of a prompt, at most `ROWS` of them, kept while it runs in any number of stretches.

They bound memory and the cost of solving whatever the length of the prompt, and what follows a prompt is more like
its end than like its beginning.

Dimensions: B = batch rows, S = positions, D = width, T = rows kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.gathering import Places

ROWS = 384


def latest(rows_BSD: Tensor, counted_BS: Tensor) -> Tensor:
    """The last rows that count of each prompt.

    Args:
        rows_BSD: one row a token.
        counted_BS: bool, False at padding.

    Returns:
        [B, T, D], T the most that any prompt has but at most `ROWS`; a prompt with fewer has zeros before its own.
    """
    counted_BS = counted_BS.to(rows_BSD.device)
    width = rows_BSD.shape[2]
    length = min(ROWS, max(1, int(counted_BS.sum(dim=1).max())))
    after_BS = counted_BS.flip(1).cumsum(dim=1).flip(1) - 1  # tokens after each, where it counts
    rows, positions = (counted_BS & (after_BS < length)).nonzero(as_tuple=True)
    latest_BTD = rows_BSD.new_zeros(len(rows_BSD), length, width)
    latest_BTD[rows, length - 1 - after_BS[rows, positions]] = rows_BSD[rows, positions]
    return latest_BTD


def joined(before_BTD: Tensor, part_BTD: Tensor, places: Places) -> Tensor:
    """The last rows of a prompt from those of its beginning and those of the stretch that follows.

    Args:
        before_BTD: what `latest` gave for the tokens before the stretch.
        part_BTD: what `latest` gave for the stretch.
        places: of the stretch.
    """
    kept = [
        torch.arange(rows_BTD.shape[1], 0, -1, device=count_B.device) <= count_B.unsqueeze(1)
        for rows_BTD, count_B in ((before_BTD, places.before_B), (part_BTD, places.count_B))
    ]
    return latest(torch.cat([before_BTD, part_BTD], dim=1), torch.cat(kept, dim=1))
