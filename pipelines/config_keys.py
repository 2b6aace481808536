"""Every key of the configuration: its help text, what is said of a key that does not exist, and the checked objects."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipelines.config import GridConfig, RunConfig, WandbConfig
from pipelines.errors import UserError
from pipelines.model_config import ModelConfig
from pipelines.task_config import TASKS, HubDataset

# What the keys of each class begin with.
_NODES: tuple[tuple[str, Any], ...] = (
    ("", RunConfig),
    ("grid.", GridConfig),
    ("wandb.", WandbConfig),
    ("model.", ModelConfig),
    *(("task.", node) for node in TASKS.values()),
    ("task.hub.", HubDataset),
)


def typed(cfg: DictConfig) -> RunConfig:
    """The composed configuration as checked objects.

    Raises:
        UserError: a value is missing, of the wrong type, or at odds with another.
    """
    for prefix in dict.fromkeys(prefix for prefix, _ in _NODES):
        group = OmegaConf.select(cfg, prefix.rstrip(".")) if prefix else cfg
        known = {item.name for place, node in _NODES if place == prefix for item in fields(node)}
        for key in set(group or ()) - known:
            raise UserError(unknown_key(f"{prefix}{key}"))  # +KEY=VALUE adds what no class has
    try:
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    assert isinstance(config, RunConfig)
    return config


def unknown_key(key: str) -> str:
    """What to tell a user who set a key that does not exist."""
    keys = [prefix + item.name for prefix, node in _NODES for item in fields(node)]
    if key in keys:
        return f"{key}: this task has no such key; --help lists the keys of each kind"
    return no_such_key(key, keys)


def no_such_key(key: str, keys: Iterable[str]) -> str:
    """What to tell a user who set a key that is none of these, with the one that is spelled most like it."""
    close = difflib.get_close_matches(key, list(keys), n=1)
    return f"{key}: no such key{f' (did you mean {close[0]}?)' if close else ''}; --help lists them all"


def help_text() -> str:
    """What `python -m pipelines.run --help` prints: every key with its help text, and the choices of each group."""
    lines = [
        "GRIFFIN: prune the feedforward neurons of a language model per prompt, and measure what it costs.",
        "",
        "  python -m pipelines.run model=gemma_7b task=xsum sparsity=0.5",
        "",
        "Keys (KEY=VALUE; the whole composed configuration: --cfg job; a sweep: -m and comma-separated values)",
    ]
    for prefix, node in _NODES:
        if prefix == "task.":
            lines += ["", (node.__doc__ or "").replace("\n    ", " ")]
        lines += [f"  {prefix + item.name:26} {item.metadata['help']}" for item in fields(node)]
    return "\n".join([*lines, "", "Choices of model, task, launcher and experiment", "$APP_CONFIG_GROUPS", ""])
