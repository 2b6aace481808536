"""The status of an output folder: every state there is, the time left, and mistakes in calling it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import Outcome, composed, run_folders, tiny

from pipelines import status
from pipelines.run_folder import RunFolder
from pipelines.sweeps import progress
from pipelines.sweeps.manifest import ManifestEntry
from pipelines.sweeps.progress import Row, duration, seconds_left


def make(output_dir: Path, name: str, samples: int, total: int | None = 4) -> RunFolder:
    folder = RunFolder(output_dir, name)
    folder.start({"seed": 0}, total)
    folder.append([{"index": index, "seconds": 2.0} for index in range(samples)])
    return folder


@pytest.fixture
def all_states(tmp_path: Path) -> Path:
    """One run of each state."""
    out = tmp_path / "out"
    make(out, "xsum-tiny-dense-1", 4).finish({}, {"rouge1": 1.0}, {}, "cpu")
    make(out, "xsum-tiny-griffin-50-2", 3)
    make(out, "xsum-tiny-griffin-75-3", 1).fail("out of memory")
    make(out, "xsum-tiny-wanda-50-4", 2)
    ManifestEntry(composed(*tiny(out, "model.name=tiny", "sparsity=0.9"))).plan("sparsity=0.9", "slurm")
    failed = ManifestEntry(composed(*tiny(out, "model.name=tiny", "sparsity=0.8")))
    failed.plan("sparsity=0.8", "slurm")
    failed.fail("SLURM job 3 ended without a result")
    return out


def test_every_state_is_told(all_states: Path) -> None:
    running = RunFolder(all_states, "xsum-tiny-wanda-50-4")
    assert running.claim()
    rows = {row.run: row for row in progress.read(all_states)}
    running.release()
    assert {name: (row.state, row.samples, row.total, row.reason) for name, row in rows.items()} == {
        "xsum-tiny-dense-1": ("done", 4, 4, ""),
        "xsum-tiny-griffin-50-2": ("broken off", 3, 4, ""),
        "xsum-tiny-griffin-75-3": ("failed", 1, 4, "out of memory"),
        "xsum-tiny-wanda-50-4": ("running", 2, 4, ""),
        "briefs tiny griffin 80% (sparsity=0.8)": ("failed", 0, None, "SLURM job 3 ended without a result"),
        "briefs tiny griffin 90% (sparsity=0.9)": ("missing", 0, None, ""),
    }


def test_time_left_is_by_the_pace_of_the_run_itself_or_of_its_like(all_states: Path) -> None:
    rows = {row.run: row for row in progress.read(all_states)}
    slow = Row("xsum-tiny-slow-5", "xsum-tiny", "broken off", samples=1, total=4, seconds=10.0)
    fresh = Row("xsum-tiny-fresh-6", "xsum-tiny", "missing")
    known = list(rows.values())
    assert seconds_left(rows["xsum-tiny-dense-1"], known) == 0
    assert seconds_left(rows["xsum-tiny-griffin-50-2"], known) == 2.0
    assert seconds_left(slow, known) == 30.0
    assert seconds_left(fresh, known) == 8.0
    assert seconds_left(rows["briefs tiny griffin 90% (sparsity=0.9)"], known) is None
    closing = progress.status_table(known).splitlines()[-1]
    assert closing == (
        "6 runs: 1 done, 2 failed, 2 broken off, 1 missing; about 12 s left with 1 at a time; no pace known yet of 2"
    )


def test_a_try_that_failed_is_gone_once_what_it_measures_is_done(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    planned = ManifestEntry(composed(*tiny(out, "sparsity=0.5", "batch_size=4")))
    planned.plan("sparsity=0.5", "slurm")
    planned.fail("SLURM job 3 ended without a result")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.tasks.generation._sample", lambda *_: 1 / 0)
        call(*tiny(out, "sparsity=0.5", "batch_size=2"))
        call(*tiny(out, "sparsity=0.5", "seed=1"))
    assert [row.state for row in progress.read(out)] == ["failed"] * 3
    call(*tiny(out, "sparsity=0.5"))
    assert sorted(row.state for row in progress.read(out)) == ["done", "failed"], "another seed is another point"


def test_points_that_differ_in_their_seed_only_are_told_apart(tmp_path: Path) -> None:
    for seed in range(3):
        ManifestEntry(composed(*tiny(tmp_path / "out", f"seed={seed}"))).plan(f"seed={seed}", "local")
    rows = progress.read(tmp_path / "out")
    assert [row.run.rpartition(" ")[2] for row in rows] == ["(seed=0)", "(seed=1)", "(seed=2)"]


def test_reading_the_status_changes_nothing(all_states: Path) -> None:
    half = all_states / "xsum-tiny-griffin-50-2" / "samples.jsonl"
    half.write_bytes(half.read_bytes()[:-5])
    before = {path: path.read_bytes() for path in all_states.rglob("*") if path.is_file()}
    assert next(row for row in progress.read(all_states) if row.run.endswith("-2")).samples == 2
    assert {path: path.read_bytes() for path in all_states.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"runs": 3}', "\x00"])
def test_damaged_notes_are_passed_over(damage: str, all_states: Path) -> None:
    for path in (all_states / ".sweep").iterdir():
        path.write_text(damage)
    (all_states / "xsum-tiny-griffin-75-3" / "state.json").write_text(damage)
    rows = {row.run: row.state for row in progress.read(all_states)}
    assert len(rows) == 4
    assert rows["xsum-tiny-griffin-75-3"] == "broken off"


def test_a_damaged_record_is_told(all_states: Path) -> None:
    done = "xsum-tiny-dense-1"
    (all_states / done / "record.json").write_text('{"run_id": ')
    (row,) = [row for row in progress.read(all_states) if row.run == done]
    assert (row.state, "record.json cannot be read" in row.reason) == ("broken off", True)


def test_a_sweep_is_done_when_all_its_points_are(call: Callable[..., Outcome], tmp_path: Path) -> None:
    call("-m", *tiny(tmp_path / "out", "sparsity=0,0.5"))
    rows = progress.read(tmp_path / "out")
    assert [row.run for row in rows] == [folder.name for folder in run_folders(tmp_path / "out")]
    assert {row.state for row in rows} == {"done"}


def call_status(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", ["status", *arguments])
    with pytest.raises(SystemExit) as ended:
        status.main()
    return ended.value.code


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, told in (("absent", "no such folder"), ("file", "not a folder"), ("empty", "no runs here")):
        message = call_status([str(tmp_path / name)], monkeypatch)
        assert str(message).startswith(f"error: {tmp_path / name}: {told}")
    assert call_status([], monkeypatch) == 2


def test_the_table_is_printed(
    all_states: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["status", str(all_states)])
    status.main()
    printed = capsys.readouterr().out
    assert "3 of 4" in printed
    assert "out of memory" in printed
    assert "broken off" in printed


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "-"), (0, "0 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h"), (1e6, "277.8 h")]
)
def test_durations_are_rounded_as_estimates_deserve(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words
