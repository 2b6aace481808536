"""Every key of the configuration: its help text, what is said of a key that does not exist, and the checked objects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import MISSING as NOTHING
from dataclasses import Field, fields
from pathlib import Path
from textwrap import fill
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipelines.bake_config import BakeConfig
from pipelines.config import ModelConfig, RunConfig, WandbConfig
from pipelines.errors import UserError, did_you_mean
from pipelines.method_keys import GridConfig
from pipelines.task_config import TASKS, HubDataset

CONF = Path(__file__).resolve().parents[1] / "conf"

Nodes = tuple[tuple[str, Any], ...]

# Of each command that is composed from a file of conf/, its classes, and what the keys of each begin with.
RUN: Nodes = (
    ("", RunConfig),
    ("grid.", GridConfig),
    ("wandb.", WandbConfig),
    ("model.", ModelConfig),
    *(("task.", node) for node in TASKS.values()),
    ("task.hub.", HubDataset),
)
BAKE: Nodes = (("", BakeConfig), ("model.", ModelConfig))


def typed(cfg: DictConfig) -> RunConfig:
    """The composed configuration as checked objects; UserError where a value is wrong, or at odds with another."""
    config = checked(cfg, RUN)
    assert isinstance(config, RunConfig)
    return config


def checked(cfg: DictConfig, nodes: Nodes) -> Any:
    """The same of a command with these classes."""
    for prefix in dict.fromkeys(prefix for prefix, _ in nodes):
        group = OmegaConf.select(cfg, prefix.rstrip(".")) if prefix else cfg
        known = {item.name for place, node in nodes if place == prefix for item in fields(node)}
        for key in set(group or ()) - known:
            raise UserError(unknown_key(f"{prefix}{key}", nodes))  # +KEY=VALUE adds what no class has
    try:
        return OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error


def unknown_key(key: str, nodes: Nodes = RUN) -> str:
    """What to tell a user who set a key that does not exist."""
    keys = [prefix + item.name for prefix, node in nodes for item in fields(node)]
    if key in keys:
        return f"{key}: this task has no such key; --help lists the keys of each kind"
    return no_such_key(key, keys)


def no_such_key(key: str, keys: Iterable[str]) -> str:
    """What to tell a user who set a key that is none of these, with the one that is spelled most like it."""
    return f"{key}: no such key{did_you_mean(key, keys)}; --help lists them all"


_RUN_HELP = """\
GRIFFIN: prune the feedforward neurons of a language model per prompt, and measure what it costs.

  python -m pipelines.run model=gemma_7b task=xsum sparsity=0.5

Set keys with KEY=VALUE, lists with KEY=[A,B]. Several values make a sweep: -m KEY=A,B. The whole composed
configuration: --cfg job. In brackets: the default; a model or a task may have its own.

A run"""
_BAKE_HELP = """\
Prune a model once for all prompts of a file, and write it as an ordinary checkpoint.

  python -m pipelines.bake model=gemma_7b data_files=prompts.jsonl sparsity=0.5 out=FOLDER

Set keys with KEY=VALUE. In brackets: the default; a model or a method may have its own.

A model"""


def help_text(nodes: Nodes = RUN) -> str:
    """What `--help` of a command prints: every key with its help text, and the choices of each group."""
    groups = {key: text for key, text in GROUPS.items() if nodes == RUN or key in ("model", "method")}
    lines = [_RUN_HELP if nodes == RUN else _BAKE_HELP, *(f"  {key:26} {text}" for key, text in groups.items())]
    for prefix, node in nodes:
        if prefix:
            lines += ["", (node.__doc__ or "").replace("\n    ", " ")]
        for key, text, default in _listed(prefix, node):
            lines.append(f"  {key:26} {text}{f' ({default})' if default else ''}")
    lines += ["", "Choices"]
    for group in groups:
        names = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        lines.append(fill(names, 118, initial_indent=f"  {group:26} ", subsequent_indent=" " * 29))
    return "\n".join([*lines, ""])


def shown_keys() -> list[tuple[str, str, str]]:
    """Every key of a run but those of the task and the model: its name, what it means, and its default."""
    return [key for prefix, node in RUN[:3] for key in _listed(prefix, node)]


def _listed(prefix: str, node: Any) -> Iterator[tuple[str, str, str]]:
    for item in fields(node):
        if prefix + item.name not in (*GROUPS, "grid", "wandb"):
            yield prefix + item.name, item.metadata["help"], _default(item)


# The keys that choose a file of conf/, and what each group is.
GROUPS = {
    "model": "which model, and how it is loaded: a file of conf/model (smollm2_135m)",
    "task": "what is measured, and on which data: a file of conf/task (briefs)",
    "method": "a method by its name, on top of which single keys go: a file of conf/method (griffin)",
    "launcher": "where the points of a sweep run: here, in processes of this machine, or as SLURM jobs (local)",
    "experiment": "a preset that sets several of the keys below, often as a sweep (null)",
}


def _default(item: Field[Any]) -> str:
    """A field's default in words; empty where a file of `conf/` must set it."""
    value = item.default if item.default_factory is NOTHING else item.default_factory()
    if value is NOTHING or value == MISSING:
        return ""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and not value.isprintable()):
        value = json.dumps(value)
    return "empty" if value == "" else str(value)
