"""From scores to experts: which k neurons of a block are kept.

Dimensions: B = batch rows, D = FF width, K = kept neurons.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SELECTIONS = ("topk", "sample", "topk_sample")


def kept_neurons(width: int, sparsity: float) -> int:
    """K = int(D * (1 - sparsity)), but at least one neuron."""
    return max(1, int(width * (1 - sparsity)))


def sparsity_per_layer(sparsity: float | Sequence[float], layers: int) -> list[float]:
    """One sparsity for each layer.

    Raises:
        ValueError: the number of values is wrong, or one is not 0 <= sparsity < 1.
    """
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
