"""The one entry: `python -m pipelines.run model=gemma_7b task=xsum sparsity=0.5`, with `-m` for sweeps."""

from __future__ import annotations

import sys

from rich.console import Console

from pipelines.composition import compose_and_call
from pipelines.job import job
from pipelines.summary import CLOSING, OPENING, tables
from pipelines.sweeps import FAILED, of_this_call, run_status_table


def main() -> None:
    """Compose, run, print the summary. Exit code 1 if any run failed, 128 + N where signal N ended it."""
    of_this_call.clear()
    OPENING.clear()
    CLOSING.clear()
    compose_and_call(job)
    for line in OPENING:
        Console(highlight=False, soft_wrap=True).print("", line, markup=False, sep="\n")
    statuses = [one for _, point in of_this_call for one in point]
    rows = [(one.method, record) for one in statuses if (record := one.record()) is not None]
    if rows:
        print("\n" + "\n\n".join(tables(rows)))
        print(f"\nRecords: {', '.join(sorted({str(one.folder.parent) for one in statuses if one.folder}))}")
    if len(of_this_call) > 1:
        print("\n" + run_status_table())
    if CLOSING:
        print("\n" + "\n".join(CLOSING))
    if any(one.state == FAILED for one in statuses):
        sys.exit(1)


if __name__ == "__main__":
    main()
