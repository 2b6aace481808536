"""A tiny, randomly initialised model of every architecture family in the layout table; prompts, and ways to prune."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LAYERS = 3
VOCABULARY = 97

# Generation never stops early: there is no end token. Prompts never hold the padding token.
_COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_SIZES = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 256}
_LLAMA = _COMMON | _SIZES | {"intermediate_size": 80, "num_key_value_heads": 2}
SMALL = _LLAMA | {"head_dim": 8}  # what most model types understand
_OPT = _COMMON | _SIZES | {"ffn_dim": 80, "word_embed_proj_dim": 32}

# family: (model type, config). The biases of qwen2, phi, opt, gpt2 and others are on by default.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, _LLAMA | {"mlp_bias": True}) for name in ("llama", "granite")},
    **{name: (name, _LLAMA) for name in ("mistral", "qwen2", "stablelm", "olmo2", "cohere")},
    **{name: (name, _LLAMA) for name in ("phi3", "phi", "gpt_neox", "starcoder2")},
    **{name: (name, SMALL) for name in ("gemma", "qwen3", "glm")},
    # A window that is shorter than the longest prompts here, so that it slides.
    **{name: (name, SMALL | {"sliding_window": 8}) for name in ("gemma2", "gemma3_text")},
    "opt": ("opt", _OPT),
    # As OPT 350M: norms after the blocks, and projections around the decoder.
    "opt_350m": ("opt", _OPT | {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "falcon": ("falcon", _COMMON | _SIZES | {"ffn_hidden_size": 80, "alibi": False, "bias": True}),
    "bloom": ("bloom", _COMMON | {"hidden_size": 32, "n_layer": LAYERS, "n_head": 4}),
    "gpt2": ("gpt2", _COMMON | {"n_embd": 32, "n_inner": 80, "n_layer": LAYERS, "n_head": 4, "n_positions": 256}),
}
FAMILIES = list(_CONFIGS)
ONE_PER_LAYOUT = ["llama", "phi3", "opt", "bloom", "gpt2"]
# Where the mask matters: rotary and learned positions, ALiBi, and sliding windows.
MASKS = ["llama", "opt", "bloom", "gemma3_text"]
# Where arithmetic depends on the architecture: every layout, and a window that slides.
VARIED = [*ONE_PER_LAYOUT, "gemma2"]
WIDTHS = {family: 128 if family == "bloom" else 80 for family in FAMILIES}  # Bloom's is 4 times its hidden size


def build(model_type: str, **config: Any) -> PreTrainedModel:
    """A model with random values everywhere: biases and norms too, and weights large enough for clear decisions."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            else:  # biases are initialised to 0 and norms to 0 or 1: stay around that
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def fresh(family: str) -> PreTrainedModel:
    """A new model, for tests that break it."""
    model_type, config = _CONFIGS[family]
    return build(model_type, **config)


@cache
def tiny(family: str) -> PreTrainedModel:
    """The family's model, shared by all tests: pruning leaves it as it was."""
    return fresh(family)


def prompt(length: int, seed: int = 0) -> Tensor:
    """[1, S] token ids without special tokens."""
    return torch.randint(2, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


IDS = prompt(11)
ROWS = [prompt(11, 0), prompt(4, 1), prompt(7, 2), prompt(1, 3)]


def tokens(length: int, seed: int = 0) -> list[int]:
    """The same as a list."""
    return prompt(length, seed)[0].tolist()


def pad(rows: list[Tensor], side: str = "left") -> tuple[Tensor, Tensor]:
    """Prompts [1, S_i] as a batch: token ids and attention mask, [B, max S_i] each."""
    ids_BS = pad_sequence([row[0] for row in rows], batch_first=True, padding_side=side)
    return ids_BS, (ids_BS != 0).long()


REFRESHED = {"compensation": "ridge", "refresh": "compensation"}
VERIFIED = {"verification": "exact"}
# How experts are put to work.
WAYS: dict[str, dict[str, Any]] = {
    **{"compact": {}, "masked": {"mode": "masked"}, "offloaded": {"offload_dense": True}},
    **{"refreshed": REFRESHED, "verified": VERIFIED},
}
