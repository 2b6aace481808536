"""The typed configuration of a run: one dataclass per node, checked before anything is loaded.

Hydra composes the YAML files of `conf/` over these classes and those of `model_config` and `task_config`, so an unknown
key or a wrong type is refused while composing. What a type cannot say, such as which values go together, is checked
here, when `config_keys.typed` builds the objects.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, fields
from typing import Any

import torch

import griffin
from griffin import LEARNING, MOST_DRAFTED
from pipelines.config_fields import at_least, count_or_auto, described, one_of
from pipelines.description import is_dense
from pipelines.errors import UserError
from pipelines.model_config import ModelConfig
from pipelines.task_config import LatencyTask

# Of a method's fields, what they may be.
VALUES = {one.name: one.metadata["values"] for one in fields(griffin.Method) if one.metadata["values"]}
ASSISTANCE = ("none", "prompt_lookup", "model")
MODES = ("auto", *griffin.MODES)
# The kinds of task whose rows, prompts times methods, run together.
BATCHED = ("generation", "code", "classification", "question_answering", "fidelity", "perplexity")
# The kinds of task that generate text, where drafts can be checked and dense weights are for prompts only.
GENERATING = ("generation", "code", "question_answering", "latency")
COMPILED = ("generation", "latency")  # the kinds of task whose decoding can be compiled
COMPILERS = ("g++", "clang++")  # what torch.compile looks for on a CPU


def _of_method(name: str) -> Any:
    """A field of `griffin.Method` as a key: what it means, what it may be, and its default."""
    one = griffin.Method.__dataclass_fields__[name]
    values = f": {', '.join(VALUES[name])}" if name in VALUES else ""
    return described(one.metadata["help"] + values, one.default)


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
    verification: list[str] = described("verifications", list)
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
    statistic: str = described(
        f"what scores the FF neurons on the prompt: {', '.join(griffin.STATISTICS)}; or for each token by itself, "
        f"masked, for quality only: {', '.join(griffin.TOKEN_STATISTICS)}",
        "griffin",
    )
    selection: str = _of_method("selection")
    compensation: str = _of_method("compensation")
    budget: str = _of_method("budget")
    refresh: str = _of_method("refresh")
    verification: str = _of_method("verification")
    draft_tokens: Any = _of_method("draft_tokens")
    draft_vocabulary: str = _of_method("draft_vocabulary")
    prompt_lookup: bool = _of_method("prompt_lookup")
    verification_threshold: float = _of_method("verification_threshold")
    assistance: str = described(
        f"with sparsity=0: transformers' assisted generation, to compare with: {', '.join(ASSISTANCE)}", "none"
    )
    assistant: str | None = described("of assistance=model: the small model of the same family, as model.repo", None)
    sparsity: Any = described("share of FF neurons dropped, 0 <= sparsity < 1; or one number per layer", 0.5)
    grid: GridConfig = described("many of the above in one process", GridConfig)
    mode: str = described("compact (fast), masked (any batch), auto: compact where one expert set does", "auto")
    shared_experts: bool = described("one expert set for a whole batch, by the paper's aggregation", False)
    compile: Any = described(
        "decode by compiled graphs of fixed shapes: generation and latency; auto: on CUDA where that can be", "auto"
    )
    cpu_onednn: bool = described("on a CPU, in float32, run linear layers by oneDNN, dense and pruned alike", True)
    offload_dense: bool = described(
        "keep the dense FF weights in host memory, on the device block by block: generated text and latency", False
    )
    batch_size: Any = described(
        "rows at once: the methods of a prompt, then further prompts; auto: what memory holds, up to 64, 8 on a CPU", 1
    )
    limit: int | None = described("only the first N rows of the data", None)
    offset: int = described("rows of the data passed over before the first", 0)
    seed: int = described("of random statistics, selections and sampled decoding", 0)
    device: str = described("auto (GPUs if there are any), cpu, cuda, cuda:N, mps", "auto")
    output_dir: str = described("where run folders go", "outputs")
    tags: list[str] = described("free labels, for W&B and for selecting runs", list)
    wandb: WandbConfig = described("tracking", WandbConfig)

    def __post_init__(self) -> None:
        self._settle_compile()
        self._check_methods()
        self._check_values()
        self._check_verification()
        self._check_batch_size()
        self._check_task()
        self._check_compile_and_mode()
        if self.offload_dense:
            self._check_offload()

    def _check_methods(self) -> None:
        """What prunes: the values of a method and of the grid, and which of them go together."""
        for name, allowed in VALUES.items():
            one_of(name, getattr(self, name), allowed)
            for value in getattr(self.grid, name, ()):
                one_of(f"grid.{name}", value, allowed)
        one_of("mode", self.mode, MODES)
        for key, statistics in (("statistic", [self.statistic]), ("grid.statistic", self.grid.statistic)):
            for statistic in statistics:
                self._realisable(key, statistic)
        self.sparsity = _sparsity("sparsity", self.sparsity)
        self._can_refresh()
        self._can_choose_by_token()
        for value in self.grid.sparsity:
            _sparsity("grid.sparsity", value)
        if self.grid.sparsity and isinstance(self.sparsity, list):
            raise UserError(f"sparsity={self.sparsity} with grid.sparsity: expected one of the two")
        for key, budgets in (("budget", [self.budget]), ("grid.budget", self.grid.budget)):
            if isinstance(self.sparsity, list) and any(budget != "uniform" for budget in budgets):
                raise UserError(f"{key}={', '.join(budgets)} with sparsity={self.sparsity}: expected one of the two")

    def _check_values(self) -> None:
        """Keys that can be judged by themselves."""
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

    @property
    def _verification(self) -> str:
        """The setting by which a method is verified, for messages; empty where none is."""
        key, values = "verification", [self.verification]
        if self.grid.verification:
            key, values = "grid.verification", self.grid.verification
        return f"{key}={', '.join(values)}" if {*values} != {"none"} else ""

    def _check_verification(self) -> None:
        """What verified decoding is told, and what it goes with: its rows run one at a time, with compact weights."""
        count = self.draft_tokens
        if count != "auto" and (
            isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MOST_DRAFTED
        ):
            shown = "null" if count is None else count
            raise UserError(f"draft_tokens={shown}: expected a whole number, 1 to {MOST_DRAFTED}, or auto")
        if not 0 < self.verification_threshold < 1:
            raise UserError(
                f"verification_threshold={self.verification_threshold}: expected a probability, 0 < threshold < 1"
            )
        self._check_assistance()
        setting = self._verification
        if not setting:
            return
        if all(map(is_dense, self.grid.sparsity or [self.sparsity])):
            key = "grid.sparsity" if self.grid.sparsity else "sparsity"
            raise UserError(f"{setting} with {key} 0 only: a dense draft is the model itself; expected sparsity > 0")
        if self.task.kind not in GENERATING:
            raise UserError(f"{setting} with task={self.task.name}: expected a task that generates, or latency")
        if self.batch_size != "auto" and self.batch_size != 1:
            raise UserError(f"{setting} with batch_size={self.batch_size}: expected 1, drafts are checked row by row")
        if self.mode == "masked":
            raise UserError(f"{setting} with mode=masked: expected compact, drafts are to be cheap")
        for key in ("shared_experts", "offload_dense"):
            if getattr(self, key):
                raise UserError(f"{setting} with {key}=true: expected one of the two")

    def _check_assistance(self) -> None:
        """What transformers' assisted generation goes with: texts of the dense model, one at a time."""
        one_of("assistance", self.assistance, ASSISTANCE)
        setting = f"assistance={self.assistance}"
        if (self.assistance == "model") != (self.assistant is not None):
            raise UserError(f"{setting} with assistant={self.assistant or 'null'}: expected both or neither")
        if self.assistance == "none":
            return
        if not all(map(is_dense, self.grid.sparsity or [self.sparsity])):
            raise UserError(f"{setting} with sparsity={self.sparsity}: expected sparsity=0, it drafts without experts")
        if self.task.kind != "generation" or self.task.decoding != "greedy":
            raise UserError(f"{setting} with task={self.task.name}: expected a generation task, decoded greedily")
        if self.assistant is not None and self.model.source != "hub":
            raise UserError(f"{setting} with model={self.model.name}: expected a model from the hub or a folder")
        if self.batch_size not in ("auto", 1):
            raise UserError(f"{setting} with batch_size={self.batch_size}: expected 1")
        for key in ("compile", "offload_dense"):
            if getattr(self, key):
                raise UserError(f"{setting} with {key}=true: expected one of the two")

    def _check_batch_size(self) -> None:
        """A number, or `auto` where more than one prompt at a time is possible at all; else `auto` becomes 1."""
        count_or_auto("batch_size", self.batch_size)
        if self.batch_size != "auto":
            return
        if self.shared_experts:
            raise UserError("batch_size=auto with shared_experts=true: experts depend on the batch; expected a number")
        # One row at a time is all that these can have, so that is what fits.
        alone = self.mode == "compact" or self.compile or self.offload_dense or bool(self._verification)
        alone = alone or self.assistance != "none"
        if alone or self.task.kind not in BATCHED:
            self.batch_size = 1

    @property
    def _several(self) -> bool:
        """Whether a batch may hold more than one prompt; `_check_batch_size` comes first."""
        return bool(self.batch_size == "auto" or self.batch_size > 1)

    def _check_task(self) -> None:
        """What the task allows, with this batch size and mode; and the task's keys that depend on the device."""
        if self.mode == "compact" and self._several and not self.shared_experts:
            raise UserError(
                f"mode=compact with batch_size={self.batch_size}: compact holds one expert set; "
                "use mode=masked or shared_experts=true"
            )
        if self.task.kind == "latency" and (self.mode == "masked" or (self._several and not self.shared_experts)):
            raise UserError("task=latency times mode=compact: above batch_size=1 it needs shared_experts=true")
        if isinstance(self.task, LatencyTask):
            self.task.fill_in(self._on_cuda)

    @property
    def _on_cuda(self) -> bool:
        return self.device.startswith("cuda") or (self.device == "auto" and torch.cuda.is_available())

    def _settle_compile(self) -> None:
        """Whether decoding is compiled; `auto` is true on CUDA, where all that is asked for can be compiled."""
        if self.compile != "auto" and not isinstance(self.compile, bool):
            raise UserError(f"compile={self.compile}: expected true, false or auto")
        if self.compile == "auto":
            alone = self.batch_size == 1 or self.shared_experts
            other = self.mode == "masked" or self.offload_dense or self.assistance != "none"
            by_token = any(name in griffin.TOKEN_STATISTICS for name in self.grid.statistic or [self.statistic])
            self.compile = self._on_cuda and self.task.kind in COMPILED and alone and not (other or by_token)

    def _check_compile_and_mode(self) -> None:
        """Whether decoding can be compiled, and which mode `auto` stands for."""
        if self.compile and self.task.kind not in COMPILED:
            raise UserError(f"compile=true with task={self.task.name}: expected a generation or latency task")
        if self.compile and not torch.cuda.is_available() and not any(map(shutil.which, COMPILERS)):
            raise UserError(f"compile=true: expected a C++ compiler on this machine: {' or '.join(COMPILERS)}")
        if self.mode == "auto":
            self.mode = "masked" if self._several and not self.shared_experts else "compact"
        if self.compile and self.mode != "compact":
            raise UserError(f"compile=true with mode={self.mode}: expected compact, whose weights keep their shapes")

    def _check_offload(self) -> None:
        """Dense weights may be out of reach of the device only where they are needed for prompts alone."""
        if self.task.kind not in GENERATING:
            raise UserError(
                f"offload_dense=true with task={self.task.name}: expected a task that generates, or latency; others "
                "need the dense weights for what follows a prompt too"
            )
        if self.mode != "compact":
            raise UserError(f"offload_dense=true with mode={self.mode}: expected compact, dense for prompts only")
        if self.compile:
            raise UserError("offload_dense=true with compile=true: expected one of the two")

    def _can_refresh(self) -> None:
        """What is refreshed can be: a compensation only if it goes on learning."""
        key, refreshes = ("grid.refresh", self.grid.refresh) if self.grid.refresh else ("refresh", [self.refresh])
        compensations = self.grid.compensation or [self.compensation]
        if "compensation" in refreshes and not {*LEARNING} & {*compensations}:
            raise UserError(
                f"{key}=compensation with compensation={', '.join(compensations)}, which cannot go on learning: "
                f"expected compensation={', '.join(LEARNING)}"
            )

    def _can_choose_by_token(self) -> None:
        """Tokens that choose for themselves have neither corrections nor fewer weights; a grid leaves such points out,
        where others remain."""
        key, statistics = "statistic", [self.statistic]
        if self.grid.statistic:
            key, statistics = "grid.statistic", self.grid.statistic
        by_token = [statistic for statistic in statistics if statistic in griffin.TOKEN_STATISTICS]
        if not by_token:
            return
        setting = f"{key}={', '.join(by_token)}"
        if self.selection != "topk":
            raise UserError(f"{setting} with selection={self.selection}: expected selection=topk")
        if self.shared_experts:
            raise UserError(f"{setting} with shared_experts=true: expected false, each token has its own experts")
        if self.task.kind == "latency":
            raise UserError(f"{setting} with task={self.task.name}: runs masked, which is no faster than dense")
        for name in ("compensation", "refresh", "verification"):
            grid = getattr(self.grid, name)
            if "none" not in (grid or [getattr(self, name)]):
                where, values = (f"grid.{name}", grid) if grid else (name, [getattr(self, name)])
                raise UserError(f"{setting} with {where}={', '.join(values)}: expected {name}=none")

    def _realisable(self, key: str, statistic: str) -> None:
        """A statistic of the dense continuation needs a task that has one."""
        if statistic in griffin.STATISTICS and griffin.STATISTICS[statistic].oracle and self.task.kind != "fidelity":
            raise UserError(
                f"{key}={statistic}: scores the dense continuation itself, which task.kind=fidelity alone has"
            )
