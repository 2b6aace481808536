"""Hydra's basic sweep, made to survive: points are checked and planned first, and every run ends with a status."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobStatus
from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from omegaconf import DictConfig, OmegaConf, open_dict

from pipelines.config_keys import no_such_key, typed
from pipelines.errors import UserError, at_least
from pipelines.sweeps import FAILED, HELD, ManifestEntry, RunStatus, merged, of_this_call, wait_for_held

# Where and how a sweep runs, as against what it runs.
_WHERE = ("launcher", "output_dir", "wandb.mode", "wandb.project", "wandb.entity")


class GriffinSweeper(BasicSweeper):
    """Every combination of the comma-separated values is a point; at most `max_batch_size` are launched at once.

    A point that is wrong fails before anything runs. A point that is finished is not launched. What other processes
    hold is waited for. A worker that dies takes its own point with it, and no other.
    """

    config: DictConfig  # as of `setup`
    hydra_context: Any
    launcher: Any

    def setup(self, *, config: DictConfig, **arguments: Any) -> None:
        """As Hydra's sweepers; UserError where a setting is not allowed, or SLURM is not on this machine."""
        check(config.hydra)
        super().setup(config=config, **arguments)

    def sweep(self, arguments: list[str]) -> None:
        """Run the points, and leave what became of them in `pipelines.sweeps.of_this_call`.

        Raises:
            HydraException: a point cannot be composed; nothing has been written or run.
            UserError: the output folder cannot be written, or SLURM takes no jobs.
        """
        parsed = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(
            [*self._parse_config(), *arguments]
        )
        swept = {one.get_key_element(): one for one in parsed if one.is_sweep_override()}
        if "launcher" in swept:
            raise UserError(f"{swept['launcher'].input_line}: expected one")
        group = self._group(parsed, [*swept])
        points = [[*overrides, *group] for overrides in self.split_arguments(parsed, None)[0]]
        configs = [self._composed(overrides) for overrides in points]
        words = [" ".join(one for one in overrides if one.partition("=")[0] in swept) for overrides in points]
        found = [self._known(*point) for point in zip(words, configs, strict=True)]
        pending = [number for number, statuses in enumerate(found) if not statuses]
        if pending:
            OmegaConf.save(self.config, Path(self.config.hydra.sweep.dir) / "multirun.yaml")
        while pending:
            for number, statuses in self._launched(pending, points, configs):
                found[number] = merged(found[number], statuses)
            for number in [number for number in pending if wait_for_held(found[number])]:
                found[number] = merged(found[number], self._known(words[number], configs[number]) or found[number])
            pending = [number for number in pending if any(one.state == HELD for one in found[number])]
        of_this_call.extend(zip(words, found, strict=True))

    def _group(self, overrides: Sequence[Override], swept: Sequence[str]) -> list[str]:
        """What makes the points one group in W&B, as overrides: the experiment's name, else what is swept."""
        texts = {one.get_key_element(): one.input_line for one in overrides}
        if "wandb.group" in texts or not swept:
            return []
        experiment = self.config.hydra.runtime.choices.get("experiment")
        if experiment and "experiment" not in swept:
            return [f"wandb.group={experiment}"]
        what = sorted(str(text) for key, text in texts.items() if key not in _WHERE and not key.startswith("hydra"))
        digest = hashlib.sha256("\n".join(what).encode()).hexdigest()[:6]
        keys = "-".join(key.rpartition(".")[2] for key in swept)
        return [f"wandb.group={keys[:100]}-{digest}"]

    def _composed(self, overrides: list[str]) -> DictConfig:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            del config["hydra"]
        return config

    def _known(self, words: str, composed: DictConfig) -> list[RunStatus]:
        """The statuses of a point that needs no launch because it is wrong or finished.

        Any other point has none yet: it goes into the manifest.
        """
        try:
            entry = ManifestEntry(typed(composed))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return [RunStatus("", FAILED, reason=str(error))]
        launcher = self.config.hydra.runtime.choices.get("launcher") or ""
        skipped = entry.finished_before(launcher)
        for run in skipped:
            print(f"{run.folder}: finished before, skipped", file=sys.stderr)
        if not skipped:
            entry.plan(words, launcher)
        return skipped

    def _launched(
        self, numbers: Sequence[int], points: Sequence[list[str]], configs: Sequence[DictConfig]
    ) -> Iterator[tuple[int, list[RunStatus]]]:
        """The statuses of the points with these numbers, launched in batches."""
        size = self.max_batch_size or len(numbers)
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            try:
                returns = self.launcher.launch([points[number] for number in batch], initial_job_idx=batch[0])
            except BrokenExecutor as error:
                # A worker of joblib was killed, and joblib gave up on all. Alone, only the one that dies can fail.
                if len(batch) > 1:
                    print("warning: a worker died; going on with one point at a time", file=sys.stderr)
                    for number in batch:
                        yield from self._launched([number], points, configs)
                else:
                    reason = f"its worker died ({type(error).__name__})"
                    yield batch[0], ManifestEntry(typed(configs[batch[0]])).died(reason)
                continue
            for number, returned in zip(batch, returns, strict=True):
                if returned.status == JobStatus.COMPLETED:
                    yield number, returned.return_value
                else:  # `return_value` would raise, after printing to stderr
                    yield number, ManifestEntry(typed(configs[number])).died(str(returned._return_value))


# -- what Hydra's types cannot say about how a sweep is to run, checked before anything is written or submitted --------

_KEYS = sorted({f"hydra.launcher.{key.name}" for node in (SlurmQueueConf, JobLibLauncherConf) for key in fields(node)})
_COUNTS = (
    *("timeout_min", "cpus_per_task", "mem_gb", "array_parallelism", "nodes", "tasks_per_node", "cpus_per_gpu"),
    *("gpus_per_node", "gpus_per_task", "signal_delay_s"),
)
_NAMES = ("partition", "account", "qos", "constraint")


def unknown_launcher_key(key: str) -> str:
    """What to tell a user who set a key of `hydra.launcher` that the chosen launcher does not have."""
    return f"{key}: this launcher has no such key; see conf/launcher" if key in _KEYS else no_such_key(key, _KEYS)


def check(hydra: DictConfig) -> None:
    """Check `hydra.sweeper` and `hydra.launcher`: a UserError names the key, its value and what is allowed."""
    launcher = hydra.launcher
    at_least("hydra.sweeper.max_batch_size", hydra.sweeper.max_batch_size, 1)
    for key in launcher:
        if f"hydra.launcher.{key}" not in (*_KEYS, "hydra.launcher._target_"):
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


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="griffin",
    node=BasicSweeperConf(_target_=f"{GriffinSweeper.__module__}.GriffinSweeper"),
    provider="griffin",
)
