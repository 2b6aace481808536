"""`python -m pipelines.prefetch model=... task=...`: what a run needs from the network, fetched into the caches.

For a login node, before runs on compute nodes that have no network. Takes what `pipelines.run` takes, `-m` and
`experiment=` too, and runs nothing.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from pipelines import tasks
from pipelines.composition import compose_and_call
from pipelines.config import ModelConfig
from pipelines.config_keys import typed
from pipelines.errors import UserError, first_line
from pipelines.hub import NEVER_LOADED, prepare_hub

failed: list[str] = []


def main() -> None:
    """Fetch, and say where to. Exit code 1 if something cannot be had."""
    with tempfile.TemporaryDirectory() as nothing_of_ours:
        # Hydra's own sweep, here and in a folder of its own: no point is planned, and output_dir stays as it is.
        sys.argv = [one for one in sys.argv if not one.lstrip("+").startswith(("launcher=", "hydra.launcher."))]
        sys.argv += [f"hydra.{key}.dir={nothing_of_ours}" for key in ("run", "sweep")]
        sys.argv += ["hydra/sweeper=basic", "hydra/launcher=basic"]
        compose_and_call(fetch)
    if failed:
        sys.exit(1)


def fetch(cfg: DictConfig) -> None:
    """Fetch the model and the data of one composed configuration; what cannot be had is told, and the next tried."""
    try:
        config = typed(cfg)
    except UserError as error:
        _tell(error)
        return
    wanted = {f"model={config.model.name}": lambda: _model(config.model)}
    if config.assistant:
        wanted[f"assistant={config.assistant}"] = lambda: _model(replace(config.model, repo=config.assistant))
    kind = config.task.kind
    wanted[f"task={config.task.name}"] = lambda: f"data at hand, {len(tasks.module_of(kind).read(config))} items"
    for what, get in wanted.items():
        try:
            print(f"{what}: {get()}", flush=True)
        except UserError as error:
            _tell(error)


def _tell(error: UserError) -> None:
    failed.append(str(error))
    print(f"error: {error}", file=sys.stderr)


def _model(model: ModelConfig) -> str:
    if model.source == "random":
        return "random weights, nothing to fetch"
    if model.source == "package":
        from pipelines.packaged_models import converted

        return str(converted(model))
    assert model.repo is not None
    if Path(model.repo).is_dir():
        return f"{model.repo}, a folder"
    from huggingface_hub import snapshot_download

    prepare_hub()
    try:
        return str(snapshot_download(model.repo, revision=model.revision, ignore_patterns=list(NEVER_LOADED)))
    except Exception as error:  # the hub's failures have no common type
        gate = f" (a gated model: accept its licence at {model.licence_gate})" if model.licence_gate else ""
        reason = first_line(error).rstrip(".")
        raise UserError(f"model={model.name}: cannot fetch {model.repo}: {reason}{gate}") from error


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    main()
