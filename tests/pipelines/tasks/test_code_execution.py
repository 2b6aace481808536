"""Programs that a model wrote: what they may do, and that hostile ones can do nothing else."""

import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.tasks.code_execution import SANDBOX, run_program

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
        ("while True: pass", "timed out"),
        ("import time; time.sleep(60)", "timed out"),
        ("while True: print('x' * 1000)", "timed out"),
        ("import sys; sys.stdin.read(); input()", "EOFError"),
        ("x = ' ' * 10**11", "MemoryError"),
        ("open('a', 'w').write('x' * 10**8)", "OSError"),
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


@pytest.fixture
def victim() -> Iterator[Path]:
    """A file that is not the program's, in a folder that anyone may write to."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        path = Path(folder) / "victim"
        path.write_text("whole", encoding="utf-8")
        path.chmod(0o666)
        yield path


LIBC = "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
ATTACKS = [
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
    "import os\nwhile True: os.fork()",
    "import os\nif os.fork() == 0:\n    os.setsid()\n    import time; time.sleep(60)",
    "import subprocess; subprocess.Popen(['sleep', '61.25'], start_new_session=True)",
    "import os; os.execv('/bin/sleep', ['sleep', '61.25'])",
    "import multiprocessing; multiprocessing.Process(target=print).start()",
    "import threading; threading.Thread(target=print).start()",
    "import os; os.kill(os.getppid(), 9)",
    "import os, signal; os.killpg(0, signal.SIGTERM)",
    "import os; os.kill(-1, 9)",
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}/')",
    "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "import socket; socket.socket(socket.AF_UNIX).connect('/run/any')",
    "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "import os; os.truncate('a', 0)",
    "import os; open('a', 'w'); os.open('a', os.O_RDONLY | os.O_TRUNC)",
    "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid())",
    "import fcntl, os, signal; fcntl.fcntl(os.pipe()[0], fcntl.F_SETSIG, signal.SIGKILL)",
    "import os; os.unlink('{sandbox}')",
    "import os; os.symlink('{sandbox}', 'a'); os.unlink('a'); os.link('{sandbox}', 'a')",
    "import os; os.pidfd_open(os.getppid())",
    "import os; os.sched_setaffinity(os.getppid(), [0])",
    "import os; os.setpriority(os.PRIO_PROCESS, os.getppid(), 9)",
    "import os; os.execve(os.memfd_create('a'), ['a'], {{}})",
    *(
        LIBC + f"if libc.{call} == -1: raise OSError(ctypes.get_errno(), '')"
        for call in (
            "ptrace(16, libc.getppid(), 0, 0)",
            "process_vm_readv(libc.getppid(), 0, 0, 0, 0, 0)",
            "prlimit(libc.getppid(), 0, 0, 0)",
            "fork()",
            "unshare(0x10000000)",
            "mount(b'none', b'/', b'tmpfs', 0, 0)",
            "syscall(437, -100, b'/etc/passwd', 0, 24)",
            "syscall(425, 1, 0)",
        )
    ),
]


@needs_isolation
@pytest.mark.parametrize("attack", ATTACKS)
def test_the_system_is_out_of_reach(attack: str, victim: Path) -> None:
    before = victim.stat()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        places = {"victim": victim, "folder": victim.parent, "home": Path.home(), "sandbox": SANDBOX}
        outcome = run_program(attack.format(port=server.getsockname()[1], **places), SECONDS)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert outcome.reason in ("PermissionError", "OSError", "RuntimeError", "URLError", "ValueError"), outcome
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert "61.25" not in listed
    after = victim.stat()
    assert (after.st_mode, after.st_mtime, after.st_size) == (before.st_mode, before.st_mtime, before.st_size)
    assert [path.name for path in victim.parent.iterdir()] == ["victim"]


TEST = "assert candidate(4) == int('86461' * 6), candidate(5)"  # which no address of an object contains by chance
EVERY = "import os\nfor fd in range(64):\n    try: os.write(fd, {text})\n    except OSError: pass\n"
VERDICT = EVERY.format(text='b\'{"error": null, "missing": []}\'')

CHEATS = {
    "ends": "import os; os._exit(0)",
    "ends when it is called": "def f(x): import os; os._exit(0)",
    "exits": "def f(x): raise SystemExit(0)",
    "tells the verdict": VERDICT + "os._exit(0)",
    "tells the verdict when it is called": "def f(x):\n " + VERDICT.replace("\n", "\n ") + "os._exit(0)",
    "tells the verdict at its end": f"import atexit; atexit.register(exec, {VERDICT!r}); raise SystemExit",
    "looks for it in frames": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        assert '86461' * 6 not in repr([*frame.f_locals.values(), *frame.f_globals.values()])
        frame = frame.f_back
""",
    "looks for it in all objects": """
import gc
def f(x):
    secret = '86461' * 6
    return int(secret) if any(secret in repr(item) for item in gc.get_objects() if isinstance(item, dict)) else None
""",
    "looks for it in memory": """
def f(x): return int('86461' * 6) if b'86461' * 6 in open('/proc/self/mem', 'rb').read(1) else 0
""",
    "equals everything": "class A:\n def __eq__(self, other): return True\ndef f(x): return A()",
    "is a number that equals everything": "class A(int):\n def __eq__(self, other): return True\ndef f(x): return A()",
    "is a list that equals everything": "class A(list):\n def __eq__(self, other): return True\ndef f(x): return A()",
    "changes what is built in": """
import builtins
builtins.AssertionError = Exception
builtins.exec = builtins.compile = builtins.print = lambda *_, **__: None
def f(x): return 0
""",
    "changes how it is told": "import builtins; builtins.ascii = lambda _: '__import__(\"os\")._exit(0)'",
    "traces": "import sys; sys.settrace(lambda *_: 1 / 0); sys.setprofile(lambda *_: 1 / 0)\ndef f(x): return 0",
    "answers with code": EVERY.format(text="b'(None, __import__(\"os\")._exit(0))\\n' * 9") + "def f(x): return 0",
    "answers with half a line": EVERY.format(text="b'(None, '") + "os._exit(0)",
    "answers without end": EVERY.format(text="b'(' * 60000") + "while True: " + "os.write(fd, b'(')",
    "nests without end": "x = []\nx.append(x)\ndef f(_): return x",
    "closes all pipes": "import os; os.closerange(0, 64)",
    "ends by a signal": "import signal; signal.signal(signal.SIGALRM, print); signal.alarm(1)\nwhile True: pass",
    "raises what passes nowhere": "class none(BaseException): pass\ndef f(x): raise none",
}


