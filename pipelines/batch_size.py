"""`batch_size=auto`: as many rows at once as the device's memory holds.

Results do not depend on it: every row has its own experts. So it begins with many, and whenever memory runs out what
is missing is run with half as many; batches hold rows of like length, the longest first, so that this happens early.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from pipelines.config import RunConfig
from pipelines.errors import out_of_memory
from pipelines.methods import Method
from pipelines.records import Sample

if TYPE_CHECKING:
    from pipelines.models import LoadedModel

# To begin with. A CPU has cores for few rows, and rarely tells in time that its memory is short.
ROWS_GPU = 64
ROWS_CPU = 8


def evaluated(
    kind: ModuleType,
    loaded: LoadedModel,
    items: Any,
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Generator[tuple[Method, list[Sample]], None, None]:
    """What `kind.evaluate` gives, with the configuration's batch size or, where it is auto, with what fits.

    Samples of an automatic batch size say what it was, at most. `done` grows by what was given.
    """
    if config.batch_size != "auto":
        yield from kind.evaluate(loaded, items, config, methods, done)
        return
    rows = ROWS_GPU if loaded.model.device.type == "cuda" else ROWS_CPU
    while True:
        try:
            for method, samples in kind.evaluate(loaded, items, replace(config, batch_size=rows), methods, done):
                yield method, [sample | {"batch_size": rows} for sample in samples]
                done[method] |= {sample["index"] for sample in samples}
            return
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not out_of_memory(error):
                raise
        rows //= 2
        tqdm.write(f"batch_size=auto: out of memory, goes on with {rows}", file=sys.stderr)
        torch.cuda.empty_cache()


def batch_size(samples: Sequence[Sample]) -> dict[str, int]:
    """The automatic batch size that a run came down to, for its record; empty where it was given."""
    sizes = [sample["batch_size"] for sample in samples if "batch_size" in sample]
    return {"batch_size": min(sizes)} if sizes else {}
