"""Offline W&B runs, uploaded with the real client to a loopback server: each once, whole, and with its metrics."""

from __future__ import annotations

import functools
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import forked
import pytest
from calling import ALPHABET, Outcome, process, read_record, run_folder, tiny, write_rows

from pipelines.run_folder import RunFolder

sys.path.append(str(Path(__file__).parents[2] / "analysis"))
from loopback import KEY, LoopbackWandb

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


def sync(output_dir: Path, url: str) -> Outcome:
    variables = {"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "HOME": str(output_dir.parent)}
    return process([sys.executable, "-m", "pipelines.sync", str(output_dir)], output_dir.parent, **variables)


def test_every_run_is_uploaded_once_and_whole(output_dir: Path, server: LoopbackWandb) -> None:
    folder = run_folder(output_dir)
    assert len(list(folder.glob("wandb/offline-run-*"))) == 3
    ended = sync(output_dir, server.url)
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
    again = sync(output_dir, server.url)
    assert again.code == 0
    assert f"{folder.name}  3        uploaded before" in again.out
    assert server.operations == before, "nothing is asked of the server for what it has"


def test_a_run_that_is_being_written_is_left_for_later(output_dir: Path, server: LoopbackWandb) -> None:
    folder = run_folder(output_dir)
    writer = RunFolder(output_dir, folder.name)
    assert writer.claim()
    ended = sync(output_dir, server.url)
    writer.release()
    assert ended.code == 0
    assert "running, left for later" in ended.out
    assert server.runs == {}
    assert sync(output_dir, server.url).code == 0
    assert [name.rpartition("-")[0] for name in server.runs] == [folder.name]


def test_a_server_out_of_reach_is_told_within_seconds(output_dir: Path) -> None:
    # wandb itself would try for minutes.
    start = time.monotonic()
    ended = sync(output_dir, "http://127.0.0.1:9")
    assert time.monotonic() - start < 15
    ended.refused("http://127.0.0.1:9")
    assert list(output_dir.rglob("*.synced")) == []
