"""The methods that a call compares, and what makes two runs the same run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import griffin
from pipelines import description
from pipelines.config import LEARNING, RunConfig
from pipelines.data import EMBEDDED, digest
from pipelines.records import environment

if TYPE_CHECKING:
    from torch import Tensor, nn

    Chosen = tuple[list[Tensor], list[griffin.Correction | None]]
    Choose = Callable[[griffin.SharedPrompt], Chosen]


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
        return description.is_dense(self.sparsity)

    @property
    def family(self) -> str:
        """The method in words, without its sparsity."""
        return description.family(asdict(self))

    @property
    def label(self) -> str:
        """The method in words, for tables and run names."""
        return description.label(asdict(self))


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


def described(config: RunConfig, method: Method) -> dict[str, Any]:
    """The `method` of a run's record: its words, and all settings that say how the run pruned."""
    return description.method_entry(run_config(config, method))


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
