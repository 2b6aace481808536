"""`make bench-gpu`, `make bench-cpu`: how fast dense, GRIFFIN, the recipe and verified decoding are on this device.

Random weights in the shapes of Gemma 7B and Llama 2 13B: speed does not depend on what the weights say. Methods run in
turn, dense and pruned with the same kernels, and each time is a median. The table puts every speed-up beside the one
that bytes of weights allow, and beside the two ratios of the paper. Where calls are not compiled, a second table puts
the parts of a verified round beside what their matrix products take alone. torch and transformers are all that is
needed.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import griffin
from griffin import DENSE, MOST_DRAFTED, RECIPE, Engine, Method, as_method, compiled_call, traffic, with_onednn
from griffin.kv_cache import KVCache
from griffin.quantization import Int8Linear
from pipelines.timing import PARTS, WARM_UP, Timed, copy_bandwidth, forget_peak, now, peak_memory, timed

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def _shape(model_type: str, *sizes: int, context: int, **more: int) -> dict[str, Any]:
    """The config of a model with as many heads for keys and values as for queries."""
    heads = {"num_key_value_heads": sizes[-1], "max_position_embeddings": context}
    return {"model_type": model_type, **dict(zip(_SIZES, sizes, strict=True)), **heads, **more}


SHAPES = {
    "gemma_7b": _shape("gemma", 256000, 3072, 24576, 28, 16, context=8192, head_dim=256),
    "llama2_13b": _shape("llama", 32000, 5120, 13824, 40, 40, context=4096),
    "qwen2_5_coder_1_5b": _shape(
        *("qwen2", 151936, 1536, 8960, 28, 12), context=4096, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "tiny": _shape("llama", 1000, 64, 256, 2, 4, context=4096),
}
# Of prompt and generation together, GRIFFIN at 50% over dense, on an NVIDIA L40 (arXiv 2404.01365, abstract).
PAPER = {"gemma_7b": 1.29, "llama2_13b": 1.25}


@dataclass
class Case:
    """A method to be timed, and its times."""

    name: str  # in the table
    method: Method
    runs: list[Timed] = field(default_factory=list)  # one for each repeat
    warm_up: float = 0.0  # seconds until its graphs were compiled and captured
    peak: int = 0  # bytes on the device, at most
    products: tuple[float, float] = (0.0, 0.0)  # seconds of the matrix products of a draft step, and of a check

    def median(self, *parts: str) -> float:
        """Seconds of these parts together."""
        return statistics.median(sum(run.seconds[part] for part in parts) for run in self.runs)

    def round(self) -> tuple[dict[str, float], int]:
        """Of a verified method: seconds of a draft, its check and what it learns, and the tokens drafted before it."""
        done = [row.drafts for run in self.runs for row in run.rows]
        seconds = {part: statistics.median(one.seconds[part] / one.checks for one in done) for part in done[0].seconds}
        return seconds, round(statistics.median(one.drafted / one.checks for one in done))


def cases(draft_tokens: int, rows: int) -> list[Case]:
    """What is compared; verified decoding runs one row at a time."""
    found = [Case("dense", DENSE), Case("griffin 50%", Method()), Case("recipe 50%", RECIPE)]
    if rows == 1:
        options = {"verification": "exact", "draft_tokens": draft_tokens}
        full = as_method(RECIPE, sparsity=0.8, budget="uniform", draft_vocabulary="full", **options)
        found += [Case("verified 80%", full), Case("exact", as_method("exact", **options))]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command and print the table."""
    options = _parse(arguments)
    device = torch.device(options.device)
    compiled = device.type == "cuda" if options.compile == "auto" else options.compile == "true"
    bandwidth = copy_bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} x {platform.machine()}"
    print(f"{name}: copies read and write {bandwidth / 1e9:.0f} GB/s", flush=True)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {options.dtype}", flush=True)
    print(f"compiled: {str(compiled).lower()}; repeats: {options.repeats}\n", flush=True)
    lines: list[tuple[str, ...]] = [HEADER]
    splits: list[tuple[str, ...]] = [SPLIT]
    for shape in options.shapes:
        try:
            model = _model(shape, device, getattr(torch, options.dtype))
        except torch.OutOfMemoryError:
            print(f"{shape}: does not fit into memory, left out", flush=True)
            continue
        for size in product(options.rows, options.prompt, options.new):
            found = cases(options.draft_tokens, rows=size[0])
            try:
                engine = Engine(model, compiler=compiled_call) if compiled else Engine(with_onednn(model))
                _measure(engine, found, size, options.repeats)
            except torch.OutOfMemoryError:
                print("{}, {} rows, {} + {} tokens: out of memory, left out".format(shape, *size), flush=True)
                torch.cuda.empty_cache()
                continue
            lines += _lines(model, shape, found, size, options.acceptance, bandwidth)
            splits += [] if compiled else [(shape, *line) for line in _split(found, size[2])]
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for table in [lines, splits][: 1 + (len(splits) > 1)]:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for line in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        print()
    print(EXPLAINED.format(acceptance=options.acceptance, tokens=options.draft_tokens))


