"""Reads runs back from W&B. No other module of the analysis imports wandb."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import wandb

from analysis.runs import Problem, Record, Runs, checked
from pipelines.errors import UserError
from pipelines.records import from_json
from pipelines.tracking import check_server

_FLOCKING_TABLE = "layers_table"


def read_wandb(path: str) -> Runs:
    """Read the runs of a W&B project, as the records that were logged.

    Runs of job type `report` are skipped: `analysis.report` logs them, and they are no results.

    Args:
        path: `entity/project`, or `project` of the account's default entity.

    Raises:
        UserError: the project cannot be read, or holds no run.
    """
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
            record = _record(run)
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


def _record(run: Any) -> Record | Problem:
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
    table = run.summary_metrics.get(_FLOCKING_TABLE)
    if not isinstance(table, dict) or "path" not in table:
        return []
    with tempfile.TemporaryDirectory() as folder:
        run.file(table["path"]).download(root=folder, replace=True)
        content = json.loads((Path(folder) / table["path"]).read_text(encoding="utf-8"))
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]
