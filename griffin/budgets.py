"""Budgets: how many neurons each layer keeps when the model as a whole keeps a given share.

Dimensions: D = FF width of a layer, K = the neurons that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from griffin.selection import kept_neurons, sparsity_per_layer

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