HEADER = (
    *("shape", "rows", "tokens", "method", "ms/token", "decode speed-up", "limit", "of limit", "of bandwidth"),
    *("prompt overhead", "total speed-up", "paper", "warm-up s", "peak GB"),
)
SPLIT = ("shape", "method", "part", "ms", "products ms", "over products", "over a dense step")
EXPLAINED = """\
ms/token: of decoding, a step of all rows. limit: bytes of weights per token, dense over pruned. of bandwidth: those
bytes per second, of what a copy reads and writes. prompt overhead: what recording, choosing and gathering add, of the
dense prefill. total: prompt and generation. paper: its total on an NVIDIA L40; other cards give other ratios.
Random weights accept no drafts, so verified decoding is what a round took, {tokens} drafts and a check, over the tokens
that it gives where {acceptance:.0%} of drafts are accepted. products: the linear layers alone, one after the other."""


def _measure(engine: Engine, found: list[Case], size: tuple[int, int, int], repeats: int) -> None:
    rows, prompt, new = size
    numbers = torch.Generator().manual_seed(0)
    vocabulary = engine.model.get_input_embeddings().num_embeddings
    # Two rounds of warming up: in the first one the buffers still grow, and captured graphs are for fixed addresses.
    rounds = tqdm(range(-2, repeats), f"{rows} x {prompt} + {new}", leave=False, disable=not sys.stderr.isatty())
    try:
        for repeat in rounds:
            prompts = torch.randint(0, vocabulary, (rows, prompt), generator=numbers).tolist()
            for case in found:
                forget_peak(engine.device)
                began = time.perf_counter()
                run = timed(engine, prompts, case.method, WARM_UP if repeat < 0 else new, room=new)
                if repeat == repeats - 1 and case.method.verified:
                    case.products = _products(engine, case)
                if repeat < 0:
                    case.warm_up += time.perf_counter() - began
                else:
                    case.runs.append(run)
                    case.peak = max(case.peak, peak_memory(engine.device))
    finally:
        engine.unload()
        if engine.compiled:
            torch.compiler.reset()  # graphs of other sizes keep their memory otherwise


def _products(engine: Engine, case: Case, times: int = 5) -> tuple[float, float]:
    """Seconds that the linear layers of a draft step take by themselves, and those of a check."""
    method, medians = case.method, []
    draft = engine.draft(method.quantization) if method.prunes_vocabulary else engine.compact(method.quantization)
    for view, tokens in ((draft, 1), (engine.dense, int(method.draft_tokens) + 1)):
        inputs: list[tuple[nn.Module, torch.Tensor]] = []
        keep = partial(_keep, inputs)
        layers = [layer for layer in view.module.modules() if isinstance(layer, nn.Linear | Conv1D | Int8Linear)]
        hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
        view(torch.zeros(1, tokens, dtype=torch.int64, device=engine.device), KVCache(1, tokens))
        for hook in hooks:
            hook.remove()
        taken = []
        for _ in range(times):
            began = now(engine.device)
            with torch.no_grad():
                for layer, x in inputs:
                    layer(x)
            taken.append(now(engine.device) - began)
        medians.append(statistics.median(taken))
    return medians[0], medians[1]


