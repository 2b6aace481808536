"""A sweep on a real SLURM: an array of jobs, one of them killed, two of them preempted, and all records in the end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cluster
import forked
import pytest
from calling import Outcome, command, environment, process, read_record, read_samples, run_folder, run_folders, tiny

KEY = "7261" * 10
POINTS = ("statistic=griffin,magnitude", "sparsity=0.25,0.5", "seed=0,1")
SMALL = ("hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1", "hydra.launcher.partition=low")


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment variables by which commands find the cluster."""
    if reason := cluster.missing():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # not pytest's folders, which munge finds too private
    folder.chmod(0o755)
    try:
        with cluster.cluster(folder / "cluster", cpus=2) as variables:
            yield variables
    finally:
        shutil.rmtree(folder)


def arguments(output_dir: Path, *more: str) -> list[str]:
    return ["-m", *tiny(output_dir, *POINTS, rows=6, tokens=600), *more]


def on_slurm(output_dir: Path) -> list[str]:
    return command(*arguments(output_dir, "launcher=slurm", *SMALL))


def writing(output_dir: Path) -> dict[int, Path]:
    """The processes that hold a run with one sample or two of its six: process -> run folder."""
    found = forked.writers(output_dir).items()
    return {pid: path for pid, path in found if (path / "samples.jsonl").read_bytes().count(b"\n") in (1, 2)}


@dataclass(frozen=True)
class Swept:
    """The first call, in which jobs were killed and preempted, and the same call again."""

    output_dir: Path
    first: Outcome
    again: Outcome
    killed: Path
    kept: dict[Path, bytes]
    restarts: str


@pytest.fixture(scope="module")
def swept(slurm: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Swept:
    root = tmp_path_factory.mktemp("slurm")
    output_dir = root / "out"
    variables = slurm | {"WANDB_API_KEY": KEY}
    with forked.running(on_slurm(output_dir), root, **variables) as calling:
        pid, killed = forked.wait_until(lambda: next(iter(writing(output_dir).items()), None), calling)
        os.kill(pid, signal.SIGKILL)
        preempted = forked.wait_until(lambda: set(writing(output_dir).values()) - {killed}, calling)
        kept = {path: (path / "samples.jsonl").read_bytes() for path in preempted}
        urgent = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true"]
        subprocess.run(urgent, env=environment(**variables), check=True, capture_output=True)
        out, err = calling.communicate(timeout=300)
    first = Outcome(calling.returncode, out, err)
    restarts = process(["scontrol", "show", "job", "--oneliner"], root, **variables).out
    again = process(on_slurm(output_dir), root, **variables)
    return Swept(output_dir, first, again, killed, kept, restarts)


def test_a_killed_job_fails_its_point_alone_and_the_head_says_so(swept: Swept) -> None:
    assert swept.first.code == 1
    assert "7 finished, 1 failed" in swept.first.out
    assert "ended without a result (failed)" in " ".join(swept.first.out.split())
    assert "Traceback" not in swept.first.err


def test_the_same_call_again_ends_in_all_records(swept: Swept) -> None:
    assert swept.again.code == 0, swept.again.err
    assert "1 finished, 7 skipped" in swept.again.out
    assert len([read_record(folder) for folder in run_folders(swept.output_dir)]) == 8


def test_preempted_jobs_were_requeued_and_went_on(swept: Swept) -> None:
    # The node has room for two: the other job was preempted too, perhaps before Python had imported anything.
    assert len(re.findall(r" Restarts=1 ", swept.restarts)) >= len(swept.kept) >= 1
    logs = [path.read_text() for path in (swept.output_dir / ".submitit").glob("*/*_log.err")]
    assert [log for log in logs if "User defined signal" in log] == []
    for folder, before in swept.kept.items():
        assert (folder / "samples.jsonl").read_bytes().startswith(before)


def test_samples_and_metrics_are_those_of_a_local_sweep(swept: Swept, tmp_path: Path) -> None:
    assert forked.start(arguments(tmp_path / "local"), tmp_path / "log").ended(300).code == 0
    here, there = run_folders(tmp_path / "local"), run_folders(swept.output_dir)
    assert [folder.name for folder in here] == [folder.name for folder in there]
    for local, remote in zip(here, there, strict=True):
        assert [sample["index"] for sample in read_samples(remote)] == list(range(6))
        assert [sample["text"] for sample in read_samples(local)] == [sample["text"] for sample in read_samples(remote)]
        assert read_record(local)["metrics"] == read_record(remote)["metrics"]


def test_no_record_names_the_host_or_a_key(swept: Swept) -> None:
    files = [path for folder in run_folders(swept.output_dir) for path in folder.rglob("*") if path.is_file()]
    files += [path for path in swept.output_dir.rglob("*") if path.is_file() and path.parent.name != ".submitit"]
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    host = socket.gethostname().encode()
    ours = [path for path in files if ".submitit" not in path.parts]  # submitit's logs name the host
    assert len(ours) >= 8 * 3
    assert len(host) < 6 or [path for path in ours if host in path.read_bytes()] == []


def test_what_slurm_refuses_is_one_line(slurm: dict[str, str], tmp_path: Path) -> None:
    ended = process(
        command(*tiny(tmp_path / "out"), "launcher=slurm", "hydra.launcher.partition=nowhere"), tmp_path, **slurm
    )
    ended.refused("partition")


def test_a_job_that_is_warned_while_it_still_imports_is_requeued(slurm: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with forked.running(command(*tiny(out, "launcher=slurm"), *SMALL), tmp_path, **slurm) as calling:
        (path,) = forked.wait_until(lambda: loading(out), calling)
        subprocess.run(["scancel", "--signal=USR2", path.parent.name], env=environment(**slurm), check=True)
        _, told = calling.communicate(timeout=300)
    assert calling.returncode == 0, told
    assert "Requeued job" in path.read_text()
    assert path.read_text().count("Job completed successfully") >= 1
    assert len(read_samples(run_folder(out))) == 3


def loading(output_dir: Path) -> list[Path]:
    """The logs of jobs that are about to import what they will run."""
    return [path for path in output_dir.glob(".submitit/*/*_log.out") if "Loading pickle" in path.read_text()]
