"""The status of an output folder; and its offline W&B runs, uploaded with the real client to a loopback server."""

import functools
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
from calling import ALPHABET, Entry, Outcome, composed, process, read_record, run_folder, tiny, write_rows
from loopback import KEY, LoopbackWandb

from pipelines import status, sync
from pipelines.run_folder import RunFolder
from pipelines.status import Row, duration, seconds_left
from pipelines.sweeps import ManifestEntry


def make(output_dir: Path, name: str, samples: int, total: int | None = 4) -> RunFolder:
    folder = RunFolder(output_dir, name)
    folder.start({"seed": 0}, total)
    folder.append([{"index": index, "seconds": 2.0} for index in range(samples)])
    return folder


@pytest.fixture
def all_states(tmp_path: Path) -> Path:
    """One run of each state."""
    out = tmp_path / "out"
    make(out, "xsum-tiny-dense-1", 4).finish("cpu", metrics={"rouge1": 1.0})
    make(out, "xsum-tiny-griffin-50-2", 3)
    make(out, "xsum-tiny-griffin-75-3", 1).fail("out of memory")
    make(out, "xsum-tiny-wanda-50-4", 2)
    for seed in (0, 1):  # told apart by nothing else
        ManifestEntry(composed(*tiny(out, "model.name=tiny", f"seed={seed}"))).plan(f"seed={seed}", "slurm")
    failed = ManifestEntry(composed(*tiny(out, "model.name=tiny", "sparsity=0.8")))
    failed.plan("sparsity=0.8", "slurm")
    failed.note(failed="SLURM job 3 ended without a result")
    return out


def test_every_state_is_told(
    all_states: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running = RunFolder(all_states, "xsum-tiny-wanda-50-4")
    assert running.claim()
    rows = {row.run: row for row in status.read(all_states)}
    monkeypatch.setattr(sys, "argv", ["status", str(all_states)])
    status.main()
    running.release()
    printed = capsys.readouterr().out
    assert [word for word in ("3 of 4", "out of memory", "broken off", "1 running") if word not in printed] == []
    assert {name: (row.state, row.samples, row.total, row.reason) for name, row in rows.items()} == {
        "xsum-tiny-dense-1": ("done", 4, 4, ""),
        "xsum-tiny-griffin-50-2": ("broken off", 3, 4, ""),
        "xsum-tiny-griffin-75-3": ("failed", 1, 4, "out of memory"),
        "xsum-tiny-wanda-50-4": ("running", 2, 4, ""),
        "briefs tiny griffin 80% (sparsity=0.8)": ("failed", 0, None, "SLURM job 3 ended without a result"),
        **{f"briefs tiny griffin 50% (seed={seed})": ("missing", 0, None, "") for seed in (0, 1)},
    }


def test_time_left_is_by_the_pace_of_the_run_itself_or_of_its_like(all_states: Path) -> None:
    rows = {row.run: row for row in status.read(all_states)}
    slow = Row("xsum-tiny-slow-5", "broken off", samples=1, total=4, seconds=10.0)
    fresh = Row("xsum-tiny-fresh-6", "missing")
    known = list(rows.values())
    assert seconds_left(rows["xsum-tiny-dense-1"], known) == 0
    assert seconds_left(rows["xsum-tiny-griffin-50-2"], known) == 2.0
    assert seconds_left(slow, known) == 30.0
    assert seconds_left(fresh, known) == 8.0
    assert seconds_left(rows["briefs tiny griffin 50% (seed=0)"], known) is None
    closing = status.status_table(known).splitlines()[-1]
    assert closing == (
        "7 runs: 1 done, 2 failed, 2 broken off, 2 missing; about 12 s left with 1 at a time; no pace known yet of 3"
    )


def test_a_try_that_failed_is_told_and_gone_once_what_it_measures_is_done(
    call: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError("a fault of our own")

    out = tmp_path / "out"
    planned = ManifestEntry(composed(*tiny(out, "sparsity=0.5", "batch_size=4")))
    planned.plan("sparsity=0.5", "slurm")
    planned.note(failed="SLURM job 3 ended without a result")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.tasks.generation._sample", broken)
        ended = call("-m", *tiny(out, "batch_size=2", "seed=0,1"))
    assert (ended.code, ended.err.count("Traceback")) == (1, 2), "a fault of our own is shown whole"
    assert "2 failed" in ended.out
    assert [row.state for row in status.read(out)] == ["failed"] * 3
    told = {"LookupError: a fault of our own", "SLURM job 3 ended without a result"}
    assert {row.reason for row in status.read(out)} == told
    first, *others = tiny(out, "seed=0,2")
    assert call(first, "-m", *others).code == 0  # -m may stand anywhere
    states = sorted(row.state for row in status.read(out))
    assert states == ["done", "done", "failed"], "another seed is another point"


def test_reading_the_status_changes_nothing(all_states: Path) -> None:
    half = all_states / "xsum-tiny-griffin-50-2" / "samples.jsonl"
    half.write_bytes(half.read_bytes()[:-5])
    before = {path: path.read_bytes() for path in all_states.rglob("*") if path.is_file()}
    assert next(row for row in status.read(all_states) if row.run.endswith("-2")).samples == 2
    assert {path: path.read_bytes() for path in all_states.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"runs": 3}', "\x00"])
def test_damaged_notes_are_passed_over_and_a_damaged_record_is_told(damage: str, all_states: Path) -> None:
    for path in (all_states / ".sweep").iterdir():
        path.write_text(damage)
    (all_states / "xsum-tiny-griffin-75-3" / "state.json").write_text(damage)
    (all_states / "xsum-tiny-dense-1" / "record.json").write_text(damage)
    rows = {row.run: row for row in status.read(all_states)}
    assert len(rows) == 4
    assert rows["xsum-tiny-griffin-75-3"].state == "broken off"
    done = rows["xsum-tiny-dense-1"]
    assert (done.state, "record.json cannot be read" in done.reason) == ("broken off", True)


@pytest.mark.parametrize(("command", "none"), [(status, "no runs here"), (sync, "no offline W&B runs here")])
def test_mistakes_are_one_line(command: Any, none: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, told in (("absent", "no such folder"), ("file", "not a folder"), ("empty", none), (None, None)):
        monkeypatch.setattr(sys, "argv", ["", *([str(tmp_path / name)] if name else [])])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert str(ended.value).startswith(f"error: {tmp_path / name}: {told}" if name else "2")
        assert "\n" not in str(ended.value)


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "-"), (0, "0 s"), (119, "119 s"), (600, "10 min"), (9000, "2.5 h"), (1e6, "277.8 h")]
)
def test_durations_are_rounded_as_estimates_deserve(seconds: float | None, words: str) -> None:
    assert duration(seconds) == words


