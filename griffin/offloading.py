"""Offloading: the dense FF weights in host memory, on the device only while their block runs.

In compact mode they are needed during the prompt alone. So every block's weights are copied into a staging slot just
before the block runs, and compaction gathers the experts from there: all FF weights cross the bus twice per prompt,
once for its dense pass and once for compaction. (Gathering on the host would move less, but at the speed of scattered
reads, and would need a second, transposed copy of the output projections.)

The slots are reused from block to block; on a GPU there are two, so that one block's copy runs beside the computing of
the block before it, on a stream of its own from pinned memory. (Those lines have not been run: the project was made on
a machine without a GPU.) Where the device is the CPU the copies are as real, and cost memory and time instead of saving
any.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks


class Offload:
    """A context in which a model's dense FF weights live in host memory. Dense forward calls work as ever, to the bit.

    Entering moves them there, unless they have been there all along (`move_without_dense`); leaving puts them back to
    where they were, as the same `Parameter` objects. Within another such context of the same model it does nothing.

    Args:
        model: a `transformers` causal language model with dense FF blocks.

    Raises:
        UnsupportedModelError: the model has an FF block that cannot be pruned, is spread over several devices, or has
            an FF weight that another module shares.
    """

    def __init__(self, model: nn.Module) -> None:
        self._blocks = find_feedforward_blocks(model)
        self._layers = {block.output: layer for layer, block in enumerate(self._blocks)}
        self._weights = [block.weights for block in self._blocks]
        self._device = _device(model, self._weights)
        _refuse_shared(model, self._weights)
        self._stream: Any = None
        self._homes: list[torch.device] = []
        self._host: list[list[Tensor]] = []
        self._slots: list[_Slot] = []
        self._here: int | None = None  # the layer that was brought last
        self._handles: dict[int, list[Any]] = {}

    def __enter__(self) -> Offload:
        if self._blocks[0].output in _offloads:
            return self
        self._homes = [weight.device for weights in self._weights for weight in weights]
        try:
            # Slots made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                for weights in self._weights:
                    self._host.append([])
                    for weight in weights:
                        self._host[-1].append(self._to_host(weight))
                self._make_slots()
        except BaseException:
            self._restore()
            raise
        for block in self._blocks:
            _offloads[block.output] = self
            self.watch(block)
        return self

    def __exit__(self, *_: object) -> None:
        if _offloads.get(self._blocks[0].output) is self:
            for block in self._blocks:
                self.unwatch(block)
                del _offloads[block.output]
            self._restore()

    def watch(self, block: FeedForwardBlock) -> None:
        """Bring the block's weights whenever it runs."""
        layer = self._layers[block.output]
        if layer not in self._handles:
            # Which of its input projections runs first is the model's affair.
            self._handles[layer] = [
                module.register_forward_pre_hook(lambda *_: self.bring(block)) for module in block.inputs
            ]

    def unwatch(self, block: FeedForwardBlock) -> None:
        """The block runs on other weights than its own: nothing is done when it does."""
        for handle in self._handles.pop(self._layers[block.output], ()):
            handle.remove()

    def bring(self, block: FeedForwardBlock) -> None:
        """Have the block's weights on the device for what is asked of it next, until another block's are brought."""
        layer = self._layers[block.output]
        if layer == self._here:
            return
        self._here = None
        slot = self._slots[layer]
        if slot.holds != layer:
            self._copy(layer)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        for weight, staged in zip(self._weights[layer], slot.tensors, strict=True):
            weight.data = staged
        self._here = layer
        if self._stream is not None and layer + 1 < len(self._blocks):
            self._copy(layer + 1)

    def _copy(self, layer: int) -> None:
        """Begin to copy a block's weights into its slot, once what was asked of the block before in it is done."""
        slot = self._slots[layer]
        if slot.holds is not None:
            for weight, host in zip(self._weights[slot.holds], self._host[slot.holds], strict=True):
                weight.data = host
        slot.holds = None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # does nothing where there is no stream
            for staged, host in zip(slot.tensors, self._host[layer], strict=True):
                staged.copy_(host, non_blocking=True)
        slot.holds = layer

    def _to_host(self, weight: nn.Parameter) -> Tensor:
        if self._device.type == "cuda":
            host = torch.empty_like(weight.data, device="cpu", pin_memory=True).copy_(weight.data)
        else:
            host = weight.data.to("cpu")
        weight.data = host
        return host

    def _make_slots(self) -> None:
        """One slot on a CPU, two in turn on a GPU; as many again for every other shape that blocks have."""
        turns = 1
        if self._device.type == "cuda":
            cuda: Any = torch.cuda
            self._stream, turns = cuda.Stream(self._device), 2
        made: dict[Hashable, _Slot] = {}
        for layer, hosts in enumerate(self._host):
            shape = (layer % turns, *((host.shape, host.stride(), host.dtype) for host in hosts))
            if shape not in made:
                made[shape] = _Slot([torch.empty_like(host, device=self._device) for host in hosts])
            self._slots.append(made[shape])

    def _restore(self) -> None:
        """Every weight back to where it was."""
        if self._stream is not None:
            self._stream.synchronize()  # a copy may still be on its way into a slot
        self._slots, self._stream, self._here = [], None, None
        weights = [weight for weights in self._weights for weight in weights]
        hosts = [host for hosts in self._host for host in hosts]
        for weight, host, home in zip(weights, hosts, self._homes, strict=False):
            weight.data = host.to(home)
        self._host = []


