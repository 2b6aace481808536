"""Quantisation: how many bits the weights of a pruned view's linear layers have.

Weights are rounded to the nearest level, symmetrically, without calibration data: those of the FF blocks, of attention
and of the output embedding. Norms and the embedding table stay as they are. Integer products are a library's affair: on
a CPU int8 and int4 weights run by PyTorch's own dynamic int8 product, which rounds activations too: int4 is held in 8
bits there. On a GPU they run by torchao, if it is installed and the model is in bfloat16; int8 in compiled calls only.
In all other calls rounded weights are computed with in the model's precision. Bytes are what a kernel would read.

Dimensions: O = outputs, I = inputs of a linear layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
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

# A scale is counted as one weight of 16 bits, whatever it is held in here: of bytes all others are counted so too.
SCALE_BITS = 16

# Devices on which torchao's products are used.
TORCHAO = ("cuda",)

VNNI = torch.cpu._is_vnni_supported()

_TILES = 8  # of 16 inputs, that the int4 product for GPUs reads at a time

_PIECE = 2**20  # weights that are rounded at a time: each piece takes some megabytes, and a dozen calls

_AT_A_TIME = 4  # layers that are packed: each has its copies, and threads that round its weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch says once a process that it will move quantised tensors elsewhere
    with torch.device("cpu"):
        torch._make_per_channel_quantized_tensor(torch.zeros(1, 1, dtype=torch.int8), torch.ones(1), torch.zeros(1), 0)


def stored_bits(quantization: str, columns: float) -> float:
    """Bits of a weight in rows of so many, its share of the scales included; 16 where nothing is quantised."""
    return {"none": 16.0, "int8": 8 + SCALE_BITS / columns, "int4": 4 + SCALE_BITS / GROUP}[quantization]


def levels(weight_OI: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """Levels, whole numbers, and their scales, in float32: weight = level * scale, [O, I] and [O, 1] for int8;
    [O, G, 32] and [O, G, 1] for int4, whose last group is filled up with zeros."""
    # Products of bfloat16 have scales of it; float16 has no room for small ones.
    dtype = torch.bfloat16 if weight_OI.dtype == torch.bfloat16 else torch.float32
    weight_OI = weight_OI.float()
    if quantization == "int8":
        scale = (weight_OI.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127.0).to(dtype).float()
        return (weight_OI / scale).round_().clamp_(-127, 127), scale
    weight_OGI = functional.pad(weight_OI, (0, -weight_OI.shape[1] % GROUP)).view(len(weight_OI), -1, GROUP)
    low, high = weight_OGI.amin(dim=-1, keepdim=True), weight_OGI.amax(dim=-1, keepdim=True)
    # The largest weight of a group lies at level -8, which has no opposite.
    scale = (torch.where(high > -low, -high, -low) / 8.0).to(dtype).float()
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight_OGI / scale).round_().clamp_(-8, 7), scale


def rounded(weight_OI: Tensor, quantization: str) -> Tensor:
    """The weights as they are after quantisation, in their own dtype."""
    if quantization == "none":
        return weight_OI
    return torch.cat(
        [
            (level * scale).flatten(1)[:, : weight_OI.shape[1]].to(weight_OI.dtype)
            for level, scale in _in_pieces(weight_OI, quantization)
        ]
    )


def _in_pieces(weight_OI: Tensor, quantization: str) -> Iterator[tuple[Tensor, Tensor]]:
    for piece_OI in torch.split(weight_OI, max(1, _PIECE // weight_OI.shape[1])):
        yield levels(piece_OI, quantization)


def _all_levels(weight_OI: Tensor, quantization: str) -> tuple[Tensor, Tensor]:
    """All levels [O, I] as int8, and their scales [O, 1] or [O, G]."""
    pieces = [
        (level.flatten(1).to(torch.int8), scale.flatten(1)) for level, scale in _in_pieces(weight_OI, quantization)
    ]
    level, scale = zip(*pieces, strict=True)
    return torch.cat(level), torch.cat(scale)


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


def quantize(layer: nn.Module, quantization: str, source: nn.Module | None = None, *, calls: str = "eager") -> None:
    """Have a linear layer of a view compute with weights that are quantised: its own, or those of another one.

    `calls`: how it will be called: `eager`; `compiled`, which cannot have PyTorch's product; or `masked`, of many rows,
    which have rounded weights.
    """
    source = source or layer
    target: Any = layer
    weight_OI, target._parameters["bias"] = weight_out_in(source).detach(), getattr(source, "bias", None)
    plain = type(layer) in (nn.Linear, OneDNNLinear, Conv1D, Int8Linear) and "forward" not in vars(layer)
    if plain and calls == "eager" and weight_OI.device.type == "cpu":
        target.packed = _packed(weight_OI, quantization)
        target.__class__ = Int8Linear
        return
    # An eager int8 product of torchao would write every weight in bfloat16 before it reads it.
    pays = calls == "compiled" or (calls == "eager" and quantization == "int4")
    if plain and pays and not isinstance(layer, Conv1D) and _runs_torchao(weight_OI):
        value = _for_torchao(weight_OI, quantization)
        held = vars(layer).setdefault("held", {})  # by shape: what a graph knows the address of does not move
        if value.shape in held:
            held[value.shape].copy_(value)
        else:
            held[value.shape] = nn.Parameter(value, requires_grad=False)
        target._parameters["weight"] = held[value.shape]
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
    level_OI, scale = _all_levels(weight_OI if quantization == "int8" else rounded(weight_OI, quantization), "int8")
    scale_O = scale.squeeze(1)
    zeros_O = torch.zeros(len(scale_O), dtype=torch.int64)
    tensor = torch._make_per_channel_quantized_tensor(level_OI, scale_O, zeros_O, 0)
    return torch.ops.quantized.linear_prepack(tensor, None)


def _runs_torchao(weight_OI: Tensor) -> bool:
    """Whether torchao is installed, and has products for these weights, where they are."""
    if weight_OI.device.type not in TORCHAO or weight_OI.dtype != torch.bfloat16 or not find_spec("torchao"):
        return False
    nvidia = torch.version.hip is None
    return weight_OI.device.type != "cuda" or (nvidia and torch.cuda.get_device_capability(weight_OI.device) >= (8, 0))


def _for_torchao(weight_OI: Tensor, quantization: str) -> Tensor:
    """Weights as torchao's weight-only products read them."""
    from torchao.quantization import Int4TilePackedTo4dTensor, Int8Tensor

    made: Tensor
    if quantization == "int8":
        made = Int8Tensor(*_all_levels(weight_OI, "int8"), [1, weight_OI.shape[1]], weight_OI.dtype)
        return made
    bytes_OI, scales_GO2 = int4_tiles(weight_OI)
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes_OI, _TILES)
    made = Int4TilePackedTo4dTensor(packed, scales_GO2, [1, GROUP], weight_OI.shape)
    return made


def int4_tiles(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """What PyTorch's int4 product for GPUs is packed from: two levels in a byte [O, I / 2], counted from 0, and scales
    with their zeros [G, O, 2], for outputs in eights and inputs in thousands, filled up with zeros."""
    outputs, inputs = weight_OI.shape
    level_OI, scale_OG = _all_levels(functional.pad(weight_OI, (0, -inputs % 1024, 0, -outputs % 8)), "int4")
    level_OI = (level_OI + 8).to(torch.uint8)
    scale_GO = scale_OG.T.to(weight_OI.dtype)
    return level_OI[:, ::2] << 4 | level_OI[:, 1::2], torch.stack([scale_GO, torch.zeros_like(scale_GO)], dim=-1)


def together(jobs: Iterable[Callable[[], object]], *, packing: bool) -> None:
    """Run what quantises layers; packing, which takes most of the time on a CPU and runs on one thread, on several."""
    if not packing:
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(min(torch.get_num_threads(), _AT_A_TIME)) as pool:
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
