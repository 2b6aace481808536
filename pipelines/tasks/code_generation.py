"""Code generation: a function is written to its description, and run against tests (HumanEval, arXiv 2107.03374)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from pipelines.config import RunConfig
from pipelines.data import read_rows
from pipelines.records import Sample
from pipelines.tasks.answers import scored_metrics
from pipelines.tasks.code_execution import run_program
from pipelines.tasks.generation import generate
from pipelines.tasks.prompts import Batches, Evaluation, Prompt

FIELDS = ("prompt", "entry_point", "canonical_solution", "test")

# Where a function that a base model writes is over.
STOPS = ("\nclass ", "\ndef ", "\n#", "\n@", "\nprint", "\nif ", "\nassert ", "\n```")
FENCE = "```"


@dataclass(frozen=True)
class Problem(Prompt):
    """A function to be written.

    Attributes:
        begun: its beginning: what it imports, its head and its description.
        entry_point: its name.
        test: a program that defines `check`, which takes the function and raises where it is wrong.
        chat: whether it is asked for in a conversation.
    """

    begun: str = ""
    entry_point: str = ""
    test: str = ""
    chat: bool = False


def read(config: RunConfig) -> list[Problem]:
    """The task's problems."""
    task, problems = config.task, []
    for index, _, row in read_rows(task, FIELDS, config.limit, config.offset):
        begun, entry_point, solution, test = (row[field] for field in FIELDS)
        text = f"{task.instruction}\n\n{FENCE}python\n{begun}\n{FENCE}" if task.chat_template else begun
        name = str(row.get("task_id", index))
        problems.append(Problem(index, name, text, solution, "", (), begun, entry_point, test, task.chat_template))
    return problems


def evaluate(run: Evaluation, problems: Sequence[Problem]) -> Batches:
    """Generate, and run what was generated against its tests."""
    task = run.config.task
    if missing := run_program("", task.timeout).missing:
        tqdm.write(f"warning: this system cannot keep generated programs from {' and '.join(missing)}", file=sys.stderr)

    def scored(problem: Problem, text: str) -> Sample:
        outcome = run_program(program(problem, text), task.timeout, judging(problem), problem.entry_point)
        scores = {"pass_at_1": float(outcome.passed), "reason": outcome.reason}
        return scores | {"text": text, "reference": problem.reference}

    return generate(run, problems, lambda text: whole(text, task.chat_template), scored)


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """`pass_at_1`, the share of functions that pass their tests, with its standard error; counts, and what answers
    took."""
    return scored_metrics(samples, ("pass_at_1",))


def versions(problems: Sequence[Problem]) -> dict[str, Any]:
    """What generated programs could not be kept from."""
    return {"code_not_kept_from": list(run_program("", 1).missing)}


def whole(text: str, chat: bool) -> bool:
    """Whether an answer's first block of code has ended; or what a base model goes on with holds more than the
    function."""
    return text.count(FENCE) > 1 if chat else any(stop in text for stop in STOPS)


def program(problem: Problem, text: str) -> str:
    """The program that defines a generated function. The text is the function's rest, or a chat's answer, whose first
    block of code, if it has one, is the function or its rest."""
    if problem.chat:
        _, fence, behind = text.partition(FENCE)
        code = behind.partition(FENCE)[0].partition("\n")[2] if fence else text
        head, define, _ = problem.begun.partition(f"def {problem.entry_point}")
        return head + code if define in code else problem.begun + code
    ends = [place for stop in STOPS if (place := text.find(stop)) >= 0]
    return problem.begun + text[: min(ends, default=len(text))]


def judging(problem: Problem) -> str:
    """The program that raises where `candidate` is not right: the problem's own beginning, which may have helpers for
    its tests, and these."""
    return f"{problem.begun}\n    pass\n{problem.entry_point} = candidate\n{problem.test}\n\ncheck(candidate)\n"
