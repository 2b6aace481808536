"""How decoding is compiled, where the configuration asks for it."""

from __future__ import annotations

import torch
from transformers import CompileConfig


def compiling(device: torch.device) -> CompileConfig:
    """torch.compile's options: CUDA graphs on a GPU, plain code elsewhere."""
    options = CompileConfig(mode="reduce-overhead" if device.type == "cuda" else "default")
    options._compile_all_devices = True  # transformers compiles on accelerators only unless told so
    return options
