"""The data: how JSON Lines are read, and what the embedded articles promise to every task that uses them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import composed, write_rows

from pipelines.data import EMBEDDED, digest, read_jsonl, read_text, read_text_file
from pipelines.errors import UserError

NEEDED = ("article", "summary")


def read(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    return read_jsonl(path, NEEDED, "task.data_files", limit)


def row(number: int) -> str:
    return f'{{"article": "a{number}", "summary": "s{number}", "extra": [{number}]}}\n'


@pytest.mark.parametrize(
    ("content", "articles"),
    [
        (row(1) + row(2), ["a1", "a2"]),
        ("\n" + row(1) + "  \r\n" + row(2).rstrip(), ["a1", "a2"]),  # blank lines, and no last line break
        ('{"article": "one\u2028two\u0085three", "summary": "s"}\n', ["one\u2028two\u0085three"]),  # as news text has
        ("\ufeff" + row(1), ["a1"]),  # a byte order mark
    ],
)
def test_only_lines_with_text_are_rows(content: str, articles: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content.encode())
    assert [found["article"] for found in read(path)] == articles
    assert all(found["extra"] == [number] for number, found in enumerate(read(path), 1) if "extra" in found)


def test_rows_beyond_the_limit_are_not_looked_at_and_errors_count_lines_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n" + row(1) + row(2) + "{]\n", encoding="utf-8")
    assert len(read(path, 2)) == 2
    with pytest.raises(UserError, match=rf"^task\.data_files={re.escape(str(path))}: line 5 is not JSON"):
        read(path, 3)


def test_a_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


FIELDS = ("id", "subject", *NEEDED, "yes_no_question", "choice_question")
BRIEFS = read_jsonl(EMBEDDED / "briefs.jsonl", FIELDS, "briefs", None)
SHOTS = read_jsonl(EMBEDDED / "briefs_shots.jsonl", FIELDS, "shots", None)


HOLDS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "the length of a news brief": lambda row: 100 <= len(row["article"].split()) <= 250,
    "not the mark that ends a generation": lambda row: "###" not in str(row),
    "a summary of one sentence": lambda row: bool(re.fullmatch(r"[A-Z\d](?!.*[.!?]\s)[^\n]*\w\.", row["summary"])),
    "a summary that is not copied": lambda row: row["summary"] not in row["article"],
    "two questions with answers": lambda row: len(row["questions"]) == len(row["answers"]) == 2,
    "questions": lambda row: all(text.endswith("?") for text in row["questions"]),
    "answers from the article": lambda row: all(text.strip() and text in row["article"] for text in row["answers"]),
    "yes or no": lambda row: isinstance(row["yes_no_answer"], bool),
    "four choices": lambda row: len(set(row["choices"])) == len(row["choices"]) == 4 and all(row["choices"]),
    "a right choice": lambda row: row["choice_answer"] in range(4),
}


@pytest.mark.parametrize("what", HOLDS)
def test_every_brief_and_shot_has(what: str) -> None:
    assert [row["id"] for row in BRIEFS + SHOTS if not HOLDS[what](row)] == []


def test_briefs_are_enough_distinct_and_balanced() -> None:
    assert (len(BRIEFS) >= 48, len(SHOTS) >= 4) == (True, True)
    for field in ("id", "subject", "article"):
        assert len({row[field] for row in BRIEFS + SHOTS}) == len(BRIEFS + SHOTS), "shots are no rows"
    assert sum(row["yes_no_answer"] for row in BRIEFS) == len(BRIEFS) / 2
    assert Counter(row["choice_answer"] for row in BRIEFS) == dict.fromkeys(range(4), len(BRIEFS) / 4)


def test_perplexity_reads_the_text_of_json_lines_and_not_their_braces(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xef\xbb\xbfA text.")
    assert read_text_file(str(text)) == "A text."
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "One."}, {"text": "Two."}])
    task = composed("task=perplexity", f"task.data_files={rows}").task
    assert read_text(task) == f"One.{task.separator}Two."
    task.text_field = "body"
    with pytest.raises(UserError, match="field 'body' is missing"):
        read_text(task)
