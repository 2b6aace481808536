"""Runs as the analysis reads them: finished runs with their records, and problems with the others."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

Record = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Problem:
    """A run that the report leaves out.

    Attributes:
        run_id: the run folder's name, or the run's id in W&B.
        state: `unfinished`, `damaged`, `contradicted` (by its own samples) or `conflicting` (with a copy of it).
        reason: one line that says why.
    """

    run_id: str
    state: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """All runs of one source.

    Attributes:
        records: the records of the finished runs.
        problems: the other runs.
        folders: run id -> run folder, for runs that were read from folders.
        layers: run id -> measures by layer, for flocking runs that were read from W&B.
    """

    records: list[Record]
    problems: list[Problem]
    folders: dict[str, Path] = field(default_factory=dict)
    layers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def watched(items: Collection[Item], unit: str) -> Iterable[Item]:
    """The items, with a progress bar where they take more than two seconds; a log file has a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else 15
    return tqdm(items, unit=f" {unit}", desc="report", delay=2, mininterval=interval, leave=False)


def checked(record: Any, run_id: str) -> Record:
    """The record.

    Args:
        record: what was read, which may be anything.
        run_id: the run that it should belong to.

    Raises:
        ValueError: the record cannot be used. The message says why, as a sentence about the record.
    """
    if not isinstance(record, dict):
        raise ValueError("is not an object")
    if record.get("status") != "finished":
        raise ValueError(f"has status {record.get('status')!r}, expected 'finished'")
    if record.get("run_id") != run_id:
        raise ValueError(f"is the record of another run, {record.get('run_id')!r}")
    _require(record, "config.model.name", "config.task.name", "config.task.kind", kind=str)
    _require(record, "metrics", "timing", "environment", kind=dict)
    for name, value in record["metrics"].items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"says metrics.{name} is {json.dumps(value)}, expected a number")
    if not isinstance(record.get("method"), dict) or not isinstance(record.get("evaluation"), dict):
        raise ValueError("is of an unknown version: it has no method or no evaluation; run its command again")
    _require(record, "method.label", "method.family", kind=str)
    return record


def _require(record: Record, *places: str, kind: type) -> None:
    """Raise ValueError unless each place holds a value of this type; an empty text is none."""
    for place in places:
        value: Any = record
        for key in place.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind) or value == "":
            raise ValueError(f"has no {place}")
