"""Tasks of lm-eval as lm-eval runs them: answers, shots, chat templates and filters; how long GSM8K's answers are."""

from dataclasses import replace
from pathlib import Path

import lm_eval
import pytest
from calling import composed, ran, read_record, read_samples, write_rows
from lm_eval.models.huggingface import HFLM

import griffin
from pipelines.models import load
from pipelines.tasks import lm_eval_adapter

ROWS = [
    {
        "question": f"A boat carries {there} crates and {more} more are loaded. How many crates are on it?",
        "answer": f"{there} + {more} = {there + more}\n#### {there + more}",
    }
    for there, more in ((4, 3), (12, 2), (30, 15), (6, 50), (10, 4), (3, 1000), (9, 3))
]


def options(folder: Path, task: str, *more: str) -> list[str]:
    data, shots = write_rows(folder / "rows.jsonl", ROWS), write_rows(folder / "shots.jsonl", ROWS[::-1])
    own = [f"task.data_files={data}"] if task.startswith("gsm8k") else []
    own += [f"task.shots_file={shots}"] if task == "gsm8k" else []
    return [f"task={task}", *own, f"output_dir={folder / 'out'}", "wandb.mode=disabled", *more]


def zeroshot(folder: Path) -> list[str]:
    return options(folder, "gsm8k_cot_zeroshot", "model=random_tiny", "limit=1")


SHARED_DATA = Path(__file__).parents[3].parent / "shared" / "data"
# The data that stands in for the hub's, in its layout, by task, and how many of its documents are asked.
LOCAL = {task: (task, 8) for task in ("piqa", "copa", "arc_easy", "boolq", "hellaswag")}
LOCAL |= {"qasper": ("qasper", 2), "coqa": ("coqa_like", 2)}


@pytest.mark.parametrize(
    ("task", "more"),
    [
        *((f"briefs_{task}", [f"cpu_onednn={on}"]) for task in ("choice", "boolq", "qa") for on in ("true", "false")),
        *((task, [f"task.data_files={SHARED_DATA / name}.jsonl", f"limit={n}"]) for task, (name, n) in LOCAL.items()),
        ("gsm8k", []),
        ("gsm8k", ["offset=2", "task.shots=2"]),
        ("gsm8k", ["task.chat_template=true"]),
        ("gsm8k_cot_zeroshot", ["task.chat_template=true"]),
    ],
)
def test_dense_equals_plain_lm_eval(task: str, more: list[str], tmp_path: Path) -> None:
    if task in LOCAL and not (data := Path(more[0].partition("=")[2])).is_file():
        pytest.skip(f"no file {data.name} beside the project")
    # Of gsm8k the packaged model's answers, and fewer tokens than the task asks for, so that it takes seconds.
    sizes = "task.max_new_tokens=16 limit=2" if "gsm8k" in task else "model=random_tiny batch_size=4 limit=4"
    overrides = options(tmp_path, task, "sparsity=0", *sizes.split(), *more)
    (folder,) = ran(*overrides)
    config = composed(*overrides)
    loaded = load(config.model, "cpu", 0)
    bos, batch_size = loaded.add_bos_token, config.batch_size
    lm = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size, add_bos_token=bos)
    built = lm_eval_adapter._build(config.task)
    if "gsm8k" in task:
        built.set_config("num_fewshot", config.task.shots)
        built.set_config("generation_kwargs", {"max_gen_toks": 16}, update=True)
    built.set_fewshot_seed(lm_eval_adapter.SHOTS_SEED)
    chat, limit = config.task.chat_template, config.offset + (config.limit or 0)
    as_chat = {"apply_chat_template": chat, "fewshot_as_multiturn": chat}
    found = lm_eval.evaluate(lm, {task: built}, limit=limit, bootstrap_iters=0, **as_chat)

    record, chosen = read_record(folder), config.task.filter or "none"
    plain = {sample["doc_id"]: sample for sample in found["samples"][task] if sample["filter"] == chosen}
    samples = {sample["index"]: sample for sample in read_samples(folder)}
    assert [*samples] == [*range(config.offset, limit)]
    for index, sample in samples.items():
        assert any(name in plain[index] for name in sample["metrics"])
        assert all(plain[index].get(name, value) == value for name, value in sample["metrics"].items())
        assert config.task.kind == "classification" or sample["answers"] == plain[index]["resps"][0]
    means = {name.partition(",")[0]: value for name, value in found["results"][task].items() if f",{chosen}" in name}
    for name in [name for name in means if not name.endswith("_stderr") and not config.offset]:
        assert record["metrics"][name] == means[name]
        assert f"{name}_stderr" in record["metrics"]
    environment = record["environment"]
    assert (environment["lm-eval"], environment["task_version"]) == (lm_eval.__version__, built.VERSION)


def judged(tmp_path: Path, task: str, text: str) -> dict[str, float]:
    config = composed(*options(tmp_path, task))
    (document, *_) = lm_eval_adapter.read(config)
    asked = document.task.construct_requests(doc=document.doc, ctx="", metadata=(task, 0, 1))
    return lm_eval_adapter.results(replace(document, instances=(asked,)), [text], config.task.filter)


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
    tiny = [*zeroshot(tmp_path), *grid, "task.max_new_tokens=12"]
    dense, pruned, by_token = (read_record(folder)["metrics"] for folder in ran(*tiny))
    assert dense["answer_tokens"] == 12  # random weights hardly ever end a text
    assert "effective_density" not in dense
    loaded = load(composed(*tiny).model, "cpu", 0)
    kept = griffin.Method().kept([block.width for block in griffin.find_feedforward_blocks(loaded.model)])
    found = griffin.traffic(loaded.model, kept)
    assert pruned["effective_density"] == pytest.approx(found.pruned / found.dense)
    assert pruned["effective_density"] < by_token["effective_density"] < 1


def test_a_refreshed_answer_counts_its_dense_steps(tmp_path: Path) -> None:
    base = [*zeroshot(tmp_path), "compensation=ridge", "task.max_new_tokens=18"]  # instead of the task's own
    plain, refreshed = (
        read_record(ran(*base, f"refresh={refresh}")[0])["metrics"] for refresh in ("none", "compensation")
    )
    assert refreshed["answer_tokens"] == 18
    density, steps, dense = plain["effective_density"], 17, 2  # after 8 and 16 tokens
    assert refreshed["effective_density"] == pytest.approx((dense + (steps - dense) * density) / steps)
