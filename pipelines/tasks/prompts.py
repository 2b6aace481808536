"""The prompts of generation tasks: in the reference implementation's format (HELM's), or what a user says in a chat."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.data import read_rows, read_shots
from pipelines.task_config import GenerationTask


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
    reference: str
    beginning: str = ""
    said: tuple[tuple[str, str], ...] = ()


def read_prompts(task: GenerationTask, limit: int | None, offset: int = 0) -> list[Prompt]:
    """The prompts of a task, built from its data; needs no model.

    Raises:
        UserError: the data is missing, malformed or unreachable.
    """
    needed = (task.article_field, task.summary_field)
    shots = [(row[task.article_field], row[task.summary_field]) for row in read_shots(task)]
    if task.chat_template:
        said = tuple((_said(text, task.shot_instruction), summary) for text, summary in shots)
        return [
            Prompt(
                index,
                str(row.get("id", index)),
                _said(row[task.article_field], task.instruction),
                row[task.summary_field],
                said=said,
            )
            for index, row in enumerate(read_rows(task, needed, limit, offset), start=offset)
        ]
    beginning = solved_shots(task.shot_instruction, shots)
    return [
        Prompt(
            index,
            str(row.get("id", index)),
            summarization_prompt(row[task.article_field], task.instruction, task.shot_instruction, shots),
            row[task.summary_field],
            beginning,
        )
        for index, row in enumerate(read_rows(task, needed, limit, offset), start=offset)
    ]


def summarization_prompt(article: str, instruction: str, shot_instruction: str, shots: list[tuple[str, str]]) -> str:
    """The prompt that a summary of `article` continues.

    The reference words the instruction of its shots and of its question differently ("1 sentence", "1 sentences"),
    and leaves the line break after the question to the model.

    Args:
        article: the text to summarise.
        instruction: the line that asks for the summary.
        shot_instruction: the line between article and summary in the shots.
        shots: solved examples, (article, summary) each, in the order shown.

    Returns:
        Text that ends with the instruction.
    """
    return f"{solved_shots(shot_instruction, shots)}###\nArticle: {article}\n\n{instruction}"


def _said(article: str, instruction: str) -> str:
    return "\n\n".join(part for part in (article, instruction) if part)


def solved_shots(shot_instruction: str, shots: list[tuple[str, str]]) -> str:
    """The solved examples that a prompt begins with; see `summarization_prompt`."""
    return "".join(f"###\nArticle: {text}\n\n{shot_instruction}\n{summary}\n\n" for text, summary in shots)
