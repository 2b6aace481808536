"""Latency: dense and pruned generation in one process, in turn, and how near decoding comes to its limit.

Ratios of times taken in turn are the metrics (`pipelines.timing` says why).

A verified method is timed beside the same method without verification. Its limit is what its drafts and checks read.

Prompt lengths P and generation lengths G are in tokens, times in seconds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import griffin
from griffin import DENSE, Method
from griffin.offloading import dense_in_host_memory
from pipelines.config import RunConfig
from pipelines.data import read_text_file
from pipelines.errors import UserError
from pipelines.methods import engine_for
from pipelines.records import Sample
from pipelines.tasks.answers import drafting_metrics, drafting_part, learning_overhead
from pipelines.tasks.prompts import Batches, Evaluation, need_context
from pipelines.timing import WARM_UP, copy_seconds, forget_peak, now, peak_memory, timed

# Tokens of the checks that are timed.
WIDTHS = (1, 2, 4, 8, 16, 1 + griffin.MOST_DRAFTED)


@dataclass(frozen=True)
class Repeat:
    """One timed turn, dense and pruned, of one pair of lengths."""

    index: int
    prompt_length: int
    generation_length: int
    text: str | None


def read(config: RunConfig) -> list[Repeat]:
    """The repeats of every pair of lengths."""
    task = config.task
    text = None if task.data_files is None else read_text_file(task.data_files)
    turns = itertools.product(task.prompt_lengths, task.generation_lengths, range(task.repeats))
    return [Repeat(index, prompt, generation, text) for index, (prompt, generation, _) in enumerate(turns)]


def evaluate(run: Evaluation, repeats: Sequence[Repeat]) -> Batches:
    """Time every repeat: dense, then an untimed pruned prompt that fills the buffers, then the same prompt pruned; in
    between, for a verified method, the same without verification.

    The very first calls of a process are slow; with three repeats or more they move no median.
    """
    for repeat in repeats:
        need_context(run, prompt_lengths=repeat.prompt_length, generation_lengths=repeat.generation_length)
    config, model, device = run.config, run.loaded.model, run.loaded.model.device
    fast = griffin.with_onednn(model) if config.cpu_onednn and config.compile is not True else model
    dense_settings = replace(config, offload_dense=False)
    plain_engine = engine_for(model, [DENSE], dense_settings)
    for method in run.methods:
        engine = engine_for(fast, [method], dense_settings)
        kept = method.kept([block.width for block in griffin.find_feedforward_blocks(model)])
        traffic = griffin.traffic(model, kept, quantization=method.quantization)
        for repeat in repeats:
            if not run.lacks(method, repeat):
                continue
            turn = partial(_turn, run, repeat)
            plain = turn(plain_engine, DENSE)[0] if fast is not model else None
            if engine.compiled:
                turn(engine, DENSE, WARM_UP)  # compiles
                turn(engine, method, WARM_UP)
            else:
                engine.unload()  # what the repeat before has left
            forget_peak(device)
            dense, _ = turn(engine, DENSE)
            dense_peak = peak_memory(device)
            checks = _check_seconds(engine, repeat.prompt_length) if method.verified else None
            unchecked = replace(method, verification="none")
            unverified = turn(engine, unchecked, another=True)[0] if method.verified else None
            with dense_in_host_memory(fast) if config.offload_dense else nullcontext():
                pruning = engine
                if config.offload_dense:
                    engine.unload()
                    pruning = engine_for(fast, [method], config)
                forget_peak(device)
                pruned, drafts = turn(pruning, method, another=True)
                peak = peak_memory(device)
            optional = {"plain": plain, "unverified": unverified, "checks": checks}
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
                **(drafting_part(drafts, traffic.dense) if drafts else {}),
                **{name: seconds for name, seconds in optional.items() if seconds is not None},
            }
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
    prefill, choose, compaction = median("dense", "prefill"), median("pruned", "choose"), median("pruned", "compact")
    gather = max(median("pruned", "prefill") - prefill, 0.0)
    overhead = gather + choose + compaction
    memcpy = statistics.median(sample["memcpy"] for sample in samples)
    drafts = {name: value for name, value in drafting_metrics(samples).items() if not name.endswith("_stderr")}
    limit = drafts.get("predicted_speedup", first["bytes"]["dense"] / first["bytes"]["pruned"])
    values = {
        "decode_speedup": dense / pruned,
        "decode_limit": limit,
        "decode_fraction_of_limit": dense / pruned / limit,
        "prompt_overhead": overhead / prefill,
        "compaction_vs_memcpy": compaction / memcpy if memcpy else 0.0,
        "total_speedup": (prefill + generation * dense) / (prefill + overhead + generation * pruned),
        "dense_prefill_ms": 1e3 * prefill,
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
        values |= drafts | learning_overhead(samples)
        for part in ("draft", "check", "learn"):
            each = [sample["drafting"]["seconds"][part] / sample["drafting"]["emitted"] for sample in samples]
            values[f"{part}_ms"] = 1e3 * statistics.median(each)
    if "checks" in first:
        step = median("checks", "1")
        values |= {f"check_cost_{width}": median("checks", str(width)) / step for width in WIDTHS}
    if dense > pruned:  # else no number of tokens pays for the preparation
        values["breakeven_tokens"] = overhead / (dense - pruned)
    return values


def _check_seconds(engine: griffin.Engine, length: int, times: int = 3) -> dict[str, float]:
    """Median seconds of a dense step over so many tokens, behind a prompt of a length."""
    cache, medians = engine.decoding_cache(1, length + WIDTHS[-1], static=engine.compiled), {}
    for width in WIDTHS:
        ids_1T = torch.zeros(1, width, dtype=torch.int64, device=engine.device)
        positions_1T = torch.arange(length, length + width, device=engine.device).unsqueeze(0)
        seconds = []
        for _ in range(times + 1):  # the first one may compile
            cache.set_window(1, 0, length)
            began = now(engine.device)
            engine.dense(ids_1T, cache, positions_BS=positions_1T)
            seconds.append(now(engine.device) - began)
        medians[str(width)] = statistics.median(seconds[1:])
    return medians


def _turn(
    run: Evaluation, repeat: Repeat, engine: griffin.Engine, method: Method, steps: int = 0, another: bool = False
) -> tuple[dict[str, float], list[griffin.DraftStatistics]]:
    """Time one turn of a repeat, see `pipelines.timing`: seconds by part, and of each row what became of its drafts.

    It decodes `steps` tokens, else as many as the repeat says. With `another` a different prompt runs first, so that
    buffers exist and this one finds the experts of another text.
    """
    room = repeat.generation_length
    for shift, tokens in ((1, 2), (0, steps or room))[not another :]:
        prompts = _prompt(run, repeat, shift).tolist()
        took = timed(engine, prompts, method, tokens, room=room, seed=run.config.seed)
    return took.seconds, [row.drafts for row in took.rows]


def _prompt(run: Evaluation, repeat: Repeat, shift: int) -> Tensor:
    """[B, P] tokens: consecutive stretches of the text, or random ones, another for every repeat."""
    loaded, config, length, rows = run.loaded, run.config, repeat.prompt_length, run.config.batch_size
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
