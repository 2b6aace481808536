"""Refresh: what was chosen from the prompt follows the text that is being generated.

A prompt tells which neurons matter for the prompt; what is generated moves away from it. So a few steps of the
generation, after 8, 16, 32, .. tokens, run dense and read again what has been generated since the last of them: the
KV cache then holds the dense model's entries of it, and its activations join the prompt's. Such a step costs little
more than a dense one where decoding is bound by memory, and there are few: four in the first 128 tokens, eight in
2,048.

Not in the paper, whose experts are the prompt's until the end.

Dimensions: B = batch rows, S = positions of a forward call, N = positions that are read again, the call's own included.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

# name: what is refreshed.
REFRESHES = {
    "none": "nothing, as in the paper",
    "experts": "the experts, and the compensation that goes with them",
    "compensation": "the compensation, which goes on learning with the experts that it has",
}

# A token that was generated counts as so many of the prompt: it says more of what comes next (docs/selection.md).
WEIGHT = 4.0

_FIRST, _FACTOR = 8, 2


def next_reading(generated: int) -> int:
    """After how many tokens the next reading comes when so many have been generated: 8, 16, 32, .."""
    after = _FIRST
    while after <= generated:
        after *= _FACTOR
    return after


def call_ends(tokens: int) -> list[int]:
    """Where the forward calls end, from 0 on, that read a given text of so many tokens as if it were generated.

    A reading comes with one token of its own; the tokens between two readings need one call only.
    """
    ends, reading_at = [0], next_reading(0)
    while reading_at < tokens:
        ends += [reading_at, reading_at + 1]
        reading_at = next_reading(reading_at)
    return sorted({*ends, tokens})


class Reader(Protocol):
    """What follows the text."""

    def read(self, ids_BN: Tensor, counted_BN: Tensor | None) -> None:
        """The coming forward call must run dense, and reads these tokens; where not all count, those that do."""

    def renew(self) -> None:
        """They have been read, and the next call is about to come."""

    def stop(self) -> None:
        """The generation is over; nothing is read any more."""


class Rereading:
    """Turns some forward calls of a generation into readings of what has been generated.

    Its hooks stand on the model while attached, and do nothing unless `begin` has been called. Forward calls give the
    same outputs as without it would, for the call's own positions.

    Args:
        model: the model that generates.
        reader: what is told of the readings.
    """

    def __init__(self, model: nn.Module, reader: Reader) -> None:
        self._model = model
        self._reader = reader
        self._signature = inspect.signature(model.forward)
        self._handles: list[Any] = []
        self.active = False

    def attach(self) -> None:
        """Put the hooks on, behind those that the model has."""
        uncompiled: Any = torch.compiler.disable
        self._handles = [
            self._model.register_forward_pre_hook(uncompiled(self._before_forward), with_kwargs=True),
            self._model.register_forward_hook(uncompiled(self._after_forward)),
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        self.end()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def begin(self) -> None:
        """The coming calls generate."""
        self.active = True
        self._generated = 0
        self._unread: list[Tensor] = []
        self._own: int | None = None  # positions of the call that is a reading
        self._renewing = False

    def end(self) -> None:
        """The coming calls do not."""
        self.active = False

    def _before_forward(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self.active:
            return None
        if self._renewing:
            self._reader.renew()
            self._renewing = False
        call = self._signature.bind_partial(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        ids_BS, cache = call.get("input_ids"), call.get("past_key_values")
        if ids_BS is None:
            raise ValueError("refresh needs input_ids: what was generated is read again")
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"refresh needs a DynamicCache, which can be set back: got {type(cache).__name__}")
        due = self._generated >= next_reading(self._generated - sum(ids.shape[1] for ids in self._unread))
        self._unread.append(ids_BS)
        self._generated += ids_BS.shape[1]
        if not due:
            cache.activate_past_recording()  # layers with a sliding window drop what they may have to go back to
            return None
        ids_BN = torch.cat(self._unread, dim=1)
        self._own, self._unread = ids_BS.shape[1], []
        again = ids_BN.shape[1] - self._own
        cache.crop(-again)
        call["input_ids"] = ids_BN
        if call.get("position_ids") is not None:
            steps_N = torch.arange(-again, self._own, device=ids_BN.device)
            call["position_ids"] = call["position_ids"][:, :1] + steps_N
        keep = call.get("logits_to_keep", 0)
        if "logits_to_keep" in self._signature.parameters and isinstance(keep, int) and keep == 0:
            call["logits_to_keep"] = self._own  # nobody asked for those of the tokens that are read again
        mask = call.get("attention_mask")
        self._reader.read(ids_BN, None if mask is None else mask[:, -ids_BN.shape[1] :].bool())
        self._renewing = True
        return (), call

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.active or self._own is None:
            return None
        own, self._own = self._own, None
        if isinstance(output, tuple):
            return (output[0][:, -own:], *output[1:])
        for name in ("logits", "last_hidden_state"):
            if output.get(name) is not None:
                output[name] = output[name][:, -own:]
        return output


@contextlib.contextmanager
def reading(model: nn.Module, reader: Reader) -> Iterator[None]:
    """Forward calls in this context generate, and the reader reads."""
    rereading = Rereading(model, reader)
    rereading.attach()
    rereading.begin()
    try:
        yield
    finally:
        rereading.detach()
        reader.stop()
