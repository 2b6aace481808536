"""Views: copies of a model's modules that share every tensor.

What differs from the model is built into its own view, for good: hooks that record, the weights of the kept neurons, a
mask. So the model itself is never hooked, switched or written to. Making a view takes milliseconds and no memory; its
logits are the model's to the bit, and either continues a KV cache that the other has filled.

Decoding steps can be compiled: one graph for each view and shape, without breaks; CUDA graphs on a GPU. A graph is for
fixed shapes and addresses. So KV caches then have static shapes (`griffin.kv_cache`), the experts' weights lie in
buffers that last from prompt to prompt (`griffin.compact`), and a check of verified decoding always has one length.

Dimensions: B = rows of a batch, S = positions of one forward call, T = positions whose logits are asked for,
V = vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from griffin.kv_cache import KVCache

# What compiles the forward calls of a view: module -> a function with the arguments of its call.
Compiler = Callable[[nn.Module], Callable[..., Any]]


def view_of(model: nn.Module, shared: Iterable[nn.Module] = ()) -> nn.Module:
    """A copy of a model's modules, with the hooks that are on them, that shares its parameters, buffers and config.

    Args:
        model: a `transformers` model.
        shared: modules of it that are not copied either.
    """
    whole: Any = model
    memo: dict[int, Any] = {id(thing): thing for thing in (*model.parameters(), *model.buffers(), *shared)}
    memo[id(whole.config)] = whole.config
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
        """Logits [B, T, V] of one forward call, which appends to the cache."""
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
    """How to ask a model for the logits of the last positions while its FF blocks see all of them.

    Where layers share keys and values, Gemma 4 runs its last layers at the asked positions only if these are a number.
    """
    config: Any = model.config
    if not getattr(config.get_text_config(decoder=True), "num_kv_shared_layers", 0):
        return logits_to_keep
    columns = ids_BS.shape[1]
    return torch.arange(max(columns - logits_to_keep, 0), columns, device=ids_BS.device)


# Variants of a view's forward call: of the compact view one for each sparsity. What torch allows by default is 8, and
# behind that it would run uncompiled.
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
    """What compiles the views of a model: `compiled_call`, or nothing.

    Args:
        compiled: whether to; `auto`: on CUDA.
        device: that the model runs on.

    Raises:
        ValueError: something else.
    """
    if compiled not in (True, False, "auto"):
        raise ValueError(f"compiled={compiled!r}: expected True, False or 'auto'")
    return compiled_call if compiled is True or (compiled == "auto" and device.type == "cuda") else None
