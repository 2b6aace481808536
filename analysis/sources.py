"""Reads runs from the place that a user names: run folders, or a W&B project."""

from __future__ import annotations

from pathlib import Path

from analysis.run_folders import read_run_folders
from analysis.runs import Runs
from pipelines.errors import UserError

WANDB = "wandb:"


def read_runs(source: str) -> Runs:
    """Read the runs of a source.

    Args:
        source: one folder, or several separated by commas, each the `output_dir` of runs or a run folder; or
            `wandb:entity/project`; or `wandb:project` for the account's default entity.

    Raises:
        UserError: the source does not exist, or holds no run.
    """
    if not source.strip():
        raise UserError("runs=: expected a folder of runs, or wandb:entity/project")
    if source.startswith(WANDB):
        from analysis.wandb_runs import read_wandb  # importing wandb takes seconds

        return read_wandb(source.removeprefix(WANDB))
    return read_run_folders([Path(path.strip()) for path in source.split(",")])
