"""The one entry: `python -m pipelines.run model=gemma_7b task=xsum sparsity=0.5`, with `-m` for sweeps."""

from __future__ import annotations

import sys

from pipelines import job
from pipelines.composition import compose_and_call
from pipelines.summary import flocking_table, latency_table, perplexity_table, summary_table
from pipelines.sweeps.run_status import FAILED, outcome_table

TABLES = (summary_table, perplexity_table, latency_table, flocking_table)


def main() -> None:
    """Compose, run, print the summary. Exit code 1 if any run failed, 128 + N where signal N ended it."""
    job.outcomes.clear()
    compose_and_call(job.job)
    outcomes = [one for point in job.outcomes for one in point]
    rows = [(one.method, record) for one in outcomes if (record := one.record()) is not None]
    if rows:
        tables = [table(rows) for table in TABLES]
        print("\n" + "\n\n".join(table for table in tables if table))
        print(f"\nRecords: {', '.join(sorted({str(one.folder.parent) for one in outcomes if one.folder}))}")
    if len(job.outcomes) > 1:
        print("\n" + outcome_table(outcomes))
    if any(one.state == FAILED for one in outcomes):
        sys.exit(1)


if __name__ == "__main__":
    main()
