"""The prompts of the summarisation tasks, to the letter those of the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from calling import composed, write_rows

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