def _keep(inputs: list[Any], layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    inputs.append((layer, args[0]))


def _split(found: list[Case], new: int) -> list[tuple[str, ...]]:
    """The parts of verified rounds beside their products, and over a dense step."""
    step, lines = found[0].median("decode") / new, []
    for case in found:
        if case.method.verified:
            parts, drafted = case.round()
            rows = [(f"check of {drafted + 1} tokens", parts["check"], case.products[1])]
            rows += [("draft step", parts["draft"] / max(drafted, 1), case.products[0])]
            rows += [("learning", parts["learn"], 0.0)]
            for name, seconds, products in rows:
                beside = (f"{1e3 * products:.1f}", f"{seconds / products:.2f}") if products else ("", "")
                lines.append((case.name, name, f"{1e3 * seconds:.1f}", *beside, f"{seconds / step:.2f}"))
    return lines


def _lines(
    model: nn.Module, shape: str, found: list[Case], size: tuple[int, int, int], acceptance: float, bandwidth: float
) -> list[tuple[str, ...]]:
    rows, prompt, new = size
    dense, *_ = found
    widths = [block.width for block in griffin.find_feedforward_blocks(model)]
    prefill, step = dense.median("prefill"), dense.median("decode") / new
    lines: list[tuple[str, ...]] = []
    for case in found:
        bytes_read = traffic(model, case.method.kept(widths), quantization=case.method.quantization)
        read, seconds = float(bytes_read.pruned), case.median("decode") / new
        if case.method.verified:
            parts, drafted = case.round()
            taken = sum(parts.values())
            emitted = sum(acceptance**token for token in range(drafted + 1))
            seconds, read = taken / emitted, (drafted * read + bytes_read.dense) / emitted
        overhead = max(case.median(*PARTS[:3]) - prefill, 0.0)
        limit, total = bytes_read.dense / read, (prefill + new * step) / (prefill + overhead + new * seconds)
        ratios = [step / seconds, limit, step / seconds / limit, read / seconds / bandwidth, overhead / prefill, total]
        # Of the dense model, only the share of the bandwidth says something.
        told = ["" if case is dense and column != 3 else f"{ratio:.2f}" for column, ratio in enumerate(ratios)]
        paper = f"{PAPER[shape]:.2f}" if shape in PAPER and case.name.startswith("griffin") else ""
        told += [paper, f"{case.warm_up:.0f}", f"{case.peak / 1e9:.1f}"]
        lines.append((shape, str(rows), f"{prompt} + {new}", case.name, f"{1e3 * seconds:.2f}", *told))
    return lines


def _model(shape: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    config = AutoConfig.for_model(**SHAPES[shape])
    torch.manual_seed(0)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=[*PAPER], help="default: %(default)s")
    add("--rows", nargs="+", type=_positive, default=[1, 8], help="batch sizes; default: %(default)s")
    add("--prompt", nargs="+", type=_positive, default=[2048], help="prompt tokens; default: %(default)s")
    add("--new", nargs="+", type=_positive, default=[128, 2048], help="generated tokens; default: %(default)s")
    add("--repeats", type=_positive, default=3, help="of which medians are taken; default: %(default)s")
    add("--acceptance", type=float, default=0.8, help="share of drafts accepted; default: %(default)s")
    add("--draft-tokens", type=_positive, default=4, help="before each check, at most 32; default: %(default)s")
    add("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="default: %(default)s")
    add("--device", default="cuda" if cuda else "cpu", help="default: cuda if there is a GPU, else cpu")
    add("--compile", choices=["auto", "true", "false"], default="auto", help="auto: on CUDA; default: %(default)s")
    options = parser.parse_args(arguments)
    if not 0.0 <= options.acceptance <= 1.0:
        parser.error(f"argument --acceptance: {options.acceptance}: expected 0 to 1")
    if options.draft_tokens > MOST_DRAFTED:
        parser.error(f"argument --draft-tokens: {options.draft_tokens}: expected 1 to {MOST_DRAFTED}")
    if options.device.startswith("cuda") and not cuda:
        parser.error(f"argument --device: {options.device}: no GPU on this machine")
    longest = max(options.prompt) + max(options.new)
    for shape in options.shapes:
        if longest > SHAPES[shape]["max_position_embeddings"]:
            parser.error(f"argument --new: {longest} tokens with the prompt are more than the context of {shape}")
    return options


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1 on")
    return int(text)


if __name__ == "__main__":
    main()
