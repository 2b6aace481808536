"""The tables at the end of a call: what was measured, next to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.text import Text
from tabulate import tabulate

from pipelines.records import Record

# What a callback has to say when the call ends, before the tables and behind them.
OPENING: list[str | Text] = []
CLOSING: list[str] = []

# Of verified runs, and the last one of fidelity.
_DRAFTING = {
    "acceptance_rate": "acceptance",
    "tokens_per_check": "tokens/check",
    "effective_density": "effective density",
    "predicted_speedup": "predicted speed-up",
    "predicted_speedup_charged": "with checks charged",
}
_LATENCY = {
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
_FLOCKING = {
    "jaccard_sequences": "sequences",
    "jaccard_halves": "own halves",
    "jaccard_other_halves": "others' halves",
    "jaccard_generation": "own generation",
    "jaccard_other_generation": "others' generation",
    "kept_energy": "energy in top k",
}

Row = tuple[str, Record]  # the method in words, and the record of a run
Table = tuple[list[str], list[list[Any]]]  # headers and lines


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """A table for each kind of measurement that there is."""
    kinds = dict.fromkeys(record["config"]["task"]["kind"] for _, record in rows)
    alike = [[row for row in rows if row[1]["config"]["task"]["kind"] == kind] for kind in kinds]
    for headers, lines in [*map(_quality, alike), *(make(rows) for make in (_perplexity, _latency, _flocking))]:
        if lines:
            yield tabulate(lines, headers, disable_numparse=True, tablefmt="simple")


def _quality(rows: Sequence[Row]) -> Table:
    """One line per run: the method, every metric that has a standard error with it, drafts, and time."""
    own = ("latency", "flocking")  # they have a table of their own
    rows = [(method, record) for method, record in rows if record["config"]["task"]["kind"] not in own]
    errors = dict.fromkeys(name for _, record in rows for name in record["metrics"] if name.endswith("_stderr"))
    measures = [name.removesuffix("_stderr") for name in errors if not name.startswith("perplexity_p")]
    measures = [name for name in measures if name not in _DRAFTING]
    drafting = {name: text for name, text in _DRAFTING.items() if any(name in record["metrics"] for _, record in rows)}
    headers = ["model", "task", "method", *(name.replace("_", " ") for name in measures)]
    headers += [*drafting.values(), "samples", "skipped", "s/sample", "tokens/s"]
    lines = []
    for method, record in rows:
        metrics, names = record["metrics"], [record["config"][part]["name"] for part in ("model", "task")]
        samples, seconds, tokens = metrics["samples"], record["timing"]["seconds"], metrics.get("generated_tokens")
        cells: list[Any] = [_with_error(metrics, name) for name in (*measures, *drafting)]
        cells += [samples, metrics.get("skipped_prompts", 0), f"{seconds / samples:.2f}" if samples else "-"]
        lines.append([*names, method, *cells, f"{tokens / seconds:.1f}" if seconds and tokens else "-"])
    return headers, lines


def _perplexity(rows: Sequence[Row]) -> Table:
    """Perplexity by prompt length (rows) and generation length (columns), where more than one was measured."""
    lines, generations = [], []
    for method, record in rows:
        task = record["config"]["task"]
        if task["kind"] == "perplexity" and len(task["prompt_lengths"]) * len(task["generation_lengths"]) > 1:
            generations = task["generation_lengths"]
            for prompt in task["prompt_lengths"]:
                cells = [_with_error(record["metrics"], f"perplexity_p{prompt}_g{length}") for length in generations]
                lines.append([record["config"]["model"]["name"], method, prompt, *cells])
    return ["model", "method", "prompt tokens", *(f"{length} generated" for length in generations)], lines


def _latency(rows: Sequence[Row]) -> Table:
    """Ratios first: one line per run and pair of lengths."""
    names = dict(_LATENCY)
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
    return ["model", "method", "tokens", *names.values()], lines


def _flocking(rows: Sequence[Row]) -> Table:
    """Jaccard similarities of the top-k sets, averaged over layers: one line per run and kind of text."""
    lines = []
    for _, record in rows:
        config, metrics = record["config"], record["metrics"]
        for text in ("natural", "permuted", "random") if config["task"]["kind"] == "flocking" else ():
            cells = [_with_error(metrics, f"{name}_{text}") for name in _FLOCKING]
            where = [config["model"]["name"], config["task"]["name"], f"{100 * config['task']['kept']:g}%", text]
            lines.append([*where, *cells, metrics["samples"]])
    return ["model", "task", "top k", "text", *_FLOCKING.values(), "samples"], lines


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