@dataclass
class _Slot:
    """Memory on the device for one block's weights, and the layer whose weights are in it."""

    tensors: list[Tensor]
    holds: int | None = None


# By output projection, the context that the block's weights are offloaded by.
_offloads: WeakKeyDictionary[nn.Module, Offload] = WeakKeyDictionary()


def bring(block: FeedForwardBlock) -> bool:
    """Have the block's weights on the device; False where they are not offloaded, and are there anyway."""
    offload = _offloads.get(block.output)
    if offload is not None:
        offload.bring(block)
    return offload is not None


def watch(block: FeedForwardBlock) -> None:
    """Where the block's weights are offloaded, bring them whenever it runs."""
    if (offload := _offloads.get(block.output)) is not None:
        offload.watch(block)


def unwatch(block: FeedForwardBlock) -> None:
    """Where the block's weights are offloaded, do not bring them any more: it runs on others."""
    if (offload := _offloads.get(block.output)) is not None:
        offload.unwatch(block)


def move_without_dense(model: nn.Module, device: torch.device | str) -> None:
    """Move to a device all of a model but what `Offload` keeps in host memory, so that the device never holds it whole.

    Such a model runs within `Offload`, or `griffin.prune(model, offload_dense=True)`, only.

    Args:
        model: a `transformers` causal language model with dense FF blocks, in host memory.
        device: where the rest of it goes.

    Raises:
        UnsupportedModelError: as `Offload`.
    """
    weights = [block.weights for block in find_feedforward_blocks(model)]
    _refuse_shared(model, weights)
    stay = {weight for one in weights for weight in one}
    apply: Any = model._apply
    apply(lambda tensor: tensor if tensor in stay else tensor.to(device))


def _device(model: nn.Module, weights: list[list[nn.Parameter]]) -> torch.device:
    """The one device that the model runs on."""
    away = {weight for one in weights for weight in one}
    devices = {parameter.device for parameter in model.parameters() if parameter not in away}
    spread = devices | {weight.device for weight in away} - {torch.device("cpu")}
    if len(devices) != 1 or len(spread) != 1:
        raise UnsupportedModelError(
            f"the model is spread over {', '.join(sorted(map(str, spread)))}: offload_dense needs all of it on one "
            "device, but for FF weights in host memory"
        )
    return devices.pop()


def _refuse_shared(model: nn.Module, weights: list[list[nn.Parameter]]) -> None:
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter.untyped_storage().data_ptr()].append(name)
    for one in weights:
        for weight in one:
            sharing = names[weight.untyped_storage().data_ptr()]
            if len(sharing) > 1:
                raise UnsupportedModelError(
                    f"{' and '.join(map(repr, sharing))} share one memory: offload_dense cannot move it"
                )
