"""`python -m pipelines.status DIR`: what is done, running, failed and missing in an output folder; the time left."""

from __future__ import annotations

import sys

from pipelines.output_dir import output_dir_argument
from pipelines.sweeps.progress import read, status_table


def main() -> None:
    """Print the state of an output folder."""
    output_dir = output_dir_argument("pipelines.status", __doc__)
    rows = read(output_dir)
    if not rows:
        sys.exit(f"error: {output_dir}: no runs here; expected an output_dir of pipelines.run")
    print(status_table(rows))


if __name__ == "__main__":
    main()
