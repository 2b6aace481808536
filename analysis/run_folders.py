"""Reads run folders, and says which runs are unfinished, damaged, or contradicted by their own samples."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from analysis.runs import Problem, Record, Runs, checked
from pipelines.errors import UserError

_FILES = ("record.json", "samples.jsonl", "config.yaml")  # a folder with any of them is a run folder


def read_run_folders(paths: list[Path]) -> Runs:
    """Read all runs in some folders. Each folder holds run folders, or is one itself.

    Raises:
        UserError: a folder does not exist, or holds no run.
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return Problem(folder.name, "damaged", f"record.json cannot be read ({error})")
    try:
        record = checked(content, folder.name)
    except ValueError as error:
        return Problem(folder.name, "damaged", f"record.json {error}")
    contradiction = _contradiction(record, folder / "samples.jsonl")
    return Problem(folder.name, "contradicted", contradiction) if contradiction else record


def _failure(folder: Path) -> str:
    """Why the run failed, if its folder says so."""
    try:
        failed = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("failed")
    except (OSError, ValueError, AttributeError):
        failed = None
    return f"; it failed: {failed}" if failed else ""


def _contradiction(record: Record, path: Path) -> str | None:
    """How the samples contradict the record: in their number, or in the mean of a metric; None if they do not."""
    if not path.is_file():
        return None  # someone copied the record alone
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
