"""Latency: dense and pruned generation in one process, in turn, and how near decoding comes to its limit.

Ratios of times taken in turn are the metrics (`pipelines.timing` says why).

A verified method is timed beside the same method without verification. Its limit is what its drafts and checks read.

Prompt lengths P and generation lengths G are in tokens, times in seconds.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import griffin
from griffin import DENSE, Method
from griffin.offloading import dense_in_host_memory
from pipelines.config import RunConfig
from pipelines.data import read_text_file
from pipelines.errors import UserError
from pipelines.methods import engine_for
from pipelines.models import LoadedModel
from pipelines.records import Sample
from pipelines.tasks import drafting
from pipelines.timing import WARM_UP, copy_seconds, forget_peak, peak_memory, timed

Seconds = dict[str, float]


@dataclass(frozen=True)
class Repeat:
    """One timed turn, dense and pruned, of one pair of lengths."""

    index: int
    prompt_length: int
    generation_length: int
    text: str | None


def read(config: RunConfig) -> list[Repeat]:
    """The repeats of every pair of lengths.

    Raises:
        UserError: the text is missing.
    """
    task = config.task
    text = None if task.data_files is None else read_text_file(task.data_files)
    pairs = [(prompt, generation) for prompt in task.prompt_lengths for generation in task.generation_lengths]
    return [
        Repeat(index, prompt, generation, text)
        for index, (prompt, generation) in enumerate(pair for pair in pairs for _ in range(task.repeats))
    ]


def evaluate(
    loaded: LoadedModel,
    repeats: Sequence[Repeat],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Time every repeat: dense, then an untimed pruned prompt that fills the buffers, then the same prompt pruned; in
    between, for a verified method, the same without verification.

    The very first calls of a process are slow; with three repeats or more they move no median.

    Raises:
        UserError: the text or the context is too short.
    """
    for repeat in repeats:
        if repeat.prompt_length + repeat.generation_length > loaded.context_length:
            raise UserError(
                f"task.prompt_lengths={repeat.prompt_length} with task.generation_lengths={repeat.generation_length}: "
                f"expected at most {loaded.context_length} tokens together, the context of {config.model.name}"
            )
    model, device = loaded.model, loaded.model.device
    fast = griffin.with_onednn(model) if config.cpu_onednn and config.compile is not True else model
    dense_settings = replace(config, offload_dense=False)
    plain_engine = engine_for(model, [DENSE], dense_settings)
    for method in methods:
        engine = engine_for(fast, [method], dense_settings)
        kept = method.kept([block.width for block in griffin.find_feedforward_blocks(model)])
        traffic = griffin.traffic(model, kept, quantization=method.quantization)
        for repeat in repeats:
            if repeat.index in done[method]:
                continue
            timing = _Timing(loaded, repeat, config)
            plain = timing.run(plain_engine, DENSE)[0] if fast is not model else None
            if engine.compiled:
                timing.run(engine, DENSE, WARM_UP)  # compiles
                timing.run(engine, method, WARM_UP)
            else:
                engine.unload()  # what the repeat before has left
            forget_peak(device)
            dense, _ = timing.run(engine, DENSE)
            dense_peak = peak_memory(device)
            unverified = timing.pruned(engine, replace(method, verification="none")) if method.verified else None
            with dense_in_host_memory(fast) if config.offload_dense else nullcontext():
                pruning = engine
                if config.offload_dense:
                    engine.unload()
                    pruning = engine_for(fast, [method], config)
                forget_peak(device)
                pruned, drafts = timing.pruned(pruning, method)
                peak = peak_memory(device)
            sample: Sample = {
                "index": repeat.index,
                "id": f"p{repeat.prompt_length}_g{repeat.generation_length}",
                "prompt_length": repeat.prompt_length,
                "generation_length": repeat.generation_length,
                "dense": dense,
                "pruned": pruned,
                "memcpy": copy_seconds(model, kept, device),
                "bytes": {"dense": traffic.dense, "pruned": traffic.pruned},
                "dense_peak_memory_bytes": dense_peak,
                "peak_memory_bytes": peak,
                "seconds": sum(dense.values()) + sum(pruned.values()),
                **(drafting.sample_part(drafts, traffic.dense) if drafts else {}),
            }
            sample |= {} if plain is None else {"plain": plain}
            sample |= {} if unverified is None else {"unverified": unverified[0]}
            yield method, [sample]


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """Ratios of medians over the repeats; with several pairs of lengths, under a suffix `_pP_gG`."""
    pairs = list(dict.fromkeys(sample["id"] for sample in samples))
    values: dict[str, float] = {"samples": len(samples)}
    for pair in pairs:
        mine = [sample for sample in samples if sample["id"] == pair]
        suffix = f"_{pair}" if len(pairs) > 1 else ""
        values |= {name + suffix: value for name, value in _ratios(mine).items()}
    return values


