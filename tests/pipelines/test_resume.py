"""Runs that were cut off: finished ones are left alone, others go on and end as if nothing had happened."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from calling import (
    Outcome,
    command,
    environment,
    process,
    prompts_run,
    read_record,
    read_samples,
    run_folder,
    run_folders,
    texts,
    tiny,
)

from pipelines.tasks import generation


def assert_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    rows = [sample["index"] for sample in read_samples(undisturbed)]
    assert [sample["index"] for sample in read_samples(folder)] == rows == list(range(len(rows)))
    assert texts(folder) == texts(undisturbed)
    assert read_record(folder)["metrics"] == read_record(undisturbed)["metrics"]


def test_a_finished_run_is_left_alone(call: Callable[..., Outcome], tmp_path: Path) -> None:
    first = call(*tiny(tmp_path / "out"))
    folder = run_folder(tmp_path / "out")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}
    again = call(*tiny(tmp_path / "out"))
    assert again.code == 0
    assert [line for line in again.err.splitlines() if str(folder) in line and "skipped" in line]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()} == before
    assert again.out == first.out, "the table shows finished runs too"


def test_a_finished_run_loads_no_model(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(*tiny(tmp_path / "out"))
    monkeypatch.setattr("pipelines.evaluation.kept_model", lambda *_: pytest.fail("a model was loaded"))
    assert call(*tiny(tmp_path / "out")).code == 0


def cuts(content: bytes) -> dict[str, int]:
    """Where a process may die: byte positions in the samples of a run."""
    ends = [place for place, byte in enumerate(content, start=1) if byte == ord("\n")]
    inside = next(place for place in range(ends[0], ends[-1]) if content[place] & 0xC0 == 0x80)
    return {
        "before the first byte": 0,
        "within the first line": ends[0] // 2,
        "before the line break": ends[0] - 1,
        "after a whole line": ends[0],
        "within a character": inside,
        "within the last line": ends[-2] + 5,
        "after the last line": ends[-1],
    }


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["batch_size=2"],
        ["batch_size=2", "statistic=random", "selection=sample"],
        ["batch_size=2", "shared_experts=true"],  # a batch shares its experts, so its rest alone is another batch
    ],
)
def test_a_run_cut_off_at_any_byte_ends_as_undisturbed(
    overrides: list[str], call: Callable[..., Outcome], tmp_path: Path
) -> None:
    def arguments(name: str) -> list[str]:
        return tiny(tmp_path / name, *overrides, rows=5, tokens=24)

    assert call(*arguments("undisturbed")).code == 0
    undisturbed = run_folder(tmp_path / "undisturbed")
    for name, place in cuts((undisturbed / "samples.jsonl").read_bytes()).items():
        folder = tmp_path / name / undisturbed.name
        shutil.copytree(undisturbed, folder)
        (folder / "record.json").unlink()
        with (folder / "samples.jsonl").open("r+b") as file:
            file.truncate(place)
        assert call(*arguments(name)).code == 0, name
        assert_as_undisturbed(folder, undisturbed)


def test_samples_that_are_there_are_not_run_again(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(*tiny(tmp_path / "out"))
    folder = run_folder(tmp_path / "out")
    (folder / "record.json").unlink()
    kept = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)[:2]
    (folder / "samples.jsonl").write_bytes(b"".join(kept))
    prompts = prompts_run(monkeypatch)
    call(*tiny(tmp_path / "out"))
    assert prompts == [1]
    assert (folder / "samples.jsonl").read_bytes().startswith(b"".join(kept))


def test_a_gap_in_the_samples_is_filled(call: Callable[..., Outcome], tmp_path: Path) -> None:
    call(*tiny(tmp_path / "out", rows=5))
    call(*tiny(tmp_path / "undisturbed", rows=5))
    folder = run_folder(tmp_path / "out")
    (folder / "record.json").unlink()
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[:1] + lines[3:]))
    call(*tiny(tmp_path / "out", rows=5))
    assert sorted(sample["index"] for sample in read_samples(folder)) == [0, 1, 2, 3, 4]
    assert texts(folder) == texts(run_folder(tmp_path / "undisturbed"))
    assert read_record(folder)["metrics"] == read_record(run_folder(tmp_path / "undisturbed"))["metrics"]


def wait_for(happened: Callable[[], bool], running: subprocess.Popen[bytes], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert running.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def test_a_killed_process_leaves_what_the_next_continues(call: Callable[..., Outcome], tmp_path: Path) -> None:
    sizes = {"rows": 4, "tokens": 200}
    running = subprocess.Popen(
        command(*tiny(tmp_path / "killed", **sizes)),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("killed/*/samples.jsonl")), running)
    finally:
        running.kill()
    assert running.wait() == -signal.SIGKILL
    folder = run_folder(tmp_path / "killed")
    assert not (folder / "record.json").exists()

    assert call(*tiny(tmp_path / "killed", **sizes)).code == 0
    assert call(*tiny(tmp_path / "undisturbed", **sizes)).code == 0
    assert_as_undisturbed(folder, run_folder(tmp_path / "undisturbed"))


def test_an_interrupted_run_says_how_to_go_on(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = generation.evaluate

    def interrupted(*arguments: Any) -> Iterator[Any]:
        yield next(evaluate(*arguments))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generation, "evaluate", interrupted)
        ended = call(*tiny(tmp_path / "out"))
    assert ended.code != 0
    assert "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("interrupted; the same command continues")
    assert len(read_samples(run_folder(tmp_path / "out"))) == 1

    assert call(*tiny(tmp_path / "out")).code == 0
    assert call(*tiny(tmp_path / "undisturbed")).code == 0
    assert_as_undisturbed(run_folder(tmp_path / "out"), run_folder(tmp_path / "undisturbed"))


def test_a_sweep_makes_one_record_per_point(call: Callable[..., Outcome], tmp_path: Path) -> None:
    swept = call("-m", *tiny(tmp_path / "out", "sparsity=0,0.5"))
    assert swept.code == 0
    records = [read_record(folder) for folder in run_folders(tmp_path / "out")]
    assert sorted(record["config"]["sparsity"] for record in records) == [0, 0.5]
    assert "dense" in swept.out
    assert "griffin 50%" in swept.out


@pytest.mark.parametrize("points", ["1,0,0.5", "0,1,0.5", "0,0.5,1"])
def test_a_failing_point_does_not_stop_a_sweep(points: str, call: Callable[..., Outcome], tmp_path: Path) -> None:
    swept = call("-m", *tiny(tmp_path / "out", f"sparsity={points}"))
    assert swept.code == 1
    assert len(swept.lines("error: sparsity=1")) == len(swept.lines("error: ")) == 1
    assert len(list((tmp_path / "out").rglob("record.json"))) == 2


def test_nothing_is_written_outside_the_output_folder(tmp_path: Path) -> None:
    # Hydra would make outputs/<date>/<time> in the current folder, and multirun.yaml beside it.
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    ended = process(command("-m", *tiny(tmp_path / "out", "sparsity=0,0.5")), cwd=cwd)
    assert ended.code == 0
    assert list(cwd.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["articles.jsonl", "cwd", "out"]
    assert len(run_folders(tmp_path / "out")) == 2


def test_a_single_run_leaves_its_run_folder_only(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    assert call(*tiny(tmp_path / "out")).code == 0
    assert list(cwd.iterdir()) == []
    assert list((tmp_path / "out").iterdir()) == [run_folder(tmp_path / "out")]
    files = sorted(path.name for path in run_folder(tmp_path / "out").iterdir())
    assert files == ["config.yaml", "record.json", "samples.jsonl"]
