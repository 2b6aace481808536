"""Runs one program that a model wrote, or the tests of it, in a process that has given up what could do harm.

`pipelines.tasks.code_execution` starts this file as a script twice, with an empty environment and in folders of their
own: one process runs the program, the other one its tests. The tests call the program's function through a pair of
pipes, as lines of Python literals. So whatever a program does to its own process, it can neither see what is expected
of it nor say that it has passed.

Before anything runs, both processes give up, for good and for whatever they start:

- everywhere: processor time, memory, file sizes and processes beyond their limits;
- on Linux: all capabilities; files other than their folder and Python's own libraries, by Landlock (Linux 5.13);
  network, new processes, signals and other ways to reach the system, by a seccomp filter (x86-64 and 64-bit ARM).

What the system lacks is reported, so that the caller can say so. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import ast
import builtins
import ctypes
import json
import os
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, TextIO

# What the seccomp filter refuses, by its number on (x86-64, 64-bit ARM); None where it does not exist. Processes and
# threads; sockets; signals and other processes' memory; what outlives a process; ways around the filter and limits;
# owners, modes, times and attributes of files, which Landlock leaves open.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    **{"truncate": (76, 45), "openat2": (437, 437)},  # Landlock knows of truncating from version 3 on only
    **{"fork": (57, None), "vfork": (58, None), "clone": (56, 220), "clone3": (435, 435)},
    **{"execve": (59, 221), "execveat": (322, 281)},
    **{"socket": (41, 198), "io_uring_setup": (425, 425)},
    **{"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "pidfd_send_signal": (424, 424)},
    **{"rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "ptrace": (101, 117)},
    **{"process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "pidfd_open": (434, 434)},
    **{"shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180)},
    **{"keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "unshare": (272, 97), "setns": (308, 268)},
    **{"mount": (165, 40), "umount2": (166, 39), "prlimit64": (302, 261), "setrlimit": (160, 164)},
    **{"setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122)},
    **{"chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54)},
    **{"utime": (132, None), "utimes": (235, None), "futimesat": (261, None), "utimensat": (280, 88)},
    **{"setxattr": (188, 5), "lsetxattr": (189, 6), "fsetxattr": (190, 7)},
    **{"removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16)},
}
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, AUDIT_ARCH

# Landlock's system calls and rights (linux/landlock.h), alike on all architectures.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many rights each version of it knows; 16 from version 5 on

# Calls that are refused with some values of an argument: their numbers, where it stands, its bits that count, and their
# value. To truncate what is opened for reading, and to let the kernel send a signal when a pipe is ready (F_SETOWN,
# F_SETSIG, F_SETOWN_EX), are two things that early versions of Landlock let through.
_REFUSED_WITH = (
    *(((2, None), 24, os.O_ACCMODE | os.O_TRUNC, os.O_TRUNC), ((257, 56), 32, os.O_ACCMODE | os.O_TRUNC, os.O_TRUNC)),
    *(((72, 25), 24, 0xFFFFFFFF, command) for command in (8, 10, 15)),
)
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2


def give_up(limits: dict[str, int]) -> list[str]:
    """Give up what a program may not have.

    Args:
        limits: seconds of processor time, bytes of memory and bytes of a file.

    Returns:
        What this system has no means to take away, in words.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (limits["seconds"], limits["seconds"] + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if sys.platform != "linux":
        return ["memory beyond its limit", "files", "the network"]
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory"],) * 2)
    libc: Any = ctypes.CDLL(None, use_errno=True)
    # A version 3 header, and no effective, permitted or inheritable capability.
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    missing = [] if _landlock(libc) else ["files"]
    return missing + ([] if _seccomp(libc) else ["the network and other processes"])


def landlock_version() -> int:
    """The version of Landlock that this kernel has, not positive where it has none."""
    return int(ctypes.CDLL(None).syscall(_CREATE_RULESET, None, 0, 1))


def _landlock(libc: Any) -> bool:
    version = landlock_version()
    if version < 1:
        return False
    rights = (1 << _RIGHTS.get(version, 16)) - 1
    # Files; from version 4 on binding and connecting; from 6 on abstract sockets and signals.
    handled = [rights] + ([3] if version >= 4 else []) + ([3] if version >= 6 else [])
    ruleset = libc.syscall(_CREATE_RULESET, (ctypes.c_uint64 * len(handled))(*handled), 8 * len(handled), 0)
    libraries = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", f"{sys.base_prefix}/lib")
    allowed = dict.fromkeys((*libraries, sysconfig.get_path("stdlib"), "/etc/ld.so.cache"), _READ_FILE | _READ_DIR)
    allowed |= {"/dev/null": _READ_FILE | _WRITE_FILE, "/dev/urandom": _READ_FILE, os.getcwd(): rights}
    for path, granted in allowed.items():
        if not os.path.exists(path):
            continue
        place = os.open(path, os.O_PATH)
        if not os.path.isdir(path):
            granted &= ~_READ_DIR
        rule = granted.to_bytes(8, sys.byteorder) + place.to_bytes(4, sys.byteorder)
        if libc.syscall(_ADD_RULE, ruleset, 1, rule, 0):
            return False
        os.close(place)
    return libc.syscall(_RESTRICT_SELF, ruleset, 0) == 0


def _seccomp(libc: Any) -> bool:
    if platform.machine() not in _ARCHITECTURES:
        return False
    column, architecture = _ARCHITECTURES[platform.machine()]
    load, equal, least, result, both = 0x20, 0x15, 0x35, 0x06, 0x54
    allow, refuse, kill = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: EPERM
    # Offset 4: the architecture; 0: the number of the call. Numbers from 2^30 on are x86-64's second set.
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (result, 0, 0, kill), (load, 0, 0, 0)]
    for number in (numbers[column] for numbers in _REFUSED.values()):
        lines += [] if number is None else [(equal, 0, 1, number), (result, 0, 0, refuse)]
    for numbers, place, bits, value in _REFUSED_WITH:
        number = numbers[column]
        if number is not None:
            lines += [(equal, 0, 5, number), (load, 0, 0, place), (both, 0, 0, bits)]
            lines += [(equal, 0, 1, value), (result, 0, 0, refuse), (load, 0, 0, 0)]
    lines += [(least, 0, 1, 1 << 30), (result, 0, 0, refuse), (result, 0, 0, allow)]
    # struct sock_filter, as many as there are, and struct sock_fprog.
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    program = struct.pack("HP", len(lines), ctypes.addressof(instructions))
    return libc.prctl(_SECCOMP, _FILTER, program, 0, 0) == 0


