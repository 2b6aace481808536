"""Sweeps over processes of this machine: a worker that dies takes nobody with it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from calling import command, environment, read_samples, run_folders, tiny


def lock_holder(output_dir: Path) -> int | None:
    """A process that holds a run with samples."""
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        for lock in output_dir.glob("*/.lock"):
            if str(lock.stat().st_ino) == fields[5].rpartition(":")[2] and lock.with_name("samples.jsonl").exists():
                return int(fields[4])
    return None


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="which worker to kill is read from /proc/locks")
def test_joblib_survives_a_killed_worker(tmp_path: Path) -> None:
    sweep = command(*tiny(tmp_path / "out", "sparsity=0,0.5", "launcher=joblib", rows=6, tokens=60))
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(sweep, cwd=tmp_path, env=environment(), stdout=log, stderr=log)
    end = time.monotonic() + 90
    while (worker := lock_holder(tmp_path / "out")) is None:
        assert running.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    assert worker != running.pid, "joblib's points run in other processes"
    os.kill(worker, signal.SIGKILL)
    assert running.wait(timeout=120) == 0
    printed = (tmp_path / "log").read_text()
    assert "a worker died; going on with one point at a time" in printed
    assert "Traceback" not in printed
    assert "2 finished" in printed
    for folder in run_folders(tmp_path / "out"):
        assert [sample["index"] for sample in read_samples(folder)] == list(range(6))
