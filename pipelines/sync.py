"""`python -m pipelines.sync DIR`: upload the offline W&B runs of an output folder, each exactly once."""

from __future__ import annotations

import os
import sys

from tabulate import tabulate

from pipelines.errors import UserError
from pipelines.output_dir import output_dir_argument
from pipelines.sweeps.sync import FAILED, offline_runs, sync


def main() -> None:
    """Upload, and print a table. Exit code 1 if a run could not be uploaded."""
    output_dir = output_dir_argument("pipelines.sync", __doc__)
    runs = offline_runs(output_dir)
    if not runs:
        sys.exit(f"error: {output_dir}: no offline W&B runs here; expected an output_dir of pipelines.run")
    logs = output_dir / ".sync"  # else the folder of the call and the home folder
    try:
        logs.mkdir(exist_ok=True)
    except OSError as error:
        sys.exit(f"error: {output_dir}: cannot write {logs}: {error.strerror}")
    os.environ |= dict.fromkeys(("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"), str(logs.resolve()))
    try:
        states = sync(runs)
    except UserError as error:
        sys.exit(f"error: {error}")
    lines = [[path.name, len(runs[path]), state] for path, state in states.items()]
    print(tabulate(lines, ["run", "parts", "state"], disable_numparse=True))
    if FAILED in states.values():
        sys.exit(1)


if __name__ == "__main__":
    main()
