"""Reads run folders, and says which runs are unfinished, damaged, or contradicted by their own samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from analysis.runs import Problem, Record, Runs, checked, watched
from pipelines.errors import UserError
from pipelines.records import contradiction, from_json

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
        for folder in watched([*_run_folders(path)], "runs"):
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
        content = from_json(path.read_bytes())
    except (OSError, ValueError) as error:
        return Problem(folder.name, "damaged", f"record.json cannot be read ({error})")
    try:
        record = checked(content, folder.name)
    except ValueError as error:
        return Problem(folder.name, "damaged", f"record.json {error}")
    reason = contradiction(record, folder)
    return Problem(folder.name, "contradicted", reason) if reason else record


def _failure(folder: Path) -> str:
    """Why the run failed, if its folder says so."""
    try:
        failed = json.loads((folder / "state.json").read_text(encoding="utf-8")).get("failed")
    except (OSError, ValueError, AttributeError):
        failed = None
    return f"; it failed: {failed}" if failed else ""
