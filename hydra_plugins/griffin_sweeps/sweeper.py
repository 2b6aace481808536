"""Hydra's basic sweep, made to survive: points are checked and planned first, and every run ends with a status."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper, BasicSweeperConf
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobStatus
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.griffin_sweeps.checks import check

if TYPE_CHECKING:
    from pipelines.sweeps.run_status import RunStatus

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
        """As Hydra's sweepers.

        Raises:
            UserError: a value of `hydra.sweeper` or `hydra.launcher` is not allowed, or SLURM is not on this machine.
        """
        check(config.hydra)
        super().setup(config=config, **arguments)

    def sweep(self, arguments: list[str]) -> None:
        """Run the points, and leave what became of them in `pipelines.sweeps.run_status.of_this_call`.

        Raises:
            HydraException: a point cannot be composed; nothing has been written or run.
            UserError: the output folder cannot be written, or SLURM takes no jobs.
        """
        from pipelines.errors import UserError
        from pipelines.sweeps import run_status
        from pipelines.sweeps.run_status import held_folders, merged, wait_for

        parsed = OverridesParser.create(config_loader=self.hydra_context.config_loader).parse_overrides(
            [*self._parse_config(), *arguments]
        )
        swept = [one.get_key_element() for one in parsed if one.is_sweep_override()]
        if "launcher" in swept:
            raise UserError(
                f"{next(one.input_line for one in parsed if one.get_key_element() == 'launcher')}: expected one"
            )
        group = self._group(parsed)
        points = [[*overrides, *group] for overrides in self.split_arguments(parsed, None)[0]]
        configs = [self._composed(overrides) for overrides in points]
        words = [" ".join(one for one in overrides if one.partition("=")[0] in swept) for overrides in points]
        found: list[list[RunStatus]] = [self._known(*point) for point in zip(words, configs, strict=True)]
        pending = [number for number, statuses in enumerate(found) if not statuses]
        if pending:
            OmegaConf.save(self.config, Path(self.config.hydra.sweep.dir) / "multirun.yaml")
        while pending:
            for number, statuses in self._launched(pending, points, configs):
                found[number] = merged(found[number], statuses)
            held = [number for number in pending if held_folders(found[number])]
            wait_for([folder for number in held for folder in held_folders(found[number])])
            for number in held:
                found[number] = merged(found[number], self._known(words[number], configs[number]) or found[number])
            pending = [number for number in held if held_folders(found[number])]
        for point, statuses in zip(words, found, strict=True):
            run_status.of_this_call.append([replace(one, words=point) for one in statuses])

    def _group(self, overrides: Sequence[Override]) -> list[str]:
        """What makes the points one group in W&B, as overrides: the experiment's name, else what is swept."""
        texts = {one.get_key_element(): one.input_line for one in overrides}
        swept = [one.get_key_element() for one in overrides if one.is_sweep_override()]
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
        from pipelines.config_keys import typed
        from pipelines.errors import UserError
        from pipelines.sweeps.manifest import ManifestEntry
        from pipelines.sweeps.run_status import FAILED, SKIPPED, RunStatus

        try:
            entry = ManifestEntry(typed(composed))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return [RunStatus(words, "", FAILED, reason=str(error))]
        launcher = self.config.hydra.runtime.choices.get("launcher") or ""
        runs = entry.finished_runs(launcher)
        if runs is None:
            entry.plan(words, launcher)
            return []
        for run in runs:
            print(f"{run}: finished before, skipped", file=sys.stderr)
        return [RunStatus(entry.words, label, SKIPPED, run) for label, run in zip(entry.labels, runs, strict=True)]

    def _launched(
        self, numbers: Sequence[int], points: Sequence[list[str]], configs: Sequence[DictConfig]
    ) -> Iterator[tuple[int, list[RunStatus]]]:
        """The statuses of the points with these numbers, launched in batches."""
        from pipelines.config_keys import typed
        from pipelines.sweeps.manifest import ManifestEntry

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


ConfigStore.instance().store(
    group="hydra/sweeper",
    name="griffin",
    node=BasicSweeperConf(_target_="hydra_plugins.griffin_sweeps.sweeper.GriffinSweeper"),
    provider="griffin",
)
