"""The sweep manifest: every point of a sweep, written down before it runs, so that what is missing can be told later.

    <output_dir>/.sweep/<key>.json    one point: what, by which methods; its runs once it has begun; why it failed

The key is a hash of all that determines the results, except the device, which only the machine that runs the point
knows. So the same command finds its points again, whatever process or machine they ran on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.methods import identity, run_config
from pipelines.records import read_object, to_json, write_in_one_step, writing
from pipelines.run_folder import RunFolder
from pipelines.sweeps.run_status import FAILED, FINISHED, HELD, RunStatus

FOLDER = ".sweep"

# Settings that say how and where a run is made. A try that failed is mended by changing some of them.
_HOW = ("batch_size", "mode", "compile", "cpu_onednn", "offload_dense", "device", "output_dir", "tags", "wandb")
_WHERE = {"model": ("repo", "revision"), "task": ("data_files", "shots_file")}


def measured(config: dict[str, Any]) -> str:
    """Names what a run measures, whatever it takes to make it.

    Args:
        config: the resolved configuration of one run.
    """
    parts = {key: value for key, value in config.items() if key not in _HOW}
    for part, places in _WHERE.items():
        parts[part] = {key: value for key, value in config.get(part, {}).items() if key not in places}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


class ManifestEntry:
    """What the manifest says about one point of a sweep. Creating the object touches no file."""

    def __init__(self, config: RunConfig) -> None:
        self.output_dir = Path(config.output_dir)
        self.measured = [measured(run_config(config, method)) for method in config.methods()]
        self.labels = [method.label for method in config.methods()]
        self.words = f"{config.task.name} {config.model.name}"
        try:
            content = [identity(config, method, config.device) for method in config.methods()]
        except OSError as error:
            raise UserError(f"task={config.task.name}: cannot read {error.filename}: {error.strerror}") from error
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        self.path = self.output_dir / FOLDER / f"{key}.json"

    def plan(self, swept: str, launcher: str) -> None:
        """Write the point down.

        Args:
            swept: the point in words, by what it does not share with the others of its sweep.
            launcher: the name of what starts it, which decides the machine and so the device.

        Raises:
            UserError: the folder cannot be written.
        """
        before = read_entry(self.path)
        runs = before["runs"] if before and before["launcher"] == launcher else None
        words = {"words": self.words, "swept": swept, "methods": self.labels, "measured": self.measured}
        entry = words | {"launcher": launcher, "runs": runs, "failed": None}
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_in_one_step(self.path, to_json(entry) + "\n")

    def finished_runs(self, launcher: str) -> list[Path] | None:
        """The point's run folders, if all of them have a record and the same launcher made them."""
        entry = read_entry(self.path)
        if entry is None or entry["launcher"] != launcher:
            return None
        runs = [RunFolder(self.output_dir, run) for run in entry["runs"] or ()]
        return [run.path for run in runs] if runs and all(run.record() for run in runs) else None

    def began(self, runs: Sequence[str]) -> None:
        """Note the point's runs, if it is part of a sweep; an earlier failure is forgotten."""
        self._update(runs=list(runs), failed=None)

    def fail(self, reason: str) -> None:
        """Note why the point failed, if it is part of a sweep."""
        self._update(failed=reason)

    def died(self, reason: str) -> list[RunStatus]:
        """What became of the point's runs, whose process ended without saying so.

        Args:
            reason: what is known about its end; noted in the folders of runs without a record.
        """
        entry = read_entry(self.path)
        runs = [RunFolder(self.output_dir, run) for run in (entry and entry["runs"]) or ()]
        if not runs:
            self.fail(reason)
            return [RunStatus(self.words, label, FAILED, reason=reason) for label in self.labels]
        statuses = []
        for label, run in zip(self.labels, runs, strict=True):
            if run.record():
                statuses.append(RunStatus(self.words, label, FINISHED, run.path))
            elif run.held():  # by yet another process
                statuses.append(RunStatus(self.words, label, HELD, run.path))
            else:
                run.fail(reason)
                statuses.append(RunStatus(self.words, label, FAILED, run.path, reason))
        return statuses

    def _update(self, **values: Any) -> None:
        # A full disk must not hide what is worse; the run folders tell the rest.
        with contextlib.suppress(OSError):
            entry = read_entry(self.path)
            if entry is not None:
                write_in_one_step(self.path, to_json(entry | values) + "\n")


def read_entry(path: Path) -> dict[str, Any] | None:
    """What is written down about a point; None if nothing is, or it is damaged."""
    entry = read_object(path)
    keys = {"words", "swept", "methods", "measured", "launcher", "runs", "failed"}
    return entry if entry and keys <= entry.keys() else None
