"""The methods that a call compares, and what makes two runs the same run."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import griffin
from griffin import LEARNING, Method
from griffin.method import DRAFTING
from pipelines import description
from pipelines.config import RunConfig
from pipelines.data import EMBEDDED, digest
from pipelines.records import environment

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Method",
    "data_digests",
    "described",
    "engine_for",
    "evaluation",
    "identity",
    "label",
    "methods",
    "run_config",
]


def methods(config: RunConfig) -> list[Method]:
    """The methods of a call: its grid, or the root's one; all of sparsity 0 are the one dense run."""
    if config.task.kind == "flocking":  # looks at the dense model
        return [Method(config.statistic, config.selection, 0.0)]
    points: list[Method] = []
    for statistic, compensation, budget, refresh, verification, sparsity in itertools.product(
        config.grid.statistic or [config.statistic],
        config.grid.compensation or [config.compensation],
        config.grid.budget or [config.budget],
        config.grid.refresh or [config.refresh],
        config.grid.verification or [config.verification],
        config.grid.sparsity or [config.sparsity],
    ):
        if refresh == "compensation" and compensation not in LEARNING:
            continue
        if statistic in griffin.TOKEN_STATISTICS and (compensation, refresh, verification) != ("none",) * 3:
            continue
        amount = tuple(sparsity) if isinstance(sparsity, list) else sparsity
        method = Method(statistic, config.selection, amount, compensation, budget, refresh)
        if verification != "none" and not method.dense:
            drafting = {name: getattr(config, name) for name in DRAFTING}
            method = replace(method, verification=verification, **drafting)
        if method not in points and not (method.dense and any(point.dense for point in points)):
            points.append(method)
    return sorted(points, key=lambda point: not point.dense)  # dense first: the others are read against it


def run_config(config: RunConfig, method: Method) -> dict[str, Any]:
    """The configuration of one method's run, as plain nested values: what a call for it alone would have."""
    plain = asdict(config)
    del plain["grid"]
    pruning: dict[str, Any] = vars(method) | ({"mode": "masked"} if method.by_token and not method.dense else {})
    return plain | {key: list(value) if isinstance(value, tuple) else value for key, value in pruning.items()}


def described(config: RunConfig, method: Method) -> dict[str, Any]:
    """The `method` of a run's record: its words, and all settings that say how the run pruned."""
    return description.method_entry(run_config(config, method), method.label, method.family)


def label(config: RunConfig, method: Method) -> str:
    """The method in words, with what assisted it."""
    words: str = described(config, method)["label"]
    return words


def evaluation(config: RunConfig, method: Method, device: str) -> dict[str, Any]:
    """The `evaluation` of a run's record: all that two runs must share to be compared.

    Args:
        config: the call's.
        method: the run's.
        device: what the model runs on, in words.
    """
    ran_on = environment(device) | {"data": data_digests(config)}
    return description.evaluation_entry(run_config(config, method), ran_on)


def identity(config: RunConfig, method: Method, device: str) -> dict[str, Any]:
    """All that determines a run's result, and nothing else: equal identities are the same run.

    Data files count by their content, not by their place; a dense run has no statistic; what came later and is not
    used (no compensation, no offset) leaves the identity that it was before.
    """
    settings = description.determining(run_config(config, method), data_digests(config))
    later = description.LATER
    used = {key: value for key, value in settings.items() if key not in later or value != later[key]}
    return used | {"device": device}


def data_digests(config: RunConfig) -> dict[str, str]:
    """The files that a run reads, by the keys that name them, as digests of their content."""
    task = config.task
    unread = {
        key for local, keys in description.INSTEAD_OF.items() if getattr(task, local, None) is not None for key in keys
    }
    folders = {"data_files": Path(), "shots_file": Path(), "embedded": EMBEDDED, "embedded_shots": EMBEDDED}
    return {
        key: digest(folder / getattr(task, key))
        for key, folder in folders.items()
        if key not in unread and getattr(task, key, None) is not None
    }


def engine_for(model: nn.Module, methods: Sequence[Method], config: RunConfig) -> griffin.Engine:
    """The engine that evaluates these methods, in the configuration's mode.

    Raises:
        UnsupportedModelError: the model cannot be evaluated, or not be pruned where a method does.
    """
    griffin.refuse_uncroppable(model)
    if any(method.prunes_vocabulary for method in methods):
        griffin.output_embedding(model)  # refuses what has none
    return griffin.Engine(
        model,
        pruning=config.offload_dense or any(not method.dense for method in methods),
        mode=config.mode,
        compiler=griffin.compiled_call if config.compile else None,
        offload_dense=config.offload_dense,
    )
