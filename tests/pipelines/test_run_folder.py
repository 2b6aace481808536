"""Run folders: their names, one writer each, samples that survive a crash, and records."""

from __future__ import annotations

import errno
import json
import re
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


def test_a_run_id_is_a_function_of_the_identity() -> None:
    identity = {"task": {"name": "xsum", "shots": 1}, "seed": 0}
    reordered = {"seed": 0, "task": {"shots": 1, "name": "xsum"}}
    assert run_id("words", identity) == run_id("words", dict(identity)) == run_id("words", reordered)
    assert run_id("words", identity).startswith("words-")


@pytest.mark.parametrize("other", [{"a": {"b": 2}}, {"a": {"b": "1"}}, {"a": {"c": 1}}, {"a": {"b": 1}, "c": None}])
def test_other_identities_have_other_run_ids(other: dict[str, object]) -> None:
    assert run_id("words", other) != run_id("words", {"a": {"b": 1}})


@pytest.mark.parametrize("name", ["owner/name", "../../up", "a b: c", "long" * 60])
def test_run_ids_are_safe_whatever_the_names(name: str, tmp_path: Path) -> None:
    # Another hub model needs no file, only a name in the call, so the name may be anything.
    (folder,) = ran(*tiny(tmp_path / "out", f"model.name='{name}'", rows=1, tokens=1))
    assert folder.parent == tmp_path / "out"
    assert SAFE.fullmatch(folder.name)
    assert folder.name == read_record(folder)["run_id"]


def test_run_ids_of_a_grid_are_safe_and_readable(tmp_path: Path) -> None:
    grid = ["grid.statistic=[griffin,wanda]", "grid.sparsity=[0,0.125]"]
    names = [folder.name for folder in ran(*tiny(tmp_path / "out", *grid, rows=1, tokens=1))]
    assert all(SAFE.fullmatch(name) for name in names)
    assert [name.rpartition("-")[0] for name in names] == [
        "briefs-random_tiny-dense",
        "briefs-random_tiny-griffin-12.5",
        "briefs-random_tiny-wanda-12.5",
    ]


def test_samples_come_back_as_they_were_appended(folder: RunFolder) -> None:
    assert folder.samples() == SAMPLES


def test_a_new_run_has_no_samples_and_no_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "out", "a-run")
    assert folder.samples() == []
    assert folder.record() is None
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
    assert state == {"samples": 7, "failed": "out of memory", "beside": []}
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


def test_what_a_killed_process_left_half_written_is_removed(folder: RunFolder) -> None:
    (folder.path / ".config.yaml.1a2b3c4d.tmp").write_text("seed")
    folder.start({"seed": 0})
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "samples.jsonl", "state.json"]


def test_a_record_makes_a_run_finished(folder: RunFolder) -> None:
    assert folder.record() is None
    written = folder.finish({"seed": 0}, {"rouge1": 1.5}, {"load_seconds": 2.0}, "cpu", method={"label": "dense"})
    assert folder.record() == written
    parts = {"run_id", "status", "method", "evaluation", "config", "metrics", "timing", "environment", "digests"}
    assert set(written) == parts
    assert written["method"] == {"label": "dense"}
    assert (written["run_id"], written["status"]) == ("a-run", "finished")
    assert sorted(path.name for path in folder.path.iterdir()) == ["config.yaml", "record.json", "samples.jsonl"]


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


def test_records_are_for_reading(folder: RunFolder) -> None:
    folder.finish({"summary": "caf\u00e9"}, {}, {}, "cpu")
    text = (folder.path / "record.json").read_text(encoding="utf-8")
    assert "caf\u00e9" in text
    assert json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n" == text
