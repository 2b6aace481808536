"""What the models wrote: the examples of the report, and the page of all answers with its search."""

import json
import shutil
from pathlib import Path
from statistics import fmean

import pytest
from browser import CHROMIUM, Browser
from made import record, score, write_run

from analysis import samples as samples_module
from analysis.contents import Report, make_report
from analysis.output import write_report
from analysis.samples import examples

DENSE = {0: 30.0, 1: 20.0, 2: 10.0, 3: 25.0, 4: 5.0}
PRUNED = {0: 10.0, 1: 21.0, 2: 10.0, 3: 20.0, 4: 4.0}


def answered(root: Path, run_id: str, sparsity: float, scores: dict[int, float]) -> None:
    """A run of the task xsum with a text for every score."""
    metrics = score(fmean(scores.values())) | {"samples": len(scores)}
    samples = [
        {"index": index, "id": f"s{index}", "text": f"{run_id} wrote <b>{index}</b>", "reference": f"truth {index}"}
        | {"rouge1": value, "generated_tokens": 7}
        for index, value in scores.items()
    ]
    write_run(root, record(run_id, sparsity=sparsity, metrics=metrics), samples)


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


def test_a_report_reads_samples_once_and_keeps_no_texts(
    answers: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    lines = [{"index": i, "answers": [[-1.0, False], [-2.0, True]], "target": 0, "metrics": {"acc": i}} for i in (0, 1)]
    write_run(tmp_path / "runs", record("choice", "classification", metrics=score(0.5, 0.1, "acc")), lines)
    assert make_report(str(tmp_path / "runs")).answers == []


def test_the_pages_show_every_text_as_text_and_none_of_an_earlier_report(answers: Report, tmp_path: Path) -> None:
    index = write_report(answers, tmp_path / "report").read_text(encoding="utf-8")
    (page,) = (tmp_path / "report" / "answers").iterdir()
    for text in ("dense wrote &lt;b&gt;3&lt;/b&gt;", "pruned wrote &lt;b&gt;3&lt;/b&gt;", "truth 3"):
        assert text in page.read_text(encoding="utf-8")
    assert "<script" not in index
    assert f'href="answers/{page.name}"' in index
    shutil.rmtree(tmp_path / "runs")
    write_run(tmp_path / "runs", record("other"))
    write_report(make_report(str(tmp_path / "runs")), tmp_path / "report")
    assert not [*(tmp_path / "report" / "answers").iterdir()]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian's package)")
@pytest.mark.parametrize(
    ("words", "left", "told"),
    [
        ("TRUTH s3", ["sample-3"], "1 of 5 samples"),
        ("", [f"sample-{index}" for index in (1, 2, 4, 3, 0)], "5 of 5 samples"),
        ("nowhere", [], "0 of 5 samples"),
    ],
)
def test_search_leaves_the_samples_that_have_all_words(
    answers: Report, tmp_path: Path, words: str, left: list[str], told: str
) -> None:
    write_report(answers, tmp_path / "report")
    script = f"""(() => {{
        const search = document.getElementById("search");
        search.value = {json.dumps(words)};
        search.dispatchEvent(new Event("input"));
        const left = [...document.querySelectorAll("article")].filter(one => one.checkVisibility());
        return [left.map(one => one.id), document.getElementById("found").textContent];
    }})()"""
    with Browser(tmp_path / "profile") as browser:
        seen = browser.open(tmp_path / "report" / "answers" / f"{answers.answers[0].name}.html", 390, script=script)
    assert (seen.messages, seen.page_width) == ([], 390)
    assert seen.result == [left, told]
