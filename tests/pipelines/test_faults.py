"""Kills, signals, short memory, a full disk and no hub: each ends in a clear state, and the next call mends it."""

import functools
import random
import re
import resource
import signal
import sys
import time
from pathlib import Path

import forked
import pytest
from calling import Entry, process, ran, read_samples, run_folder, run_folders, timeless, tiny
from test_tracking import summary_of

from pipelines.run_folder import RunFolder
from pipelines.status import BROKEN_OFF, FAILED, read

many = functools.partial(tiny, tokens=16)


def lines(output_dir: Path) -> int:
    """The lines written so far by the one run."""
    return sum(path.read_bytes().count(b"\n") for path in output_dir.glob("*/samples.jsonl"))


def wait_for_lines(output_dir: Path, count: int, call: forked.Call) -> float:
    """The seconds until so many lines were there."""
    start = time.monotonic()
    forked.wait_until(lambda: lines(output_dir) >= count, call, 60)
    return time.monotonic() - start


def assert_same(folder: Path, undisturbed: Path, rows: int) -> None:
    assert [sample["index"] for sample in read_samples(folder)] == list(range(rows))
    assert timeless(folder) == timeless(undisturbed)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_run_killed_at_random_moments_ends_as_undisturbed_to_the_bit(batch_size: int, tmp_path: Path) -> None:
    rows, chance, counts = 50, random.Random(7), [0]
    out, grid = tmp_path / "killed", ["grid.sparsity=[0,0.5]", f"batch_size={batch_size}"]
    starting = 1.0
    for number in range(5):
        call = forked.start(many(out, *grid, rows=rows), tmp_path / "log")
        if number % 2:  # while it starts, reads and takes up what is there
            time.sleep(chance.uniform(0, starting))
        else:  # while it writes samples
            starting = wait_for_lines(out, counts[-1] + 1, call)
            time.sleep(chance.uniform(0, 0.05))
        call.send(signal.SIGKILL)
        assert call.ended().code == -signal.SIGKILL, "the run was too short for so many kills"
        counts.append(lines(out))
    assert counts == sorted(counts)
    folders = run_folders(out)
    assert len(folders) == 2
    assert [folder for folder in folders if RunFolder(out, folder.name).held()] == [], "dead processes hold no locks"
    assert not (folders[1] / "record.json").exists()

    for output_dir in (out, tmp_path / "undisturbed"):
        assert forked.start(many(output_dir, *grid, rows=rows), tmp_path / "log").ended().code == 0
    for folder, undisturbed in zip(folders, run_folders(tmp_path / "undisturbed"), strict=True):
        assert_same(folder, undisturbed, rows)


def test_two_processes_on_one_sweep_compute_each_point_once(tmp_path: Path) -> None:
    sweep = ["-m", *many(tmp_path / "out", "sparsity=0,0.25,0.5,0.75", rows=12)]
    calls = [forked.start(sweep, tmp_path / f"log{number}") for number in range(2)]
    ended = [call.ended() for call in calls]
    assert [one.code for one in ended] == [0, 0], ended
    assert sum(int(count) for one in ended for count in re.findall(r"^(\d+) finished", one.out, re.MULTILINE)) == 4
    assert [one for one in ended if "failed" in one.out.splitlines()[-1]] == []
    folders = run_folders(tmp_path / "out")
    assert len(folders) == 4
    for folder in folders:
        assert [sample["index"] for sample in read_samples(folder)] == list(range(12))
        assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "record.json", "samples.jsonl"]


