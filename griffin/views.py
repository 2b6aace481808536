"""Views: copies of a model's modules that share every tensor.

What differs from the model is built into its own view, for good: hooks that record, the weights of the kept neurons, a
mask. So the model itself is never hooked, switched or written to. Making a view takes milliseconds and no memory; its
logits are the model's to the bit, and either continues a KV cache that the other has filled.

Decoding steps can be compiled: one graph for each view and shape, without breaks; CUDA graphs on a GPU. A graph is for
fixed shapes and addresses: of KV caches, of the experts' weights, and of the checks of verified decoding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from griffin.kv_cache import KVCache

# What compiles the forward calls of a view: module -> a function with the arguments of its call.
Compiler = Callable[[nn.Module], Callable[..., Any]]


def view_of(model: nn.Module, shared: Iterable[nn.Module] = ()) -> nn.Module:
    """A copy of a model's modules, `shared` ones excepted, and of their hooks; it shares all tensors and the config."""
    whole: Any = model
    memo: dict[int, Any] = {id(thing): thing for thing in (*model.parameters(), *model.buffers(), *shared)}
    memo |= {id(config): config for config in [getattr(whole, "config", None)] if config is not None}
    return copy.deepcopy(model, memo)


class View:
    """A view, `module`, and how it is called."""

    def __init__(self, model: nn.Module, compiler: Compiler | None = None, shared: Iterable[nn.Module] = ()) -> None:
        self.module: Any = view_of(model, shared)
        self._compiled = None if compiler is None else compiler(self.module)
        parameters = inspect.signature(self.module.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._keeps_logits = "logits_to_keep" in parameters

    @torch.no_grad()
    def __call__(
        self,
        ids_BS: Tensor,
        cache: KVCache,
        *,
        mask_BP: Tensor | None = None,
        positions_BS: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Logits [B, T, V], at all positions or the last T, of one forward call, which appends to the cache."""
        options: dict[str, Any] = {"attention_mask": mask_BP} if mask_BP is not None else {}
        if positions_BS is not None and self._takes_positions:
            options["position_ids"] = positions_BS
        if logits_to_keep and self._keeps_logits:
            options["logits_to_keep"] = logit_positions(self.module, logits_to_keep, ids_BS)
        call = self.module
        if self._compiled is not None and cache.static:
            call = self._compiled
            # From here on a CUDA graph may overwrite what the call before returned.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        logits: Tensor = call(ids_BS, past_key_values=cache, use_cache=True, **options).logits
        return logits[:, -logits_to_keep:] if logits_to_keep else logits


def logit_positions(model: nn.Module, logits_to_keep: int, ids_BS: Tensor) -> int | Tensor:
    """How to ask a model for the logits of the last positions while its FF blocks see all: where layers share keys and
    values, Gemma 4 runs its last layers at the asked positions only if these are a number."""
    config: Any = model.config
    if not getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        return logits_to_keep
    columns = ids_BS.shape[1]
    return torch.arange(max(columns - logits_to_keep, 0), columns, device=ids_BS.device)


# Variants of a view's forward call: of the compact view one for each sparsity. Behind torch's 8 it would not compile.
VARIANTS = 64


def compiled_call(model: nn.Module) -> Callable[..., Any]:
    """The compiled call of a model or view on its device. It changes a setting of torch's compiler for the process.

    A graph break, or one variant too many, raises an error of `torch._dynamo.exc` instead of being slow in silence.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    device = next(model.parameters()).device.type
    mode = "reduce-overhead" if device == "cuda" else "default"
    compiled: Callable[..., Any] = torch.compile(model.__call__, mode=mode, fullgraph=True, dynamic=False)
    return compiled


def compiler_for(compiled: bool | str, device: torch.device) -> Compiler | None:
    """What compiles a model's views: `compiled_call`, or nothing; `auto`: on CUDA. ValueError: another value."""
    if compiled not in (True, False, "auto"):
        raise ValueError(f"compiled={compiled!r}: expected True, False or 'auto'")
    return compiled_call if compiled is True or (compiled == "auto" and device.type == "cuda") else None


class OneDNNLinear(nn.Linear):
    """A linear layer that runs by oneDNN: in float32 on a CPU, without gradients.

    PyTorch's own product of few tokens, which reads every weight once and does little else, comes nowhere near the
    speed of memory there, and for prompts it needs up to twice the time (docs/performance.md).
    """

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not input.numel():
            return functional.linear(input, self.weight, self.bias)
        # An input in oneDNN's layout has the product taken by oneDNN, with the weights where they lie.
        rows = input.reshape(-1, input.shape[-1]).to_mkldnn()
        product: Tensor = functional.linear(rows, self.weight, self.bias).to_dense()
        return product.view(*input.shape[:-1], -1)


def with_onednn(model: nn.Module) -> nn.Module:
    """A view of the model whose linear layers run by oneDNN; the model itself where none can. Layers with a forward of
    their own are left alone, and so are other devices and types. Results change by rounding."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    on_cpu = getattr(model, "device", torch.device("cpu")).type == "cpu"
    if not (available and on_cpu and any(_applies(module) for module in model.modules())):
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
