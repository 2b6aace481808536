"""Refresh: what was chosen from the prompt follows the text that is being generated.

What is generated moves away from the prompt. So the dense model reads it too, and the compensation goes on learning.
Without verification a few steps, after 8, 16, 32, .. tokens, run dense over all tokens since the last of them: such a
step costs little more than a dense one where decoding is bound by memory. With verification every check is such a pass.
Not in the paper, whose experts are the prompt's until the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from griffin.activations import row_lengths
from griffin.feedforward import FeedForwardBlock
from griffin.ridge import RidgeFit

# name: what is refreshed.
REFRESHES = {
    "none": "nothing, as in the paper",
    "compensation": "the compensation, which goes on learning with the experts that it has",
}

# A token that was generated counts as so many of the prompt: it says more of what comes next (docs/selection.md).
WEIGHT = 4.0

# Tokens of one forward call of a refresh: what it keeps of all layers is bounded.
PIECE = 128

_FIRST, _FACTOR = 8, 2


def next_refresh(generated: int) -> int:
    """After how many tokens the next refresh comes when so many have been generated: 8, 16, 32, .."""
    after = _FIRST
    while after <= generated:
        after *= _FACTOR
    return after


def call_ends(tokens: int) -> list[int]:
    """Where the calls end, from 0 on, that read a text of so many tokens as if it were generated: a refresh comes with
    one token of its own, and the tokens between two of them need one call only."""
    ends, refresh_at = [0], next_refresh(0)
    while refresh_at < tokens:
        ends += [refresh_at, refresh_at + 1]
        refresh_at = next_refresh(refresh_at)
    return sorted({*ends, tokens})


class Seen:
    """What blocks on one device saw and made of it, in one call of one row: buffers that last from call to call."""

    @torch.inference_mode(False)
    def __init__(self, layers: Sequence[int], blocks: Sequence[FeedForwardBlock], tokens: int) -> None:
        mine, like = [blocks[layer] for layer in layers], blocks[layers[0]].output.get_parameter("weight").detach()
        hidden = like.numel() // blocks[layers[0]].width
        self.layers = tuple(layers)
        self.biases = [getattr(block.output, "bias", None) for block in mine]
        self.z_LTD = like.new_zeros(len(layers), tokens, max(block.width for block in mine))
        self.output_LTH = like.new_zeros(len(layers), tokens, hidden)

    def take(self, layer: int, z: Tensor, output: Tensor) -> None:
        """Keep what a layer saw, and what it made of it."""
        place, count, width = self.layers.index(layer), z.numel() // z.shape[-1], z.shape[-1]
        self.z_LTD[place, :count, :width] = z.detach().reshape(count, width)
        self.output_LTH[place, :count] = output.detach().reshape(count, -1)


def to_learn(fit: RidgeFit, groups: Sequence[Seen], count: int) -> tuple[Tensor, Tensor]:
    """What a fit learns of the first tokens that were seen, on the scale of its rows."""
    seen = next(group for group in groups if fit.layers[0] in group.layers)
    z_LND, output_LNH = seen.z_LTD[:, :count], seen.output_LTH[:, :count].float()
    if any(bias is not None for bias in seen.biases):
        biases = [output_LNH.new_zeros(()) if bias is None else bias.detach() for bias in seen.biases]
        output_LNH = output_LNH - torch.stack([bias.expand(output_LNH.shape[2]) for bias in biases]).unsqueeze(1)
    if fit.layers != seen.layers:
        places = [seen.layers.index(layer) for layer in fit.layers]
        z_LND, output_LNH = z_LND[places], output_LNH[places]
    scale_LN1 = WEIGHT**0.5 / row_lengths(z_LND)
    return scale_LN1 * fit.kept(z_LND).float(), scale_LN1 * output_LNH
