"""Quantisation: how many bits the weights of a pruned view's linear layers have.

Weights are rounded to the nearest level, symmetrically, without calibration data: those of the FF blocks, of attention
and of the output embedding. Norms and the embedding table stay as they are. Integer products are a library's affair: on
a CPU PyTorch's own dynamic int8 product runs both, and rounds activations too: weights of 4 bits are held in 8 there.
Elsewhere, and in compiled calls, rounded weights are computed with in the model's precision. Bytes are what a kernel
would read.

Dimensions: O = outputs, I = inputs of a linear layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from griffin.feedforward import UnsupportedModelError, weight_out_in
from griffin.views import OneDNNLinear

QUANTIZATIONS = {
    "none": "the model's own precision",
    "int8": "8 bits a weight, one scale for each row",
    "int4": "4 bits a weight, one scale for each 32 of a row; its bytes are what a kernel would read",
}

# Weights that share a scale of int4, as in the Q4_0 format of llama.cpp.
GROUP = 32

# A scale has as many bits as a weight of the model: bytes are compared with those of 16 bits a weight.
SCALE_BITS = 16

VNNI = torch.cpu._is_vnni_supported()

_PIECE = 2**17  # weights that are rounded at a time: a core's cache holds what is made of them

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says once a process that it will move quantised tensors elsewhere
    torch._make_per_channel_quantized_tensor(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1), torch.zeros(1), 0)


def stored_bits(quantization: str, columns: float) -> float:
    """Bits of a weight in rows of so many, its share of the scales included; 16 where nothing is quantised."""
    return {"none": 16.0, "int8": 8 + SCALE_BITS / columns, "int4": 4 + SCALE_BITS / GROUP}[quantization]


def levels(weight_OI: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """Levels, whole numbers in float32, and their scales: weight = level * scale, [O, I] and [O, 1] for int8;
    [O, G, 32] and [O, G, 1] for int4, whose last group is filled up with zeros."""
    weight_OI = weight_OI.float()
    if quantization == "int8":
        scale = weight_OI.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127.0
        return (weight_OI / scale).round_(), scale
    weight_OGI = functional.pad(weight_OI, (0, -weight_OI.shape[1] % GROUP)).view(len(weight_OI), -1, GROUP)
    low, high = weight_OGI.amin(dim=-1, keepdim=True), weight_OGI.amax(dim=-1, keepdim=True)
    # The largest weight of a group lies at level -8, which has no opposite.
    scale = torch.where(high > -low, -high, -low) / 8.0
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight_OGI / scale).round_().clamp_(-8, 7), scale


def rounded(weight_OI: Tensor, quantization: str) -> Tensor:
    """The weights as they are after quantisation, in their own dtype."""
    if quantization == "none":
        return weight_OI
    pieces = []
    for piece_OI in torch.split(weight_OI, max(1, _PIECE // weight_OI.shape[1])):
        level, scale = levels(piece_OI, quantization)
        pieces.append((level * scale).flatten(1)[:, : weight_OI.shape[1]].to(weight_OI.dtype))
    return torch.cat(pieces)


class Int8Linear(nn.Module):
    """A linear layer, with weights of its own or another's, that runs by PyTorch's dynamic int8 product on a CPU."""

    packed: Any
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        rows = input.reshape(-1, input.shape[-1]).float()
        # One scale serves all rows of a product, so rows come to it of one size.
        size = rows.abs().amax(dim=-1, keepdim=True).clamp_(min=1e-12) if len(rows) > 1 else 1.0
        # Processors without VNNI add two products in 16 bits: there activations have 7 bits.
        product: Tensor = torch.ops.quantized.linear_dynamic(rows / size, self.packed, not VNNI) * size
        product = product if self.bias is None else product + self.bias
        return product.to(input.dtype).view(*input.shape[:-1], -1)


def quantize(layer: nn.Module, quantization: str, source: nn.Module | None = None, *, packed: bool = True) -> None:
    """Have a linear layer of a view compute with weights that are quantised: its own, or those of another one.

    `packed`: whether by an integer product, where there is one; compiled calls cannot have it.
    """
    source = source or layer
    target: Any = layer
    weight_OI, target._parameters["bias"] = weight_out_in(source).detach(), getattr(source, "bias", None)
    plain = type(layer) in (nn.Linear, OneDNNLinear, Conv1D, Int8Linear) and "forward" not in vars(layer)
    if packed and plain and weight_OI.device.type == "cpu":
        target.packed = _packed(weight_OI, quantization)
        target.__class__ = Int8Linear
        return
    value = rounded(weight_OI, quantization)
    value = value.T if isinstance(layer, Conv1D) else value
    if isinstance(layer, Conv1D):
        target.nf = value.shape[1]
    memory = vars(layer).get("memory")
    if memory is None or memory.numel() < value.numel():  # it moves only when it grows
        memory = vars(layer)["memory"] = value.new_empty(value.numel())
    weight = memory[: value.numel()].view(value.shape).copy_(value)
    if target.weight.data_ptr() != weight.data_ptr() or target.weight.shape != weight.shape:
        target._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


def _packed(weight_OI: Tensor, quantization: str) -> Any:
    """Weights in the layout of PyTorch's int8 product."""
    pieces = []
    for piece_OI in torch.split(weight_OI, max(1, _PIECE // weight_OI.shape[1])):
        pieces.append(levels(piece_OI if quantization == "int8" else rounded(piece_OI, quantization), "int8"))
    level_OI = torch.cat([level.to(torch.int8) for level, _ in pieces])
    scale_O = torch.cat([scale for _, scale in pieces]).squeeze(1)
    zeros_O = torch.zeros(len(scale_O), dtype=torch.int64)
    tensor = torch._make_per_channel_quantized_tensor(level_OI, scale_O, zeros_O, 0)
    return torch.ops.quantized.linear_prepack(tensor, None)


def together(jobs: Iterable[Callable[[], object]]) -> None:
    """Run these on as many threads as PyTorch has: packing, most of the time that quantising takes, runs on one."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for _ in pool.map(lambda job: job(), jobs):
            pass


def linear_layers(model: nn.Module) -> list[nn.Module]:
    """The linear layers of a model's decoder, and its output embedding.

    Raises:
        UnsupportedModelError: one of them has weights that cannot be quantised.
    """
    whole: Any = model
    decoder = {*whole.get_decoder().modules(), whole.get_output_embeddings()}
    found = []
    for name, layer in model.named_modules():
        if layer in decoder and isinstance(layer, nn.Linear | Conv1D):
            weight = layer.get_parameter("weight")
            if weight.dim() != 2 or not weight.is_floating_point():
                raise UnsupportedModelError(f"{name} has weights of {weight.dtype}: it cannot be quantised")
            found.append(layer)
    return found
