"""From scores to experts: how many neurons each layer keeps, which, and what is added to what they write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from griffin.feedforward import FeedForwardBlock
from griffin.quantization import rounded
from griffin.ridge import Correction, RidgeFit
from griffin.statistics import TokenChoice

SELECTIONS = ("topk", "sample", "topk_sample")


def kept_neurons(width: int, sparsity: float) -> int:
    """K = int(D * (1 - sparsity)), but at least one neuron."""
    return max(1, int(width * (1 - sparsity)))


def select(scores_D: Tensor, kept: int, selection: str = "topk", draw_D: Tensor | None = None) -> Tensor:
    """The kept neurons [.., K], int64, ascending.

    `topk` takes the best. `sample` draws without replacement with probabilities in proportion to the scores.
    `topk_sample` takes the best K // 2 and draws the others from the rest (the sampled variants of arXiv 2404.01365).

    Sampling adds Gumbel noise to the log scores and takes the largest, which is the same distribution as drawing
    one neuron after another (Kool et al., arXiv 1903.06059), without leaving the device or failing where fewer
    than K scores are positive.

    Args:
        scores_D: non-negative scores [.., D].
        kept: K, 1 to D.
        selection: one of `SELECTIONS`.
        draw_D: uniform numbers in [0, 1) of that shape, needed unless `topk`.

    Raises:
        ValueError: unknown `selection`, `kept` out of range, or no `draw_D`.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection={selection!r}: expected one of {', '.join(SELECTIONS)}")
    if not 1 <= kept <= scores_D.shape[-1]:
        raise ValueError(f"kept={kept}: expected 1 to {scores_D.shape[-1]}")
    keys_D = scores_D
    if selection != "topk":
        if draw_D is None:
            raise ValueError(f"selection={selection!r} needs random numbers")
        draw_D = draw_D.to(scores_D.device)  # drawn beside the weights, which may be in host memory
        keys_D = scores_D.log() - (-draw_D.log()).log()
        if selection == "topk_sample":
            keys_D = keys_D.scatter(-1, scores_D.topk(kept // 2, dim=-1).indices, torch.inf)
    return keys_D.topk(kept, dim=-1).indices.sort(dim=-1).values


BUDGETS = {
    "uniform": "every layer keeps the same share, as in the paper",
    "late": "the first half of the layers keeps less, the second more",
}

# How far a layer's share may be from the mean at 50%, where there is most to choose from.
_SPREAD = 0.1


def late(layers: int) -> list[float]:
    """Per layer, how its share departs from the mean, together 0: shares rise up to the middle.

    Dropping half of one of the first layers moves the next-token distributions several times less than half of a middle
    one (docs/selection.md). The very first layer, which models disagree about, keeps the mean share.
    """
    tilts = [min(1.0, 2 * layer / max(layers - 1, 1)) for layer in range(1, layers)]
    mean = sum(tilts) / max(len(tilts), 1)
    return [0.0] * min(layers, 1) + [2 * (tilt - mean) for tilt in tilts]


def kept_per_layer(widths: Sequence[int], sparsity: float | Sequence[float], budget: str = "uniform") -> list[int]:
    """K of each layer, by its width D; the same sum under every budget. The sparsity is what share is dropped of all
    layers together or, where the budget is uniform, of each.

    Raises:
        ValueError: the sparsities are not as many as the layers.
    """
    layers = len(widths)
    values = [sparsity] * layers if isinstance(sparsity, int | float) else list(sparsity)
    if len(values) != layers:
        raise ValueError(f"sparsity has {len(values)} values: expected one number, or one for each of {layers} layers")
    even = [kept_neurons(width, value) for width, value in zip(widths, values, strict=True)]
    if budget == "uniform" or not any(values):
        return even
    room = _SPREAD * 4 * values[0] * (1 - values[0])  # with a sparsity for each layer, budgets are uniform
    shifts = [width * room * tilt for width, tilt in zip(widths, late(layers), strict=True)]
    excess = sum(shifts) / len(shifts)  # not 0 where widths differ
    kept = [
        min(width, max(1, round(count + shift - excess)))
        for width, count, shift in zip(widths, even, shifts, strict=True)
    ]
    # What rounding and the limits of a layer have moved goes to, or comes from, the last layers that can.
    missing = sum(even) - sum(kept)
    for layer in reversed(range(len(kept))):
        moved = min(max(missing, 1 - kept[layer]), widths[layer] - kept[layer])
        kept[layer] += moved
        missing -= moved
    return kept


@dataclass(frozen=True, eq=False)
class Experts:
    """What a row computes with, layer by layer."""

    neurons: tuple[Tensor, ...]  # the kept ones [K], int64, ascending; a layer that keeps all of them is dense
    corrections: tuple[tuple[Correction, ...], ...]  # what the compensation adds to the output, one after the other
    scores: tuple[Tensor, ...] = ()  # what the neurons were chosen by [D], float32; none where they are not known
    by_token: TokenChoice | None = None  # how each token chooses among these neurons, which are all; None: none does
    fits: tuple[RidgeFit, ...] = ()  # what the corrections were fitted by, by device, where they can go on learning
    quantization: str = "none"  # the precision of all that computes with them

    def output_weights(self, layer: int, block: FeedForwardBlock) -> Tensor:
        """What a layer's experts write by [H, K], float32: corrected, and quantised where they are."""
        columns_HK = block.output_columns(self.neurons[layer])
        weight_HK = columns_HK.float()
        for correction in self.corrections[layer]:
            weight_HK = torch.addmm(weight_HK, correction.weights_NH.T, correction.basis_NK)
        return rounded(weight_HK.to(columns_HK.dtype), self.quantization).float()

    def corrected(self, further: dict[int, Correction]) -> Experts:
        """The same with further corrections of some layers."""
        corrections = tuple(
            (*before, further[layer]) if layer in further else before for layer, before in enumerate(self.corrections)
        )
        return replace(self, corrections=corrections)
