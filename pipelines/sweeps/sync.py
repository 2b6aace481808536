"""The upload of an output folder's offline W&B runs, each exactly once: behind `pipelines.sync`.

Wraps `wandb sync`, which joins the parts of a run that was continued, in the order of their beginning, and leaves a
mark beside what it has uploaded. Two things it leaves to us. A run that is being written is left for later. And a part
whose process was killed ends within a record: wandb uploads what comes before, but neither marks the part nor goes on
with the parts behind it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.run_folder import RunFolder
from pipelines.tracking import check_server

_EMPTY_BYTES = 7  # of a .wandb file's own header

UPLOADED, BEFORE, FAILED, RUNNING = "uploaded", "uploaded before", "failed", "running, left for later"


def offline_runs(output_dir: Path) -> dict[Path, list[Path]]:
    """The run folders with offline W&B runs: run folder -> the parts' .wandb files, in the order of their beginning."""
    found: dict[Path, list[Path]] = {}
    for part in sorted(output_dir.glob("*/wandb/offline-run-*/*.wandb")):
        found.setdefault(part.parents[2], []).append(part)
    return found


def sync(runs: Mapping[Path, Sequence[Path]]) -> dict[Path, str]:
    """Upload what is not uploaded, and return what became of each run folder.

    Raises:
        UserError: the server cannot be reached.
    """
    states: dict[Path, str] = {}
    for folder, parts in runs.items():
        if RunFolder(folder.parent, folder.name).held():
            states[folder] = RUNNING
        elif all(map(_marked, parts)):
            states[folder] = BEFORE
    wanted = [part for folder, parts in runs.items() if folder not in states for part in parts if not _marked(part)]
    if wanted:
        check_server()
    for part in wanted:
        if part.stat().st_size <= _EMPTY_BYTES:
            _mark(part)
    while left := [part for part in wanted if not _marked(part)]:
        cut_off = _upload(left)
        for part in cut_off:
            _mark(part)
        if not cut_off:
            break
    return {folder: states.get(folder, UPLOADED if all(map(_marked, runs[folder])) else FAILED) for folder in runs}


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


def _marked(part: Path) -> bool:
    return part.with_name(f"{part.name}.synced").exists()


def _mark(part: Path) -> None:
    part.with_name(f"{part.name}.synced").touch()
