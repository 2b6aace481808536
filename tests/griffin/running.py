"""Random prompts, how the tests run a model on them, and how they compare what it gives."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from families import VOCABULARY
from torch import Tensor, nn
from transformers import PreTrainedModel

import griffin

TOKENS = 6
TOLERANCE = 1e-5

# What a model has of its own while it is pruned.
ROUTED = ("forward", "generate", "__reduce_ex__")


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
    longest = max(row.shape[1] for row in rows)
    ids_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    mask_BS = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(longest - row.shape[1], longest) if side == "left" else slice(0, row.shape[1])
        ids_BS[index, where], mask_BS[index, where] = row[0], 1
    return ids_BS, mask_BS


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


def hooks(model: nn.Module) -> int:
    """How many a model has."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class OutOfMemoryError(RuntimeError):
    """What a device raises that has run out of memory."""


@contextmanager
def failing(model: PreTrainedModel, call: int) -> Iterator[None]:
    """The middle layer's output projection runs out of memory in its n-th call, in every view that is made here."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == call:
            raise OutOfMemoryError

    handle = griffin.find_feedforward_blocks(model)[1].output.register_forward_hook(fail)
    yield
    handle.remove()


@contextmanager
def unchanged(model: PreTrainedModel, ids: Tensor | None = None) -> Iterator[None]:
    """The body leaves the model as it found it: the same objects, the same bits, the same logits."""
    ids = prompt(9, 8) if ids is None else ids

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
        dense = model(ids).logits
        yield
        assert torch.equal(model(ids).logits, dense)
    for found, expected in zip(state(), before, strict=True):
        assert found == expected
    assert same(model.parameters(), bits)
