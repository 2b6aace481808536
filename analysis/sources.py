"""Where runs come from: folders on this machine, or a W&B project."""

from __future__ import annotations

from pathlib import Path

from analysis.run_folders import Runs, read_run_folders
from pipelines.errors import UserError

WANDB = "wandb:"


def read_runs(source: str) -> Runs:
    """The runs of a source.

    Args:
        source: one folder or several with commas between, each the `output_dir` of runs or a run folder; or
            `wandb:entity/project`, or `wandb:project` of the account's default entity.

    Raises:
        UserError: the source is not there, or holds no run.
    """
    if not source.strip():
        raise UserError("runs=: expected a folder of runs, or wandb:entity/project")
    if source.startswith(WANDB):
        from analysis.wandb_runs import read_wandb  # wandb takes seconds to import

        return read_wandb(source.removeprefix(WANDB))
    return read_run_folders([Path(path.strip()) for path in source.split(",")])