@pytest.mark.parametrize("cheat", CHEATS)
def test_programs_cannot_say_that_they_pass(cheat: str) -> None:
    outcome = run_program(CHEATS[cheat], SECONDS, TEST, "f")
    assert not outcome.passed
    assert outcome.reason


def test_a_right_program_passes_its_tests() -> None:
    written = "import collections\ndef f(*a, **n): return [*a, n and collections.Counter(n), (1.5, {2}, None, 'x\\n')]"
    test = "assert candidate(4, b=2) == [4, {'b': 2}, (1.5, {2}, None, 'x\\n')]"
    assert run_program(written, 10, test, "f").passed
    assert run_program("def f(): raise KeyError", 10, "try: candidate()\nexcept KeyError: pass", "f").passed


@pytest.mark.skipif(not ISOLATED, reason="not a system that these means exist on")
@pytest.mark.parametrize("version", [1, 2])
def test_early_versions_of_landlock_truncate_nothing_either(version: int, victim: Path, tmp_path: Path) -> None:
    script = f"""
import os, sys
sys.path.insert(0, {str(SANDBOX.parent)!r})
import sandbox
sandbox.landlock_version = lambda: {version}
assert sandbox.give_up({{"seconds": 9, "memory": 2**30, "file": 2**20}}) == []
for action in (lambda: os.truncate({str(victim)!r}, 0), lambda: os.open({str(victim)!r}, os.O_TRUNC)):
    try: action()
    except PermissionError: pass
    else: raise SystemExit("it was truncated")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert victim.read_text(encoding="utf-8") == "whole"


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_program("import os\nos.mkdir('a')\nopen('a/b', 'w').write('x')\nwhile True: pass", 1)
    assert list(tmp_path.iterdir()) == []
