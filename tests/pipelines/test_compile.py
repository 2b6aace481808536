"""compile=true: the same texts and one graph for all prompts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calling import Outcome, read_record, read_samples, run_folder, texts, tiny

from pipelines.config import COMPILERS

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler on a CPU"
)


@pytest.fixture(autouse=True)
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@needs_compiler
@pytest.mark.parametrize("method", ["sparsity=0", "sparsity=0.5"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_texts_are_those_without(batch_size: int, method: str, call: Callable[..., Outcome], tmp_path: Path) -> None:
    sizes = {"rows": 4, "tokens": 12}
    options = [method, f"batch_size={batch_size}", "shared_experts=true"]
    assert call(*tiny(tmp_path / "eager", *options, **sizes)).code == 0
    assert call(*tiny(tmp_path / "compiled", *options, "compile=true", **sizes)).code == 0
    eager, compiled = run_folder(tmp_path / "eager"), run_folder(tmp_path / "compiled")
    assert eager.name != compiled.name, "rounding may differ, so it is another run"
    assert texts(compiled) == texts(eager)
    assert len({sample["prompt_tokens"] for sample in read_samples(compiled)}) > 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "prompts of any length share one graph"


@needs_compiler
def test_latency_is_that_of_the_compiled_model(call: Callable[..., Outcome], tmp_path: Path) -> None:
    plain = ["model=random_tiny", "task=latency", f"output_dir={tmp_path / 'out'}", "wandb.mode=disabled"]
    lengths = ["task.prompt_lengths=[8]", "task.generation_lengths=[3]", "task.repeats=2"]
    assert call(*plain, *lengths, "compile=true").code == 0
    assert read_record(run_folder(tmp_path / "out"))["metrics"]["decode_speedup"] > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for dense, one for pruned"


def test_a_machine_without_a_compiler_is_told(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    ended = call(*tiny(tmp_path / "out", "compile=true", "device=cpu"))
    assert ended.code == 1
    assert "compile=true: expected a C++ compiler" in ended.lines("error: ")[0]
