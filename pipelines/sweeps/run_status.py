"""What became of the runs of a call: finished, skipped, failed, or in the hands of another process."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from pipelines.records import Record
from pipelines.run_folder import RunFolder

FINISHED, SKIPPED, FAILED, HELD = "finished", "skipped", "failed", "held by another process"

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RunStatus:
    """What became of one run. Plain values, because it comes back from other processes and other machines.

    Attributes:
        words: task and model, or in a sweep what the run does not share with the others.
        method: the method in words.
        state: FINISHED now, SKIPPED (finished before), FAILED or HELD.
        folder: the run's folder; None where the run failed before it had one.
        reason: why it failed, in one line.
    """

    words: str
    method: str
    state: str
    folder: Path | None = None
    reason: str | None = None

    def record(self) -> Record | None:
        """The run's record, if it has one."""
        return RunFolder(self.folder.parent, self.folder.name).record() if self.folder else None


# Of the runs of each point of this call, for the summary at its end. A single job or the sweeper puts them here.
of_this_call: list[list[RunStatus]] = []


def held_folders(statuses: Sequence[RunStatus]) -> list[Path]:
    """The folders that other processes held."""
    return [one.folder for one in statuses if one.state == HELD and one.folder]


def wait_for(folders: Sequence[Path]) -> None:
    """Return once no process holds any of the run folders."""
    for path in folders:
        folder = RunFolder(path.parent, path.name)
        if folder.held():
            print(f"{path}: another process is at it, waiting for its end", file=sys.stderr, flush=True)
        while folder.held():
            time.sleep(_POLL_SECONDS)


def merged(before: Sequence[RunStatus], after: Sequence[RunStatus]) -> list[RunStatus]:
    """The statuses after a second attempt at the same runs; what the first one finished stays finished."""
    finished = {one.folder: one for one in before if one.state == FINISHED}
    return [finished.get(one.folder, one) for one in after]


def run_status_table(statuses: Sequence[RunStatus]) -> str:
    """One line per run of a sweep, and the counts below."""
    lines = [[one.words, one.method, one.state, one.reason or ""] for one in statuses]
    counts = Counter(one.state for one in statuses)
    table = tabulate(
        lines, ["point", "method", "state", "reason"], disable_numparse=True, maxcolwidths=[None, None, None, 80]
    )
    order = (FINISHED, SKIPPED, FAILED, HELD)
    return "\n".join([table, "", ", ".join(f"{counts[state]} {state}" for state in order if counts[state])])
