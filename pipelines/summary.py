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
    measures = [name.removesuffix("_stderr") for name in errors]
    headers = ["model", "task", "method", *measures, "samples", "skipped", "tokens", "s/sample", "tokens/s"]
    lines = []
    for method, record in rows:
        metrics, timing = record["metrics"], record["timing"]
        samples, seconds = metrics["samples"], timing["generate_seconds"]
        lines.append(
            [
                record["config"]["model"]["name"],
                record["config"]["task"]["name"],
                method,
                *(f"{metrics[name]:.2f} ± {metrics[f'{name}_stderr']:.2f}" if samples else "-" for name in measures),
                samples,
                metrics["skipped_prompts"],
                metrics["generated_tokens"],
                f"{seconds / samples:.2f}" if samples else "-",
                f"{metrics['generated_tokens'] / seconds:.1f}" if seconds else "-",
            ]
        )
    return tabulate(lines, headers=headers, disable_numparse=True, tablefmt="simple")
