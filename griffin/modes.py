"""The ways in which experts can be put to work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from griffin.compaction import Compaction
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock
from griffin.masking import Mask


class Work(Protocol):
    """Experts at work in some blocks, until `detach`."""

    def attach(self, experts: Sequence[Tensor], corrections: Iterable[Correction | None] | None = None) -> None: ...

    def pause(self) -> None: ...

    def resume(self, added: Sequence[Correction | None]) -> None: ...

    def detach(self) -> None: ...


MODES = ("compact", "masked")


def work(mode: str, blocks: Sequence[FeedForwardBlock], *, compiled: bool) -> Work:
    """What puts experts to work in these blocks in one of `MODES`, where the model's call is compiled or not."""
    return Compaction(blocks, compiled=compiled) if mode == "compact" else Mask(blocks)
