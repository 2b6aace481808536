"""Timing: what a prompt and its continuation take, in parts, with the functions that generate all texts.

Times depend on the machine, and ratios of times that were taken in turn far less. Decoding one token reads every active
weight once and does little else, so bytes read, dense over pruned, are the speed-up that cannot be passed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

import griffin
from griffin import Engine, Method, Row

PARTS = ("prefill", "choose", "compact", "decode")

# Steps that compile a graph, warm it up and capture it. They never count as decoding.
WARM_UP = 4


@dataclass(frozen=True)
class Timed:
    """What one run took.

    Attributes:
        seconds: of the prefill with what is recorded, of choosing experts, of gathering their weights, of decoding.
        rows: what was decoded.
    """

    seconds: dict[str, float]
    rows: list[Row]


def timed(
    engine: Engine, prompts: Sequence[Sequence[int]], method: Method, steps: int, *, room: int, seed: int = 0
) -> Timed:
    """Run prompts of one length and decode greedily, whatever the text says.

    Args:
        engine: the model.
        prompts: token ids; several share one set of experts.
        method: how they are pruned.
        steps: decode steps; the prefill's token comes before them.
        room: steps that the KV cache has room for, so that shorter runs use the same cache.
        seed: of random selections.
    """
    device = engine.dense.module.device  # this view is made once, and not timed
    times = [now(device)]
    states = griffin.prefill(engine, prompts, griffin.wanted([method]), likely_tokens=method.prunes_vocabulary)
    times.append(now(device))
    rows = griffin.begin(engine, states, method, seed, range(len(states)))
    times.append(now(device))
    engine.view([row.experts for row in rows])
    times.append(now(device))
    list(griffin.decode(engine, rows, griffin.Generation(steps + 1), batch_size=len(rows), max_new_tokens=room + 1))
    times.append(now(device))
    return Timed(dict(zip(PARTS, [last - first for first, last in pairwise(times)], strict=True)), rows)


# -- what time is measured beside -------------------------------------------------------------------------------------


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def copy_seconds(model: nn.Module, kept: Sequence[int], device: torch.device) -> float:
    """Seconds to copy as many bytes as gathering the weights of so many neurons of each layer writes, block by block:
    the floor of a full compaction."""
    blocks = griffin.find_feedforward_blocks(model)
    sizes = [left * neuron for left, neuron in zip(kept, griffin.neuron_bytes(blocks), strict=True)]
    sources = [torch.ones(size // 4, device=device) for size in sizes]
    targets = [torch.zeros(size // 4, device=device) for size in sizes]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    return _median_seconds(copy, device)


def copy_bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes per second that a copy reads and writes together, of more bytes than caches hold."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    return 2 * size / _median_seconds(lambda: target.copy_(source), device, times=7)


def _median_seconds(action: Callable[[], object], device: torch.device, times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        began = now(device)
        action()
        seconds.append(now(device) - began)
    return statistics.median(seconds)


def forget_peak(device: torch.device) -> None:
    """On a GPU, count the most memory from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """On a GPU, the most its tensors have taken since `forget_peak`; elsewhere the most this process ever has."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource  # not on Windows

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
