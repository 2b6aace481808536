"""Sweeps: every point, written down before it runs, so that what is missing can be told later; what became of each run.

    <output_dir>/.sweep/<key>.json    one point: what, by which methods; its runs once it has begun; why it failed

The key is a hash of all that determines the results, except the device, which only the machine that runs the point
knows. So the same command finds its points again, whatever process or machine they ran on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.methods import identity, label, run_config
from pipelines.records import Record, read_object, to_json, write_in_one_step, writing
from pipelines.run_folder import RunFolder

FOLDER = ".sweep"

FINISHED, SKIPPED, FAILED, HELD = "finished", "skipped", "failed", "held by another process"

# Settings that say how and where a run is made. A try that failed is mended by changing some of them.
_HOW = ("batch_size", "mode", "compile", "cpu_onednn", "offload_dense", "device", "output_dir", "tags", "wandb")
_WHERE = {"model": ("repo", "revision"), "task": ("data_files", "shots_file")}

_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RunStatus:
    """What became of one run. Plain values, because it comes back from other processes and other machines.

    Attributes:
        method: the method in words.
        state: FINISHED now, SKIPPED (finished before), FAILED or HELD.
        folder: the run's folder; None where the run failed before it had one.
        reason: why it failed, in one line.
    """

    method: str
    state: str
    folder: Path | None = None
    reason: str | None = None

    def record(self) -> Record | None:
        """The run's record, if it has one."""
        return RunFolder(self.folder.parent, self.folder.name).record() if self.folder else None


# Of each point of this call, what its sweep does not share with the others, and its runs, for the summary at the end.
# A single job or the sweeper puts them here.
of_this_call: list[tuple[str, list[RunStatus]]] = []


def wait_for_held(statuses: Iterable[RunStatus]) -> bool:
    """Whether other processes held any of the runs; if so, none does when this returns."""
    held = [RunFolder(one.folder.parent, one.folder.name) for one in statuses if one.state == HELD and one.folder]
    for folder in held:
        if folder.held():
            print(f"{folder.path}: another process is at it, waiting for its end", file=sys.stderr, flush=True)
        while folder.held():
            time.sleep(_POLL_SECONDS)
    return bool(held)


def merged(before: Sequence[RunStatus], after: Sequence[RunStatus]) -> list[RunStatus]:
    """The statuses after a second attempt at the same runs; what the first one finished stays finished."""
    finished = {one.folder: one for one in before if one.state == FINISHED}
    return [finished.get(one.folder, one) for one in after]


def run_status_table() -> str:
    """One line per run of this call's sweep, unless all have just finished, and the counts below."""
    lines = [[words, one.method, one.state, one.reason or ""] for words, point in of_this_call for one in point]
    counts = Counter(state for _, _, state, _ in lines)
    told = ", ".join(f"{counts[state]} {state}" for state in (FINISHED, SKIPPED, FAILED, HELD) if counts[state])
    if counts.keys() == {FINISHED}:
        return told
    headers = ["point", "method", "state", "reason"]
    return f"{tabulate(lines, headers, disable_numparse=True, maxcolwidths=[None, None, None, 80])}\n\n{told}"


def measured(config: dict[str, Any]) -> str:
    """Names what a run of this resolved configuration measures, whatever it takes to make it."""
    parts = {key: value for key, value in config.items() if key not in _HOW}
    for part, places in _WHERE.items():
        parts[part] = {key: value for key, value in config.get(part, {}).items() if key not in places}
    return _digest(parts)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


class ManifestEntry:
    """What the manifest says about one point of a sweep. Creating the object touches no file."""

    def __init__(self, config: RunConfig) -> None:
        self.output_dir = Path(config.output_dir)
        methods = config.methods()
        self.labels = [label(config, method) for method in methods]
        self._planned = {
            "words": f"{config.task.name} {config.model.name}",
            "swept": "",
            "methods": self.labels,
            "measured": [measured(run_config(config, method)) for method in methods],
        }
        try:
            key = _digest([identity(config, method, config.device) for method in methods])
        except OSError as error:
            raise UserError(f"task={config.task.name}: cannot read {error.filename}: {error.strerror}") from error
        self.path = self.output_dir / FOLDER / f"{key}.json"

    def plan(self, swept: str, launcher: str) -> None:
        """Write the point down.

        Args:
            swept: the point in words, by what it does not share with the others of its sweep.
            launcher: the name of what starts it, which decides the machine and so the device.
        """
        before = read_entry(self.path)
        runs = before["runs"] if before and before["launcher"] == launcher else None
        entry = self._planned | {"swept": swept, "launcher": launcher, "runs": runs, "failed": None}
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_in_one_step(self.path, to_json(entry) + "\n")

    def finished_before(self, launcher: str) -> list[RunStatus]:
        """The point's runs, if all of them have a record and the same launcher made them; else none."""
        entry = read_entry(self.path)
        runs = self._runs() if entry and entry["launcher"] == launcher else []
        if not runs or not all(run.record() for run in runs):
            return []
        return [RunStatus(words, SKIPPED, run.path) for words, run in zip(self.labels, runs, strict=True)]

    def note(self, **values: Any) -> None:
        """Note the point's `runs`, or why it `failed`, if the point is part of a sweep."""
        # A full disk must not hide what is worse; the run folders tell the rest.
        with contextlib.suppress(OSError):
            entry = read_entry(self.path)
            if entry is not None:
                write_in_one_step(self.path, to_json(entry | values) + "\n")

    def died(self, reason: str) -> list[RunStatus]:
        """What became of the point's runs, whose process ended without saying so.

        What is known about its end is noted in the folders of runs without a record.
        """
        runs = self._runs()
        if not runs:
            self.note(failed=reason)
            return [RunStatus(words, FAILED, reason=reason) for words in self.labels]
        statuses = []
        for words, run in zip(self.labels, runs, strict=True):
            state = FINISHED if run.record() else HELD if run.held() else FAILED  # held by yet another process
            if state == FAILED:
                run.fail(reason)
            statuses.append(RunStatus(words, state, run.path, reason if state == FAILED else None))
        return statuses

    def _runs(self) -> list[RunFolder]:
        entry = read_entry(self.path)
        return [RunFolder(self.output_dir, run) for run in (entry and entry["runs"]) or ()]


def read_entry(path: Path) -> dict[str, Any] | None:
    """What is written down about a point; None if nothing is, or it is damaged."""
    entry = read_object(path)
    keys = {"words", "swept", "methods", "measured", "launcher", "runs", "failed"}
    return entry if entry and keys <= entry.keys() else None
