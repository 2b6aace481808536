"""GSM8K as lm-eval defines it: shots, chat templates, filters, and how long answers are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from calling import composed, ran, read_record, read_samples, write_rows
from lm_eval.models.huggingface import HFLM

import griffin
from pipelines.composition import Call
from pipelines.job import attempt
from pipelines.models import load
from pipelines.tasks import lm_eval_adapter
from pipelines.tasks.lm_eval_adapter import LM_EVAL_TASKS, SHOTS_SEED

QUESTIONS = [
    ("A boat carries 4 crates and 3 more are loaded. How many crates are on it?", "4 + 3 = 7\n#### 7"),
    ("A baker sells 12 loaves at 2 coins each. How many coins does she get?", "12 * 2 = 24\n#### 24"),
    ("Of 30 lamps, half are lit. How many are dark?", "30 / 2 = 15\n#### 15"),
    ("A train has 6 coaches of 50 seats. How many seats are there?", "6 * 50 = 300\n#### 300"),
    ("Ten geese land and four fly off. How many stay?", "10 - 4 = 6\n#### 6"),
    ("Three boxes hold 1,000 pins each. How many pins are there?", "3 * 1000 = 3000\n#### 3,000"),
    ("A rope of 9 metres is cut into 3. How long is each part?", "9 / 3 = 3\n#### 3"),
]
ROWS = [{"question": question, "answer": answer} for question, answer in QUESTIONS]


def definition(folder: Path, name: str, tokens: int) -> str:
    """lm-eval's own task with shorter answers, so that a test takes seconds."""
    path = folder / f"{name}.yaml"
    include = LM_EVAL_TASKS / "gsm8k" / f"{name}.yaml"
    kwargs = yaml.safe_load(include.read_text(encoding="utf-8"))["generation_kwargs"] | {"max_gen_toks": tokens}
    path.write_text(yaml.safe_dump({"include": str(include), "generation_kwargs": kwargs}), encoding="utf-8")
    return f"task.definition={path}"


def options(folder: Path, task: str, *more: str) -> list[str]:
    data, shots = write_rows(folder / "rows.jsonl", ROWS), write_rows(folder / "shots.jsonl", ROWS[::-1])
    plain = [f"task={task}", f"task.data_files={data}", f"output_dir={folder / 'out'}", "wandb.mode=disabled"]
    return [*plain, *([f"task.shots_file={shots}"] if task == "gsm8k" else []), *more]


@pytest.mark.parametrize(
    ("task", "yaml_name", "more"),
    [
        ("gsm8k", "gsm8k", []),
        ("gsm8k", "gsm8k", ["offset=2", "task.shots=2"]),
        ("gsm8k", "gsm8k", ["task.chat_template=true"]),
        ("gsm8k_cot_zeroshot", "gsm8k-cot-zeroshot", ["task.chat_template=true"]),
    ],
)
def test_dense_answers_are_those_of_plain_lm_eval(task: str, yaml_name: str, more: list[str], tmp_path: Path) -> None:
    overrides = options(tmp_path, task, definition(tmp_path, yaml_name, 16), "sparsity=0", "limit=2", *more)
    (folder,) = ran(*overrides)
    config = composed(*overrides)
    loaded = load(config.model, "cpu", 0)
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, add_bos_token=loaded.add_bos_token)
    built = lm_eval_adapter._build(config.task)
    built.set_config("num_fewshot", config.task.shots)
    built.set_fewshot_seed(SHOTS_SEED)
    chat = config.task.chat_template
    found = lm_eval.evaluate(
        lm,
        {task: built},
        limit=config.offset + config.limit,
        bootstrap_iters=0,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
    )
    plain = {sample["doc_id"]: sample for sample in found["samples"][task] if sample["filter"] == config.task.filter}
    samples = read_samples(folder)
    assert [sample["index"] for sample in samples] == [config.offset, config.offset + 1]
    for sample in samples:
        expected = plain[sample["index"]]
        assert sample["answers"] == expected["resps"][0]
        assert sample["metrics"]["exact_match"] == expected["exact_match"]


