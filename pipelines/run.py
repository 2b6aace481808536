"""The one entry: `python -m pipelines.run model=gemma_7b task=xsum sparsity=0.5`, with `-m` for sweeps."""

from __future__ import annotations

import sys

from pipelines.composition import compose_and_call
from pipelines.job import job
from pipelines.summary import CLOSING, flocking_table, latency_table, perplexity_table, summary_table
from pipelines.sweeps import run_status

TABLES = (summary_table, perplexity_table, latency_table, flocking_table)


def main() -> None:
    """Compose, run, print the summary. Exit code 1 if any run failed, 128 + N where signal N ended it."""
    run_status.of_this_call.clear()
    CLOSING.clear()
    compose_and_call(job)
    statuses = [one for point in run_status.of_this_call for one in point]
    rows = [(one.method, record) for one in statuses if (record := one.record()) is not None]
    if rows:
        tables = [table(rows) for table in TABLES]
        print("\n" + "\n\n".join(table for table in tables if table))
        print(f"\nRecords: {', '.join(sorted({str(one.folder.parent) for one in statuses if one.folder}))}")
    if len(run_status.of_this_call) > 1:
        print("\n" + run_status.run_status_table(statuses))
    if CLOSING:
        print("\n" + "\n".join(CLOSING))
    if any(one.state == run_status.FAILED for one in statuses):
        sys.exit(1)


if __name__ == "__main__":
    main()
