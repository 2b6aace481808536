"""What latency is measured beside: bytes that decoding reads, how fast they are copied, a device's time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

import griffin
from griffin.feedforward import weight_out_in
from pipelines.models import LoadedModel


def decode_bytes(loaded: LoadedModel, kept: Sequence[int]) -> dict[str, int]:
    """Bytes of weights that decoding one token reads, dense and pruned; the KV cache comes on top of both.

    Args:
        loaded: the model.
        kept: neurons of each layer that the pruned model has.

    An embedding table counts only where it is the output layer too: decoding looks up one row of it.
    """
    model: Any = loaded.model
    blocks = griffin.find_feedforward_blocks(model)
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings()
    weights = {id(weight): weight for weight in model.parameters()}
    if output is None or output.weight is not embedding:
        weights.pop(id(embedding))
    dense = sum(weight.numel() * weight.element_size() for weight in weights.values())
    dropped = sum(
        neuron * (block.width - left) for block, left, neuron in zip(blocks, kept, _neuron_bytes(blocks), strict=True)
    )
    return {"dense": dense, "pruned": dense - dropped}


def memcpy_seconds(loaded: LoadedModel, kept: Sequence[int]) -> float:
    """Seconds to copy as many bytes as compaction writes, block by block: the floor of a full compaction."""
    blocks = griffin.find_feedforward_blocks(loaded.model)
    sizes = [left * neuron for left, neuron in zip(kept, _neuron_bytes(blocks), strict=True)]
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


def _neuron_bytes(blocks: Sequence[griffin.FeedForwardBlock]) -> list[int]:
    """Per block, the bytes of one neuron's weights in all projections."""
    weights = [[weight_out_in(module) for module in (*block.inputs, block.output)] for block in blocks]
    return [
        sum(weight.numel() * weight.element_size() for weight in mine) // block.width
        for block, mine in zip(blocks, weights, strict=True)
    ]


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
