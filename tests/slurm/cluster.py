"""A SLURM of one node for the tests: the real daemons on loopback, in the foreground, with a folder of their own.

Needs root, because slurmd starts jobs as their users, and Debian's slurmctld, slurmd, slurm-client and munge.
There is no accounting, as at many small sites, so `sacct` knows nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")


def missing() -> str | None:
    """Why there can be no cluster here; None if there can."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)}"
    return None if os.geteuid() == 0 else "SLURM's daemons need root"


@contextlib.contextmanager
def cluster(folder: Path, cpus: int) -> Iterator[dict[str, str]]:
    """A running cluster, and the environment variables by which SLURM's commands find it.

    Two partitions share the node: jobs of `urgent` preempt those of `low`, which are requeued.

    Args:
        folder: for state, keys and logs; munged wants no folder above it to be writable by others, unless sticky.
        cpus: how many the node claims to have, whatever it has.
    """
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(parents=True)
    for path in (folder, folder / "munge"):
        path.chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    config.write_text(_configuration(folder, cpus))
    variables = {"SLURM_CONF": str(config)}
    munged = ["munged", "--foreground", f"--key-file={key}"]
    munged += [f"--{name}={folder / 'munge' / name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    with contextlib.ExitStack() as running:
        running.enter_context(_daemon(munged, folder, variables))
        _wait_until(lambda: (folder / "munge" / "socket").exists(), "munged")
        running.enter_context(_daemon(["slurmctld", "-D", "-f", str(config)], folder, variables))
        running.enter_context(_daemon(["slurmd", "-D", "-N", "node", "-f", str(config)], folder, variables))
        _wait_until(lambda: _asked(variables, "sinfo", "-h", "-n", "node", "-o", "%t").startswith("idle"), "slurmd")
        try:
            yield variables
        finally:
            for state in ("PENDING", "RUNNING"):
                _asked(variables, "scancel", f"--state={state}")
            with contextlib.suppress(TimeoutError):
                _wait_until(lambda: not _asked(variables, "squeue", "-h"), "the jobs' end")


def _configuration(folder: Path, cpus: int) -> str:
    host = socket.gethostname().partition(".")[0]
    controller, node = _free_ports(2)
    settings = {
        "ClusterName": "tests",
        "SlurmctldHost": f"{host}(127.0.0.1)",
        "SlurmctldPort": controller,
        "SlurmdPort": node,
        "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",  # loopback only
        "SlurmUser": "root",
        "AuthType": "auth/munge",
        # A requeued job may begin once its old credential has expired: two minutes by default, five seconds at least.
        "AuthInfo": f"socket={folder / 'munge' / 'socket'},cred_expire=5",
        "StateSaveLocation": folder / "state",
        "SlurmdSpoolDir": folder / "spool",
        **{f"{daemon}PidFile": folder / f"{daemon.lower()}.pid" for daemon in ("Slurmctld", "Slurmd")},
        **{f"{daemon}LogFile": folder / f"{daemon.lower()}.log" for daemon in ("Slurmctld", "Slurmd")},
        "ProctrackType": "proctrack/linuxproc",  # needs no cgroups
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "AccountingStorageType": "accounting_storage/none",
        "MpiDefault": "none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core",
        "SlurmdParameters": "config_overrides",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "SlurmctldParameters": "preempt_send_user_signal",
        "KillWait": 5,
        "ReturnToService": 2,
    }
    lines = [f"{name}={value}" for name, value in settings.items()]
    lines += [
        f"NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=4096",
        "PartitionName=low Nodes=node Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20",
        "PartitionName=urgent Nodes=node PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def _daemon(command: Sequence[str], folder: Path, variables: dict[str, str]) -> Iterator[None]:
    with (folder / f"{command[0]}.out").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=os.environ | variables)
    try:
        yield
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
        process.kill()  # does nothing to what has ended
        process.wait()


def _asked(variables: dict[str, str], *command: str) -> str:
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip()


def _wait_until(happened: Callable[[], bool], what: str, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.1)
