"""Run folders as they come: finished, cut off, damaged, or at odds with themselves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import made
import pytest
from made import score, write_run

from analysis.run_folders import read_run_folders
from pipelines.errors import UserError
from pipelines.records import digests


def change(path: Path, **values: Any) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    for place, value in values.items():
        *where, key = place.split("__")
        part = record
        for name in where:
            part = part[name]
        if value is ...:
            del part[key]
        else:
            part[key] = value
    path.write_text(json.dumps(record), encoding="utf-8")


def test_all_finished_runs_are_read_as_they_are(runs: Path) -> None:
    found = read_run_folders([runs])
    assert found.problems == []
    assert len(found.records) == 4
    for record in found.records:
        text = (found.folders[record["run_id"]] / "record.json").read_text(encoding="utf-8")
        assert record == json.loads(text)


def test_a_run_folder_itself_will_do_and_so_will_several(runs: Path) -> None:
    one, other = runs / "xsum-dense", runs / "latency-griffin-50"
    assert len(read_run_folders([one]).records) == 1
    assert len(read_run_folders([one, other, one]).records) == 2


def test_a_missing_record_is_an_unfinished_run(runs: Path) -> None:
    folder = runs / "xsum-griffin-50"
    (folder / "record.json").unlink()
    found = read_run_folders([runs])
    (problem,) = found.problems
    assert (problem.run_id, problem.state) == (folder.name, "unfinished")
    assert "4 samples" in problem.reason
    assert folder.name not in [record["run_id"] for record in found.records]


def test_an_unfinished_run_says_why_it_failed_if_that_is_known(runs: Path) -> None:
    folder = runs / "xsum-griffin-50"
    (folder / "record.json").unlink()
    for text, known in (('{"samples": 3, "failed": "out of memory"}', True), ("{", False), ('{"failed": null}', False)):
        (folder / "state.json").write_text(text, encoding="utf-8")
        (problem,) = read_run_folders([runs]).problems
        assert problem.reason.endswith("it failed: out of memory") == known


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": "running"}', "\udcff"])
def test_a_damaged_record_is_told(text: str, runs: Path) -> None:
    folder = runs / "xsum-griffin-50"
    (folder / "record.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (problem,) = read_run_folders([runs]).problems
    assert (problem.run_id, problem.state) == (folder.name, "damaged")


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
def test_a_record_that_is_none_is_told(values: dict[str, Any], words: str, runs: Path) -> None:
    folder = runs / "xsum-griffin-50"
    change(folder / "record.json", **values)
    (problem,) = read_run_folders([runs]).problems
    assert problem.state == "damaged"
    assert words in problem.reason


def test_a_wrong_record_is_contradicted_by_its_digests(runs: Path) -> None:
    folder = runs / "xsum-griffin-50"
    written = digests({"rouge1": 77.0}, folder / "samples.jsonl")
    change(folder / "record.json", digests=written)
    (problem,) = read_run_folders([runs]).problems
    assert (problem.run_id, problem.state) == (folder.name, "contradicted")


def test_a_run_that_is_there_twice_counts_once_unless_the_two_differ(runs: Path, tmp_path: Path) -> None:
    folder = runs / "xsum-griffin-50"
    shutil.copytree(folder, tmp_path / "copies" / folder.name)
    assert len(read_run_folders([runs, tmp_path / "copies"]).records) == 4
    shutil.rmtree(tmp_path / "copies" / folder.name)
    write_run(tmp_path / "copies", made.record(folder.name, metrics=score(1.0)))
    found = read_run_folders([runs, tmp_path / "copies"])
    assert [problem.state for problem in found.problems] == ["conflicting"]
    assert len(found.records) == 3  # which of the two is right, nobody knows


def test_what_is_no_folder_of_runs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, words in (("nowhere", "no such folder"), ("file", "not a folder"), ("empty", "no run folder")):
        with pytest.raises(UserError, match=words):
            read_run_folders([tmp_path / name])
