"""The one entry: `python -m pipelines.run model=gemma_7b task=xsum sparsity=0.5`, with `-m` for sweeps."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from pipelines import config, job
from pipelines.errors import UserError
from pipelines.summary import flocking_table, latency_table, perplexity_table, summary_table
from pipelines.sweeps.run_status import FAILED, outcome_table

CONF = Path(__file__).resolve().parents[1] / "conf"
TABLES = (summary_table, perplexity_table, latency_table, flocking_table)


def main() -> None:
    """Compose, run, print the summary. Exit code 1 if any run failed, 128 + N where signal N ended it."""
    job.outcomes.clear()
    compose_and_call(job.job)
    outcomes = [one for point in job.outcomes for one in point]
    rows = [(one.method, record) for one in outcomes if (record := one.record()) is not None]
    if rows:
        tables = [table(rows) for table in TABLES]
        print("\n" + "\n\n".join(table for table in tables if table))
        print(f"\nRecords: {', '.join(sorted({str(one.folder.parent) for one in outcomes if one.folder}))}")
    if len(job.outcomes) > 1:
        print("\n" + outcome_table(outcomes))
    if any(one.state == FAILED for one in outcomes):
        sys.exit(1)


def compose_and_call(task: Callable[[DictConfig], Any]) -> None:
    """Call the task with what the command line composes to, by Hydra; a mistake ends the process with one line."""
    config.register()
    # Hydra then raises what goes wrong instead of printing it over several lines; we print one.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(task)()
    except Terminated:
        print("terminated; the same command continues after the last whole sample", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        print("interrupted; the same command continues after the last whole sample", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {UserError(_readable(error))}")
    except OSError as error:
        sys.exit(f"error: output_dir: cannot write {error.filename}: {error.strerror}")
    except (AssertionError, ValueError) as error:
        # What Hydra does not foresee in a command line, such as a group set to null.
        overrides = " ".join(sys.argv[1:])
        sys.exit(f"error: {UserError(f'cannot compose {overrides}: {error}')}")
    finally:
        signal.signal(signal.SIGTERM, before)


class Terminated(KeyboardInterrupt):
    """SIGTERM, taken as an interrupt: open runs are closed, their locks released, and the process ends."""


def _terminated(*_: Any) -> None:
    raise Terminated


def _readable(error: Exception) -> str:
    """What a composition error says to the user: the key, the value and what is allowed."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={choice}: expected one of {', '.join(error.options)}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form KEY=VALUE, or the value needs quotes"
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return config.unknown_key(str(cause.full_key))
    if isinstance(cause, OmegaConfBaseException):
        return f"{str(error).removeprefix('Error merging override ')}: {str(cause.msg).splitlines()[0]}"
    return str(error)


if __name__ == "__main__":
    main()
