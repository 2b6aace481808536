"""Recording: looking at the activations of a dense model while it runs.

Dimensions: B = batch rows, S = positions of one forward call, D = FF width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from griffin.block_hooks import BlockHooks
from griffin.feedforward import find_feedforward_blocks
from griffin.gathering import unit_rows


@contextmanager
def record_activations(model: nn.Module, look: Callable[[int, Tensor], Any]) -> Iterator[list[list[Any]]]:
    """Call `look(layer, z_SD)` in every FF block of every forward call, and keep what it returns.

    Activations of long texts are large, so what is kept is what `look` makes of them. Nothing of the model changes;
    the hooks are off again when the context ends.

    Args:
        model: a `transformers` causal language model with dense FF blocks, run with batches of one row.
        look: takes the layer and its activations [S, D] in float32, on the model's device.

    Yields:
        Per layer, what `look` returned in each forward call so far.

    Raises:
        UnsupportedModelError: as `find_feedforward_blocks`.
    """
    blocks = find_feedforward_blocks(model)
    seen: list[list[Any]] = [[] for _ in blocks]

    @torch.no_grad()
    def hook(layer: int, z: Tensor) -> None:
        seen[layer].append(look(layer, z.detach().reshape(-1, z.shape[-1]).float()))

    hooks = BlockHooks(blocks, hook)
    hooks.attach()
    try:
        yield seen
    finally:
        hooks.detach()


def relative_activations(z_SD: Tensor) -> Tensor:
    """|z| with every row divided by its L2 norm, a zero row staying zero (arXiv 2404.01365).

    Args:
        z_SD: activations, float32.

    Returns:
        [S, D] float32, 0 to 1; the column norms are GRIFFIN's scores.
    """
    return unit_rows(z_SD).abs()