def test_a_second_process_waits_for_a_run_and_takes_it_over_if_its_process_dies(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = forked.start(many(out, rows=100), tmp_path / "first")
    wait_for_lines(out, 2, first)
    first.send(signal.SIGSTOP)  # it holds the run, and gets no further
    second = forked.start(many(out, rows=100), tmp_path / "second")
    forked.wait_until(lambda: "another process is at it" in second.printed(), first)
    first.send(signal.SIGKILL)
    assert second.ended().code == 0
    assert [sample["index"] for sample in read_samples(run_folder(out))] == list(range(100))


@pytest.mark.parametrize(
    ("number", "word", "mode"), [(signal.SIGTERM, "terminated", "offline"), (signal.SIGINT, "interrupted", "disabled")]
)
def test_signals_end_a_run_in_a_clear_state(number: signal.Signals, word: str, mode: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    call = forked.start(many(out, f"wandb.mode={mode}", rows=60), tmp_path / "log")
    wait_for_lines(out, 2, call)
    call.send(number)
    ended = call.ended()
    assert ended.code == 128 + number
    assert ended.err.splitlines()[-1] == f"{word}; the same command continues after the last whole sample"
    assert "Traceback" not in ended.err
    (row,) = read(out)
    assert row.state == BROKEN_OFF
    assert row.samples == len(read_samples(run_folder(out))) >= 2
    assert row.total == 60
    if mode == "offline":
        assert summary_of(run_folder(out))["state"] == "failed", "the run in W&B is closed"
    ran(*many(out, rows=60))
    assert [sample["index"] for sample in read_samples(run_folder(out))] == list(range(60))


def _two_gigabytes() -> None:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2 * 2**30, size + 2 * 2**30))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's size is read from /proc")
def test_short_memory_fails_one_point_in_one_line_and_the_others_go_on(tmp_path: Path) -> None:
    sweep = ["-m", *tiny(tmp_path / "out", "model=random_llama2_7b,random_tiny")]
    ended = forked.start(sweep, tmp_path / "log", _two_gigabytes).ended()
    error = ended.refused("error: out of memory")
    assert "1 finished, 1 failed" in ended.out
    large, small = read(tmp_path / "out")
    assert (large.state, small.state) == (FAILED, "done")
    assert large.reason in error


def _small_files() -> None:
    limit = 2000  # bytes: the configuration fits, six samples do not
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def test_a_file_that_cannot_grow_is_told_and_the_run_goes_on_once_it_can(tmp_path: Path) -> None:
    full = tiny(tmp_path / "full", rows=6, tokens=40)
    ended = forked.start(full, tmp_path / "log", _small_files).ended()
    ended.refused("output_dir", "samples.jsonl")
    folder = run_folder(tmp_path / "full")
    assert not (folder / "record.json").exists()
    assert (folder / "samples.jsonl").stat().st_size == 2000, "the limit did not bite in the midst of a sample"
    ran(*full)
    ran(*tiny(tmp_path / "undisturbed", rows=6, tokens=40))
    assert_same(folder, run_folder(tmp_path / "undisturbed"), 6)


@pytest.mark.parametrize("module", ["run", "prefetch"])
def test_a_hub_out_of_reach_is_told_within_seconds(module: str, tmp_path: Path) -> None:
    # The hub's clients left alone would retry for a minute, and print a traceback at its end.
    out, home = tmp_path / "out", tmp_path / "huggingface"
    sweep = ["-m", "model=random_tiny,gemma_7b", "task=briefs,xsum", "limit=1", "task.max_new_tokens=2"]
    sweep += [f"output_dir={out}", "wandb.mode=disabled"]
    prefetch = module == "prefetch"
    launcher = ["launcher=slurm_gpu", "hydra.launcher.partition=gpu"] if prefetch else []  # as for the run
    start = time.monotonic()
    entry = [sys.executable, "-m", f"pipelines.{module}", *sweep, *launcher]
    ended = process(entry, cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(home))
    assert time.monotonic() - start < 60
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert ended.lines("warning: ") == ended.lines("warning: http://127.0.0.1:9 cannot be reached")
    assert len(ended.lines("warning: ")) == 1
    errors = ended.lines("error: ")
    data = [line for line in errors if "task.hub.path=EdinburghNLP/xsum" in line and "task.data_files=FILE" in line]
    gated = [line for line in errors if "model=gemma_7b" in line and "https://huggingface.co/google/gemma-7b" in line]
    assert [len(found) for found in (errors, data, gated)] == ([4, 2, 2] if prefetch else [3, 2, 1])
    if prefetch:
        assert ended.out.count("model=random_tiny: random weights, nothing to fetch") == 2
        assert ended.out.count("task=briefs: data at hand") == 2
        assert not out.exists()
    else:  # what needs no hub
        assert len(list(out.rglob("record.json"))) == len(list(out.rglob("samples.jsonl"))) == 1


def test_no_room_for_the_record_leaves_none(call: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == "record.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    ended = call(*tiny(tmp_path / "out"))
    ended.refused("No space left on device")
    folder = run_folder(tmp_path / "out")
    left = sorted(path.name for path in folder.iterdir())
    assert left == [".lock", "config.yaml", "samples.jsonl", "state.json"], "no temporary file either"
