"""How the tests run a model on prompts, and how they compare what it gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from families import prompt
from torch import Tensor
from transformers import PreTrainedModel

import griffin

TOKENS = 6
TOLERANCE = 1e-5

# What a model has of its own while it is pruned.
ROUTED = ("forward", "generate", "__reduce_ex__")


def generate(model: Any, ids_BS: Tensor, mask_BS: Tensor | None = None, **options: Any) -> Any:
    """`model.generate`, greedy unless told otherwise, with its logits."""
    defaults = {
        "attention_mask": torch.ones_like(ids_BS) if mask_BS is None else mask_BS,
        "max_new_tokens": TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    return model.generate(ids_BS, **(defaults | options))


def text(model: Any, ids_BS: Tensor, mask_BS: Tensor | None = None, **options: Any) -> Tensor:
    """The same without logits: the sequences alone."""
    options = {"return_dict_in_generate": False, "output_logits": False} | options
    sequences_BS: Tensor = generate(model, ids_BS, mask_BS, **options)
    return sequences_BS


def new_tokens(output: Any, ids_BS: Tensor) -> list[list[int]]:
    """What was generated after the prompt, per row."""
    return output.sequences[:, ids_BS.shape[1] :].tolist()


def step_logits(output: Any, row: int = 0) -> Tensor:
    """[tokens, V]: the logits that each token of a row was chosen from."""
    return torch.stack([step[row] for step in output.logits])


def as_lists(experts: Iterable[Tensor], row: int | None = 0) -> list[list[int]]:
    """Each layer's experts of one row of [B, K]; None: of [K]."""
    return [(one if row is None else one[row]).tolist() for one in experts]


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value: logits near zero carry no information of their own."""
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def same(found: Iterable[Tensor], expected: Iterable[Tensor]) -> bool:
    """Whether all tensors are equal to the bit."""
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@contextmanager
def failing(model: PreTrainedModel, call: int) -> Iterator[None]:
    """The middle layer's output projection runs out of memory in its n-th call, in every view that is made here."""
    calls = count(1)

    def fail(*_: Any) -> None:
        if next(calls) == call:
            raise torch.OutOfMemoryError

    handle = griffin.find_feedforward_blocks(model)[1].output.register_forward_hook(fail)
    yield
    handle.remove()


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """The body leaves the model as it found it: the same objects, the same bits, the same logits."""

    def state() -> list[Any]:
        return [
            [(name, id(one), one.data_ptr(), one.requires_grad) for name, one in model.named_parameters()],
            [(name, id(one)) for name, one in model.named_buffers()],
            list(model.state_dict()),
            {name: list(vars(module)) for name, module in model.named_modules()},
            [(list(one._forward_hooks), list(one._forward_pre_hooks)) for one in model.modules()],
            [(getattr(one, "nf", 0), getattr(one, "out_features", 0)) for one in model.modules()],
            (getattr(model, "generate", None), model.forward, id(model.config), model.config.to_dict()),
        ]

    before, bits = state(), [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        dense = model(prompt(9, 8)).logits
        yield
        assert torch.equal(model(prompt(9, 8)).logits, dense)
    for found, expected in zip(state(), before, strict=True):
        assert found == expected
    assert same(model.parameters(), bits)
