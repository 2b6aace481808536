"""A small model and prompts."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


def model(device: torch.device, dtype: torch.dtype = torch.float32, **shape: int) -> PreTrainedModel:
    """A small Llama with random weights, large enough for clear decisions."""
    sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **(sizes | shape), eos_token_id=None, pad_token_id=0)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.08)
    return made.to(device, dtype).requires_grad_(False)


def prompt(length: int, seed: int = 0, vocabulary: int = 512) -> list[int]:
    """Random token ids."""
    numbers = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(1, vocabulary, (length,), generator=numbers).tolist()
    return ids
