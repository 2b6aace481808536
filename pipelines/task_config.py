"""The typed configuration of every kind of task."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipelines.errors import UserError
from pipelines.method_keys import check, described

DECODINGS = ("greedy", "reference_sampling")
PROTOCOLS = ("paper", "continuation")
KIND = "which pipeline runs the task, and the job type in W&B"


@dataclass
class HubDataset:
    """A data set on the Hugging Face hub."""

    path: str = described("the repository")
    name: str | None = described("its configuration", None)
    split: str = described("the split evaluated", "test")
    shots_split: str = described("the split whose first rows are the shots", "train")


@dataclass
class Task:
    """What every task has."""

    name: str = described("name in records and tables")
    kind: str = described(KIND)
    data_files: str | None = described("a JSON Lines file in the data set's layout, instead of hub or embedded", None)

    def __post_init__(self) -> None:
        check(self, "task.")
        if not any(getattr(self, key, None) for key in ("hub", "embedded", "data_files", "definition")):
            raise UserError(f"task={self.name} has no data: set task.data_files=FILE")


@dataclass
class GenerationTask(Task):
    """Summaries of articles, or other answers: generated and compared with a reference by ROUGE (kind `generation`), or
    the dense model's own, teacher-forced, on which the pruned next-token distributions are compared (kind
    `fidelity`), or written again and compared token by token (kind `exactness`)."""

    kind: str = described(KIND, "generation", ("generation", "fidelity", "exactness"))
    hub: HubDataset | None = described("the data set on the hub", None)
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    embedded_shots: str | None = described("the shots that go with it", None)
    shots_file: str | None = described("a JSON Lines file whose first rows are the shots", None)
    article_field: str = described("the field that holds the article")
    summary_field: str = described("the field that holds the reference summary")
    instruction: str = described("the line that asks for the summary, at the prompt's end")
    shot_instruction: str = described("the same line in the shots, between article and summary")
    shots: int = described("solved examples before each article", 1, least=0)
    chat_template: bool = described(
        "article and instruction are what a user says to an instruction model, and the shots what was said before",
        False,
    )
    stop: str = described("generated text is cut where this begins", "###")
    max_new_tokens: int = described("length of the generation in tokens", 128, least=1)
    decoding: str = described("greedy, or the reference's sampling at temperature 0.3", "greedy", DECODINGS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stop:
            raise UserError("task.stop is empty: expected the text that ends a generation")
        if self.shots > 0 and self.data_files and not self.shots_file and not self.embedded_shots:
            raise UserError("task.data_files without task.shots_file: the shots need a file too, or set task.shots=0")


@dataclass
class HarnessTask(Task):
    """A task of lm-eval: classification by log-likelihood, or question answering by generation."""

    kind: str = described(KIND, values=("classification", "question_answering"))
    definition: str = described("the task's YAML file, in pipelines/tasks/harness_tasks or lm-eval's tasks")
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    data_files: str | None = described("a JSON Lines file in the data set's layout, instead of the hub", None)
    protocol: str = described(
        "paper (the last input position is pruned) or continuation (all its positions)", "paper", PROTOCOLS
    )
    shots: int = described("solved examples before each document, drawn as lm-eval draws them", 0, least=0)
    shots_file: str | None = described("a JSON Lines file that they are drawn from, beside task.data_files", None)
    chat_template: bool = described("the document is what a user says to an instruction model", False)
    max_new_tokens: int | None = described("length of generated answers in tokens; null: the task's own", None, least=1)
    filter: str | None = described("which of the task's filters makes the answer of a text; null: the first", None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chat_template and self.kind == "classification":
            raise UserError(
                f"task.chat_template=true: {self.name} scores continuations; expected a task that generates"
            )
        if self.shots and (self.data_files or self.embedded) and not self.shots_file:
            raise UserError("task.data_files without task.shots_file: the shots need a file too, or set task.shots=0")
        if self.kind == "question_answering" and self.protocol != "paper":
            raise UserError(f"task.protocol={self.protocol}: {self.name} generates; protocols are for classification")


@dataclass
class CodeTask(Task):
    """Programs: a function is written to its description, and run against tests, which it passes or does not."""

    kind: str = described(KIND, "code", ("code",))
    hub: HubDataset | None = described("the data set on the hub", None)
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    data_files: str | None = described("a JSON Lines file in HumanEval's layout, instead of hub or embedded", None)
    instruction: str = described("with task.chat_template=true, what is said before the function's beginning", "")
    chat_template: bool = described("the function's beginning is what a user says to an instruction model", False)
    max_new_tokens: int = described("length of the generation in tokens", 512, least=1)
    decoding: str = described("greedy, or the reference's sampling at temperature 0.3", "greedy", DECODINGS)
    allow_code_execution: bool = described(
        "run what the model writes on this machine; nothing else can judge it", False
    )
    timeout: int = described("seconds after which a program is ended, and has not passed", 10, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.allow_code_execution:
            raise UserError(
                f"task.allow_code_execution=false with task={self.name}: it runs programs that the model writes on "
                "this machine, which may do harm (they are kept from files, network and processes where the system "
                "can do so); set task.allow_code_execution=true to allow it"
            )


@dataclass
class PerplexityTask(Task):
    """Perplexity of the tokens that follow a prompt, by length of prompt and of generation."""

    kind: str = described(KIND, "perplexity", ("perplexity",))
    hub: HubDataset | None = described("the data set on the hub", None)
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    data_files: str | None = described("a text file, instead of hub or embedded", None)
    text_field: str = described("the field that holds the text, in hub and embedded data", "text")
    separator: str = described("what joins the rows to one text", "\n\n")
    prompt_lengths: list[int] = described("prompt lengths in tokens, run dense", list, least=1)
    generation_lengths: list[int] = described(
        "how many of the following tokens are scored, under the experts", list, least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("prompt_lengths", "generation_lengths"):
            if not getattr(self, key):
                raise UserError(f"task.{key}=[]: expected at least one length")


@dataclass
class LatencyTask(Task):
    """How long dense and pruned generation take, side by side, beside the limit that memory traffic sets."""

    kind: str = described(KIND, "latency", ("latency",))
    data_files: str | None = described("a text file whose stretches are the prompts; null: random tokens", None)
    prompt_lengths: list[int] = described("prompt lengths in tokens; []: 2048 on a GPU, else 256", list, least=1)
    generation_lengths: list[int] = described(
        "generation lengths in tokens; []: 128, 2048 on a GPU, else 32", list, least=1
    )
    repeats: int = described(
        "timed repeats of each pair of lengths, dense and pruned in turn; medians are reported", 5, least=1
    )

    def __post_init__(self) -> None:
        check(self, "task.")

    def settled(self, gpu: bool) -> LatencyTask:
        """With the lengths that were left open as they suit the device."""
        prompts, generations = ([2048], [128, 2048]) if gpu else ([256], [32])
        prompts, generations = self.prompt_lengths or prompts, self.generation_lengths or generations
        return replace(self, prompt_lengths=prompts, generation_lengths=generations)


@dataclass
class FlockingTask(Task):
    """How alike the relative activations of a text's tokens are: heatmaps, scores and Jaccard similarities of the
    dense model, beside permuted and random tokens."""

    kind: str = described(KIND, "flocking", ("flocking",))
    embedded: str | None = described("the project's own data: a file in pipelines/data", None)
    data_files: str | None = described("a text file, cut into sequences; or .jsonl, a sequence per row", None)
    text_field: str = described("the field that holds the text, in JSON Lines", "text")
    sequence_length: int = described("tokens of a sequence, at most", 256, least=16)
    max_new_tokens: int = described("tokens that the model continues each sequence with", 32, least=1)
    kept: float = described("share of a layer's neurons in its top-k set", 0.5)
    heatmap_tokens: int = described("heatmaps show the first N tokens", 128, least=1)
    heatmap_neurons: int = described("heatmaps show the first M neurons", 128, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
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
