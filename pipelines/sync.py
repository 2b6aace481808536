"""`python -m pipelines.sync DIR`: upload the offline W&B runs of an output folder, each exactly once.

Wraps `wandb sync`, which joins the parts of a run that was continued, in the order of their beginning, and leaves a
mark beside what it has uploaded. Runs that are being written are left for later: wandb would mark them as uploaded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from pipelines.records import RunFolder

UPLOADED, BEFORE, FAILED, RUNNING = "uploaded", "uploaded before", "failed", "running, left for later"


def main() -> None:
    """Upload, and print a table. Exit code 1 if a run could not be uploaded."""
    parser = argparse.ArgumentParser(prog="python -m pipelines.sync", description=__doc__)
    parser.add_argument("output_dir", metavar="DIR", type=Path, help="an output_dir of pipelines.run")
    output_dir = parser.parse_args().output_dir
    if not output_dir.is_dir():
        sys.exit(f"error: {output_dir}: {'not a folder' if output_dir.exists() else 'no such folder'}")
    runs = offline_runs(output_dir)
    if not runs:
        sys.exit(f"error: {output_dir}: no offline W&B runs here; expected an output_dir of pipelines.run")
    states = sync(runs)
    lines = [[path.name, len(runs[path]), state] for path, state in states.items()]
    print(tabulate(lines, ["run", "parts", "state"], disable_numparse=True))
    if FAILED in states.values():
        sys.exit(1)


def offline_runs(output_dir: Path) -> dict[Path, list[Path]]:
    """The run folders with offline W&B runs: run folder -> the parts' .wandb files, in the order of their beginning."""
    found: dict[Path, list[Path]] = {}
    for part in sorted(output_dir.glob("*/wandb/offline-run-*/*.wandb")):
        found.setdefault(part.parents[2], []).append(part)
    return found


def sync(runs: dict[Path, Sequence[Path]]) -> dict[Path, str]:
    """Upload what is not uploaded, and return what became of each run folder."""
    states: dict[Path, str] = {}
    wanted: dict[Path, list[Path]] = {}
    for folder, parts in runs.items():
        missing = [part for part in parts if not _marked(part)]
        if RunFolder(folder.parent, folder.name).held():
            states[folder] = RUNNING
        elif missing:
            wanted[folder] = missing
        else:
            states[folder] = BEFORE
    if wanted:
        parts = [str(part.parent) for missing in wanted.values() for part in missing]
        command = [sys.executable, "-m", "wandb", "sync", "--yes", "--skip-synced", *parts]
        subprocess.run(command, check=False)
    for folder, missing in wanted.items():
        states[folder] = UPLOADED if all(map(_marked, missing)) else FAILED
    return {folder: states[folder] for folder in runs}


def _marked(part: Path) -> bool:
    return part.with_name(f"{part.name}.synced").exists()


if __name__ == "__main__":
    main()
