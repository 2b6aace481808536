"""Run folders: their names, one writer each, samples that survive a crash, and records."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import ran, read_record, tiny

from pipelines.errors import UserError
from pipelines.run_folder import RunFolder, run_id

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


def samples_file(folder: RunFolder) -> Path:
    return folder.path / "samples.jsonl"


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


def test_a_new_run_has_no_samples_and_no_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", "a-run")
    assert (folder.samples(), folder.record()) == ([], None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [1, 3, 10])
def test_a_truncated_last_line_is_cut_off_the_file(cut: int, folder: RunFolder) -> None:
    # 1: only the line break is missing; 3: in the midst of the bytes of one character.
    whole = b"".join(samples_file(folder).read_bytes().splitlines(keepends=True)[:2])
    content = samples_file(folder).read_bytes()
    samples_file(folder).write_bytes(content[:-cut])
    assert folder.samples() == SAMPLES[:2]
    assert samples_file(folder).read_bytes() == whole
    folder.append(SAMPLES[2:])
    assert samples_file(folder).read_bytes() == content


@pytest.mark.parametrize(
    "garbage",
    [
        *(b"not JSON\n", b"\xff\xfe\n", b'{"index": 1\n', b"\x00\x00\x00\n", b"\n", b"null\n", b"7\n"),
        *(b'{"index": 0, "text": "again"}\n', b'{"index": "1"}\n', b'{"text": "two"}\n'),
    ],
)
def test_from_a_damaged_line_on_samples_are_cut_off(garbage: bytes, folder: RunFolder) -> None:
    # A file system may bring back blocks of zeros after a crash; what follows them cannot be trusted either.
    lines = samples_file(folder).read_bytes().splitlines(keepends=True)
    samples_file(folder).write_bytes(lines[0] + garbage + lines[1] + lines[2])
    assert folder.samples() == SAMPLES[:1]
    assert samples_file(folder).read_bytes() == lines[0]


def test_a_folder_has_one_writer(folder: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(tmp_path, "a-run")
    assert not other.held()
    assert folder.claim()
    assert other.held()
    assert not other.claim(wait_seconds=0)
    assert folder.held()
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
    folder.finish({"seed": 0}, {}, {}, "cpu")
    folder.release()
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "record.json", "samples.jsonl"]


def test_a_file_system_without_locks_is_refused(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", missing)
    with pytest.raises(UserError, match="has no file locks"):
        folder.claim()


def test_a_failure_is_kept_until_the_next_start(folder: RunFolder) -> None:
    folder.start({"seed": 0}, 7)
    folder.fail("out of memory")
    state = folder.state()
    assert state.pop("started").endswith("Z")
    assert state == {"samples": 7, "failed": "out of memory", "beside": [], "versions": []}
    folder.start({"seed": 0}, 7)
    assert folder.state()["failed"] is None


def test_a_run_that_goes_on_keeps_those_that_it_ran_beside(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "a-run")
    folder.start({"seed": 0}, 3, ["a-run", "b-run"])
    folder.start({"seed": 0}, 3, ["a-run", "c-run"])
    assert folder.state()["beside"] == ["a-run", "c-run"], "nothing had been written"
    folder.append(SAMPLES[:1])
    folder.start({"seed": 0}, 3, ["a-run"])
    assert folder.state()["beside"] == ["a-run", "c-run"]


def test_a_record_makes_a_run_finished(folder: RunFolder) -> None:
    assert folder.record() is None
    (folder.path / ".config.yaml.1a2b3c4d.tmp").write_text("seed")  # of a process that was killed
    folder.start({"seed": 0})
    method = {"label": "caf\u00e9"}
    written = folder.finish({"seed": 0}, {"rouge1": 1.5}, {"load_seconds": 2.0}, "cpu", method=method)
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
    folder.finish({"seed": 0}, {"rouge1": 1.5}, {}, "cpu")
    path = folder.path / "record.json"
    path.write_bytes(damage(path.read_bytes()))
    assert folder.record() is None
