"""The prompts of generation tasks, in the reference implementation's format (HELM's), or what a user says in a chat;
and the rows of any run, prompts times methods, in groups that are evaluated as a whole.

Above `batch_size=1` rows run beside others, and their numbers depend on these by rounding. So a group is always the
same rows, whatever of it was finished before: a run that was cut off ends with the numbers of an undisturbed one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import griffin
from griffin import Method, PromptState, Row
from pipelines.config import RunConfig
from pipelines.data import read_rows, read_shots
from pipelines.errors import UserError
from pipelines.methods import engine_for
from pipelines.records import Sample, check_costs

if TYPE_CHECKING:
    from pipelines.models import LoadedModel

P = TypeVar("P", bound="Prompt")
Item = TypeVar("Item", bound=Any)  # with an `index`, as samples have
Batches = Generator[tuple[Method, list[Sample]], None, None]

# Batches that a group of generated texts has at least: only the last one of a group may have fewer rows.
BATCHES = 4


@dataclass(frozen=True)
class Prompt:
    """One row of the data, or a stretch of a text, ready to be continued.

    Attributes:
        beginning: the part of the text that all prompts begin with: the shots; empty without shots, and in a chat.
        said: in a chat, what user and model have said before: the shots.
    """

    index: int
    id: str
    text: str
    reference: str = ""
    beginning: str = ""
    said: tuple[tuple[str, str], ...] = ()

    def sample_part(self, tokens: Sequence[int]) -> Sample:
        """What every sample says of its prompt, which has these tokens."""
        return {"index": self.index, "id": self.id, "prompt_tokens": len(tokens)}


def read(config: RunConfig) -> list[Prompt]:
    """The prompts of a generation task, built from its data; needs no model.

    The reference words the instruction of its shots and of its question differently ("1 sentence", "1 sentences"),
    and leaves the line break after the question to the model.
    """
    task, article, summary = config.task, config.task.article_field, config.task.summary_field

    def asked(text: str, instruction: str) -> str:
        if task.chat_template:
            return "\n\n".join(part for part in (text, instruction) if part)
        return f"###\nArticle: {text}\n\n{instruction}"

    shots = [(asked(row[article], task.shot_instruction), row[summary]) for row in read_shots(task)]
    beginning = "" if task.chat_template else "".join(f"{question}\n{answer}\n\n" for question, answer in shots)
    said = tuple(shots) if task.chat_template else ()
    rows = read_rows(task, (article, summary), config.limit, config.offset)
    return [
        Prompt(index, name, beginning + asked(row[article], task.instruction), row[summary], beginning, said)
        for index, name, row in rows
    ]


@dataclass(frozen=True)
class Evaluation:
    """What a call evaluates on one model.

    Attributes:
        methods: all methods of the call.
        done: of each method, the indices of the items that it has samples of.
    """

    loaded: LoadedModel
    config: RunConfig
    methods: Sequence[Method]
    done: dict[Method, set[int]]

    @cached_property
    def engine(self) -> griffin.Engine:
        """The model, for these methods."""
        return engine_for(self.loaded.model, self.methods, self.config)

    @cached_property
    def traffic(self) -> dict[Method, griffin.Traffic]:
        """What a step reads under each method that is not dense."""
        model, widths = self.engine.model, self.engine.widths
        pruning = [method for method in self.methods if not method.dense]
        return {one: griffin.traffic(model, one.kept(widths), one.scorer, one.quantization) for one in pruning}

    @cached_property
    def check_costs(self) -> dict[int, float]:
        """What a check of so many tokens costs on a device, in dense steps; empty where it was not measured."""
        return check_costs(self.config.check_costs)

    def lacks(self, method: Method, item: Any) -> bool:
        """Whether a method has no sample of an item."""
        return item.index not in self.done[method]

    def groups(
        self, items: Sequence[Item], batches: int = 1, size: int | None = None
    ) -> Iterator[tuple[list[Item], Sequence[Method]]]:
        """The items in groups of at least so many batches of rows, one by one where rows run alone; and the methods
        that run with a group. A group whose samples are all there is left out.

        Args:
            items: prompts or other items, each a row under every method.
            batches: how many batches of rows a group has; one, of one method, where experts are shared.
            size: of a group, where it does not follow from the batch size.
        """
        shared, rows = self.config.shared_experts, self.config.batch_size
        size = size or (rows if shared or rows == 1 else max(1, -(-batches * rows // len(self.methods))))
        for start in range(0, len(items), size):
            group = list(items[start : start + size])
            needed = [method for method in self.methods if any(self.lacks(method, item) for item in group)]
            if needed:
                yield group, needed if shared or rows == 1 else self.methods

    def prefill(self, ids: Sequence[int], prefix: PromptState | None = None) -> PromptState:
        """A prompt, after it has run dense, from a prefix on that has."""
        likely = any(method.prunes_vocabulary for method in self.methods)
        record = griffin.wanted(self.methods)
        return griffin.prefill(self.engine, [ids], record, prefix=prefix, likely_tokens=likely)[0]

    def begun(
        self, items: Sequence[Item], methods: Sequence[Method], prefilled: Callable[[Item], PromptState]
    ) -> Iterator[tuple[Iterator[Row], int]]:
        """The rows of a group, and how many of them run at a time: each prompt runs when there is room for its first
        row. Where experts are shared the rows of one method are together.

        Args:
            items: of the group; they label their rows.
            methods: that run with it.
            prefilled: an item's prompt, after it has run dense.
        """
        engine, seed = self.engine, self.config.seed
        if not self.config.shared_experts:
            states = ((item, prefilled(item)) for item in items)
            pairs = ((item, state, method) for item, state in states for method in methods)
            rows = (griffin.begin(engine, [state], method, seed, [item])[0] for item, state, method in pairs)
            yield rows, self.config.batch_size
            return
        together = [prefilled(item) for item in items]
        for method in methods:
            yield iter(griffin.begin(engine, together, method, seed, items)), len(items)

    def generated(
        self,
        items: Sequence[Item],
        methods: Sequence[Method],
        prefilled: Callable[[Item], PromptState],
        generation: griffin.Generation,
        longest: int,
    ) -> Iterator[tuple[Row, float]]:
        """The rows of a group as they end, those that lack a sample, and the seconds that each took with its share of
        its prompt. Arguments are those of `begun` and of `griffin.decode`, and the longest prompt's tokens."""
        seconds: dict[Item, float] = {}

        def timed(item: Item) -> PromptState:
            began = time.perf_counter()
            state = prefilled(item)
            seconds[item] = (time.perf_counter() - began) / len(methods)
            return state

        for rows, size in self.begun(items, methods, timed):
            decoding = griffin.decode(self.engine, rows, generation, batch_size=size, max_prompt_tokens=longest)
            with closing(decoding) as ended:
                for row in ended:
                    if self.lacks(row.method, row.label):
                        yield row, row.seconds + seconds[row.label]


def fitting(run: Evaluation, prompts: Sequence[P]) -> tuple[dict[P, list[int]], Batches]:
    """The prompts with their tokens, and samples that say of others that they leave no room for `max_new_tokens` in the
    model's context; these are not run, as in the reference implementation."""
    task, loaded = run.config.task, run.loaded
    room = loaded.context_length - task.max_new_tokens
    encoded = {prompt: loaded.encode(prompt.text, task.chat_template, prompt.said) for prompt in prompts}
    skipped = (
        (method, [prompt.sample_part(ids) | {"skipped": f"longer than {room} tokens"}])
        for prompt, ids in encoded.items()
        for method in run.methods
        if len(ids) > room and run.lacks(method, prompt)
    )
    return {prompt: ids for prompt, ids in encoded.items() if len(ids) <= room}, skipped


def need_context(run: Evaluation, **tokens: int) -> None:
    """UserError where keys of the task ask for more tokens, together, than the model's context has."""
    most = run.loaded.context_length
    if sum(tokens.values()) > most:
        settings = " with ".join(f"task.{key}={number}" for key, number in tokens.items())
        name = run.config.model.name
        raise UserError(f"{settings}: expected at most {most} tokens together, the context of {name}")
