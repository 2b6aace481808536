"""Offloading: the dense FF weights in host memory, on the device only while their block runs.

In compact mode they are needed during the prompt alone. So every projection of a dense view brings its weights when it
runs, and compaction gathers the experts from there: all FF weights cross the bus twice per prompt. (Gathering on the
host would move less, but at the speed of scattered reads, and would need a second, transposed copy of the output
projections.) Where the device is the CPU nothing is moved.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks


class Offloaded:
    """Brings the weights of a view's blocks to the device when they run."""

    def __init__(self, blocks: Sequence[FeedForwardBlock], device: torch.device) -> None:
        self._blocks, self._device = blocks, device
        self._host = [block.weights for block in blocks]
        self._here: int | None = None
        for layer, block in enumerate(blocks):
            for module in block.inputs:  # which of them runs first is the model's affair
                module.register_forward_pre_hook(lambda *_, layer=layer: self.bring(layer))

    def bring(self, layer: int) -> None:
        """Have a block's weights on the device, and those of the block before no longer."""
        if layer == self._here:
            return
        if self._here is not None:
            self._set(self._here, self._host[self._here])
        moved = [weight.detach().to(self._device, non_blocking=True) for weight in self._host[layer]]
        self._set(layer, [nn.Parameter(weight, requires_grad=False) for weight in moved])
        self._here = layer

    def _set(self, layer: int, weights: Sequence[nn.Parameter]) -> None:
        for module, weight in zip(self._blocks[layer].projections, weights, strict=True):
            module._parameters["weight"] = weight


def move_without_dense(model: nn.Module, device: torch.device | str) -> None:
    """Move to a device all of a model in host memory but its FF weights, for `offload_dense=True`.

    Raises:
        UnsupportedModelError: an FF block cannot be pruned, or has a weight that another module shares.
    """
    stay = {id(weight) for weight in _weights(model)}
    apply: Any = model._apply
    apply(lambda tensor: tensor if id(tensor) in stay else tensor.to(device))


@contextmanager
def dense_in_host_memory(model: nn.Module) -> Iterator[None]:
    """While the context lasts, a model's FF weights, as the same `Parameter`s, are in host memory, pinned for a GPU.

    Raises:
        UnsupportedModelError: as `move_without_dense`; or the rest of the model is spread over several devices.
    """
    weights = _weights(model)
    away = {id(weight) for weight in weights}
    devices = {parameter.device for parameter in model.parameters() if id(parameter) not in away}
    homes = [weight.device for weight in weights]
    if len(devices) != 1 or not {*homes} <= {*devices, torch.device("cpu")}:
        raise UnsupportedModelError(
            f"the model is spread over {', '.join(sorted(map(str, {*devices, *homes})))}: offload_dense needs all of "
            "it on one device, but for FF weights in host memory"
        )
    try:
        for weight in weights:
            if devices != {torch.device("cpu")}:
                weight.data = weight.data.cpu().pin_memory()
        yield
    finally:
        for weight, home in zip(weights, homes, strict=True):
            weight.data = weight.data.to(home)


def _weights(model: nn.Module) -> list[nn.Parameter]:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter.untyped_storage().data_ptr()].append(name)
    weights = [weight for block in find_feedforward_blocks(model) for weight in block.weights]
    for sharing in (names[weight.untyped_storage().data_ptr()] for weight in weights):
        if len(sharing) > 1:
            raise UnsupportedModelError(
                f"{' and '.join(map(repr, sharing))} share one memory: offload_dense cannot move it"
            )
    return weights
