"""The methods that a call compares, and what makes two runs the same run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import griffin
from pipelines.config import LEARNING, RunConfig
from pipelines.data import EMBEDDED, digest

if TYPE_CHECKING:
    from torch import Tensor, nn

    Chosen = tuple[list[Tensor], list[griffin.Correction | None]]
    Choose = Callable[[griffin.SharedPrompt], Chosen]

# A file named on the command line is read instead of what the task's file names.
_INSTEAD_OF = {"data_files": ("embedded", "hub"), "shots_file": ("embedded_shots",)}


class Execution(Protocol):
    """How the experts of any method are put to work: a configuration says it, among other things."""

    mode: str
    shared_experts: bool
    seed: int


@dataclass(frozen=True)
class Method:
    """One way to prune: how neurons are scored and chosen, how many, how the kept ones make up for the others, and
    what follows the text that is generated; sparsity 0 is the dense model."""

    statistic: str
    selection: str
    sparsity: float | tuple[float, ...]
    compensation: str = "none"
    budget: str = "uniform"
    refresh: str = "none"

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
        words = [self.statistic] if self.compensation == "none" else [f"{self.statistic}+{self.compensation}"]
        words += [] if self.selection == "topk" else [self.selection]
        words += [] if self.budget == "uniform" else [self.budget]
        words += [] if self.refresh == "none" else [f"refresh={self.refresh}"]
        return " ".join([*words, amount])


def methods(config: RunConfig) -> list[Method]:
    """The methods of a call: its grid, or the root's one; all of sparsity 0 are the one dense run."""
    if config.task.kind == "flocking":  # looks at the dense model
        return [Method(config.statistic, config.selection, 0.0)]
    points: list[Method] = []
    for statistic, compensation, budget, refresh, sparsity in itertools.product(
        config.grid.statistic or [config.statistic],
        config.grid.compensation or [config.compensation],
        config.grid.budget or [config.budget],
        config.grid.refresh or [config.refresh],
        config.grid.sparsity or [config.sparsity],
    ):
        if refresh == "compensation" and compensation not in LEARNING:
            continue
        amount = tuple(sparsity) if isinstance(sparsity, list) else sparsity
        method = Method(statistic, config.selection, amount, compensation, budget, refresh)
        if method not in points and not (method.dense and any(point.dense for point in points)):
            points.append(method)
    return sorted(points, key=lambda point: not point.dense)  # dense first: the others are read against it


def run_config(config: RunConfig, method: Method) -> dict[str, Any]:
    """The configuration of one method's run, as plain nested values: what a call for it alone would have."""
    plain = asdict(config)
    del plain["grid"]
    sparsity = list(method.sparsity) if isinstance(method.sparsity, tuple) else method.sparsity
    return plain | {
        "statistic": method.statistic,
        "selection": method.selection,
        "sparsity": sparsity,
        "compensation": method.compensation,
        "budget": method.budget,
        "refresh": method.refresh,
    }


# What means nothing where nothing is pruned.
_PRUNING = ("statistic", "selection", "mode", "shared_experts", "compensation", "budget", "refresh")

# Keys that were added when runs had been recorded already, with the values that change nothing.
_LATER = {
    "compensation": "none",
    "budget": "uniform",
    "refresh": "none",
    "offset": 0,
    "compile": False,
    "offload_dense": False,
}


def identity(config: RunConfig, method: Method, device: str) -> dict[str, Any]:
    """All that determines a run's result, and nothing else: equal identities are the same run.

    Data files count by their content, not by their place; a dense run has no statistic; what came later and is not
    used (no compensation, no offset) leaves the identity that it was before.
    """
    plain = run_config(config, method)
    task = plain["task"]
    for local, unused in _INSTEAD_OF.items():
        if task.get(local) is not None:
            task |= dict.fromkeys(unused)
    task |= data_digests(config)
    for where, unused in (
        (plain, ("output_dir", "tags", "wandb")),
        (plain["model"], ("licence_gate", "install")),
        (plain, ("offload_dense",) if config.task.kind != "latency" else ()),  # changes times alone
        (plain, _PRUNING if method.dense else ()),
        (plain, [key for key, unused_value in _LATER.items() if plain.get(key) == unused_value]),
    ):
        for key in unused:
            where.pop(key, None)
    return plain | {"device": device, "sparsity": 0.0 if method.dense else plain["sparsity"]}


def data_digests(config: RunConfig) -> dict[str, str]:
    """The files that a run reads, by the keys that name them, as digests of their content."""
    task = config.task
    unread = {key for local, keys in _INSTEAD_OF.items() if getattr(task, local, None) is not None for key in keys}
    folders = {"data_files": Path(), "shots_file": Path(), "embedded": EMBEDDED, "embedded_shots": EMBEDDED}
    return {
        key: digest(folder / getattr(task, key))
        for key, folder in folders.items()
        if key not in unread and getattr(task, key, None) is not None
    }


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
        "compensation": method.compensation,
        "budget": method.budget,
        "refresh": method.refresh,
        "offload_dense": config.offload_dense,
        "compiled": config.compile,
    }


def shared_prompt(model: nn.Module, methods: Sequence[Method], *, compiled: bool = False) -> griffin.SharedPrompt:
    """One dense prompt pass for all of these methods."""
    pruning = [method for method in methods if not method.dense]
    return griffin.SharedPrompt(
        model,
        sorted({method.statistic for method in pruning}),
        sorted({method.compensation for method in pruning}),
        compiled=compiled,
    )


def pruned(shared: griffin.SharedPrompt, method: Method, config: Execution) -> AbstractContextManager[None]:
    """The model on a method's experts for the shared prompts, in the mode of the configuration."""
    experts, corrections, reader = _put_to_work(shared, method, config.seed, config.mode, config.shared_experts)
    return shared.pruned(experts, corrections, config.mode, reader)


def continued(shared: griffin.SharedPrompt, method: Method, ids_BC: Tensor, lengths_B: Tensor, seed: int) -> Tensor:
    """The logits [B, C, V] of a given continuation of the shared prompts under one method."""
    experts, corrections, reader = _put_to_work(shared, method, seed, "masked", False)
    return shared.continued(ids_BC, lengths_B, experts, corrections, reader)


def chooser(method: Method, seed: int, *, shared_experts: bool = False) -> Choose | None:
    """Chooses a method's experts for prompts that ran, and what it adds with them; None: dense."""
    if method.dense:
        return None

    def choose(prompts: griffin.SharedPrompt) -> Chosen:
        experts = prompts.experts(
            method.statistic, method.selection, method.sparsity, seed, method.budget, shared_experts=shared_experts
        )
        learns = method.refresh == "compensation"
        added = prompts.corrections(method.compensation, experts, shared_experts=shared_experts, fits=learns)
        return experts, added

    return choose


def _put_to_work(
    shared: griffin.SharedPrompt, method: Method, seed: int, mode: str, shared_experts: bool
) -> tuple[list[Tensor] | None, list[griffin.Correction | None], griffin.Reader | None]:
    """A method's experts for the shared prompts, what it adds with them, and what is to follow the text."""
    choose = chooser(method, seed, shared_experts=shared_experts)
    if choose is None:
        return None, [], None
    experts, corrections = choose(shared)
    reader: griffin.Reader | None = None
    if method.refresh == "experts":
        reader = shared.renewal(mode, choose)
    elif method.refresh == "compensation":
        reader = shared.refit(mode, method.compensation, experts, corrections, shared_experts=shared_experts)
    return experts, corrections, reader
