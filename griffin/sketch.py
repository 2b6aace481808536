"""A sketch: a matrix of few rows that stands for one with a row for every token of a prompt.

Token t is added, with a sign, to row t mod T (a CountSketch, Charikar, Chen and Farach-Colton 2002, with buckets in
turn). Signs are pseudo-random in t, so the products of different tokens that share a row cancel on average:
E[sketch^T sketch] = Z^T Z. A prompt of at most T tokens is kept as it is. Memory and the cost of solving are
bounded, whatever the length of the prompt; and since the sketch is a sum over tokens, stretches of a prompt join.

Dimensions: B = batch rows, S = positions, D = width, T = rows of the sketch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from griffin.gathering import Places

ROWS = 256


def sketch(rows_BSD: Tensor, places: Places) -> Tensor:
    """The sketch [B, T, D] of a stretch of the prompts, T the tokens so far but at most `ROWS`.

    Args:
        rows_BSD: one row a token, zero at padding.
        places: where the tokens stand in their prompts.
    """
    batch, _, width = rows_BSD.shape
    device = rows_BSD.device
    length = max(1, min(ROWS, places.longest))
    positions_BS = places.positions_BS.to(device).clamp(min=0)  # padding is zero: it may go to any row
    flat_BS = positions_BS % ROWS + length * torch.arange(batch, device=device).unsqueeze(1)
    signed_BSD = rows_BSD * signs(positions_BS).to(rows_BSD).unsqueeze(-1)
    flat = rows_BSD.new_zeros(batch * length, width).index_add_(0, flat_BS.flatten(), signed_BSD.flatten(0, 1))
    return flat.reshape(batch, length, width)


def sketches_added(before_BTD: Tensor, part_BTD: Tensor, places: Places) -> Tensor:
    """The sketch of a prompt from those of its beginning and of the stretch that follows."""
    missing = part_BTD.shape[1] - before_BTD.shape[1]
    return torch.nn.functional.pad(before_BTD, (0, 0, 0, missing)) + part_BTD


def signs(positions: Tensor) -> Tensor:
    """-1 or 1 for each position, int64: the lowest bit of a hash (the finaliser of MurmurHash3, 32 bits)."""
    mixed = positions
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return 2 * (mixed & 1) - 1
