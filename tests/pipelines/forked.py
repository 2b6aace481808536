"""Calls of the entry as processes of their own that begin with everything imported, so that they can be many.

A server process imports the pipeline once; each call is a fork of it. What happens to a call, happens to a process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from calling import Outcome

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
