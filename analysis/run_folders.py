"""Reading run folders, and telling what is missing, damaged or at odds with its own samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import UserError

Record = dict[str, Any]

_FILES = ("record.json", "samples.jsonl", "config.yaml")


@dataclass(frozen=True)
class Problem:
    """A run that is not in the tables, and why.

    Attributes:
        run_id: the run's folder or its id in W&B.
        state: `unfinished`, `damaged`, `contradicted` (by its own samples) or `conflicting` (with its double).
        reason: one line.
    """

    run_id: str
    state: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """What was found.

    Attributes:
        records: of the finished runs, as in their record.json.
        problems: the runs that have no record to rely on.
        folders: run id -> where the run's files lie, where they lie on this machine.
        layers: run id -> the measures by layer of a flocking run, where they were read from W&B.
    """

    records: list[Record]
    problems: list[Problem]
    folders: dict[str, Path] = field(default_factory=dict)
    layers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def read_run_folders(paths: list[Path]) -> Runs:
    """The runs below some folders, each the `output_dir` of runs or a run folder itself.

    Raises:
        UserError: a folder is not there, or holds no run.
    """
    found: dict[str, Record] = {}
    folders: dict[str, Path] = {}
    problems: list[Problem] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"runs={path}: {'not a folder' if path.exists() else 'no such folder'}")
        seen = False
        for folder in _run_folders(path):
            seen = True
            record = _read(folder)
            if isinstance(record, Problem):
                problems.append(record)
                continue
            twin = found.setdefault(folder.name, record)
            folders.setdefault(folder.name, folder)
            if twin["metrics"] != record["metrics"]:
                problems.append(Problem(folder.name, "conflicting", f"{folders[folder.name]} and {folder} differ"))
        if not seen:
            raise UserError(f"runs={path}: no run folder in it; python -m pipelines.run output_dir={path} makes some")
    conflicting = {problem.run_id for problem in problems if problem.state == "conflicting"}
    return Runs([record for name, record in found.items() if name not in conflicting], problems, folders)


def fault(record: Any, run_id: str) -> str | None:
    """What keeps a record from being used, in words; None if nothing does."""
    if not isinstance(record, dict):
        return "not an object"
    if record.get("status") != "finished":
        return f"status {record.get('status')!r}, expected 'finished'"
    if record.get("run_id") != run_id:
        return f"is the record of another run, {record.get('run_id')!r}"
    for place in ("config.model.name", "config.task.name", "config.task.kind", "metrics", "timing", "environment"):
        value: Any = record
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, str if place.startswith("config") else dict) or value == "":
            return f"has no {place}"
    for name, value in record["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            return f"metrics.{name} is {json.dumps(value)}, expected a number"
    return None


def _run_folders(path: Path) -> Iterator[Path]:
    candidates = [path] if _is_run(path) else sorted(path.iterdir())
    return (folder for folder in candidates if folder.is_dir() and _is_run(folder))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def _read(folder: Path) -> Record | Problem:
    path = folder / "record.json"
    if not path.is_file():
        lines = 0
        if (folder / "samples.jsonl").is_file():
            lines = (folder / "samples.jsonl").read_bytes().count(b"\n")
        return Problem(folder.name, "unfinished", f"no record.json, {lines} samples so far{_failure(folder)}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Problem(folder.name, "damaged", f"record.json cannot be read ({error})")
    reason = fault(record, folder.name)
    if reason:
        return Problem(folder.name, "damaged", f"record.json {reason}")
    reason = _contradiction(record, folder / "samples.jsonl")
    if reason:
        return Problem(folder.name, "contradicted", reason)
    return dict(record)


def _failure(folder: Path) -> str:
    """Why a run failed, where its folder says so."""
    try:
        failed = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("failed")
    except (OSError, ValueError, AttributeError):
        failed = None
    return f"; it failed: {failed}" if failed else ""


def _contradiction(record: Record, path: Path) -> str | None:
    """Where the samples say something else than the record: their number, or the mean of a metric of theirs."""
    if not path.is_file():
        return None  # a record that was moved alone
    samples = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                sample = json.loads(line)
                samples.append(sample | (sample.get("metrics") or {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"samples.jsonl cannot be read ({error})"
    samples = [sample for sample in samples if "skipped" not in sample]
    metrics = record["metrics"]
    if "samples" in metrics and metrics["samples"] != len(samples):
        return f"record.json counts {metrics['samples']} samples, samples.jsonl holds {len(samples)}"
    for name in metrics:
        values = [sample[name] for sample in samples if isinstance(sample.get(name), int | float)]
        if f"{name}_stderr" in metrics and values and len(values) == len(samples):
            mean = sum(values) / len(values)
            if not math.isclose(mean, metrics[name], rel_tol=1e-6, abs_tol=1e-9):
                return f"record.json says {name}={metrics[name]:g}, the mean of samples.jsonl is {mean:g}"
    return None
