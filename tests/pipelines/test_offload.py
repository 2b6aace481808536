"""offload_dense=true: the same runs with the same texts, from weights in host memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calling import Outcome, composed, ran, read_record, read_samples, run_folders, texts, tiny, tiny_task

import griffin
from griffin.offloading import Offloaded
from pipelines.methods import identity
from pipelines.models import load


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


@pytest.mark.parametrize("more", [["grid.sparsity=[0,0.5]"], ["statistic=joint", "compensation=ridge", "budget=late"]])
def test_texts_and_run_ids_are_the_same(more: list[str], tmp_path: Path, brought: list[int]) -> None:
    plain = ran(*tiny(tmp_path / "plain", *more, tokens=16))
    assert not brought
    offloaded = ran(*tiny(tmp_path / "offloaded", *more, "offload_dense=true", tokens=16))
    assert {*brought} == {0, 1, 2}
    assert [folder.name for folder in offloaded] == [folder.name for folder in plain]
    for one, other in zip(plain, offloaded, strict=True):
        assert texts(other) == texts(one)
        assert read_record(other)["metrics"] == read_record(one)["metrics"]
        assert [read_record(folder)["config"]["offload_dense"] for folder in (one, other)] == [False, True]


def test_question_answering_too(tmp_path: Path, brought: list[int]) -> None:
    answers = []
    for offload in ("false", "true"):
        (folder,) = ran(*tiny_task("briefs_qa", tmp_path / offload, "limit=2", f"offload_dense={offload}"))
        assert bool(brought) == (offload == "true")
        answers.append([sample["answers"] for sample in read_samples(folder)])
    assert answers[0] == answers[1]


def test_points_of_a_sweep_that_share_a_model_find_it_as_it_was(
    call: Callable[..., Outcome], tmp_path: Path, brought: list[int]
) -> None:
    sweep = ["sparsity=0.25,0.5", "task.max_new_tokens=7,8"]
    assert call("-m", *tiny(tmp_path / "plain", *sweep)).code == 0
    assert call("-m", *tiny(tmp_path / "offloaded", *sweep, "offload_dense=true")).code == 0
    assert brought
    pairs = zip(run_folders(tmp_path / "plain"), run_folders(tmp_path / "offloaded"), strict=True)
    assert [texts(one) for one, _ in pairs] == [texts(folder) for folder in run_folders(tmp_path / "offloaded")]


def test_latency_is_a_run_of_its_own(tmp_path: Path, brought: list[int]) -> None:
    ran(*tiny_task("latency", tmp_path / "out"))
    assert not brought
    ran(*tiny_task("latency", tmp_path / "out", "offload_dense=true"))
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


def test_a_model_that_cannot_be_offloaded_is_told_in_one_line(
    call: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise griffin.UnsupportedModelError("'a' and 'b' share one memory")

    options = ["model.architecture.model_type=mixtral", "+model.architecture.num_local_experts=2", "offload_dense=true"]
    for overrides in (options, [*options[2:], "sparsity=0"]):
        call(*tiny(tmp_path / "out", *overrides)).refused("error: model=random_tiny: ")
        monkeypatch.setattr(griffin, "move_without_dense", refuse)
