"""Linear layers by oneDNN: how a CPU nears its memory's speed.

A product of few tokens reads every weight once and does little else. In float32, PyTorch's own product comes nowhere
near the speed of memory for it, and for prompts it needs up to twice the time; oneDNN, which PyTorch brings along, does
better (measured, see docs/performance.md). So each linear layer of a model (attention, FF, output embedding) is given
to oneDNN, for dense and pruned alike. On other devices and in other types nothing changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional


@contextlib.contextmanager
def onednn_linear(model: nn.Module) -> Iterator[None]:
    """The model's linear layers run by oneDNN while the context lasts: in float32 on a CPU, without gradients.

    Layers with a forward of their own are left alone, and so are other devices and types.

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
    if "forward" in vars(module) or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32


def _forward(module: nn.Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not x.numel():
            return functional.linear(x, module.weight, module.bias)
        # An input in oneDNN's layout has the product taken by oneDNN, with the weights where they lie.
        rows = x.reshape(-1, x.shape[-1]).to_mkldnn()
        product: Tensor = functional.linear(rows, module.weight, module.bias).to_dense()
        return product.view(*x.shape[:-1], -1)

    return forward
