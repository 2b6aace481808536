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
    """Experts at work in the blocks that it was made for, until `detach`."""

    def __init__(self, blocks: Sequence[FeedForwardBlock]) -> None: ...

    def attach(self, experts: Sequence[Tensor], corrections: Iterable[Correction | None] | None = None) -> None: ...

    def pause(self) -> None: ...

    def resume(self, added: Sequence[Correction | None]) -> None: ...

    def detach(self) -> None: ...


MODES: dict[str, type[Work]] = {"compact": Compaction, "masked": Mask}
