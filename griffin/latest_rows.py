"""The end of a prompt in few rows: its last tokens, each two neighbours added to one row.

Memory and the cost of solving are bounded, whatever the length of the prompt. Neighbours are alike, so a row for two
of them says nearly as much as two rows (measured in docs/selection.md). Rows go by positions in the prompt, so that a
prompt in stretches gives what it gives whole.

Dimensions: B = batch rows, S = positions, D = width, T = rows kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.gathering import Places, unit_rows

ROWS = 512
TOKENS_PER_ROW = 2


def latest(z_BSD: Tensor, places: Places) -> Tensor:
    """The last rows of the prompts as far as they have come, from a stretch's tokens alone.

    Args:
        z_BSD: one row a token.
        places: where the tokens stand in their prompts.

    Returns:
        [B, T, D] sums of z / ||z|| over the tokens of a row, times the root of what a token counts as; the last row
        last. T is what the longest prompt has, but at most `ROWS`. What is not in the stretch is zero.
    """
    device = z_BSD.device
    length = _length(places)
    row_BS = places.positions_BS // TOKENS_PER_ROW + length - 1 - _last_row(places).unsqueeze(1)
    prompts, positions = (places.counted_BS & (row_BS >= 0)).nonzero(as_tuple=True)
    flat = (prompts * length + row_BS[prompts, positions]).to(device)
    z = z_BSD[prompts.to(device), positions.to(device)]
    latest_BTD = z_BSD.new_zeros(len(z_BSD), length, z_BSD.shape[2])
    latest_BTD.flatten(0, 1).index_add_(0, flat, places.weight**0.5 * unit_rows(z))
    return latest_BTD


def joined(before_BTD: Tensor, part_BTD: Tensor, places: Places) -> Tensor:
    """The last rows of the prompts, from those of their beginning and those of the stretch that follows.

    Args:
        before_BTD: the rows before the stretch.
        part_BTD: what `latest` gave for the stretch.
        places: of the stretch.
    """
    device = before_BTD.device
    before = Places(places.counted_BS[:, :0], places.before_B)
    come_B = _last_row(places) - _last_row(before)  # rows begun since, by which the earlier ones move up
    length = part_BTD.shape[1]
    source_BT = torch.arange(length, device=come_B.device) + come_B.unsqueeze(1) + before_BTD.shape[1] - length
    there_BT = ((source_BT >= 0) & (source_BT < before_BTD.shape[1])).to(device)
    index_BT1 = source_BT.clamp(0, before_BTD.shape[1] - 1).to(device).unsqueeze(-1)
    moved_BTD = before_BTD.gather(1, index_BT1.expand(-1, -1, before_BTD.shape[2]))
    return torch.where(there_BT.unsqueeze(-1), moved_BTD, 0.0) + part_BTD


def _last_row(places: Places) -> Tensor:
    """[B] int64: the number of the row that the last token is in, -1 before the first token."""
    return (places.before_B + places.count_B - 1).div(TOKENS_PER_ROW, rounding_mode="floor")


def _length(places: Places) -> int:
    return min(ROWS, max(1, int(_last_row(places).max()) + 1))
