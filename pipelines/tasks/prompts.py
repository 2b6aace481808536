"""The prompts of generation tasks: in the reference implementation's format (HELM's), or what a user says in a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from griffin import Method
from pipelines.config import RunConfig
from pipelines.data import read_rows, read_shots
from pipelines.errors import UserError
from pipelines.records import Sample
from pipelines.tasks.grouping import Batches, Evaluation


@dataclass(frozen=True)
class Prompt:
    """One row of the data, ready to be continued.

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


P = TypeVar("P", bound=Prompt)

# A prompt, how it was continued, the new tokens, their seconds, and what its sample says of how they were decoded.
Texts = Iterator[tuple[P, Method, Sequence[int], float, Sample]]


def read(config: RunConfig) -> list[Prompt]:
    """The prompts of a generation task, built from its data; needs no model.

    The reference words the instruction of its shots and of its question differently ("1 sentence", "1 sentences"),
    and leaves the line break after the question to the model.
    """
    task = config.task

    def asked(article: str, instruction: str) -> str:
        if task.chat_template:
            return "\n\n".join(part for part in (article, instruction) if part)
        return f"###\nArticle: {article}\n\n{instruction}"

    shots = [
        (asked(row[task.article_field], task.shot_instruction), row[task.summary_field]) for row in read_shots(task)
    ]
    beginning = "" if task.chat_template else "".join(f"{question}\n{answer}\n\n" for question, answer in shots)
    said = tuple(shots) if task.chat_template else ()
    rows = read_rows(task, (task.article_field, task.summary_field), config.limit, config.offset)
    return [
        Prompt(
            index,
            str(row.get("id", index)),
            beginning + asked(row[task.article_field], task.instruction),
            row[task.summary_field],
            beginning,
            said,
        )
        for index, row in enumerate(rows, start=config.offset)
    ]


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
