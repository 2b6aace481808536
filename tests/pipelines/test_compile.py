"""compile=true: the same texts and one graph for all prompts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from calling import composed, ran, read_record, read_samples, texts, tiny, tiny_task

from pipelines.config import COMPILERS
from pipelines.errors import UserError

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="torch.compile needs a C++ compiler on a CPU"
)


@pytest.fixture(scope="module")
def inductor(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the tests' own; it begins with a header that takes longer to compile than all graphs."""
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(autouse=True)
def compiler(inductor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(inductor))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@needs_compiler
@pytest.mark.parametrize(("batch_size", "sparsities"), [(1, "[0,0.5]"), (2, "[0.5]")])
def test_texts_are_those_without(batch_size: int, sparsities: str, tmp_path: Path) -> None:
    sizes = {"rows": 4, "tokens": 12}
    layer = "model.architecture.num_hidden_layers=1"
    options = [f"grid.sparsity={sparsities}", f"batch_size={batch_size}", "shared_experts=true", layer]
    both = ran(*tiny(tmp_path / "eager", *options, **sizes))
    for eager, compiled in zip(both, ran(*tiny(tmp_path / "compiled", *options, "compile=true", **sizes)), strict=True):
        assert eager.name != compiled.name, "rounding may differ, so it is another run"
        assert texts(compiled) == texts(eager)
        assert len({sample["prompt_tokens"] for sample in read_samples(compiled)}) > 1
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == len(both), "one for dense, one for pruned: prompts of any length share them"


@needs_compiler
def test_latency_is_that_of_the_compiled_model(tmp_path: Path) -> None:
    (folder,) = ran(*tiny_task("latency", tmp_path / "out", "compile=true", "model.architecture.num_hidden_layers=1"))
    assert read_record(folder)["metrics"]["decode_speedup"] > 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for dense, one for pruned"


def test_a_machine_without_a_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=r"compile=true: expected a C\+\+ compiler"):
        composed(*tiny(tmp_path / "out", "compile=true", "device=cpu")).settled()


@pytest.mark.parametrize(
    ("overrides", "compiled"),
    [
        ("", True),
        ("task=latency", True),
        ("verification=exact", True),
        ("statistic=joint compensation=ridge refresh=compensation", True),
        ("batch_size=4 shared_experts=true", True),
        ("batch_size=4", False),  # masked
        ("mode=masked", False),
        ("statistic=teal", False),
        ("offload_dense=true", False),
        ("task=fidelity", False),
        ("device=cpu", False),
        ("compile=false", False),
    ],
)
def test_auto_compiles_on_cuda_what_can_be_compiled(
    overrides: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gpu in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda gpu=gpu: gpu)
        assert composed("model=random_tiny", *overrides.split()).settled().compile is (compiled and gpu)
