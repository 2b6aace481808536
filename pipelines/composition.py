"""The command line, by Hydra: composes `conf/` with what it sets, and calls a task with the result.

The only module here that imports Hydra.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from pipelines.bake_config import BakeConfig
from pipelines.config import ModelConfig, RunConfig
from pipelines.config_keys import BAKE, CONF, RUN, Nodes, help_text, unknown_key
from pipelines.errors import UserError, not_one_of
from pipelines.method_keys import GridConfig
from pipelines.task_config import TASKS

_AMBIGUOUS = re.compile(r"Ambiguous value for argument '(?P<key>[^=]+)=(?P<values>[^']*)'")


@dataclass(frozen=True)
class Call:
    """How the job that is running was called.

    Attributes:
        overrides: what the command line sets; in a sweep, what this job of it sets.
        experiment: the experiment that was chosen; None without one.
        single: whether the job is the whole call, and not part of a sweep.
    """

    overrides: tuple[str, ...]
    experiment: str | None
    single: bool

    @property
    def command(self) -> str:
        """The call of this job alone, as one would type it."""
        return shlex.join(["python", "-m", "pipelines.run", *self.overrides])


def current_call() -> Call:
    """The call of the job that is running in this process."""
    settings = HydraConfig.get()
    experiment = settings.runtime.choices.get("experiment")
    return Call(tuple(settings.overrides.task), experiment, settings.mode == RunMode.RUN)


def register() -> None:
    """Make our sweeper, our launcher and the classes that the files in `conf/` extend known to Hydra."""
    plugins = Plugins.instance()
    # Imported after that, because Hydra runs other plugins' modules, which ours extend, again when it reads them.
    from hydra_plugins.griffin_sweeps._slurm import GriffinSlurmLauncher
    from hydra_plugins.griffin_sweeps._sweeper import GriffinSweeper

    plugins.register(GriffinSweeper)
    plugins.register(GriffinSlurmLauncher)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(name="bake_schema", node=BakeConfig)
    store.store(group="schema", name="model", node=ModelConfig)
    for name, node in TASKS.items():
        store.store(group="schema", name=name, node=node)
    store.store(group="hydra/help", name="griffin", node={"app_name": "pipelines.run", "template": help_text()})
    store.store(group="hydra/help", name="bake", node={"app_name": "pipelines.bake", "template": help_text(BAKE)})


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of a call, by itself; UserError where it cannot be composed."""
    register()
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            return hydra.compose("config", overrides=[*overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_readable(error, RUN)) from error
    except (AssertionError, ValueError) as error:
        raise UserError(f"cannot compose {' '.join(overrides)}: {error}") from error


def compose_and_call(task: Callable[[DictConfig], Any], name: str = "config", nodes: Nodes = RUN) -> None:
    """Call the task with what the command line composes to, by Hydra; a mistake ends the process with one line.

    Args:
        task: what is called.
        name: the file of `conf/` that says what the configuration is made of.
        nodes: the classes of its keys.
    """
    register()
    # Hydra then raises what goes wrong instead of printing it over several lines; we print one.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra's parser takes -m before or behind all KEY=VALUE, and not in between.
    sweep = [word for word in sys.argv[1:] if word in ("-m", "--multirun")]
    sys.argv[1:] = [*sweep[:1], *(word for word in sys.argv[1:] if word not in sweep)]
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
    except KeyboardInterrupt as end:
        word, number = ("terminated", signal.SIGTERM) if isinstance(end, Terminated) else ("interrupted", signal.SIGINT)
        print(f"{word}; the same command continues after the last whole sample", file=sys.stderr)
        sys.exit(128 + number)
    except UserError as error:
        sys.exit(f"error: {error}")
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(f"error: {UserError(_readable(error, nodes))}")
    except BrokenPipeError:  # of `--help | head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def _readable(error: Exception, nodes: Nodes) -> str:
    """What a composition error says to the user: the key, the value and what is allowed."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return not_one_of(group, choice, error.options)
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not of the form KEY=VALUE, or the value needs quotes"
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        key = str(cause.full_key)
        if key.startswith("hydra.launcher."):
            from hydra_plugins.griffin_sweeps._sweeper import unknown_launcher_key

            return unknown_launcher_key(key)
        return unknown_key(key, nodes)
    ambiguous = _AMBIGUOUS.search(str(error))
    if ambiguous:
        key, values = ambiguous["key"], ambiguous["values"]
        if nodes != RUN:
            return f"{key}={values}: several values; expected one"
        if key.startswith("grid."):
            return f"{key}={values}: expected a list, '{key}=[{values}]'"
        of_grid = key in (item.name for item in fields(GridConfig))
        grid = f", or 'grid.{key}=[{values}]' in one process" if of_grid else ""
        return f"{key}={values}: several values; for a sweep: -m {key}={values}{grid}"
    if isinstance(cause, OmegaConfBaseException):
        override = str(error).removeprefix("Error merging override ")
        key, _, value = override.partition("=")
        listed = f"expected a list, '{key}=[{value}]'" if "is not a ListConfig" in str(cause.msg) else None
        return f"{override}: {listed or str(cause.msg).splitlines()[0]}"
    return str(error)
