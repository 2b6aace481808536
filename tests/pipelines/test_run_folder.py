"""Run folders: their names, one writer each, samples that survive a crash, and records with what they are to say."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from calling import ran, read_record, tiny, tiny_task

from analysis.runs import read_run_folders
from pipelines import status
from pipelines.errors import UserError
from pipelines.records import mean_and_stderr
from pipelines.run_folder import RunFolder, run_id
from pipelines.summary import tables

SAFE = re.compile(r"[A-Za-z0-9_.-]{1,128}")  # in W&B ids and in folders of every file system
SAMPLES = [{"index": 0, "text": "one\u2028still one"}, {"index": 1, "text": "two"}, {"index": 2, "text": "drei \u20ac"}]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that was cut off after three samples."""
    folder = RunFolder(tmp_path, "a-run")
    folder.start({"seed": 0})
    folder.append(SAMPLES[:2])
    folder.append(SAMPLES[2:])
    return folder


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({"c": None, "a": {"b": 1}}, True),
        ({"a": {"b": 2}, "c": None}, False),
        ({"a": {"b": "1"}, "c": None}, False),
        ({"a": {"c": 1}, "c": None}, False),
        ({"a": {"b": 1}}, False),
    ],
)
def test_a_run_id_is_a_function_of_the_identity(other: dict[str, object], same: bool) -> None:
    name = run_id("words", {"a": {"b": 1}, "c": None})
    assert name.startswith("words-")
    assert (run_id("words", other) == name) == same


@pytest.mark.parametrize("name", ["owner/name", "../../up", "a b: c", "long" * 60])
def test_run_ids_are_safe_and_readable_whatever_the_names(name: str, tmp_path: Path) -> None:
    # Another hub model needs no file, only a name in the call, so the name may be anything.
    folders = ran(*tiny(tmp_path / "out", f"model.name='{name}'", "grid.sparsity=[0,0.125]", rows=1, tokens=1))
    for folder, method in zip(folders, ("-dense", "-griffin-12.5"), strict=True):
        assert folder.parent == tmp_path / "out"
        assert SAFE.fullmatch(folder.name)
        assert folder.name == read_record(folder)["run_id"]
        assert folder.name.startswith("briefs-")
        assert folder.name.rpartition("-")[0].endswith(method) or len(name) > 100


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"not JSON\n", b"\xff\xfe\n", b'{"index": 1\n', b"\x00\x00\x00\n", b"\n", b"null\n", b"7\n"),
        *(b'{"index": 0, "text": "again"}\n', b'{"index": "1"}\n', b'{"text": "two"}\n'),
    ],
)
def test_from_a_damaged_line_on_samples_are_cut_off(garbage: bytes, folder: RunFolder) -> None:
    # A file system may bring back blocks of zeros after a crash; what follows them cannot be trusted either.
    path = folder.path / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + garbage + lines[1] + lines[2])
    assert folder.samples() == SAMPLES[:1]
    assert path.read_bytes() == lines[0]


def test_a_folder_has_one_writer(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path, "a-run")
    assert not other.held()
    assert folder.claim()
    assert other.held()
    assert not other.claim(wait_seconds=0)
    folder.release()
    assert not other.held()
    assert other.claim()
    other.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="another user's files need root")
def test_a_folder_of_another_user_is_held_only_by_a_process() -> None:
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        folder = RunFolder(Path(root), "a-run")
        held = []
        for claimed in (True, False):
            if claimed:
                assert folder.claim()
            else:
                folder.release()
            os.seteuid(65534)
            try:
                held.append(RunFolder(Path(root), "a-run").held())
            finally:
                os.seteuid(0)
    assert held == [True, False]


def test_no_lock_stays_beside_a_record(folder: RunFolder, tmp_path: Path) -> None:
    folder.claim()
    folder.release()
    assert (folder.path / ".lock").exists(), "whoever waits for it must find the same file"
    folder.claim()
    folder.finish("cpu", config={"seed": 0})
    folder.release()
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "record.json", "samples.jsonl"]


def test_a_file_system_without_locks_is_refused(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(UserError, match="has no file locks"):
        folder.claim()


def test_a_run_that_goes_on_keeps_its_state_and_forgets_its_failure(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "a-run")
    assert (folder.samples(), folder.record(), list(tmp_path.iterdir())) == ([], None, [])
    folder.start({"seed": 0}, 3, ["a-run", "b-run"])
    folder.start({"seed": 0}, 3, ["a-run", "c-run"])
    assert folder.state()["beside"] == ["a-run", "c-run"], "nothing had been written"
    folder.append(SAMPLES[:1])
    folder.fail("out of memory")
    started = folder.state()["started"]
    assert folder.state()["failed"] == "out of memory"
    folder.start({"seed": 0}, 3, ["a-run"])
    expected = {"samples": 3, "failed": None, "beside": ["a-run", "c-run"], "versions": [], "started": started}
    assert folder.state() == expected


def test_a_record_makes_a_run_finished(folder: RunFolder) -> None:
    assert folder.record() is None
    (folder.path / ".config.yaml.1a2b3c4d.tmp").write_text("seed")  # of a process that was killed
    folder.start({"seed": 0})
    method = {"label": "caf\u00e9"}
    written = folder.finish("cpu", config={"seed": 0}, metrics={"rouge1": 1.5}, timing={}, method=method)
    assert folder.record() == written
    parts = {"run_id", "status", "method", "evaluation", "config", "metrics", "timing", "environment", "digests"}
    assert set(written) == parts
    assert (written["run_id"], written["status"], written["method"]) == ("a-run", "finished", method)
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "record.json", "samples.jsonl"]
    text = (folder.path / "record.json").read_text(encoding="utf-8")
    assert "caf\u00e9" in text, "for reading"
    assert json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n" == text


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-3],
        lambda content: b"\x00" * len(content),
        lambda content: b"\xff" + content,
        lambda content: b"[]",
        lambda content: content.replace(b'"finished"', b'"running"'),
    ],
)
def test_a_damaged_record_counts_as_unfinished(damage: Callable[[bytes], bytes], folder: RunFolder) -> None:
    folder.finish("cpu", config={"seed": 0}, metrics={"rouge1": 1.5})
    path = folder.path / "record.json"
    path.write_bytes(damage(path.read_bytes()))
    assert folder.record() is None


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.0, 0.0, 3.0], [17.25, 3.5, 9.0, 41.125, 0.0]])
def test_mean_and_standard_error_are_the_textbooks(values: list[float]) -> None:
    mean, stderr = mean_and_stderr(values)
    assert mean == pytest.approx(np.mean(values))
    assert mean_and_stderr(values[:1]) == (values[0], 0.0)
    with pytest.raises(ValueError, match="no values"):
        mean_and_stderr([])
    assert stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_finite_number_is_a_result(broken: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.functional.cross_entropy", lambda *_, **__: torch.tensor([1.0, broken]))
    (folder,) = ran(*tiny_task("perplexity", tmp_path / "out", "limit=2"))
    for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines():
        assert json.loads(line, parse_constant=pytest.fail)["nll"] == {"p12_g5": {"float": str(broken)}}
    json.loads((folder / "record.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    (record,) = read_run_folders([tmp_path / "out"]).records
    assert str(record["metrics"]["perplexity"]) == str(broken)
    assert math.isnan(record["metrics"]["perplexity_stderr"])
    assert f"{broken:.2f}" in "".join(tables([("dense", record)]))
    (row,) = status.read(tmp_path / "out")
    assert row.state == status.DONE
