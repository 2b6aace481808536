"""Runs as the analysis reads them: records of finished runs, from run folders and from W&B; and problems with
the others, which are unfinished, damaged, or contradicted by their own samples."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from pipelines.errors import UserError
from pipelines.records import contradiction, from_json, read_object
from pipelines.tracking import check_server

Record = dict[str, Any]
Item = TypeVar("Item")

_FILES = ("record.json", "samples.jsonl", "config.yaml")  # a folder with any of them is a run folder
WANDB = "wandb:"


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


def read_runs(source: str) -> Runs:
    """Read the runs of a source.

    Args:
        source: one folder, or several separated by commas, each the `output_dir` of runs or a run folder; or
            `wandb:entity/project`; or `wandb:project` for the account's default entity.
    """
    if not source.strip():
        raise UserError("runs=: expected a folder of runs, or wandb:entity/project")
    if source.startswith(WANDB):
        return read_wandb(source.removeprefix(WANDB))
    return read_run_folders([Path(path.strip()) for path in source.split(",")])


def read_run_folders(paths: list[Path]) -> Runs:
    """Read all runs in some folders. Each folder holds run folders, or is one itself."""
    found: dict[str, Record] = {}
    folders: dict[str, Path] = {}
    problems: list[Problem] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"runs={path}: {'not a folder' if path.exists() else 'no such folder'}")
        inside = [folder for folder in ([path] if _is_run(path) else sorted(path.iterdir())) if _is_run(folder)]
        if not inside:
            raise UserError(f"runs={path}: no run folder in it; python -m pipelines.run output_dir={path} makes some")
        for folder in watched(inside, "runs"):
            record = _read(folder)
            if isinstance(record, Problem):
                problems.append(record)
                continue
            twin = found.setdefault(folder.name, record)
            folders.setdefault(folder.name, folder)
            if twin["metrics"] != record["metrics"]:
                problems.append(Problem(folder.name, "conflicting", f"{folders[folder.name]} and {folder} differ"))
    conflicting = {problem.run_id for problem in problems if problem.state == "conflicting"}
    return Runs([record for name, record in found.items() if name not in conflicting], problems, folders)


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)


def _read(folder: Path) -> Record | Problem:
    path = folder / "record.json"
    if not path.is_file():
        samples = folder / "samples.jsonl"
        lines = samples.read_bytes().count(b"\n") if samples.is_file() else 0
        failed = (read_object(folder / "state.json") or {}).get("failed")
        why = f"; it failed: {failed}" if failed else ""
        return Problem(folder.name, "unfinished", f"no record.json, {lines} samples so far{why}")
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


def checked(record: Any, run_id: str) -> Record:
    """The record of this run, if that is what was read.

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


def at(record: Any, place: str) -> Any:
    """What a record holds at a place like `config.model.name`; None if it holds nothing there."""
    for key in place.split("."):
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _require(record: Record, *places: str, kind: type) -> None:
    """Raise ValueError unless each place holds a value of this type; an empty text is none."""
    for place in places:
        if not isinstance(at(record, place), kind) or at(record, place) == "":
            raise ValueError(f"has no {place}")


def watched(items: Collection[Item], unit: str) -> Iterable[Item]:
    """The items, with a progress bar where they take more than two seconds; a log file has a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else 15
    return tqdm(items, unit=f" {unit}", desc="report", delay=2, mininterval=interval, leave=False)


# -- from W&B ----------------------------------------------------------------------------------------------------------


def read_wandb(path: str) -> Runs:
    """Read the runs of a W&B project, as the records that were logged.

    Runs of job type `report` are skipped: `analysis.report` logs them, and they are no results.

    Args:
        path: `entity/project`, or `project` of the account's default entity.
    """
    import wandb  # takes seconds

    entity, _, project = path.rpartition("/")
    if not project or "/" in entity:
        raise UserError(f"runs=wandb:{path}: expected wandb:entity/project")
    check_server()
    records: list[Record] = []
    problems: list[Problem] = []
    layers: dict[str, list[dict[str, Any]]] = {}
    try:
        api = wandb.Api(overrides={"base_url": wandb.setup().settings.base_url}, timeout=30)
        found = [run for run in api.runs(path, order="+created_at", lazy=False) if run.job_type != "report"]
        for run in found:
            record = _logged_record(run)
            if isinstance(record, Problem):
                problems.append(record)
                continue
            twin = next((one for one in records if one["run_id"] == record["run_id"]), None)
            if twin is not None:  # by somebody else
                if twin["metrics"] != record["metrics"]:
                    problems.append(Problem(run.id, "conflicting", f"another run here is {twin['run_id']} too"))
                continue
            records.append(record)
            if record["config"]["task"]["kind"] == "flocking":
                layers[record["run_id"]] = _layer_rows(run)
    except (wandb.Error, ValueError, OSError) as error:  # its HTTP library raises OSErrors
        reason = " ".join(str(error).split())
        raise UserError(f"runs=wandb:{path}: cannot be read ({reason})") from error
    if not found:
        raise UserError(f"runs=wandb:{path}: no run in this project")
    return Runs(records, problems, layers=layers)


def _logged_record(run: Any) -> Record | Problem:
    if run.state != "finished":
        return Problem(run.id, "unfinished", f"its state in W&B is {run.state}")
    logged = run.summary_metrics.get("record")
    try:
        parts = from_json(logged) if isinstance(logged, str) else None
    except ValueError:
        parts = None
    if not isinstance(parts, dict):
        return Problem(run.id, "damaged", "its summary holds no record")
    try:
        return checked({"status": "finished", "config": dict(run.config), **parts}, str(parts.get("run_id")))
    except ValueError as error:
        return Problem(run.id, "damaged", f"its record {error}")


def _layer_rows(run: Any) -> list[dict[str, Any]]:
    """The measures by layer, from the table that a flocking run logged; empty if there is no table."""
    table = run.summary_metrics.get("layers_table")
    if not isinstance(table, dict) or "path" not in table:
        return []
    with tempfile.TemporaryDirectory() as folder:
        run.file(table["path"]).download(root=folder, replace=True)
        content = json.loads((Path(folder) / table["path"]).read_text(encoding="utf-8"))
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
