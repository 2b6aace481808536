"""The methods that a call compares, and what makes two runs the same run."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import griffin
from pipelines.config import RunConfig
from pipelines.data import EMBEDDED, digest


@dataclass(frozen=True)
class Method:
    """One way to prune: a statistic, a selection and a sparsity; sparsity 0 is the dense model."""

    statistic: str
    selection: str
    sparsity: float | tuple[float, ...]

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned, so that statistic and selection mean nothing."""
        values = self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)
        return not any(values)

    @property
    def label(self) -> str:
        """The method in words, for tables and run names."""
        if self.dense:
            return "dense"
        amount = "per layer" if isinstance(self.sparsity, tuple) else f"{100 * self.sparsity:g}%"
        words = [self.statistic] if self.selection == "topk" else [self.statistic, self.selection]
        return " ".join([*words, amount])


def methods(config: RunConfig) -> list[Method]:
    """The methods of a call: its grid, or the root's one; all of sparsity 0 are the one dense run."""
    statistics = config.grid.statistic or [config.statistic]
    sparsities = config.grid.sparsity or [config.sparsity]
    points = []
    for statistic, sparsity in itertools.product(statistics, sparsities):
        method = Method(statistic, config.selection, tuple(sparsity) if isinstance(sparsity, list) else sparsity)
        if method not in points and not (method.dense and any(point.dense for point in points)):
            points.append(method)
    return sorted(points, key=lambda point: not point.dense)  # dense first: the others are read against it


def run_config(config: RunConfig, method: Method) -> dict[str, Any]:
    """The configuration of one method's run, as plain nested values: what a call for it alone would have."""
    plain = asdict(config)
    del plain["grid"]
    sparsity = list(method.sparsity) if isinstance(method.sparsity, tuple) else method.sparsity
    return plain | {"statistic": method.statistic, "selection": method.selection, "sparsity": sparsity}


def identity(config: RunConfig, method: Method, device: str) -> dict[str, Any]:
    """All that determines a run's result, and nothing else: equal identities are the same run.

    Data files count by their content, not by their place; a dense run has no statistic.
    """
    plain = run_config(config, method)
    task = plain["task"]
    for local, unused_source in (("data_files", ("embedded", "hub")), ("shots_file", ("embedded_shots",))):
        if task.get(local) is not None:
            task |= dict.fromkeys(unused_source)
    for key, folder in (
        ("data_files", Path()),
        ("shots_file", Path()),
        ("embedded", EMBEDDED),
        ("embedded_shots", EMBEDDED),
    ):
        if task.get(key) is not None:
            task[key] = digest(folder / task[key])
    for where, unused in (
        (plain, ("output_dir", "tags", "wandb")),
        (plain["model"], ("licence_gate",)),
        (plain, ("statistic", "selection", "mode", "shared_experts") if method.dense else ()),
    ):
        for key in unused:
            del where[key]
    return plain | {"device": device, "sparsity": 0.0 if method.dense else plain["sparsity"]}


def pruner_options(config: RunConfig, method: Method) -> dict[str, Any]:
    """The method as arguments of `griffin.prune`."""
    assert config.mode in griffin.MODES
    return {
        "sparsity": method.sparsity,
        "statistic": method.statistic,
        "selection": method.selection,
        "mode": config.mode,
        "shared_experts": config.shared_experts,
        "seed": config.seed,
    }
