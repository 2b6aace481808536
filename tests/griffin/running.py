"""How the tests run a model and compare what it gives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

TOKENS = 6


def generate(model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor | None = None, **options: Any) -> Any:
    """`model.generate`, greedy unless told otherwise, with its logits."""
    defaults = {
        "attention_mask": torch.ones_like(ids_BS) if mask_BS is None else mask_BS,
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(ids_BS, **(defaults | options))


def new_tokens(output: Any, ids_BS: Tensor) -> list[list[int]]:
    """What was generated after the prompt, per row."""
    return output.sequences[:, ids_BS.shape[1] :].tolist()


def step_logits(output: Any, row: int = 0) -> Tensor:
    """[tokens, V]: the logits that each token of a row was chosen from."""
    return torch.stack([step[row] for step in output.logits])


def as_lists(experts: list[Tensor], row: int = 0) -> list[list[int]]:
    """Each layer's experts of one row."""
    return [experts_BK[row].tolist() for experts_BK in experts]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value: logits near zero carry no information of their own."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())
