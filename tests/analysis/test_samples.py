"""What the models wrote: the examples of the report, and the page of all answers with its search."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from made import record, write_run, write_samples

from analysis import samples as samples_module
from analysis.contents import Report, make_report
from analysis.output import write_report
from analysis.samples import examples

Samples = list[dict[str, Any]]
DENSE = {0: 30.0, 1: 20.0, 2: 10.0, 3: 25.0, 4: 5.0}
PRUNED = {0: 10.0, 1: 21.0, 2: 10.0, 3: 20.0, 4: 4.0}


def answered(root: Path, run_id: str, sparsity: float, scores: dict[int, float], **more: Any) -> None:
    """A run of the task xsum with a text for every score."""
    metrics = {"rouge1": sum(scores.values()) / len(scores), "rouge1_stderr": 1.0, "samples": len(scores)}
    folder = write_run(root, record(run_id, sparsity=sparsity, metrics=metrics, **more))
    samples: Samples = [
        {"index": index, "id": f"s{index}", "text": f"{run_id} wrote <b>{index}</b>", "reference": f"truth {index}"}
        | {"rouge1": value, "generated_tokens": 7}
        for index, value in scores.items()
    ]
    write_samples(folder, samples)


@pytest.fixture
def answers(tmp_path: Path) -> Report:
    answered(tmp_path / "runs", "dense", 0, DENSE)
    answered(tmp_path / "runs", "pruned", 0.5, PRUNED)
    return make_report(str(tmp_path / "runs"))


def test_the_examples_are_the_best_the_median_and_the_worst_difference(answers: Report) -> None:
    (found,) = answers.answers
    assert [(one.rule, one.index, one.difference) for one in examples(found.samples)] == [
        ("best", 1, 1.0),
        ("median", 4, -1.0),
        ("worst", 0, -20.0),
    ]
    assert [answer.text for answer in examples(found.samples)[0].answers] == [
        "dense wrote <b>1</b>",
        "pruned wrote <b>1</b>",
    ]


def test_a_report_reads_samples_once_and_keeps_no_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run_id, sparsity in (("dense", 0), ("pruned", 0.5)):
        answered(tmp_path / "runs", run_id, sparsity, DENSE)
    opened: list[str] = []
    read = samples_module.read_samples
    monkeypatch.setattr(samples_module, "read_samples", lambda folder: opened.append(folder.name) or read(folder))
    report = make_report(str(tmp_path / "runs"))
    assert sorted(opened) == ["dense", "pruned"]
    assert " wrote " not in repr(report)


def test_scores_are_a_frame_with_a_column_a_method(answers: Report) -> None:
    scores = answers.answers[0].scores
    assert {name: column.to_dict() for name, column in scores.items()} == {"dense": DENSE, "griffin 50%": PRUNED}


def test_without_dense_the_scores_themselves_rank(tmp_path: Path) -> None:
    answered(tmp_path / "runs", "pruned", 0.5, PRUNED)
    (found,) = make_report(str(tmp_path / "runs")).answers
    assert not found.compared
    assert [one.index for one in examples(found.samples)] == [1, 0, 4]


def test_samples_that_not_all_have_are_left_out(tmp_path: Path) -> None:
    answered(tmp_path / "runs", "dense", 0, DENSE)
    answered(tmp_path / "runs", "pruned", 0.5, {index: PRUNED[index] for index in (0, 1)})
    (found,) = make_report(str(tmp_path / "runs")).answers
    assert {one.index for one in found.samples} == {0, 1}
    assert [one.rule for one in examples(found.samples)] == ["", ""]


def test_chosen_answers_are_no_texts(tmp_path: Path) -> None:
    shape = {"acc": 0.5, "acc_stderr": 0.1, "samples": 2}
    folder = write_run(tmp_path / "runs", record("choice", "classification", metrics=shape))
    lines = [{"index": i, "answers": [[-1.0, False], [-2.0, True]], "target": 0, "metrics": {"acc": i}} for i in (0, 1)]
    write_samples(folder, lines)
    assert make_report(str(tmp_path / "runs")).answers == []


def test_the_pages_show_every_text_as_text(answers: Report, tmp_path: Path) -> None:
    index = write_report(answers, tmp_path / "report")
    page = (tmp_path / "report" / "answers" / f"{answers.answers[0].name}.html").read_text(encoding="utf-8")
    for text in ("dense wrote &lt;b&gt;3&lt;/b&gt;", "pruned wrote &lt;b&gt;3&lt;/b&gt;", "truth 3"):
        assert text in page
    assert "<script" not in index.read_text(encoding="utf-8")
    assert f'href="answers/{answers.answers[0].name}.html"' in index.read_text(encoding="utf-8")


def test_a_report_without_answers_leaves_no_page_of_an_earlier_one(answers: Report, tmp_path: Path) -> None:
    write_report(answers, tmp_path / "report")
    assert [*(tmp_path / "report" / "answers").iterdir()]
    shutil.rmtree(tmp_path / "runs")
    write_run(tmp_path / "runs", record("other"))
    write_report(make_report(str(tmp_path / "runs")), tmp_path / "report")
    assert not [*(tmp_path / "report" / "answers").iterdir()]


@pytest.fixture
def search(answers: Report, tmp_path: Path) -> Callable[[str], tuple[list[str], str]]:
    if CHROMIUM is None:
        pytest.skip("needs chromium (Debian's package)")
    write_report(answers, tmp_path / "report")
    page = tmp_path / "report" / "answers" / f"{answers.answers[0].name}.html"

    def found(words: str) -> tuple[list[str], str]:
        """The samples that are left, and what the page says of them."""
        with Browser(tmp_path / "profile") as browser:
            seen = browser.open(
                page,
                390,
                script=f"""(() => {{
                    const search = document.getElementById("search");
                    search.value = {json.dumps(words)};
                    search.dispatchEvent(new Event("input"));
                    const left = [...document.querySelectorAll("article")].filter(one => one.checkVisibility());
                    return [left.map(one => one.id), document.getElementById("found").textContent];
                }})()""",
            )
        assert seen.messages == []
        assert seen.page_width == 390
        left, told = seen.result
        return left, told

    return found


@pytest.mark.parametrize(
    ("words", "left", "told"),
    [
        ("TRUTH s3", ["sample-3"], "1 of 5 samples"),
        ("", [f"sample-{index}" for index in (1, 2, 4, 3, 0)], "5 of 5 samples"),
        ("nowhere", [], "0 of 5 samples"),
    ],
)
def test_search_leaves_the_samples_that_have_all_words(
    search: Callable[[str], tuple[list[str], str]], words: str, left: list[str], told: str
) -> None:
    assert search(words) == (left, told)
