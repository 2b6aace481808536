"""What latency is measured beside: how fast bytes are copied, a device's time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

import griffin
from pipelines.models import LoadedModel


def memcpy_seconds(loaded: LoadedModel, kept: Sequence[int]) -> float:
    """Seconds to copy as many bytes as compaction writes, block by block: the floor of a full compaction."""
    blocks = griffin.find_feedforward_blocks(loaded.model)
    sizes = [left * neuron for left, neuron in zip(kept, griffin.neuron_bytes(blocks), strict=True)]
    device = loaded.model.device
    sources = [torch.ones(size // 4, device=device) for size in sizes]
    targets = [torch.zeros(size // 4, device=device) for size in sizes]

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    return _median_seconds(copy, device)


def _median_seconds(action: Callable[[], None], device: torch.device, times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        began = now(device)
        action()
        seconds.append(now(device) - began)
    return statistics.median(seconds)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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
