"""Programs that a model wrote: what they may do, and that hostile ones can do nothing else."""

from __future__ import annotations

import http.server
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.tasks.code_execution import run_program

SECONDS = 2
MISSING = run_program("", 10).missing
ISOLATED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
needs_isolation = pytest.mark.skipif(bool(MISSING), reason=f"this system cannot take away {MISSING}")

HARMLESS = {
    "nothing": "",
    "the standard library": "import collections, datetime, decimal, hashlib, itertools, json, math, random, re, typing",
    "its own folder": "open('a', 'w').write('x' * 9); assert open('a').read() == 'x' * 9; import os; os.remove('a')",
    "temporary files": "import tempfile; tempfile.TemporaryFile().write(b'x')",
    "an empty environment": "import os; assert not os.environ",
    "much output": "for _ in range(1000): print('x' * 1000)",
}


@pytest.mark.parametrize("what", HARMLESS)
def test_harmless_programs_pass(what: str) -> None:
    assert run_program(HARMLESS[what], 10).passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("x =", "SyntaxError"),
        ("raise SystemExit", "SystemExit"),
        ("def f(): return f()\nf()", "RecursionError"),
        ("import os; os._exit(0)", "ended before its tests did"),
        (
            "import os, json; os.write(3, json.dumps({'token': '', 'error': None}).encode()); os._exit(0)",
            "ended before",
        ),
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("while True: print('x' * 1000)", "timed out"),
        ("import os\nwhile True: os.write(3, b'x' * 10**6)", ""),
        ("import sys; sys.stdin.read(); input()", "EOFError"),
    ],
)
def test_programs_that_do_not_pass_say_why(program: str, reason: str) -> None:
    began = time.perf_counter()
    outcome = run_program(program, SECONDS)
    assert not outcome.passed
    assert reason in outcome.reason
    assert time.perf_counter() - began < SECONDS + 10


@pytest.mark.skipif(not ISOLATED, reason="not a system that these means exist on")
def test_on_linux_nothing_is_missing() -> None:
    assert MISSING == (), "Landlock needs Linux 5.13, and neither it nor seccomp switched off"


@pytest.mark.parametrize("program", ["x = ' ' * 10**11", "open('a', 'w').write('x' * 10**8)"])
def test_memory_and_files_have_limits(program: str) -> None:
    assert run_program(program, SECONDS).reason in ("MemoryError", "OSError")


@pytest.fixture
def victim() -> Iterator[Path]:
    """A file that is not the program's, in a folder that anyone may write to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "victim"
        path.write_text("whole", encoding="utf-8")
        path.chmod(0o666)
        yield path


@needs_isolation
@pytest.mark.parametrize(
    "attack",
    [
        "open('{victim}', 'w').write('gone')",
        "open('{victim}', 'a').write('gone')",
        "open('{victim}').read()",
        "import os; os.remove('{victim}')",
        "import os; os.truncate('{victim}', 0)",
        "import os; os.chmod('{victim}', 0)",
        "import os; os.utime('{victim}', (0, 0))",
        "import os; os.rename('{victim}', 'mine')",
        "import os; os.link('{victim}', 'mine'); open('mine', 'w')",
        "import os; os.symlink('{victim}', 'mine'); open('mine', 'w')",
        "import os; os.chdir('/'); open('{victim}', 'w')",
        "import shutil; shutil.rmtree('{folder}')",
        "import os; open('{folder}/new', 'w')",
        "import os; os.mkdir('{folder}/new')",
        "import pathlib; list(pathlib.Path('{home}').iterdir())",
        "import os; os.listdir('/')",
        "open('/etc/passwd').read()",
        "open('/proc/self/environ').read()",
    ],
)
def test_files_outside_its_folder_are_out_of_reach(attack: str, victim: Path) -> None:
    before = victim.stat()
    program = attack.format(victim=victim, folder=victim.parent, home=Path.home())
    assert run_program(program, SECONDS).reason in ("PermissionError", "OSError")
    assert victim.read_text(encoding="utf-8") == "whole"
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]
    after = victim.stat()
    assert (after.st_mode, after.st_mtime, after.st_size) == (before.st_mode, before.st_mtime, before.st_size)


def processes(mark: str) -> list[str]:
    """Lines of running processes that hold a mark."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if mark in line]


@needs_isolation
@pytest.mark.parametrize(
    "attack",
    [
        "import os\nwhile True: os.fork()",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)",
        "import subprocess; subprocess.Popen(['sleep', '61.25'], start_new_session=True)",
        "import os; os.execv('/bin/sleep', ['sleep', '61.25'])",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
        "import threading; threading.Thread(target=print).start()",
        "import os; os.kill(os.getppid(), 9)",
        "import os, signal; os.killpg(0, signal.SIGTERM)",
        "import os; os.kill(-1, 9)",
    ],
)
def test_processes_and_signals_are_out_of_reach(attack: str) -> None:
    before = processes("sandbox.py")
    outcome = run_program(attack, SECONDS)
    assert outcome.reason in ("PermissionError", "RuntimeError", "OSError"), outcome
    assert not processes("61.25")
    assert processes("sandbox.py") == before


@needs_isolation
@pytest.mark.parametrize(
    "attack",
    [
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/')",
        "import socket; socket.create_connection(('127.0.0.1', {port}))",
        "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
        "import socket; socket.socket(socket.AF_UNIX).connect('/run/any')",
    ],
)
def test_the_network_is_out_of_reach(attack: str) -> None:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        outcome = run_program(attack.format(port=server.server_port), SECONDS)
        server.shutdown()
    assert outcome.reason in ("PermissionError", "URLError")
    assert asked == []


@needs_isolation
def test_limits_cannot_be_lifted() -> None:
    raised = "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))"
    assert run_program(raised, SECONDS).reason in ("PermissionError", "ValueError")


def test_nothing_is_left_behind() -> None:
    def folders() -> set[str]:
        return {path.name for path in Path(tempfile.gettempdir()).glob("griffin-*")}

    before = folders()
    run_program("import os\nos.mkdir('a')\nopen('a/b', 'w').write('x')\nwhile True: pass", 1)
    assert folders() == before
