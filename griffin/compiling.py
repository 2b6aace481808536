"""How decode steps are compiled: one graph for each shape, without breaks; CUDA graphs on a GPU.

A graph is for fixed shapes and addresses. So caches are whole (`griffin.kv_cache`), the experts' weights lie in buffers
that last from prompt to prompt (`griffin.executors`), and a check of verified decoding always has the same length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Variants of the model's forward call: dense, each sparsity, each number of rows, and with a check's length. What torch
# allows by default is 8, and behind that it would run uncompiled.
VARIANTS = 64


def compiled_call(model: nn.Module) -> Callable[..., Any]:
    """The model's compiled call, for `griffin.Engine`. Two settings of torch's compiler change for the process.

    Args:
        model: on the device that it will run on.

    Returns:
        A function with the arguments of the model's own call. A graph break, or one variant too many, raises torch's
        error (of `torch._dynamo.exc`) instead of being slow in silence.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, VARIANTS)
    config.skip_nnmodule_hook_guards = False  # checks of verified decoding run with hooks, other steps without
    device = next(model.parameters()).device.type
    mode = "reduce-overhead" if device == "cuda" else "default"
    compiled: Callable[..., Any] = torch.compile(model.__call__, mode=mode, fullgraph=True, dynamic=False)
    return compiled
