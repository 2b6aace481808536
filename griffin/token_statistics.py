"""Statistics of single tokens: every generated token keeps its own neurons, as published methods do that need a kernel
for it. Here they run masked, for quality only: they show what one choice for the whole prompt gives away.

Adding one is writing one function and one line of `TOKEN_STATISTICS`.

Dimensions: S = tokens, D = FF width, K = kept neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from griffin.feedforward import FeedForwardBlock


@dataclass(frozen=True)
class TokenStatistic:
    """What scores the neurons of each token by itself.

    Attributes:
        score: (z_SD, |act(gate)|_SD, block) -> scores_SD, float32; the K largest of each token are kept. The gate is
            None unless it is asked for.
        gate: whether `score` reads |act(gate)|. Such a statistic knows what it keeps before the up projection runs, so
            that only the gate is read whole; the others know it before the output projection runs.
    """

    score: Callable[[Tensor, Tensor | None, FeedForwardBlock], Tensor]
    gate: bool = False

    def skippable(self, block: FeedForwardBlock) -> float:
        """The share of a dropped neuron's weights that need not be read: those behind what it is known from."""
        matrices = len(block.inputs) * block.parts + 1
        return (2 if self.gate and matrices > 2 else 1) / matrices


def teal(z_SD: Tensor, gate_SD: Tensor | None, block: FeedForwardBlock) -> Tensor:
    """|z|: TEAL's score for the input of the output projection (arXiv 2408.14690), the largest instead of those above a
    threshold."""
    return z_SD.abs()


def wina(z_SD: Tensor, gate_SD: Tensor | None, block: FeedForwardBlock) -> Tensor:
    """|z| * ||Wd[:, j]||_2, the length of what a neuron writes (WINA, arXiv 2505.19427)."""
    return z_SD.abs() * block.output_lengths.to(z_SD.device)


def cats(z_SD: Tensor, gate_SD: Tensor | None, block: FeedForwardBlock) -> Tensor:
    """|act(gate)| (CATS, arXiv 2404.08763; Sirius's fine-grained sparsity, arXiv 2409.03856)."""
    assert gate_SD is not None
    return gate_SD


TOKEN_STATISTICS: dict[str, TokenStatistic] = {
    "teal": TokenStatistic(teal),
    "wina": TokenStatistic(wina),
    "cats": TokenStatistic(cats, gate=True),
}


def gate_activations(z_SD: Tensor, up_SD: Tensor | None) -> Tensor:
    """|act(gate)| [S, D] float32, from z = act(gate) * up, whatever the activation function; 0 where up is 0, since z
    is. In a plain block, which has no up projection, it is |z|.

    Args:
        z_SD: activations.
        up_SD: what the up projection gave; None in a plain block.
    """
    if up_SD is None:
        return z_SD.abs().float()
    size_SD = up_SD.abs().float()
    return (z_SD.abs().float() / size_SD).masked_fill(size_SD == 0, 0.0)


@dataclass(frozen=True)
class TokenChoice:
    """How each token of a row chooses its neurons.

    Attributes:
        statistic: by what.
        kept: how many in each layer.
    """

    statistic: TokenStatistic
    kept: tuple[int, ...]

    def dropped(self, layer: int, block: FeedForwardBlock, z_SD: Tensor, up_SD: Tensor | None) -> Tensor:
        """Which neurons each token drops [S, D], bool."""
        gate_SD = gate_activations(z_SD, up_SD) if self.statistic.gate else None
        scores_SD = self.statistic.score(z_SD.float(), gate_SD, block)
        best_SK = scores_SD.topk(self.kept[layer], dim=-1).indices
        dropped_SD = torch.ones_like(z_SD, dtype=torch.bool)
        return dropped_SD.scatter_(1, best_SK, False)
