"""Experts: which neurons a row computes with, and what is added to what they write.

Dimensions: K = kept neurons, D = FF width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from griffin.correction import Correction
from griffin.ridge import RidgeFit
from griffin.statistics import TokenChoice


@dataclass(frozen=True, eq=False)
class Experts:
    """What a row computes with, layer by layer."""

    neurons: tuple[
        Tensor, ...
    ]  # the kept ones [K], int64, ascending; a layer that keeps all runs as in the dense model
    corrections: tuple[tuple[Correction, ...], ...]  # what compensations add to the output, one after the other
    scores: tuple[Tensor, ...] = ()  # what the neurons were chosen by [D], float32; none where they are not known
    by_token: TokenChoice | None = None  # how each token chooses among these neurons, which are all; None: none does
    fits: tuple[RidgeFit, ...] = ()  # what the corrections were fitted by, by device, where they can go on learning

    def corrected(self, further: dict[int, Correction]) -> Experts:
        """The same with further corrections of some layers."""
        corrections = tuple(
            (*before, further[layer]) if layer in further else before for layer, before in enumerate(self.corrections)
        )
        return replace(self, corrections=corrections)

    def follows(self, before: Experts) -> bool:
        """Whether these are the experts of before with further corrections, if any."""
        corrections = zip(self.corrections, before.corrections, strict=True)
        return self.neurons is before.neurons and all(now[: len(then)] == then for now, then in corrections)

    def save(self, path: str | Path) -> None:
        """Write the neurons and their corrections as one safetensors file; scores and fits are left out.

        Raises:
            ValueError: each token chooses its own neurons.
        """
        if self.by_token is not None:
            raise ValueError("each token has experts of its own: there are none to save")
        tensors = {f"{layer}.neurons": neurons_K for layer, neurons_K in enumerate(self.neurons)}
        for layer, corrections in enumerate(self.corrections):
            for number, correction in enumerate(corrections):
                parts = {name: value for name, value in vars(correction).items() if value is not None}
                tensors |= {f"{layer}.corrections.{number}.{name}": value for name, value in parts.items()}
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Experts:
        """What `save` wrote.

        Args:
            path: of the file.
            device: of the model.
        """
        tensors = load_file(path, device=str(device))
        layers = sum(name.endswith(".neurons") for name in tensors)
        corrections: list[list[dict[str, Tensor]]] = [[] for _ in range(layers)]
        for name in sorted(name for name in tensors if ".corrections." in name):
            layer, _, number, part = name.split(".")
            mine = corrections[int(layer)]
            mine += [{} for _ in range(int(number) + 1 - len(mine))]
            mine[int(number)][part] = tensors[name]
        return cls(
            tuple(tensors[f"{layer}.neurons"] for layer in range(layers)),
            tuple(tuple(Correction(**parts) for parts in mine) for mine in corrections),
        )
