"""Random prompts, alone and in padded batches."""

from __future__ import annotations

import torch
from families import VOCABULARY
from torch import Tensor


def prompt(length: int, seed: int = 0) -> Tensor:
    """[1, S] token ids without special tokens."""
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Prompts [1, S_i] as a batch: token ids and attention mask, [B, max S_i] each."""
    longest = max(row.shape[1] for row in rows)
    ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(longest - row.shape[1], longest) if side == "left" else slice(0, row.shape[1])
        ids_BS[index, where] = row[0]
        mask_BS[index, where] = 1
    return ids_BS, mask_BS
