"""Products of few tokens with a weight matrix, a piece of its rows at a time: how a CPU nears its memory's speed.

A product of few tokens reads every weight once and does little else. On a CPU one large and flat product often comes
nowhere near the speed of memory; a stack of smaller ones, `torch.bmm`, is shared among threads better. So each linear
layer of a model (attention, FF, output embedding) is multiplied in pieces, for dense and pruned alike. Of many tokens,
and on other devices, one product makes the most.

What is fastest depends on the processor. With AVX-512, torch's own product of up to three tokens reads at the speed of
memory; from eight tokens on it is best to have the weights on the left side (measured, see docs/performance.md). Which
product is taken follows from the processor's kind and the number of tokens alone, so that results are repeated.

Dimensions: T = tokens, I = inputs, O = outputs, P = pieces, Q = outputs of a piece.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

PIECES = 16
MOST = 32  # tokens; of more, one product is as fast
_AVX512 = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")
LEAST = 4 if _AVX512 else 1  # tokens
WEIGHTS_LEFT = 8 if _AVX512 else MOST + 1  # tokens from which the weights are the left factor


def multiply(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """[T, O]: `functional.linear`, up to rounding, in `PIECES` pieces; the rows that are left over are one more."""
    outputs = len(weight_OI) // PIECES * PIECES
    weight_PQI = weight_OI[:outputs].view(PIECES, -1, weight_OI.shape[1])
    if len(x_TI) < WEIGHTS_LEFT:
        product_PTQ = torch.bmm(x_TI.expand(PIECES, -1, -1), weight_PQI.transpose(1, 2))
        product_TO = product_PTQ.transpose(0, 1).flatten(1).contiguous()  # flattening single rows copies nothing
    else:
        product_PQT = torch.bmm(weight_PQI, x_TI.T.expand(PIECES, -1, -1))
        product_TO = product_PQT.flatten(0, 1).T.contiguous()
    if outputs < len(weight_OI):
        product_TO = torch.cat([product_TO, functional.linear(x_TI, weight_OI[outputs:])], dim=1)
    return product_TO if bias_O is None else product_TO + bias_O


@contextlib.contextmanager
def linear_in_pieces(model: nn.Module) -> Iterator[None]:
    """The model's linear layers multiply few tokens in pieces while the context lasts: in float32 on a CPU.

    Layers with a forward of their own are left alone, and so are other devices and types: there nothing changes.

    Args:
        model: any module; results change by rounding only.
    """
    layers = [module for module in model.modules() if type(module) is nn.Linear and _applies(module)]
    for module in layers:
        vars(module)["forward"] = _forward(module)
    try:
        yield
    finally:
        for module in layers:
            vars(module).pop("forward", None)  # uncovers the class's own


def _applies(module: nn.Linear) -> bool:
    if "forward" in vars(module):
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        tokens = x.numel() // x.shape[-1]
        if not LEAST <= tokens <= MOST or torch.is_autocast_enabled("cpu"):
            return functional.linear(x, module.weight, module.bias)
        return multiply(x.reshape(tokens, -1), module.weight, module.bias).view(*x.shape[:-1], -1)

    return forward
