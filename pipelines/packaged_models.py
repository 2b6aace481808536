"""Models that come as GGUF files inside PyPI packages: converted once to safetensors, then loaded from a cache.

The cache is `$GRIFFIN_CACHE`, else `$XDG_CACHE_HOME/griffin`, else `~/.cache/griffin`. transformers can read GGUF
itself, but needs about ten times as long as for safetensors, on every load.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipelines.config import ModelConfig
from pipelines.errors import UserError


def cache_dir() -> Path:
    """Where converted models are kept."""
    own = os.environ.get("GRIFFIN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "griffin"


def converted(model: ModelConfig) -> Path:
    """The folder with the model's safetensors and tokenizer, converted first if it is not there.

    UserError where the package is not installed, or the cache cannot be written.
    """
    assert model.package is not None
    try:
        folder = cache_dir() / f"{model.name}-{version(model.package)}"
    except PackageNotFoundError:
        install = model.install or f"pip install {model.package}"
        raise UserError(f"model={model.name}: its PyPI package {model.package} is not installed: {install}") from None
    if not folder.is_dir():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            _convert(model, folder)
        except OSError as error:
            raise UserError(f"cannot convert model={model.name} into the cache {folder}: {error}") from error
    return folder


def _convert(model: ModelConfig, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"Converting {model.name} to safetensors, once (under a minute) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        gguf, target = Path(scratch) / "model.gguf", Path(scratch) / "converted"
        with gguf.open("wb") as whole:
            for part in model.gguf_parts:
                with _packaged_file(part).open("rb") as file:
                    shutil.copyfileobj(file, whole)
        AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name).save_pretrained(target)
        loaded = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype="float32")
        # The weights are plain by now; only these two say otherwise, and would refuse or mislead on loading.
        loaded.hf_quantizer = None
        if hasattr(loaded.config, "quantization_config"):
            del loaded.config.quantization_config
        loaded.save_pretrained(target)
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same result
                raise


def _packaged_file(part: str) -> Path:
    """A file inside an installed module, without importing (running) the module."""
    module, _, name = part.partition("/")
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"model.gguf_parts: {part}: no installed module {module!r}")
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        raise UserError(f"model.gguf_parts: {part}: no such file in the installed package")
    return path
