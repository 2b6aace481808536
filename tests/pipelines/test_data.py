"""The data: how JSON Lines are read, and what the embedded articles promise to every task that uses them."""

from __future__ import annotations

import re
from collections import Counter
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


def test_rows_keep_their_order_and_their_other_fields(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row(1) + row(2), encoding="utf-8")
    assert read(path) == [
        {"article": "a1", "summary": "s1", "extra": [1]},
        {"article": "a2", "summary": "s2", "extra": [2]},
    ]


def test_blank_lines_and_a_missing_last_line_break_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + row(1) + "  \r\n" + row(2).rstrip(), encoding="utf-8")
    assert [found["article"] for found in read(path)] == ["a1", "a2"]


def test_only_line_breaks_end_a_row(tmp_path: Path) -> None:
    # str.splitlines would break at these too, and news text holds them.
    path = tmp_path / "rows.jsonl"
    text = "one\u2028two\u0085three"
    path.write_text(f'{{"article": "{text}", "summary": "s"}}\n', encoding="utf-8")
    assert read(path)[0]["article"] == text


def test_rows_beyond_the_limit_are_not_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(row(1) + row(2) + "not JSON\n", encoding="utf-8")
    assert len(read(path, 2)) == 2
    with pytest.raises(UserError, match="line 3"):
        read(path, 3)


def test_errors_count_blank_lines_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n" + row(1) + "{]\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"^task\.data_files={re.escape(str(path))}: line 4 is not JSON"):
        read(path)


def test_a_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    for name, content in (("a", "x"), ("b", "x"), ("c", "y")):
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


FIELDS = ("id", "subject", *NEEDED, "yes_no_question", "choice_question")
BRIEFS = read_jsonl(EMBEDDED / "briefs.jsonl", FIELDS, "briefs", None)
SHOTS = read_jsonl(EMBEDDED / "briefs_shots.jsonl", FIELDS, "shots", None)
ALL = BRIEFS + SHOTS


def bad(rows: list[dict[str, Any]], holds: Any) -> list[str]:
    """The ids of the rows that do not hold what they should."""
    return [found["id"] for found in rows if not holds(found)]


def test_there_are_enough_briefs() -> None:
    assert len(BRIEFS) >= 48
    assert len(SHOTS) >= 4


def test_shots_are_not_among_the_rows_they_are_shown_with() -> None:
    for field in ("id", "subject", "article"):
        assert [value for value, count in Counter(found[field] for found in ALL).items() if count > 1] == []


def test_articles_have_the_length_of_a_news_brief() -> None:
    assert bad(ALL, lambda found: 100 <= len(found["article"].split()) <= 250) == []


def test_no_text_holds_the_mark_that_ends_a_generation() -> None:
    assert bad(ALL, lambda found: "###" not in str(found)) == []


def test_summaries_are_one_sentence() -> None:
    assert bad(ALL, lambda found: re.fullmatch(r"[A-Z\d][^\n]*\w\.", found["summary"])) == []
    assert bad(ALL, lambda found: not re.search(r"[.!?]\s", found["summary"])) == []


def test_summaries_are_not_copied_from_their_article() -> None:
    assert bad(ALL, lambda found: found["summary"] not in found["article"]) == []


def test_questions_are_answered_literally_in_their_article() -> None:
    assert bad(ALL, lambda found: len(found["questions"]) == len(found["answers"]) == 2) == []
    assert bad(ALL, lambda found: all(text.endswith("?") for text in found["questions"])) == []
    assert bad(ALL, lambda found: all(text.strip() and text in found["article"] for text in found["answers"])) == []


def test_yes_and_no_are_balanced() -> None:
    assert bad(ALL, lambda found: isinstance(found["yes_no_answer"], bool)) == []
    assert sum(found["yes_no_answer"] for found in BRIEFS) == len(BRIEFS) / 2


def test_choices_are_four_and_the_right_one_is_anywhere() -> None:
    assert bad(ALL, lambda found: len(set(found["choices"])) == len(found["choices"]) == 4) == []
    assert bad(ALL, lambda found: all(text.strip() for text in found["choices"])) == []
    places = Counter(found["choice_answer"] for found in BRIEFS)
    assert places == dict.fromkeys(range(4), len(BRIEFS) / 4)
    assert bad(SHOTS, lambda found: found["choice_answer"] in range(4)) == []


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b"\xef\xbb\xbf" + b'{"a": "one"}\n{"a": "two"}\n')
    assert [row["a"] for row in read_jsonl(rows, ("a",), "task.data_files", None)] == ["one", "two"]
    text = tmp_path / "text.txt"
    text.write_bytes(b"\xef\xbb\xbfA text.")
    assert read_text_file(str(text)) == "A text."


def test_perplexity_reads_the_text_of_json_lines_and_not_their_braces(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "One."}, {"text": "Two."}])
    task = composed("task=perplexity", f"task.data_files={rows}").task
    assert read_text(task) == f"One.{task.separator}Two."
    task.text_field = "body"
    with pytest.raises(UserError, match="field 'body' is missing"):
        read_text(task)
