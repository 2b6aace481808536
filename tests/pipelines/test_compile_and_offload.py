"""compile=true and offload_dense=true: the same texts by one graph for all prompts, or from weights in host memory."""

import shutil
from pathlib import Path

import pytest
import torch
from calling import Entry, composed, ran, read_record, read_samples, run_folders, texts, timeless, tiny

import griffin
from griffin.offloading import Offloaded
from pipelines.config import COMPILERS
from pipelines.errors import UserError
from pipelines.methods import identity
from pipelines.models import load

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
    (folder,) = ran(*tiny(tmp_path / "out", "compile=true", "model.architecture.num_hidden_layers=1", task="latency"))
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


@pytest.fixture
def brought(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the layer of every block that runs offloaded."""
    layers: list[int] = []
    bring = Offloaded.bring

    def noted(offloaded: Offloaded, layer: int) -> None:
        layers.append(layer)
        bring(offloaded, layer)

    monkeypatch.setattr(Offloaded, "bring", noted)
    return layers


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("generation", "grid.sparsity=[0,0.5]"),
        ("generation", "statistic=joint compensation=ridge budget=late"),
        ("briefs_qa", "limit=2"),
    ],
)
def test_samples_and_run_ids_are_the_same(task: str, more: str, tmp_path: Path, brought: list[int]) -> None:
    plain = ran(*tiny(tmp_path / "plain", *more.split(), task=task, tokens=16))
    assert not brought
    offloaded = ran(*tiny(tmp_path / "offloaded", *more.split(), "offload_dense=true", task=task, tokens=16))
    assert {*brought} == {0, 1, 2}
    assert [folder.name for folder in offloaded] == [folder.name for folder in plain]
    for one, other in zip(plain, offloaded, strict=True):
        assert timeless(other)[1] == timeless(one)[1]
        assert read_record(other)["metrics"] == read_record(one)["metrics"]
        assert [read_record(folder)["config"]["offload_dense"] for folder in (one, other)] == [False, True]


def test_points_of_a_sweep_that_share_a_model_find_it_as_it_was(
    call: Entry, tmp_path: Path, brought: list[int]
) -> None:
    sweep = ["sparsity=0.25,0.5", "task.max_new_tokens=7,8"]
    assert call("-m", *tiny(tmp_path / "plain", *sweep)).code == 0
    assert call("-m", *tiny(tmp_path / "offloaded", *sweep, "offload_dense=true")).code == 0
    assert brought
    pairs = zip(run_folders(tmp_path / "plain"), run_folders(tmp_path / "offloaded"), strict=True)
    assert [texts(one) for one, _ in pairs] == [texts(folder) for folder in run_folders(tmp_path / "offloaded")]


def test_latency_is_a_run_of_its_own(tmp_path: Path, brought: list[int]) -> None:
    ran(*tiny(tmp_path / "out", task="latency"))
    assert not brought
    ran(*tiny(tmp_path / "out", "offload_dense=true", task="latency"))
    assert brought
    assert len(run_folders(tmp_path / "out")) == 2
    for folder in run_folders(tmp_path / "out"):  # peaks are of the process, and dense comes first
        found = read_record(folder)["metrics"]
        assert found["peak_memory_bytes"] >= found["dense_peak_memory_bytes"] > 0
    config = composed("model=random_tiny", "task=latency")
    assert "offload_dense" not in identity(config, config.methods()[0], "cpu"), "as before there was the key"


def test_a_model_is_loaded_without_its_dense_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The packaged model, as one from the hub is: never whole on the device.
    moved = []
    move = griffin.move_without_dense

    def noted(model: torch.nn.Module, device: str) -> None:
        moved.append(({weight.device.type for weight in model.parameters()}, device))
        move(model, device)

    monkeypatch.setattr(griffin, "move_without_dense", noted)
    load(composed(*tiny(tmp_path / "out")).model, "cpu", 0)
    assert moved == []
    load(composed(*tiny(tmp_path / "out")).model, "cpu", 0, offload_dense=True)
    assert moved == [({"cpu"}, "cpu")]
