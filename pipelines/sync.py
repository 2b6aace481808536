"""`python -m pipelines.sync DIR`: upload the offline W&B runs of an output folder, each exactly once.

Wraps `wandb sync`, which joins the parts of a run that was continued, in the order of their beginning, and leaves a
mark beside what it has uploaded. Two things it leaves to us. A run that is being written is left for later. And a part
whose process was killed ends within a record: wandb uploads what comes before, but neither marks the part nor goes on
with the parts behind it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from pipelines.errors import UserError
from pipelines.run_folder import RunFolder
from pipelines.tracking import check_server

_EMPTY_BYTES = 7  # of a .wandb file's own header

UPLOADED, BEFORE, FAILED, RUNNING = "uploaded", "uploaded before", "failed", "running, left for later"


def sync(runs: Mapping[Path, Sequence[Path]]) -> dict[Path, str]:
    """Upload what is not uploaded, and return what became of each run folder; UserError without a server."""
    states: dict[Path, str] = {}
    for folder, parts in runs.items():
        if RunFolder(folder.parent, folder.name).held():
            states[folder] = RUNNING
        elif all(_mark(part).exists() for part in parts):
            states[folder] = BEFORE
    wanted = [part for folder, parts in runs.items() if folder not in states for part in parts]
    if wanted:
        check_server()
    for part in wanted:
        if part.stat().st_size <= _EMPTY_BYTES:
            _mark(part).touch()
    while left := [part for part in wanted if not _mark(part).exists()]:
        cut_off = _upload(left)
        for part in cut_off:
            _mark(part).touch()
        if not cut_off:
            break
    for folder in runs.keys() - states.keys():
        states[folder] = UPLOADED if all(_mark(part).exists() for part in runs[folder]) else FAILED
    return {folder: states[folder] for folder in runs}


def _upload(parts: Sequence[Path]) -> list[Path]:
    """Call `wandb sync`, and return the parts that it uploaded up to where their process was killed."""
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "--skip-synced", *(str(part.parent) for part in parts)]
    cut_off = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        for line in running.stderr:
            ended_within = [part for part in parts if part.parent.name in line and "incomplete record" in line]
            cut_off += ended_within
            if not ended_within:  # else told as an error
                print(line, end="", file=sys.stderr)
    return cut_off


def _mark(part: Path) -> Path:
    """The file by which wandb knows what it has uploaded."""
    return part.with_name(f"{part.name}.synced")


def output_dir_argument(command: str, description: str) -> Path:
    """The folder named on the command line, with --help; the process ends with one line if it is none."""
    parser = argparse.ArgumentParser(prog=f"python -m {command}", description=description.split("\n\n")[0])
    parser.add_argument("output_dir", metavar="DIR", type=Path, help="an output_dir of pipelines.run")
    output_dir: Path = parser.parse_args().output_dir
    if not output_dir.is_dir():
        sys.exit(f"error: {output_dir}: {'not a folder' if output_dir.exists() else 'no such folder'}")
    return output_dir


def main() -> None:
    """Upload, and print a table. Exit code 1 if a run could not be uploaded."""
    output_dir = output_dir_argument("pipelines.sync", __doc__)
    runs: dict[Path, list[Path]] = {}  # run folder -> its parts, in the order of their beginning
    for part in sorted(output_dir.glob("*/wandb/offline-run-*/*.wandb")):
        runs.setdefault(part.parents[2], []).append(part)
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
