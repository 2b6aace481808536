"""The data, and the prompts of summarisation, to the letter those of the reference implementation."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calling import composed, write_rows

from pipelines.data import EMBEDDED, read_jsonl, read_text, read_text_file
from pipelines.errors import UserError
from pipelines.models import load
from pipelines.tasks.prompts import read

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
REFERENCE = SHARED / "xsum_1shot_prompts.jsonl"  # third-party text, so it lies beside the repository


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the reference's own prompts are not beside the repository")
def test_xsum_prompts_are_the_reference_implementations_own() -> None:
    files = [f"task.data_files={SHARED / 'xsum.jsonl'}", f"task.shots_file={SHARED / 'xsum_shot.jsonl'}"]
    expected = [json.loads(line) for line in REFERENCE.read_text(encoding="utf-8").splitlines()]
    assert len(expected) == 25
    found = [(prompt.id, prompt.text) for prompt in read(composed("task=xsum", *files, "limit=25"))]
    assert found == [(row["id"], row["prompt"]) for row in expected]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides for a task of two rows and three shots."""
    rows = [{"id": "r7", "article": "Rain fell.", "summary": "Rain."}, {"article": "Snow fell.", "summary": "Snow."}]
    shots = [{"article": f"Article {n}.", "summary": f"Summary {n}."} for n in (1, 2, 3)]
    return [
        "task.summary_field=summary",
        f"task.data_files={write_rows(tmp_path / 'rows.jsonl', rows)}",
        f"task.shots_file={write_rows(tmp_path / 'shots.jsonl', shots)}",
    ]


def test_shots_come_first_in_the_order_of_their_file_with_their_own_instruction(files: list[str]) -> None:
    prompts = read(composed("task=cnn_dailymail", *files, "task.shots=2", "task.shot_instruction=Like this:"))
    assert prompts[1].text == (
        "###\nArticle: Article 1.\n\nLike this:\nSummary 1.\n\n"
        "###\nArticle: Article 2.\n\nLike this:\nSummary 2.\n\n"
        "###\nArticle: Snow fell.\n\nSummarize the above article in 3 sentences."
    )
    assert prompts[1].text.startswith(prompts[1].beginning)


def test_rows_are_named_and_limited_and_never_show_their_answer(files: list[str]) -> None:
    prompts = read(composed("task=cnn_dailymail", *files, "task.shots=0", "limit=99"))
    assert prompts[0].text == "###\nArticle: Rain fell.\n\nSummarize the above article in 3 sentences."
    assert [(prompt.index, prompt.id) for prompt in prompts] == [(0, "r7"), (1, "1")]
    assert read(composed("task=cnn_dailymail", *files, "task.shots=0", "limit=1")) == prompts[:1]
    # The first row's summary may stand in no prompt but through a shot.
    shown = prompts + read(composed("task=cnn_dailymail", *files))
    assert all(prompt.reference not in prompt.text for prompt in shown)


def test_a_chat_has_the_models_own_format(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": "Two."}])
    options = ["task=gsm8k_chat", f"task.data_files={data}"]
    (prompt,) = read(composed(*options))
    assert (prompt.text, prompt.reference, prompt.beginning) == ("How many?", "Two.", "")
    (asked,) = read(composed(*options, "task.instruction=Think."))
    assert asked.text == "How many?\n\nThink."
    loaded = load(composed("model=random_tiny").model, "cpu", 0)
    with pytest.raises(UserError, match=r"task\.chat_template=true: the model has no chat template"):
        loaded.encode(prompt.text, chat_template=True)
    loaded.tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = loaded.encode("Now.", chat_template=True, said=[("One.", "1")])
    assert loaded.tokenizer.decode(ids) == "<user>One.<assistant>1<user>Now.<assistant>"


def test_shots_of_a_chat_are_what_was_said_before(files: list[str]) -> None:
    config = composed("task=xsum", "task.article_field=article", *files, "task.shots=2", "task.chat_template=true")
    prompt, _ = read(config)
    assert prompt.text == f"Rain fell.\n\n{config.task.instruction}"
    shown = config.task.shot_instruction
    assert prompt.said == ((f"Article 1.\n\n{shown}", "Summary 1."), (f"Article 2.\n\n{shown}", "Summary 2."))


NEEDED = ("article", "summary")


def rows_of(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
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
    assert [found["article"] for found in rows_of(path)] == articles
    assert all(found["extra"] == [number] for number, found in enumerate(rows_of(path), 1) if "extra" in found)


def test_rows_beyond_the_limit_are_not_looked_at_and_errors_count_lines_as_an_editor_does(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n" + row(1) + row(2) + "{]\n", encoding="utf-8")
    assert len(rows_of(path, 2)) == 2
    with pytest.raises(UserError, match=rf"^task\.data_files={re.escape(str(path))}: line 5 is not JSON"):
        rows_of(path, 3)


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
