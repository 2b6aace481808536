"""The typed configuration of every kind of task."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.config_fields import at_least, described, is_file, lengths, one_of
from pipelines.errors import UserError

DECODINGS = ("greedy", "reference_sampling")
PROTOCOLS = ("paper", "continuation")


@dataclass
class HubDataset:
    """A data set on the Hugging Face hub."""

    path: str = described("the repository")
    name: str | None = described("its configuration", None)
    split: str = described("the split evaluated", "test")
    shots_split: str = described("the split whose first rows are the shots", "train")


@dataclass
class GenerationTask:
    """Summaries of articles, or other answers: generated and compared with a reference by ROUGE (kind `generation`), or
    the dense model's own, teacher-forced, on which the pruned next-token distributions are compared (kind
    `fidelity`)."""

    name: str = described("name in records and tables")
    kind: str = described("generation or fidelity: which pipeline runs the task, and the job type in W&B", "generation")
    hub: HubDataset | None = described("the data set on the hub", None)
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    embedded_shots: str | None = described("the shots that go with it", None)
    data_files: str | None = described("a JSON Lines file in the data set's layout, instead of hub or embedded", None)
    shots_file: str | None = described("a JSON Lines file whose first rows are the shots", None)
    article_field: str = described("the field that holds the article")
    summary_field: str = described("the field that holds the reference summary")
    instruction: str = described("the line that asks for the summary, at the prompt's end")
    shot_instruction: str = described("the same line in the shots, between article and summary")
    shots: int = described("solved examples before each article", 1)
    chat_template: bool = described(
        "article and instruction are what a user says to an instruction model, and the shots what was said before",
        False,
    )
    stop: str = described("generated text is cut where this begins", "###")
    max_new_tokens: int = described("length of the generation in tokens", 128)
    decoding: str = described("greedy, or the reference's sampling at temperature 0.3", "greedy")

    def __post_init__(self) -> None:
        one_of("task.kind", self.kind, ("generation", "fidelity"))
        one_of("task.decoding", self.decoding, DECODINGS)
        at_least("task.shots", self.shots, 0)
        at_least("task.max_new_tokens", self.max_new_tokens, 1)
        if not self.stop:
            raise UserError("task.stop is empty: expected the text that ends a generation")
        if not (self.hub or self.embedded or self.data_files):
            raise UserError(f"task={self.name} has no data: set task.data_files=FILE")
        is_file("task.data_files", self.data_files)
        is_file("task.shots_file", self.shots_file)
        if self.shots > 0 and self.data_files and not self.shots_file and not self.embedded_shots:
            raise UserError("task.data_files without task.shots_file: the shots need a file too, or set task.shots=0")


@dataclass
class HarnessTask:
    """A task of lm-eval: classification by log-likelihood, or question answering by generation."""

    name: str = described("name in records and tables")
    kind: str = described("which kind of task, and the job type in W&B")
    definition: str = described("the task's YAML file, in pipelines/tasks/harness_tasks or lm-eval's tasks")
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    data_files: str | None = described("a JSON Lines file in the data set's layout, instead of the hub", None)
    protocol: str = described("paper (the last input position is pruned) or continuation (all its positions)", "paper")
    shots: int = described("solved examples before each document, drawn as lm-eval draws them", 0)
    shots_file: str | None = described("a JSON Lines file that they are drawn from, beside task.data_files", None)
    chat_template: bool = described("the document is what a user says to an instruction model", False)
    max_new_tokens: int | None = described("length of generated answers in tokens; null: the task's own", None)
    filter: str | None = described("which of the task's filters makes the answer of a text; null: the first", None)

    def __post_init__(self) -> None:
        one_of("task.kind", self.kind, ("classification", "question_answering"))
        at_least("task.shots", self.shots, 0)
        at_least("task.max_new_tokens", self.max_new_tokens, 1)
        if self.chat_template and self.kind == "classification":
            raise UserError(
                f"task.chat_template=true: {self.name} scores continuations; expected a task that generates"
            )
        is_file("task.shots_file", self.shots_file)
        if self.shots and (self.data_files or self.embedded) and not self.shots_file:
            raise UserError("task.data_files without task.shots_file: the shots need a file too, or set task.shots=0")
        one_of("task.protocol", self.protocol, PROTOCOLS)
        if self.kind == "question_answering" and self.protocol != "paper":
            raise UserError(f"task.protocol={self.protocol}: {self.name} generates; protocols are for classification")
        is_file("task.data_files", self.data_files)


@dataclass
class CodeTask:
    """Programs: a function is written to its description, and run against tests, which it passes or does not."""

    name: str = described("name in records and tables")
    kind: str = described("which pipeline runs the task, and the job type in W&B", "code")
    hub: HubDataset | None = described("the data set on the hub", None)
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    data_files: str | None = described("a JSON Lines file in HumanEval's layout, instead of hub or embedded", None)
    instruction: str = described("with task.chat_template=true, what is said before the function's beginning", "")
    chat_template: bool = described("the function's beginning is what a user says to an instruction model", False)
    max_new_tokens: int = described("length of the generation in tokens", 512)
    decoding: str = described("greedy, or the reference's sampling at temperature 0.3", "greedy")
    allow_code_execution: bool = described(
        "run what the model writes on this machine; nothing else can judge it", False
    )
    timeout: int = described("seconds after which a program is ended, and has not passed", 10)

    def __post_init__(self) -> None:
        one_of("task.kind", self.kind, ("code",))
        one_of("task.decoding", self.decoding, DECODINGS)
        at_least("task.max_new_tokens", self.max_new_tokens, 1)
        at_least("task.timeout", self.timeout, 1)
        is_file("task.data_files", self.data_files)
        if not (self.hub or self.embedded or self.data_files):
            raise UserError(f"task={self.name} has no data: set task.data_files=FILE")
        if not self.allow_code_execution:
            raise UserError(
                f"task.allow_code_execution=false with task={self.name}: it runs programs that the model writes on "
                "this machine, which may do harm (they are kept from files, network and processes where the system "
                "can do so); set task.allow_code_execution=true to allow it"
            )


@dataclass
class PerplexityTask:
    """Perplexity of the tokens that follow a prompt, by length of prompt and of generation."""

    name: str = described("name in records and tables")
    kind: str = described("which pipeline runs the task, and the job type in W&B", "perplexity")
    hub: HubDataset | None = described("the data set on the hub", None)
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    data_files: str | None = described("a text file, instead of hub or embedded", None)
    text_field: str = described("the field that holds the text, in hub and embedded data", "text")
    separator: str = described("what joins the rows to one text", "\n\n")
    prompt_lengths: list[int] = described("prompt lengths in tokens, run dense", list)
    generation_lengths: list[int] = described("how many of the following tokens are scored, under the experts", list)

    def __post_init__(self) -> None:
        one_of("task.kind", self.kind, ("perplexity",))
        is_file("task.data_files", self.data_files)
        if not (self.hub or self.embedded or self.data_files):
            raise UserError(f"task={self.name} has no data: set task.data_files=FILE")
        lengths("task.prompt_lengths", self.prompt_lengths)
        lengths("task.generation_lengths", self.generation_lengths)


@dataclass
class LatencyTask:
    """How long dense and pruned generation take, side by side, beside the limit that memory traffic sets."""

    name: str = described("name in records and tables")
    kind: str = described("which pipeline runs the task, and the job type in W&B", "latency")
    data_files: str | None = described("a text file whose stretches are the prompts; null: random tokens", None)
    prompt_lengths: list[int] = described("prompt lengths in tokens; []: 2048 on a GPU, else 256", list)
    generation_lengths: list[int] = described("generation lengths in tokens; []: 128, 2048 on a GPU, else 32", list)
    repeats: int = described("timed repeats of each pair of lengths, dense and pruned in turn; medians are reported", 5)

    def __post_init__(self) -> None:
        one_of("task.kind", self.kind, ("latency",))
        is_file("task.data_files", self.data_files)
        at_least("task.repeats", self.repeats, 1)
        for key in ("prompt_lengths", "generation_lengths"):
            for value in getattr(self, key):
                at_least(f"task.{key}", value, 1)

    def settled(self, gpu: bool) -> LatencyTask:
        """With the lengths that were left open as they suit the device."""
        prompts, generations = ([2048], [128, 2048]) if gpu else ([256], [32])
        return replace(
            self,
            prompt_lengths=self.prompt_lengths or prompts,
            generation_lengths=self.generation_lengths or generations,
        )


@dataclass
class FlockingTask:
    """How alike the relative activations of a text's tokens are: heatmaps, scores and Jaccard similarities of the
    dense model, beside permuted and random tokens."""

    name: str = described("name in records and tables")
    kind: str = described("which pipeline runs the task, and the job type in W&B", "flocking")
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    data_files: str | None = described("a text file, cut into sequences; or .jsonl, a sequence per row", None)
    text_field: str = described("the field that holds the text, in JSON Lines", "text")
    sequence_length: int = described("tokens of a sequence, at most", 256)
    max_new_tokens: int = described("tokens that the model continues each sequence with", 32)
    kept: float = described("share of a layer's neurons in its top-k set", 0.5)
    heatmap_tokens: int = described("heatmaps show the first N tokens", 128)
    heatmap_neurons: int = described("heatmaps show the first M neurons", 128)

    def __post_init__(self) -> None:
        one_of("task.kind", self.kind, ("flocking",))
        is_file("task.data_files", self.data_files)
        if not (self.embedded or self.data_files):
            raise UserError(f"task={self.name} has no data: set task.data_files=FILE")
        at_least("task.sequence_length", self.sequence_length, 16)
        for key in ("max_new_tokens", "heatmap_tokens", "heatmap_neurons"):
            at_least(f"task.{key}", getattr(self, key), 1)
        if not 0 < self.kept < 1:
            raise UserError(f"task.kept={self.kept}: expected a share, 0 < kept < 1")


# The schemas that the files in conf/task extend, by name.
TASKS = {
    "generation_task": GenerationTask,
    "harness_task": HarnessTask,
    "code_task": CodeTask,
    "perplexity_task": PerplexityTask,
    "latency_task": LatencyTask,
    "flocking_task": FlockingTask,
}
