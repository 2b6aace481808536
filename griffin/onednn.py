"""Linear layers by oneDNN: how a CPU nears its memory's speed.

A product of few tokens reads every weight once and does little else. In float32, PyTorch's own product comes nowhere
near the speed of memory for it, and for prompts it needs up to twice the time; oneDNN, which PyTorch brings along, does
better (measured, see docs/performance.md). So each linear layer of a model (attention, FF, output embedding) is given
to oneDNN, for dense and pruned alike. On other devices and in other types nothing changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from griffin.views import view_of


class OneDNNLinear(nn.Linear):
    """A linear layer that runs by oneDNN: in float32 on a CPU, without gradients."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not input.numel():
            return functional.linear(input, self.weight, self.bias)
        # An input in oneDNN's layout has the product taken by oneDNN, with the weights where they lie.
        rows = input.reshape(-1, input.shape[-1]).to_mkldnn()
        product: Tensor = functional.linear(rows, self.weight, self.bias).to_dense()
        return product.view(*input.shape[:-1], -1)


def with_onednn(model: nn.Module) -> nn.Module:
    """A view of the model whose linear layers run by oneDNN; the model itself where that is not possible.

    Layers with a forward of their own are left alone, and so are other devices and types. Results change by rounding.

    Args:
        model: a `transformers` model.
    """
    whole: Any = model
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if (
        not available
        or getattr(whole, "device", torch.device("cpu")).type != "cpu"
        or not any(_applies(module) for module in model.modules())
    ):
        return model
    view = view_of(model)
    for module in view.modules():
        if _applies(module):
            module.__class__ = OneDNNLinear
    return view


def _applies(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    return module.weight.device.type == "cpu" and module.weight.dtype == torch.float32
