"""The prompts of the summarisation tasks, to the letter those of the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import composed, write_rows

from pipelines.errors import UserError
from pipelines.models import load
from pipelines.tasks.prompts import read_prompts, summarization_prompt

SHARED = Path(__file__).parents[3].parent / "shared" / "data"
REFERENCE = SHARED / "xsum_1shot_prompts.jsonl"  # third-party text, so it lies beside the repository


@pytest.mark.skipif(not REFERENCE.is_file(), reason="the reference's own prompts are not beside the repository")
def test_xsum_prompts_are_the_reference_implementations_own() -> None:
    config = composed(
        "task=xsum", f"task.data_files={SHARED / 'xsum.jsonl'}", f"task.shots_file={SHARED / 'xsum_shot.jsonl'}"
    )
    expected = [json.loads(line) for line in REFERENCE.read_text(encoding="utf-8").splitlines()]
    found = read_prompts(config.task, 25)
    assert len(expected) == 25
    assert [prompt.text for prompt in found] == [row["prompt"] for row in expected]
    assert [prompt.id for prompt in found] == [row["id"] for row in expected]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Overrides for a task of two rows and three shots."""
    rows = [{"id": "r7", "article": "Rain fell.", "summary": "Rain."}, {"article": "Snow fell.", "summary": "Snow."}]
    shots = [{"article": f"Article {n}.", "summary": f"Summary {n}."} for n in (1, 2, 3)]
    return [
        "task=cnn_dailymail",
        "task.summary_field=summary",
        f"task.data_files={write_rows(tmp_path / 'rows.jsonl', rows)}",
        f"task.shots_file={write_rows(tmp_path / 'shots.jsonl', shots)}",
    ]


def test_without_shots_a_prompt_is_article_and_instruction(files: list[str]) -> None:
    prompts = read_prompts(composed(*files, "task.shots=0").task, None)
    assert prompts[0].text == "###\nArticle: Rain fell.\n\nSummarize the above article in 3 sentences."


def test_shots_come_first_in_the_order_of_their_file(files: list[str]) -> None:
    prompts = read_prompts(composed(*files, "task.shots=2").task, None)
    assert prompts[1].text == (
        "###\nArticle: Article 1.\n\nSummarize the above article in 3 sentences.\nSummary 1.\n\n"
        "###\nArticle: Article 2.\n\nSummarize the above article in 3 sentences.\nSummary 2.\n\n"
        "###\nArticle: Snow fell.\n\nSummarize the above article in 3 sentences."
    )


def test_the_reference_never_shows_its_answer(files: list[str]) -> None:
    # The first row's summary may stand in no prompt but through a shot.
    assert all(prompt.reference not in prompt.text for prompt in read_prompts(composed(*files).task, None))


def test_shots_and_question_word_their_instructions_separately() -> None:
    prompt = summarization_prompt("A.", "Now you:", "Like this:", [("B.", "b")])
    assert prompt == "###\nArticle: B.\n\nLike this:\nb\n\n###\nArticle: A.\n\nNow you:"


def test_rows_without_an_id_are_named_by_their_place(files: list[str]) -> None:
    assert [(prompt.index, prompt.id) for prompt in read_prompts(composed(*files).task, None)] == [(0, "r7"), (1, "1")]


def test_limit_takes_the_first_rows(files: list[str]) -> None:
    task = composed(*files).task
    assert read_prompts(task, 1) == read_prompts(task, None)[:1]
    assert len(read_prompts(task, 99)) == 2


def test_a_chat_has_the_models_own_format(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"question": "How many?", "answer": "Two."}])
    task = composed("task=gsm8k_chat", f"task.data_files={tmp_path / 'rows.jsonl'}").task
    (prompt,) = read_prompts(task, None)
    assert (prompt.text, prompt.reference, prompt.beginning) == ("How many?", "Two.", "")
    task.instruction = "Think."
    (asked,) = read_prompts(task, None)
    assert asked.text == "How many?\n\nThink."
    loaded = load(composed("model=random_tiny").model, "cpu", 0)
    with pytest.raises(UserError, match=r"task\.chat_template=true: the model has no chat template"):
        loaded.encode(prompt.text, chat_template=True)
    loaded.tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = loaded.encode(prompt.text, chat_template=True)
    assert loaded.tokenizer.decode(ids) == "<user>How many?<assistant>"


def test_shots_of_a_chat_are_what_was_said_before(tmp_path: Path) -> None:
    rows = [{"document": "B.", "summary": "b"}, {"document": "C.", "summary": "c"}]
    files = [write_rows(tmp_path / f"{name}.jsonl", rows[:count]) for name, count in (("rows", 1), ("shots", 2))]
    paths = [f"task.data_files={files[0]}", f"task.shots_file={files[1]}"]
    task = composed("task=xsum", *paths, "task.shots=2", "task.chat_template=true").task
    (prompt,) = read_prompts(task, None)
    assert prompt.text == f"B.\n\n{task.instruction}"
    assert prompt.said == ((f"B.\n\n{task.shot_instruction}", "b"), (f"C.\n\n{task.shot_instruction}", "c"))
    loaded = load(composed("model=random_tiny").model, "cpu", 0)
    loaded.tokenizer.chat_template = (
        "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}{% endfor %}"
    )
    ids = loaded.encode("Now.", chat_template=True, said=[("One.", "1"), ("Two.", "2")])
    assert loaded.tokenizer.decode(ids) == "<u>One.<a>1<u>Two.<a>2<u>Now."
