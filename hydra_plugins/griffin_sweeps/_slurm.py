"""Points as the array jobs of SLURM, through submitit, in a way that no dead job can hold up or hide the others."""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import submitit
from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from submitit.core.job_environment import JobEnvironment
from tqdm import tqdm

from pipelines.errors import UserError

_LONGEST_POLL_SECONDS = 30
_WARNING = f"SIG{JobEnvironment.USR_SIG}"  # the name of the signal that SLURM warns with


class GriffinSlurmLauncher(SlurmLauncher):
    """hydra-submitit-launcher's job, submitted and preempted as there, but waited for otherwise.

    submitit asks `sacct` for a job's state: without accounting it waits for a killed job for ever, and with it the
    first killed job ends the call. Here `squeue`, which every site has, tells which jobs are still to come or running;
    one that is not and left no result is dead, and only its own point has failed.

    SLURM's warning before preemption is a signal that submitit can answer from its first second in Python on, which
    importing takes. Until then it would kill the job, so it is held back.
    """

    def __call__(self, *arguments: Any) -> JobReturn:
        """Run a point, in its job."""
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {getattr(signal, _WARNING)})
        return super().__call__(*arguments)

    def setup(self, **arguments: Any) -> None:
        """As Hydra's launchers; UserError where SLURM is not on this machine."""
        super().setup(**arguments)
        for command in ("sbatch", "srun", "squeue"):
            if shutil.which(command) is None:
                launcher = self.config.hydra.runtime.choices.get("launcher")
                raise UserError(
                    f"launcher={launcher}: there is no {command} on this machine; call it where SLURM takes jobs, or "
                    "use launcher=joblib or local"
                )

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit one array, and wait until each job has a result or is dead; UserError where SLURM refuses it."""
        parameters = {
            name if name in _OF_EVERY_EXECUTOR else f"slurm_{name}": value
            for name, value in self.params.items()
            if name not in ("submitit_folder", "max_num_timeout")
        }
        count = len(job_overrides)
        executor = submitit.AutoExecutor(
            self.params["submitit_folder"],
            cluster="slurm",
            slurm_max_num_timeout=self.params["max_num_timeout"],
            slurm_python=shlex.join(
                ["sh", "-c", _IGNORING, "sh", JobEnvironment.USR_SIG, sys.executable, "-c", _HOLDING_BACK, _WARNING]
            ),
        )
        try:
            executor.update_parameters(**parameters)
            jobs = executor.map_array(
                self,
                [list(overrides) for overrides in job_overrides],
                ["hydra.sweep.dir"] * count,
                range(initial_job_idx, initial_job_idx + count),
                [f"job_id_for_{initial_job_idx + number}" for number in range(count)],
                [Singleton.get_state()] * count,
            )
        except (RuntimeError, ValueError, subprocess.CalledProcessError) as error:
            raise UserError(f"hydra.launcher: SLURM refuses the jobs: {error}") from error
        array = jobs[0].job_id.partition("_")[0]
        with tqdm(total=count, desc=f"SLURM job {array}", unit="point") as bar:
            try:
                _wait(jobs, bar)
            except KeyboardInterrupt:
                tqdm.write(f"SLURM job {array} goes on; to end it, too: scancel {array}", file=sys.stderr)
                raise
        return [_returned(job) for job in jobs]


# A shell is there before Python is, which takes its time on a busy node; a warning that comes meanwhile is lost, and
# the job is requeued without having been warned.
_IGNORING = 'trap "" "$1"; shift; exec "$@"'

# A signal that is blocked waits, also while the program is replaced by another.
_HOLDING_BACK = (
    "import os, signal, sys; warning = getattr(signal, sys.argv[1]); "
    "signal.pthread_sigmask(signal.SIG_BLOCK, {warning}); signal.signal(warning, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
)


# As in submitit: what its executors share is passed under its own name, what is SLURM's with a prefix.
_OF_EVERY_EXECUTOR = (
    *("timeout_min", "cpus_per_task", "gpus_per_node", "tasks_per_node", "mem_gb", "nodes", "name", "stderr_to_stdout"),
)


def _wait(jobs: Sequence[Any], bar: Any) -> None:
    """Return when every job has a result or is neither waiting nor running, twice in a row: it may just be moving."""
    pending, gone = list(jobs), Counter[str]()
    seconds = 1.0
    while pending:
        time.sleep(seconds)
        queue = _asked("squeue", "--me", "--noheader", "--array", "--format=%i %T")  # the user's jobs that wait or run
        if queue is not None:
            states = dict(line.split()[:2] for line in queue.splitlines())
            gone = Counter({job.job_id: gone[job.job_id] + 1 for job in pending if job.job_id not in states})
            counts = Counter(states[job.job_id].lower() for job in pending if job.job_id in states)
            bar.set_postfix_str(", ".join(f"{count} {state}" for state, count in counts.items()))
        left = [job for job in pending if not _result(job) and gone[job.job_id] < 2]
        bar.update(len(pending) - len(left))
        seconds = 1.0 if len(left) < len(pending) or gone else min(1.5 * seconds, _LONGEST_POLL_SECONDS)
        pending = left


def _asked(*command: str) -> str | None:
    """What a command of SLURM prints; None if it does not answer now."""
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if asked.returncode else asked.stdout


def _result(job: Any) -> bool:
    """Whether the job left its result. Listing the folder makes a network file system look again."""
    folder = job.paths.folder
    return folder.is_dir() and job.paths.result_pickle.name in {path.name for path in folder.iterdir()}


def _returned(job: Any) -> JobReturn:
    """What the job returned; for a dead one, an exception that says how it ended."""
    if _result(job):
        try:
            return job.result()
        except Exception as error:  # what submitit makes of an exception, with its traceback
            return JobReturn(status=JobStatus.FAILED, _return_value=RuntimeError(str(error).splitlines()[-1]))
    shown = _asked("scontrol", "show", "job", "--oneliner", job.job_id) or ""
    fields = dict(field.partition("=")[::2] for field in shown.split())
    state = fields.get("JobState", "").lower().replace("_", " ") or "without a trace"
    reason = f"SLURM job {job.job_id} ended without a result ({state}); its log: {job.paths.stderr}"
    return JobReturn(status=JobStatus.FAILED, _return_value=RuntimeError(reason))


ConfigStore.instance().store(
    group="hydra/launcher",
    name="griffin_slurm",
    node=SlurmQueueConf(_target_=f"{GriffinSlurmLauncher.__module__}.GriffinSlurmLauncher"),
    provider="griffin",
)
