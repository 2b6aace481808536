"""What Hydra's types cannot say about how a sweep is to run, checked before anything is written or submitted."""

from __future__ import annotations

import dataclasses

from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf import DictConfig

_COUNTS = (
    *("timeout_min", "cpus_per_task", "mem_gb", "array_parallelism", "nodes", "tasks_per_node", "cpus_per_gpu"),
    *("gpus_per_node", "gpus_per_task", "signal_delay_s"),
)
_NAMES = ("partition", "account", "qos", "constraint")


def launcher_keys() -> list[str]:
    """Every key that some launcher has."""
    names = {item.name for schema in (SlurmQueueConf, JobLibLauncherConf) for item in dataclasses.fields(schema)}
    return [f"hydra.launcher.{name}" for name in sorted(names)]


def unknown_launcher_key(key: str) -> str:
    """What to tell a user who set a key of `hydra.launcher` that the chosen launcher does not have."""
    from pipelines.config_keys import no_such_key

    keys = launcher_keys()
    if key in keys:
        return f"{key}: this launcher has no such key; see conf/launcher"
    return no_such_key(key, keys)


def check(hydra: DictConfig) -> None:
    """Check `hydra.sweeper` and `hydra.launcher`.

    Raises:
        UserError: names the key, its value and what is allowed.
    """
    from pipelines.config_fields import at_least
    from pipelines.errors import UserError

    launcher = hydra.launcher
    at_least("hydra.sweeper.max_batch_size", hydra.sweeper.max_batch_size, 1)
    for key in launcher:
        if f"hydra.launcher.{key}" not in (*launcher_keys(), "hydra.launcher._target_"):
            raise UserError(unknown_launcher_key(f"hydra.launcher.{key}"))  # +KEY=VALUE adds what no launcher has
    if launcher.get("n_jobs") == 0:
        raise UserError("hydra.launcher.n_jobs=0: expected 1 or more, or -1 for as many as there are CPUs")
    for name in _COUNTS:
        at_least(f"hydra.launcher.{name}", launcher.get(name), 1)
    for name in _NAMES:
        value = launcher.get(name)
        if value is not None and not value.strip():
            raise UserError(f"hydra.launcher.{name}=: expected a name, or leave it out for the site's default")
    minutes, delay = launcher.get("timeout_min"), launcher.get("signal_delay_s")
    if minutes is not None and delay is not None and delay >= 60 * minutes:
        raise UserError(
            f"hydra.launcher.signal_delay_s={delay}: expected less than the {60 * minutes} seconds of "
            f"hydra.launcher.timeout_min={minutes}; jobs would be requeued as soon as they begin"
        )
