"""The table at the end of a call: what was measured, next to each other."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from pipelines.records import Record


def summary_table(rows: Sequence[tuple[str, Record]]) -> str:
    """One line per run: the method, every metric that has a standard error with it, and time.

    Args:
        rows: (method in words, record) of each run.
    """
    errors = dict.fromkeys(name for _, record in rows for name in record["metrics"] if name.endswith("_stderr"))
    measures = [name.removesuffix("_stderr") for name in errors if not name.startswith("perplexity_p")]
    headers = ["model", "task", "method", *measures, "samples", "skipped", "s/sample", "tokens/s"]
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
                samples,
                metrics.get("skipped_prompts", 0),
                f"{seconds / samples:.2f}" if samples else "-",
                f"{tokens / seconds:.1f}" if seconds and tokens else "-",
            ]
        )
    return tabulate(lines, headers=headers, disable_numparse=True, tablefmt="simple")


def _with_error(metrics: dict[str, float], name: str) -> str:
    """A metric with its standard error: two decimals where it is a score out of 100 or a perplexity, else four."""
    if name not in metrics:
        return "-"
    digits = 2 if name.startswith(("rouge", "perplexity")) else 4
    return f"{metrics[name]:.{digits}f} ± {metrics[f'{name}_stderr']:.{digits}f}"


def perplexity_table(rows: Sequence[tuple[str, Record]]) -> str | None:
    """Perplexity by prompt length (rows) and generation length (columns), where more than one was measured."""
    lines, generations = [], []
    for method, record in rows:
        task = record["config"]["task"]
        if len(task.get("prompt_lengths", [])) * len(task.get("generation_lengths", [])) > 1:
            generations = task["generation_lengths"]
            for prompt in task["prompt_lengths"]:
                cells = [_with_error(record["metrics"], f"perplexity_p{prompt}_g{length}") for length in generations]
                lines.append([record["config"]["model"]["name"], method, prompt, *cells])
    if not lines:
        return None
    headers = ["model", "method", "prompt tokens", *(f"{length} generated" for length in generations)]
    return tabulate(lines, headers=headers, disable_numparse=True, tablefmt="simple")
