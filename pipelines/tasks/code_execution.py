"""Runs programs that a model wrote, each in a process that can do little (see `pipelines.tasks.sandbox`)."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

SANDBOX = Path(__file__).with_name("sandbox.py")

MEMORY = 2**30  # bytes of address space
FILE = 2**24  # bytes of a file


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        passed: whether it ran to its end.
        reason: why not, in words; empty where it did.
        missing: what this system has no means to keep it from; empty where it was stopped before it could say.
    """

    passed: bool
    reason: str = ""
    missing: tuple[str, ...] = ()


def run_program(program: str, seconds: int) -> Outcome:
    """Run a program with an empty environment, in a temporary folder of its own, and end all that it started.

    Args:
        program: Python, with nothing but the standard library to import.
        seconds: of time, on the clock and of the processor, after which it is ended.
    """
    token = secrets.token_hex(16)  # so that a program that just ends is not taken for one that passed
    limits = {"seconds": seconds, "memory": MEMORY, "file": FILE}
    request = json.dumps({"program": program, "token": token, "limits": limits}).encode()
    # A file, and no pipe, so that whatever the program writes ends at its limit.
    with (
        tempfile.TemporaryFile() as told,
        tempfile.TemporaryDirectory(prefix="griffin-", ignore_cleanup_errors=True) as folder,
    ):
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=told,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        late = False
        try:
            process.communicate(request, timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        told.seek(0)
        answer = told.read()
    try:
        result = json.loads(answer)
        known = result.get("token") == token
    except (ValueError, AttributeError):
        known = False
    if not known:
        late = late or process.returncode == -signal.SIGXCPU
        return Outcome(False, "timed out" if late else "ended before its tests did")
    return Outcome(result["error"] is None, result["error"] or "", tuple(result["missing"]))