ROWS = 100


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in three parts: its first process was killed at once, the second in the midst of a record."""
    out = tmp_path_factory.mktemp("sync") / "out"
    overrides = tiny(out, "wandb.mode=offline", "wandb.group=mine", rows=ROWS, tokens=4)
    write_rows(out.with_name("articles.jsonl"), [{"article": str(row), "summary": ALPHABET} for row in range(ROWS)])
    parts = functools.partial(out.glob, "*/wandb/offline-run-*/*.wandb")
    for size in (1, 32 * 2**10):  # bytes; wandb writes blocks of 32 KiB
        killed = forked.start(overrides, out.with_name("log"))
        forked.wait_until(lambda size=size: any(part.stat().st_size >= size for part in parts()), killed)
        killed.send(signal.SIGKILL)
        killed.ended()
        time.sleep(1.1)  # a part's name is its second
    assert forked.start(overrides, out.with_name("log")).ended().code == 0
    return out


@pytest.fixture
def server() -> Iterator[LoopbackWandb]:
    with LoopbackWandb() as server:
        yield server


@pytest.fixture
def output_dir(offline: Path, tmp_path: Path) -> Path:
    shutil.copytree(offline, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


def synced(output_dir: Path, url: str) -> Outcome:
    variables = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(output_dir.parent)}
    return process([sys.executable, "-m", "pipelines.sync", str(output_dir)], output_dir.parent, **variables)


def test_every_run_is_uploaded_once_and_whole(output_dir: Path, server: LoopbackWandb) -> None:
    folder = run_folder(output_dir)
    assert len(list(folder.glob("wandb/offline-run-*"))) == 3
    ended = synced(output_dir, server.url)
    assert ended.code == 0, ended.err
    assert [folder.name, "3", "uploaded"] in [line.split() for line in ended.out.splitlines()]
    (run,) = server.runs.values()
    assert (run.name.rpartition("-")[0], run.group, run.state) == (folder.name, "mine", "finished")
    metrics = read_record(folder)["metrics"]
    assert {name: run.summary[name] for name in metrics} == pytest.approx(metrics)
    steps = [step["samples_done"] for step in run.history if "samples_done" in step]
    assert steps == sorted(set(steps)), "no step twice"
    assert steps[-1] == ROWS
    assert server.unknown == []
    assert [path.name for path in output_dir.parent.iterdir()] == ["out"], "nor the home nor the folder of the call"

    before = list(server.operations)
    again = synced(output_dir, server.url)
    assert again.code == 0
    assert f"{folder.name}  3        uploaded before" in again.out
    assert server.operations == before, "nothing is asked of the server for what it has"


def test_a_run_that_is_being_written_is_left_for_later(output_dir: Path, server: LoopbackWandb) -> None:
    folder = run_folder(output_dir)
    writer = RunFolder(output_dir, folder.name)
    assert writer.claim()
    ended = synced(output_dir, server.url)
    writer.release()
    assert ended.code == 0
    assert "running, left for later" in ended.out
    assert server.runs == {}
    assert synced(output_dir, server.url).code == 0
    assert [name.rpartition("-")[0] for name in server.runs] == [folder.name]


def test_a_server_out_of_reach_is_told_within_seconds(output_dir: Path) -> None:
    # wandb itself would try for minutes.
    start = time.monotonic()
    ended = synced(output_dir, "http://127.0.0.1:9")
    assert time.monotonic() - start < 15
    ended.refused("http://127.0.0.1:9")
    assert list(output_dir.rglob("*.synced")) == []
