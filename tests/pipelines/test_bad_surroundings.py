"""Faults of the surroundings: a hub out of reach, no room for a record. One line each, and a run that can go on."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from calling import Outcome, command, process, run_folder, tiny


def test_a_hub_out_of_reach_is_told_within_seconds(tmp_path: Path) -> None:
    # The hub's clients left alone would retry for a minute, and print a traceback at its end.
    out, home = tmp_path / "out", tmp_path / "huggingface"
    sweep = ["model=random_tiny,gemma_7b", "task=briefs,xsum", "limit=1", "task.max_new_tokens=2"]
    sweep += [f"output_dir={out}", "wandb.mode=disabled"]
    start = time.monotonic()
    ended = process(command("-m", *sweep), cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(home))
    assert time.monotonic() - start < 60
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert len(ended.lines("warning: ")) == 1
    errors = ended.lines("error: ")
    data = [line for line in errors if "task.hub.path=EdinburghNLP/xsum" in line and "task.data_files=FILE" in line]
    (model,) = [line for line in errors if "model=gemma_7b" in line]
    assert "google/gemma-7b" in model
    assert "https://huggingface.co/google/" in model
    assert (len(errors), len(data)) == (3, 2)
    assert len(list(out.rglob("record.json"))) == len(list(out.rglob("samples.jsonl"))) == 1, "what needs no hub"


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
