"""The table at the end of a call: what was measured, next to each other."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from pipelines.records import Record

# What a callback has to say when the call ends, behind the tables.
CLOSING: list[str] = []

# Of verified runs, and the last one of fidelity.
_DRAFTING = {
    "acceptance_rate": "acceptance",
    "tokens_per_check": "tokens/check",
    "effective_density": "effective density",
    "predicted_speedup": "predicted speed-up",
}


def summary_table(rows: Sequence[tuple[str, Record]]) -> str | None:
    """One line per run: the method, every metric that has a standard error with it, drafts, and time.

    Args:
        rows: (method in words, record) of each run; those of latency and flocking have a table of their own.
    """
    own = ("latency", "flocking")
    rows = [(method, record) for method, record in rows if record["config"]["task"]["kind"] not in own]
    if not rows:
        return None
    errors = dict.fromkeys(name for _, record in rows for name in record["metrics"] if name.endswith("_stderr"))
    measures = [name.removesuffix("_stderr") for name in errors if not name.startswith("perplexity_p")]
    measures = [name for name in measures if name not in _DRAFTING]
    drafting = {name: text for name, text in _DRAFTING.items() if any(name in record["metrics"] for _, record in rows)}
    headers = ["model", "task", "method", *(name.replace("_", " ") for name in measures)]
    headers += [*drafting.values(), "samples", "skipped", "s/sample", "tokens/s"]
    lines = []
    for method, record in rows:
        metrics = record["metrics"]
        samples, seconds, tokens = metrics["samples"], record["timing"]["seconds"], metrics.get("generated_tokens")
        lines.append(
            [
                record["config"]["model"]["name"],
                record["config"]["task"]["name"],
                method,
                *(_with_error(metrics, name) for name in measures),
                *(_with_error(metrics, name) for name in drafting),
                samples,
                metrics.get("skipped_prompts", 0),
                f"{seconds / samples:.2f}" if samples else "-",
                f"{tokens / seconds:.1f}" if seconds and tokens else "-",
            ]
        )
    return tabulate(lines, headers=headers, disable_numparse=True, tablefmt="simple")


def latency_table(rows: Sequence[tuple[str, Record]]) -> str | None:
    """Ratios first: one line per run and pair of lengths."""
    names = {
        "decode_speedup": "decode speed-up",
        "decode_limit": "limit",
        "decode_fraction_of_limit": "of limit",
        "prompt_overhead": "prompt overhead",
        "compaction_vs_memcpy": "compaction / memcpy",
        "breakeven_tokens": "break-even tokens",
        "total_speedup": "total speed-up",
        "dense_decode_ms": "dense ms/token",
        "onednn_speedup": "dense, over plain torch",
    }
    if any(name.startswith("pruned_decode_speedup") for _, record in rows for name in record["metrics"]):
        names |= {"pruned_decode_speedup": "decode speed-up unverified"}
        names |= {name: text for name, text in _DRAFTING.items() if name != "predicted_speedup"}  # which is the limit
    lines = []
    for method, record in rows:
        metrics, task = record["metrics"], record["config"]["task"]
        if task["kind"] == "latency":
            pairs = [(prompt, length) for prompt in task["prompt_lengths"] for length in task["generation_lengths"]]
            for prompt, length in pairs:
                suffix = f"_p{prompt}_g{length}" if len(pairs) > 1 else ""
                values = [f"{metrics[name + suffix]:.3g}" if name + suffix in metrics else "-" for name in names]
                lines.append([record["config"]["model"]["name"], method, f"{prompt} + {length}", *values])
    if not lines:
        return None
    return tabulate(lines, headers=["model", "method", "tokens", *names.values()], disable_numparse=True)


def flocking_table(rows: Sequence[tuple[str, Record]]) -> str | None:
    """Jaccard similarities of the top-k sets, averaged over layers: one line per run and kind of text."""
    names = {
        "jaccard_sequences": "sequences",
        "jaccard_halves": "own halves",
        "jaccard_other_halves": "others' halves",
        "jaccard_generation": "own generation",
        "jaccard_other_generation": "others' generation",
        "kept_energy": "energy in top k",
    }
    lines = []
    for _, record in rows:
        config, metrics = record["config"], record["metrics"]
        if config["task"]["kind"] == "flocking":
            for text in ("natural", "permuted", "random"):
                cells = [_with_error(metrics, f"{name}_{text}") for name in names]
                where = [config["model"]["name"], config["task"]["name"], f"{100 * config['task']['kept']:g}%", text]
                lines.append([*where, *cells, metrics["samples"]])
    if not lines:
        return None
    headers = ["model", "task", "top k", "text", *names.values(), "samples"]
    return tabulate(lines, headers=headers, disable_numparse=True, tablefmt="simple")


def _with_error(metrics: dict[str, float], name: str) -> str:
    """A metric with its standard error: two decimals where it is a score out of 100, a perplexity or a
    speed-up, else four."""
    if name not in metrics:
        return "-"
    digits = 1 if name == "answer_tokens" else 4
    digits = 2 if name.startswith(("rouge", "perplexity", "tokens", "predicted")) else digits
    known = metrics["samples"] > 1 and f"{name}_stderr" in metrics  # of one sample it is not
    error = f" ± {metrics[f'{name}_stderr']:.{digits}f}" if known else ""
    return f"{metrics[name]:.{digits}f}{error}"


def perplexity_table(rows: Sequence[tuple[str, Record]]) -> str | None:
    """Perplexity by prompt length (rows) and generation length (columns), where more than one was measured."""
    lines, generations = [], []
    for method, record in rows:
        task = record["config"]["task"]
        if task["kind"] == "perplexity" and len(task["prompt_lengths"]) * len(task["generation_lengths"]) > 1:
            generations = task["generation_lengths"]
            for prompt in task["prompt_lengths"]:
                cells = [_with_error(record["metrics"], f"perplexity_p{prompt}_g{length}") for length in generations]
                lines.append([record["config"]["model"]["name"], method, prompt, *cells])
    if not lines:
        return None
    headers = ["model", "method", "prompt tokens", *(f"{length} generated" for length in generations)]
    return tabulate(lines, headers=headers, disable_numparse=True, tablefmt="simple")
