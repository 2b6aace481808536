"""Runs programs that a model wrote, each in a process that can do little (see `pipelines.tasks.sandbox`).

`python -m pipelines.tasks.code_execution` prints what this system can keep them from.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.tasks.sandbox import landlock_version

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


def run_program(program: str, seconds: int, test: str = "", function: str = "") -> Outcome:
    """Run a program and its tests, each in a process with an empty environment and in a temporary folder of its own,
    and end all that they started.

    Args:
        program: Python, with nothing but the standard library to import.
        seconds: of time, on the clock and of the processor, after which it is ended.
        test: a program that raises where `candidate`, the program's function, is wrong; it gives and takes plain data.
            Without one, a program that runs to its end has passed, and one that is bent on it can say so itself.
        function: the name of that function in the program.
    """
    limits = {"seconds": seconds, "memory": MEMORY, "file": FILE}
    calls, answers = os.pipe(), os.pipe()
    late = False
    # A file, and no pipe, so that whatever is written ends at its limit.
    with tempfile.TemporaryFile() as told, ExitStack() as stack:
        try:
            tested = _started(stack, {"program": program, "limits": limits}, calls[0], answers[1], subprocess.DEVNULL)
            tests = {"test": test, "function": function, "limits": limits}
            testing = _started(stack, tests, answers[0], calls[1], told.fileno())
        finally:
            for end in (*calls, *answers):
                os.close(end)
        try:
            testing.wait(timeout=seconds + 1)
        except subprocess.TimeoutExpired:
            late = True
        stack.close()
        told.seek(0)
        answer = told.read()
    if late or -signal.SIGXCPU in (tested.returncode, testing.returncode):
        return Outcome(False, "timed out")
    result = json.loads(answer or '{"error": "ended before its tests did", "missing": []}')
    return Outcome(result["error"] is None, result["error"] or "", tuple(result["missing"]))


def _started(stack: ExitStack, request: dict[str, Any], read: int, write: int, output: int) -> subprocess.Popen[bytes]:
    """A process of the sandbox that has its request. The stack ends it, with all that it started."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="griffin-", ignore_cleanup_errors=True))
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SANDBOX), str(read), str(write)],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        pass_fds=(read, write),
        start_new_session=True,
    )
    stack.callback(_end, process)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(json.dumps(request).encode())
    return process


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    """Print what this system can keep generated programs from."""
    missing = run_program("", 10).missing
    print(f"{platform.system()} {platform.release()} {platform.machine()}, Landlock version {landlock_version()}")
    print(f"Generated programs cannot be kept from {' and '.join(missing)}." if missing else "Nothing is missing.")


if __name__ == "__main__":
    main()
