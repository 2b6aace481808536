"""The ways in which experts can be put to work: `attach(experts, corrections)` until `detach()`."""

from __future__ import annotations

from griffin.compaction import Compaction
from griffin.masking import Mask

MODES: dict[str, type[Compaction] | type[Mask]] = {"compact": Compaction, "masked": Mask}
