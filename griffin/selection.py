"""From scores to experts: how many neurons each layer keeps (its budget), and which.

Dimensions: B = batch rows, D = FF width, K = kept neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SELECTIONS = ("topk", "sample", "topk_sample")


def kept_neurons(width: int, sparsity: float) -> int:
    """K = int(D * (1 - sparsity)), but at least one neuron."""
    return max(1, int(width * (1 - sparsity)))


def sparsity_per_layer(sparsity: float | Sequence[float], layers: int) -> list[float]:
    """One sparsity for each layer."""
    values = [sparsity] * layers if isinstance(sparsity, int | float) else list(sparsity)
    if len(values) != layers:
        raise ValueError(f"sparsity has {len(values)} values: expected one number, or one for each of {layers} layers")
    for value in values:
        if not 0 <= value < 1:
            raise ValueError(f"sparsity={value}: expected 0 <= sparsity < 1")
    return values


def select(scores_BD: Tensor, kept: int, selection: str = "topk", draw_BD: Tensor | None = None) -> Tensor:
    """The kept neurons of each row.

    `topk` takes the best. `sample` draws without replacement with probabilities in proportion to the scores.
    `topk_sample` takes the best K // 2 and draws the others from the rest (the sampled variants of arXiv 2404.01365).

    Sampling adds Gumbel noise to the log scores and takes the largest, which is the same distribution as drawing
    one neuron after another (Kool et al., arXiv 1903.06059), without leaving the device or failing where fewer
    than K scores are positive.

    Args:
        scores_BD: non-negative scores, or [1, D] for all rows of `draw_BD`.
        kept: K, 1 to D.
        selection: one of `SELECTIONS`.
        draw_BD: uniform numbers in [0, 1), needed unless `topk`.

    Returns:
        [B, K] int64, ascending in each row.

    Raises:
        ValueError: unknown `selection`, `kept` out of range, or no `draw_BD` where it is needed.
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection={selection!r}: expected one of {', '.join(SELECTIONS)}")
    if not 1 <= kept <= scores_BD.shape[-1]:
        raise ValueError(f"kept={kept}: expected 1 to {scores_BD.shape[-1]}")
    if selection == "topk":
        keys_BD = scores_BD
    else:
        if draw_BD is None:
            raise ValueError(f"selection={selection!r} needs random numbers")
        draw_BD = draw_BD.to(scores_BD.device)  # drawn beside the weights, which may be in host memory
        scores_BD = scores_BD.expand_as(draw_BD)
        keys_BD = scores_BD.log() - (-draw_BD.log()).log()
        if selection == "topk_sample":
            best = scores_BD.topk(kept // 2, dim=-1).indices
            keys_BD = keys_BD.scatter(-1, best, torch.inf)
    return keys_BD.topk(kept, dim=-1).indices.sort(dim=-1).values


# -- budgets: how the layers share what is kept -----------------------------------------------------------------------

# How far a layer's share may be from the mean at 50%, where there is most to choose from.
_SPREAD = 0.1


def uniform(layers: int) -> list[float]:
    """Every layer keeps the same share, as in the paper."""
    return [0.0] * layers


def late(layers: int) -> list[float]:
    """Early layers keep less: their shares rise up to the middle of the model and stay there.

    On both models that it was measured on, dropping half of one of the first layers moves the next-token
    distributions several times less than half of a middle one (docs/selection.md). The very first layer, which they
    disagree about, keeps the mean share.
    """
    tilts = [min(1.0, 2 * layer / max(layers - 1, 1)) for layer in range(1, layers)]
    mean = sum(tilts) / max(len(tilts), 1)
    return [0.0] * min(layers, 1) + [2 * (tilt - mean) for tilt in tilts]


# name: number of layers -> per layer, in which direction its share departs from the mean; they add up to 0.
BUDGETS: dict[str, Callable[[int], list[float]]] = {"uniform": uniform, "late": late}


def kept_per_layer(widths: Sequence[int], sparsity: float | Sequence[float], budget: str = "uniform") -> list[int]:
    """K of each layer, the same sum under every budget.

    Args:
        widths: D of each layer.
        sparsity: share of FF neurons dropped over all layers, or, where the budget is uniform, of each layer.
        budget: one of `BUDGETS`.

    Raises:
        ValueError: an argument is out of range, or says twice what each layer keeps.
    """
    if budget not in BUDGETS:
        raise ValueError(f"budget={budget!r}: expected one of {', '.join(BUDGETS)}")
    values = sparsity_per_layer(sparsity, len(widths))
    even = [kept_neurons(width, value) for width, value in zip(widths, values, strict=True)]
    if budget == "uniform" or not any(values):
        return even
    if not isinstance(sparsity, int | float):
        raise ValueError(f"budget={budget!r} with a sparsity for each layer: expected one of the two")
    room = _SPREAD * 4 * sparsity * (1 - sparsity)
    shifts = [width * room * tilt for width, tilt in zip(widths, BUDGETS[budget](len(widths)), strict=True)]
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