def _ratios(samples: Sequence[Sample]) -> dict[str, float]:
    def median(kind: str, part: str) -> float:
        return statistics.median(sample[kind][part] for sample in samples)

    first = samples[0]
    generation = first["generation_length"]
    dense, pruned = median("dense", "decode") / generation, median("pruned", "decode") / generation
    # Gathering the statistic happens within the prefill; selecting and compacting after it.
    gather = max(median("pruned", "prefill") - median("dense", "prefill"), 0.0)
    choose, compaction = median("pruned", "choose"), median("pruned", "compact")
    overhead = gather + choose + compaction
    memcpy = statistics.median(sample["memcpy"] for sample in samples)
    drafts = {name: value for name, value in drafting.metrics(samples).items() if not name.endswith("_stderr")}
    limit = drafts.get("predicted_speedup", first["bytes"]["dense"] / first["bytes"]["pruned"])
    values = {
        "decode_speedup": dense / pruned,
        "decode_limit": limit,
        "decode_fraction_of_limit": dense / pruned / limit,
        "prompt_overhead": overhead / median("dense", "prefill"),
        "compaction_vs_memcpy": compaction / memcpy if memcpy else 0.0,
        "total_speedup": (median("dense", "prefill") + generation * dense)
        / (median("dense", "prefill") + overhead + generation * pruned),
        "dense_prefill_ms": 1e3 * median("dense", "prefill"),
        "dense_decode_ms": 1e3 * dense,
        "pruned_decode_ms": 1e3 * pruned,
        "gather_ms": 1e3 * gather,
        "choose_ms": 1e3 * choose,
        "compaction_ms": 1e3 * compaction,
        "memcpy_ms": 1e3 * memcpy,
        "dense_peak_memory_bytes": max(sample["dense_peak_memory_bytes"] for sample in samples),
        "peak_memory_bytes": max(sample["peak_memory_bytes"] for sample in samples),
    }
    if "plain" in first:
        values["onednn_speedup"] = median("plain", "decode") / median("dense", "decode")
    if "unverified" in first:
        values["pruned_decode_speedup"] = dense * generation / median("unverified", "decode")
    if drafts:
        values |= drafts | drafting.timing(samples)
        for part, name in (("draft", "draft"), ("check", "check"), ("learn", "learn")):
            each = [one["seconds"][part] / one["emitted"] for one in (sample["drafting"] for sample in samples)]
            values[f"{name}_ms"] = 1e3 * statistics.median(each)
    if dense > pruned:  # else no number of tokens pays for the preparation
        values["breakeven_tokens"] = overhead / (dense - pruned)
    return values


@dataclass(frozen=True)
class _Timing:
    """Times one repeat, see `pipelines.timing`."""

    loaded: LoadedModel
    repeat: Repeat
    config: RunConfig

    def run(
        self, engine: griffin.Engine, method: Method, tokens: int | None = None, shift: int = 0
    ) -> tuple[Seconds, list[griffin.DraftStatistics]]:
        """Seconds by part, and of each row what became of its drafts.

        Args:
            engine: the model.
            method: how the prompts are continued.
            tokens: how many tokens are decoded; None: as many as the repeat says.
            shift: another prompt.
        """
        prompts = _prompt(self.loaded, self.repeat, self.config, shift).tolist()
        room = self.repeat.generation_length
        run = timed(engine, prompts, method, tokens or room, room=room, seed=self.config.seed)
        return run.seconds, [row.drafts for row in run.rows]

    def pruned(self, engine: griffin.Engine, method: Method) -> tuple[Seconds, list[griffin.DraftStatistics]]:
        """The same of a pruned method: another prompt first, so that buffers exist and the timed one finds the experts
        of another text."""
        self.run(engine, method, 2, shift=1)
        return self.run(engine, method)


def _prompt(loaded: LoadedModel, repeat: Repeat, config: RunConfig, shift: int = 0) -> Tensor:
    """[B, P] tokens: consecutive stretches of the text, or random ones, another for every repeat."""
    length, rows = repeat.prompt_length, config.batch_size
    start = (2 * repeat.index + shift) * rows * length
    if repeat.text is None:
        numbers = torch.Generator().manual_seed(config.seed + start)
        ids = torch.randint(0, loaded.model.config.get_text_config().vocab_size, (rows * length,), generator=numbers)
    else:
        ids = torch.tensor(loaded.tokenizer(repeat.text, add_special_tokens=False)["input_ids"])
        if len(ids) < 2 * rows * length:
            raise UserError(
                f"task.data_files={config.task.data_files}: the text has {len(ids)} tokens, expected at least "
                f"{2 * rows * length} for task.prompt_lengths={length}"
            )
        start %= len(ids) - rows * length + 1
        ids = ids[start : start + rows * length]
    return ids.reshape(rows, length).to(loaded.model.device)
