"""Calls of the entry as processes of their own, and what they are at; forks begin with everything imported.

A server process imports the pipeline once, so that calls can be many; each is a fork of it. What happens to a call,
happens to a process.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from calling import Outcome, environment

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["pipelines.tasks.generation", "pipelines.models", "pipelines.run"])


@dataclass(frozen=True)
class Call:
    """A call that is under way."""

    process: BaseProcess
    output: Path

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def poll(self) -> int | None:
        """Its exit code; None while it is under way."""
        return self.process.exitcode

    def ended(self, timeout: float = 60) -> Outcome:
        """How it ended; stdout and stderr are one."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "still running"
        return Outcome(self.process.exitcode, self.printed(), self.printed())

    def printed(self) -> str:
        """What it printed so far."""
        return self.output.read_text(encoding="utf-8") if self.output.exists() else ""


def start(overrides: Sequence[str], output: Path, before: Callable[[], None] | None = None) -> Call:
    """Call the entry with overrides.

    Args:
        output: the file for what it prints.
        before: called first, in the process of the call.
    """
    process = _SERVER.Process(target=_entry, args=(list(overrides), output, before))
    process.start()
    return Call(process, output)


def _entry(overrides: list[str], output: Path, before: Callable[[], None] | None) -> None:
    import torch

    from pipelines import run

    os.environ.pop("WANDB_SERVICE", None)  # else a kill would leave its W&B run open in the caller's service
    torch.set_num_threads(1)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server of forks ignores it
    sys.argv = ["run.py", *overrides]
    if before is not None:
        before()
    run.main()


@contextlib.contextmanager
def running(arguments: Sequence[str], cwd: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A command that runs until it ends or its test does; stdout and stderr are pipes."""
    started = subprocess.Popen(
        arguments, cwd=cwd, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield started
    finally:
        if started.poll() is None:
            started.kill()
            started.communicate()


def wait_until(happened: Callable[[], Any], call: Call | subprocess.Popen[str], seconds: float = 180) -> Any:
    """What happened, once it has; the call is under way till then."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert call.poll() is None, "it ended before it should"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
    return found


def writers(output_dir: Path) -> dict[int, Path]:
    """The processes that hold a run with samples: process -> run folder."""
    locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    holders = {fields[5].rpartition(":")[2]: int(fields[4]) for fields in locks if fields[1] == "FLOCK"}
    held = {str(lock.stat().st_ino): lock.parent for lock in output_dir.glob("*/.lock")}
    written = {inode: folder for inode, folder in held.items() if (folder / "samples.jsonl").exists()}
    return {holders[inode]: folder for inode, folder in written.items() if inode in holders}