def judged(tmp_path: Path, task: str, text: str) -> dict[str, float]:
    config = composed(*options(tmp_path, task))
    (document, *_) = lm_eval_adapter.read(config)
    built = document.task
    asked = built.construct_requests(doc=document.doc, ctx="", metadata=(task, 0, 1))
    whole = lm_eval_adapter.Document(0, document.doc, built, (asked,) if not isinstance(asked, list) else tuple(asked))
    return lm_eval_adapter.results(whole, [text], config.task.filter)


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [("4 + 3 = 7\n#### 7", 1, 1), ("There are 7.", 0, 1), ("4 and 3 make 8\n#### 8", 0, 0), ("Many crates.", 0, 0)],
)
def test_each_filter_judges_an_answer_its_own_way(text: str, strict: int, flexible: int, tmp_path: Path) -> None:
    assert judged(tmp_path, "gsm8k", text) == {"exact_match": strict, "exact_match_flexible_extract": flexible}
    found = judged(tmp_path, "gsm8k_cot_zeroshot", text)
    assert list(found) == ["exact_match", "exact_match_strict_match"]
    assert found["exact_match"] == flexible


def test_records_say_how_long_answers_are_and_what_they_took(tmp_path: Path) -> None:
    grid = ["grid.statistic=[griffin,teal]", "grid.sparsity=[0,0.5]", "limit=2", "batch_size=4"]
    tiny = [*options(tmp_path, "gsm8k_cot_zeroshot", "model=random_tiny"), *grid]
    tiny += [definition(tmp_path, "gsm8k-cot-zeroshot", 12)]
    dense, pruned, by_token = (read_record(folder)["metrics"] for folder in ran(*tiny))
    assert dense["answer_tokens"] == 12  # random weights hardly ever end a text
    assert "effective_density" not in dense
    loaded = load(composed(*tiny).model, "cpu", 0)
    kept = griffin.Method().kept([block.width for block in griffin.find_feedforward_blocks(loaded.model)])
    found = griffin.traffic(loaded.model, kept)
    assert pruned["effective_density"] == pytest.approx(found.pruned / found.dense)
    assert pruned["effective_density"] < by_token["effective_density"] < 1


def test_a_refreshed_answer_counts_its_dense_steps(tmp_path: Path) -> None:
    base = [*options(tmp_path, "gsm8k_cot_zeroshot", "model=random_tiny"), "limit=1", "compensation=ridge"]
    base += [definition(tmp_path, "gsm8k-cot-zeroshot", 18)]
    plain, refreshed = (
        read_record(ran(*base, more)[0])["metrics"] for more in ("refresh=none", "refresh=compensation")
    )
    assert refreshed["answer_tokens"] == 18
    density, steps, dense = plain["effective_density"], 17, 2  # after 8 and 16 tokens
    assert refreshed["effective_density"] == pytest.approx((dense + (steps - dense) * density) / steps)


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    overrides = options(tmp_path, "gsm8k_cot_zeroshot", "model=random_tiny", "task.chat_template=true", "limit=1")
    (status,) = attempt(composed(*overrides), Call((), None, single=True))
    assert "task.chat_template=true: the model has no chat template" in str(status.reason)


def test_more_shots_than_there_are_is_refused(tmp_path: Path) -> None:
    overrides: list[Any] = [*options(tmp_path, "gsm8k"), "task.shots=8", "model=random_tiny"]
    (status,) = attempt(composed(*overrides), Call((), None, single=True))
    assert "task.shots=8" in str(status.reason)


def test_answers_can_be_longer_or_shorter_than_the_tasks_own(tmp_path: Path) -> None:
    (folder,) = ran(*options(tmp_path, "gsm8k_cot_zeroshot", "model=random_tiny", "limit=1", "task.max_new_tokens=5"))
    assert read_record(folder)["metrics"]["answer_tokens"] == 5
