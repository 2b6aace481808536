"""Faults of the surroundings: a hub out of reach, a full disk. One line, no record, and a run that can go on."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import (
    Outcome,
    command,
    environment,
    process,
    read_record,
    read_samples,
    run_folder,
    texts,
    tiny,
)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model=random_tiny", "task=xsum"], ["task.hub.path=EdinburghNLP/xsum", "task.data_files=FILE"]),
        (["model=gemma_7b", "task=briefs"], ["model=gemma_7b", "google/gemma-7b", "https://huggingface.co/google/"]),
    ],
)
def test_a_hub_out_of_reach_is_told_within_seconds(overrides: list[str], named: list[str], tmp_path: Path) -> None:
    # The hub's clients left alone would retry for a minute, and print a traceback at its end.
    out, home = tmp_path / "out", tmp_path / "huggingface"
    start = time.monotonic()
    ended = process(
        command(*overrides, "limit=1", f"output_dir={out}", "wandb.mode=disabled"),
        cwd=tmp_path,
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(home),
    )
    assert time.monotonic() - start < 20
    assert ended.code == 1
    assert "Traceback" not in ended.err
    (error,) = ended.lines("error: ")
    assert [word for word in named if word not in error] == []
    assert len(ended.lines("warning: ")) == 1
    assert list(out.rglob("record.json")) == []
    assert list(out.rglob("samples.jsonl")) == []


def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
    call: Callable[..., Outcome], tmp_path: Path
) -> None:
    full = tiny(tmp_path / "full", rows=6, tokens=40)
    limit = 2000  # bytes: the configuration fits, six samples do not

    ended = subprocess.run(
        command(*full),
        cwd=tmp_path,
        env=environment(PYTHONDONTWRITEBYTECODE="1"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "output_dir" in error
    assert "samples.jsonl" in error
    folder = run_folder(tmp_path / "full")
    assert not (folder / "record.json").exists()
    assert (folder / "samples.jsonl").stat().st_size == limit, "the limit did not bite in the midst of a sample"

    assert call(*full).code == 0
    assert call(*tiny(tmp_path / "undisturbed", rows=6, tokens=40)).code == 0
    undisturbed = run_folder(tmp_path / "undisturbed")
    assert [sample["index"] for sample in read_samples(folder)] == list(range(6))
    assert texts(folder) == texts(undisturbed)
    assert read_record(folder)["metrics"] == read_record(undisturbed)["metrics"]


def test_no_room_for_the_record_leaves_none(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if Path(target).name == "record.json":
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    ended = call(*tiny(tmp_path / "out"))
    assert ended.code == 1
    assert "No space left on device" in ended.lines("error: ")[0]
    folder = run_folder(tmp_path / "out")
    left = sorted(path.name for path in folder.iterdir())
    assert left == [".lock", "config.yaml", "samples.jsonl", "state.json"], "no temporary file either"