class EndedError(Exception):
    """The program's process ended before its tests did."""


def serve(program: str, calls: TextIO, answers: TextIO) -> None:
    """Run the program, then its functions as they are called, one line a call and one an answer: `(error, value)`."""
    names: dict[str, Any] = {"__name__": "__main__"}

    def answer(action: Callable[[], Any]) -> None:
        told: tuple[str | None, Any]
        try:
            told = (None, _plain(action()))
        except BaseException as raised:
            told = (type(raised).__name__, None)
        print(ascii(told), file=answers, flush=True)

    answer(lambda: exec(compile(program, "program", "exec"), names))
    for line in calls:
        name, positional, named = ast.literal_eval(line)
        answer(lambda: names[name](*positional, **named))  # noqa: B023


def _plain(value: Any) -> Any:
    """The value as what literals are made of, which compares as itself wherever it came from."""
    scalars: tuple[Any, ...] = (bool, int, float, complex, str, bytes)
    several: tuple[Any, ...] = (list, tuple, set, frozenset)
    for kind in (*scalars, *several):
        if isinstance(value, kind):
            return kind(map(_plain, value) if kind in several else value)
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if value is not None:
        raise TypeError("a function's value must be of numbers, texts, lists, tuples, sets and dictionaries")
    return None


def judge(test: str, function: str, calls: TextIO, answers: TextIO) -> str | None:
    """Run the tests, in which `candidate` is the program's function.

    Returns:
        What went wrong, as the name of an exception or in words; None if nothing did.
    """

    def told() -> Any:
        line = answers.readline()
        if not line:
            raise EndedError
        error, value = ast.literal_eval(line)
        if error is not None:
            known = getattr(builtins, str(error), None)
            if isinstance(known, type) and issubclass(known, BaseException):
                raise known
            raise type(str(error), (Exception,), {})
        return value

    def candidate(*positional: Any, **named: Any) -> Any:
        print(ascii((function, positional, named)), file=calls, flush=True)
        return told()

    try:
        told()
        exec(compile(test, "test", "exec"), {"__name__": "__main__", "candidate": candidate})
    except (EndedError, BrokenPipeError):
        return "ended before its tests did"
    except BaseException as raised:
        return type(raised).__name__
    return None


def main() -> None:
    """Run the requested part. The tests' part tells what became of it on the standard output that it began with."""
    request = json.load(sys.stdin)
    sys.set_int_max_str_digits(0)
    told = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(nowhere, standard)
    missing = give_up(request["limits"])
    os.environ.clear()  # Python itself has set some
    read, write = map(int, sys.argv[1:])
    with open(read, encoding="ascii") as incoming, open(write, "w", encoding="ascii") as outgoing:
        if "program" in request:
            serve(request["program"], incoming, outgoing)
        else:
            error = judge(request["test"], request["function"], outgoing, incoming)
            os.write(told, json.dumps({"error": error, "missing": missing}).encode())
        os._exit(0)


if __name__ == "__main__":
    main()
