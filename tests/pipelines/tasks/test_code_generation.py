"""HumanEval: which program an answer becomes, and how it is judged."""

import subprocess
import sys
from pathlib import Path

import pytest
from calling import composed, ran, read_record, read_samples, tiny, write_rows

from pipelines.data import read_jsonl
from pipelines.tasks.code_execution import run_program
from pipelines.tasks.code_generation import FIELDS, Problem, judging, program, read, whole

SHARED = Path(__file__).parents[3].parent / "shared" / "data" / "humaneval.jsonl"
HEAD = '''from typing import List


def half(number: int) -> int:
    """Half of an even number.
    >>> half(4)
    2
    """
'''
TEST = "def check(candidate):\n    assert candidate(4) == 2\n    assert candidate(10) == 5\n"
ROW = {
    "task_id": "own/0",
    "prompt": HEAD,
    "entry_point": "half",
    "canonical_solution": "    return number // 2\n",
    "test": TEST,
}


def problem(row: dict[str, str] = ROW, chat: bool = False) -> Problem:
    begun, entry_point, _, test = (row[field] for field in FIELDS)
    return Problem(0, row["task_id"], begun, "", begun=begun, entry_point=entry_point, test=test, chat=chat)


def passed(problem: Problem, text: str) -> bool:
    return run_program(program(problem, text), 10, judging(problem), problem.entry_point).passed


WRITTEN = "def half(number):\n    return number // 2\n"


@pytest.mark.parametrize(
    ("chat", "text", "passes"),
    [
        (False, "    return number // 2\n", True),
        (False, "    return number // 2\n\ndef other():\n    raise ValueError\n\nother()\n", True),
        (False, "    return number // 2\nprint(1 / 0)\n", True),
        (False, "    return number / 3\n", False),
        (False, "return number\n", False),
        (False, "", False),
        (True, f"```python\n{WRITTEN}```", True),
        (True, f"Here it is:\n```\n{WRITTEN}```\nIt divides.", True),
        (True, f"```python\n{HEAD}    return number // 2\n```\n```python\nraise ValueError\n```", True),
        (True, "```python\n    return number // 2\n```", True),  # the rest of the function alone
        (True, WRITTEN, True),
        (True, "```python\n" + WRITTEN, True),  # cut off at the limit
        (True, "```\ndef half(numbers: List[int]):\n    return numbers // 2\n```", True),  # the head imports
        (True, "```python\ndef other(number):\n    return number // 2\n```", False),
        (True, "I cannot.", False),
    ],
)
def test_a_text_goes_on_to_the_functions_end_and_a_chats_answer_is_its_first_block_of_code(
    chat: bool, text: str, passes: bool
) -> None:
    assert passed(problem(chat=chat), text) == passes


def test_a_text_is_whole_where_the_function_is() -> None:
    assert not whole("    return 1\n    # a comment", chat=False)
    assert whole("    return 1\ndef other", chat=False)
    assert not whole("```python\ndef half", chat=True)
    assert whole("```python\ndef half(): ...\n```", chat=True)


def test_canonical_solutions_pass_and_broken_ones_are_judged_as_by_hand(tmp_path: Path) -> None:
    if not SHARED.is_file():
        pytest.skip(f"no file {SHARED.name} beside the project")
    path, judged = tmp_path / "program.py", []
    for row in read_jsonl(SHARED, FIELDS, "task.data_files", None):
        solution: str = row["canonical_solution"]
        assert passed(problem(row), solution), row["task_id"]
        broken = "\n".join(solution.rstrip().split("\n")[:-1])
        judged.append(passed(problem(row), broken))
        by_itself = f"{row['prompt']}{broken}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
        path.write_text(by_itself, encoding="utf-8")
        ended = subprocess.run([sys.executable, str(path)], cwd=tmp_path, capture_output=True, check=False)
        assert judged[-1] == (ended.returncode == 0), row["task_id"]
    assert judged.count(True) < len(judged) / 4


def options(folder: Path, *more: str) -> list[str]:
    data = write_rows(folder / "problems.jsonl", [ROW, ROW | {"task_id": "own/1"}])
    own = [f"task.data_files={data}", "task.max_new_tokens=8", "task.allow_code_execution=true"]
    return tiny(folder / "out", *own, *more, task="humaneval")


def test_a_run_judges_every_problem_under_every_method(tmp_path: Path) -> None:
    grid = ["grid.sparsity=[0,0.5]", "grid.statistic=[griffin,cats]", "batch_size=4"]
    folders = ran(*options(tmp_path, *grid))
    assert len(folders) == 3
    for folder in folders:
        record = read_record(folder)
        assert record["metrics"]["samples"] == 2
        assert record["metrics"]["pass_at_1"] == 0.0
        assert record["environment"]["code_not_kept_from"] == list(run_program("", 5).missing)
        for sample in read_samples(folder):
            assert sample["reason"]
            assert sample["pass_at_1"] == 0.0


def test_what_passes_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [ROW["canonical_solution"], "    return 0\n"]
    written = "pipelines.tasks.code_generation.program"
    monkeypatch.setattr(written, lambda problem, _: program(problem, answers[problem.index]))
    metrics = read_record(ran(*options(tmp_path))[0])["metrics"]
    assert (metrics["pass_at_1"], metrics["pass_at_1_stderr"]) == (0.5, 0.5)


def test_a_chat_asks_with_the_instruction_and_the_functions_head(tmp_path: Path) -> None:
    (asked, _) = read(composed(*options(tmp_path, "task.chat_template=true")))
    assert asked.text.startswith("Complete this Python function.")
    assert f"```python\n{HEAD}\n```" in asked.text
