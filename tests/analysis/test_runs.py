"""Run folders as they come: finished, cut off, damaged, or at odds with themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from made import change, record, score, write_run

from analysis.runs import Problem, read_run_folders
from pipelines.errors import UserError
from pipelines.records import digests


def problem_of(folder: Path) -> Problem:
    """What is wrong with this run, which is then no result; nothing is with those beside it."""
    found = read_run_folders([folder.parent])
    (problem,) = found.problems
    assert problem.run_id == folder.name
    assert len(found.records) == 3
    assert folder.name not in [record["run_id"] for record in found.records]
    return problem


@pytest.fixture
def folder(runs: Path) -> Path:
    """A run folder beside others, to be damaged."""
    return runs / "xsum-griffin-50"


def test_all_finished_runs_are_read_as_they_are(runs: Path) -> None:
    found = read_run_folders([runs])
    assert found.problems == []
    assert len(found.records) == 4
    for one in found.records:
        assert one == json.loads((found.folders[one["run_id"]] / "record.json").read_text(encoding="utf-8"))


def test_a_run_folder_itself_will_do_and_so_will_several(runs: Path) -> None:
    one, other = runs / "xsum-dense", runs / "latency-griffin-50"
    assert len(read_run_folders([one]).records) == 1
    assert len(read_run_folders([one, other, one]).records) == 2


@pytest.mark.parametrize(
    ("state", "failed"),
    [
        (None, ""),
        ('{"samples": 3, "failed": "out of memory"}', "; it failed: out of memory"),
        ("{", ""),
        ('{"failed": null}', ""),
    ],
)
def test_a_missing_record_is_an_unfinished_run_that_says_why_it_failed_if_that_is_known(
    state: str | None, failed: str, folder: Path
) -> None:
    (folder / "record.json").unlink()
    if state is not None:
        (folder / "state.json").write_text(state, encoding="utf-8")
    problem = problem_of(folder)
    assert (problem.state, problem.reason) == ("unfinished", f"no record.json, 4 samples so far{failed}")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "running"}', "\udcff"])
def test_a_damaged_record_is_told(text: str, folder: Path) -> None:
    (folder / "record.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert problem_of(folder).state == "damaged"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"status": "failed"}, "status 'failed'"),
        ({"run_id": "another"}, "another"),
        ({"metrics__rouge1": "high"}, "metrics.rouge1"),
        ({"metrics__rouge1": None}, "metrics.rouge1"),
        ({"config__model": {}}, "config.model.name"),
        ({"timing": None}, "timing"),
        ({"method": {"label": ""}}, "method.label"),
        ({"method": ["griffin"]}, "method"),
        ({"evaluation": ...}, "unknown version"),
    ],
)
def test_a_record_that_is_none_is_told(values: dict[str, Any], words: str, folder: Path) -> None:
    change(folder, **values)
    problem = problem_of(folder)
    assert problem.state == "damaged"
    assert words in problem.reason


def test_a_wrong_record_is_contradicted_by_its_digests(folder: Path) -> None:
    change(folder, digests=digests({"rouge1": 77.0}, folder / "samples.jsonl"))
    assert problem_of(folder).state == "contradicted"


def test_a_run_that_is_there_twice_counts_once_unless_the_two_differ(folder: Path, tmp_path: Path) -> None:
    copies = tmp_path / "copies"
    shutil.copytree(folder, copies / folder.name)
    assert len(read_run_folders([folder.parent, copies]).records) == 4
    shutil.rmtree(copies)
    write_run(copies, record(folder.name, metrics=score(1.0)))
    found = read_run_folders([folder.parent, copies])
    assert [problem.state for problem in found.problems] == ["conflicting"]
    assert len(found.records) == 3  # which of the two is right, nobody knows


def test_what_is_no_folder_of_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, words in (("nowhere", "no such folder"), ("file", "not a folder"), ("empty", "no run folder")):
        with pytest.raises(UserError, match=words):
            read_run_folders([tmp_path / name])
