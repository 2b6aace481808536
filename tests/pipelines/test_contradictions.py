"""Files of a finished run that were changed: `run`, `status` and the report agree, and the run is done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import composed, ran, read_record, timeless, tiny

from analysis.run_folders import read_run_folders
from pipelines.composition import Call
from pipelines.job import attempt
from pipelines.sweeps.progress import BROKEN_OFF, DONE, read


def delete_samples(folder: Path) -> None:
    (folder / "samples.jsonl").unlink()


def cut_samples(folder: Path) -> None:
    content = (folder / "samples.jsonl").read_bytes()
    (folder / "samples.jsonl").write_bytes(content[:-20])


def spoil_samples(folder: Path) -> None:
    (folder / "samples.jsonl").write_bytes(b"\xff\n")


def lose_a_sample(folder: Path) -> None:
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[1:]))


def improve_a_score(folder: Path) -> None:
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    sample = json.loads(lines[0]) | {"rouge1": 100.0}
    (folder / "samples.jsonl").write_text("\n".join([json.dumps(sample), *lines[1:], ""]), encoding="utf-8")


def word_a_text_otherwise(folder: Path) -> None:
    """No score changes by this."""
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    sample = json.loads(lines[0]) | {"text": "Something else."}
    (folder / "samples.jsonl").write_text("\n".join([json.dumps(sample), *lines[1:], ""]), encoding="utf-8")


def improve_a_metric(folder: Path) -> None:
    record = read_record(folder)
    record["metrics"]["rouge1"] += 10
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")


def hide_the_error(folder: Path) -> None:
    record = read_record(folder)
    record["metrics"]["rouge1_stderr"] /= 2
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")


CHANGES = [
    *(delete_samples, cut_samples, spoil_samples, lose_a_sample, improve_a_score, word_a_text_otherwise),
    *(improve_a_metric, hide_the_error),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_is_contradicted_everywhere_and_done_again(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    options = tiny(tmp_path / "out")
    (folder,) = ran(*options)
    whole = timeless(folder)
    change(folder)
    (problem,) = read_run_folders([tmp_path / "out"]).problems
    assert (problem.run_id, problem.state) == (folder.name, "contradicted")
    (row,) = read(tmp_path / "out")
    assert row.state == BROKEN_OFF
    assert row.reason == f"{problem.reason}; the next call of its command mends it"
    ran(*options)
    assert timeless(folder) == whole
    assert read_run_folders([tmp_path / "out"]).problems == []
    (row,) = read(tmp_path / "out")
    assert row.state == DONE


def test_an_unchanged_run_is_not_done_again(tmp_path: Path) -> None:
    options = tiny(tmp_path / "out")
    (folder,) = ran(*options)
    before = (folder / "record.json").read_bytes()
    (status,) = attempt(composed(*options), Call(tuple(options), None, single=True))
    assert status.state == "skipped"
    assert (folder / "record.json").read_bytes() == before


def test_records_of_older_versions_have_no_digests_and_stay_finished(tmp_path: Path) -> None:
    options = tiny(tmp_path / "out")
    (folder,) = ran(*options)
    record = read_record(folder)
    del record["digests"]
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    assert read_run_folders([tmp_path / "out"]).problems == []
    (row,) = read(tmp_path / "out")
    assert row.state == DONE
    improve_a_score(folder)
    (problem,) = read_run_folders([tmp_path / "out"]).problems
    assert "rouge1" in problem.reason
