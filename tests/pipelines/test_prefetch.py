"""What runs need from the network, fetched beforehand; here there is none, which is told in a line for each thing."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from calling import process, tiny, unchecked

from pipelines import prefetch
from pipelines.config import ModelConfig


def test_what_cannot_be_had_is_told_and_the_rest_is_fetched(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = process(
        [
            *(sys.executable, "-m", "pipelines.prefetch", "-m", "model=random_tiny,gemma_7b", "task=briefs,xsum"),
            *(f"output_dir={tmp_path / 'out'}", "launcher=slurm_gpu", "hydra.launcher.partition=gpu"),  # as for the run
        ],
        tmp_path,
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HOME=str(tmp_path / "huggingface"),
    )
    assert time.monotonic() - start < 60
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert len(ended.lines("warning: http://127.0.0.1:9 cannot be reached")) == 1
    errors = ended.lines("error: ")
    assert len([error for error in errors if "task.hub.path=EdinburghNLP/xsum" in error]) == 2
    gated = [error for error in errors if error.startswith("error: model=gemma_7b: cannot fetch google/gemma-7b")]
    assert len(gated) == 2
    assert "https://huggingface.co/google/gemma-7b" in gated[0]
    assert len(errors) == 4
    assert ended.out.count("model=random_tiny: random weights, nothing to fetch") == 2
    assert ended.out.count("task=briefs: data at hand") == 2
    assert not (tmp_path / "out").exists()


def test_only_what_is_loaded_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return "/cache"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("pipelines.hub.prepare_hub", lambda: None)
    assert prefetch._model(ModelConfig(name="mine", source="hub", repo="owner/name", revision="v1")) == "/cache"
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v1")
    assert {"*.bin", "*.pth", "*.gguf"} <= set(asked["ignore_patterns"])  # type: ignore[call-overload]


def test_the_assistant_is_fetched_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    models = [f"model.repo={tmp_path / 'large'}", "assistance=model", f"assistant={tmp_path / 'small'}"]
    prefetch.fetch(unchecked(*tiny(tmp_path / "out", "model=llama3_8b"), "sparsity=0", *models))
    told = capsys.readouterr().out
    assert f"model=llama3_8b: {tmp_path / 'large'}, a folder" in told
    assert f"assistant={tmp_path / 'small'}: {tmp_path / 'small'}, a folder" in told


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prefetch", *tiny(tmp_path / "out", "model=foo")])
    with pytest.raises(SystemExit, match=r"^error: .*model=foo") as ended:
        prefetch.main()
    assert "\n" not in str(ended.value.code)
    assert not (tmp_path / "out").exists()
