"""One job: a configuration in, a record for each of its methods out.

What takes seconds to import is imported once the configuration is known to be good, so that a mistake is told at
once.
"""

from __future__ import annotations

import importlib
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from pipelines.config import ModelConfig, RunConfig, typed
from pipelines.errors import UserError
from pipelines.methods import Method, data_digests, identity, methods, pruner_options, run_config
from pipelines.records import Record, RunFolder, Sample, run_id
from pipelines.tracking import Media, Tracker, track

if TYPE_CHECKING:
    from pipelines.models import LoadedModel

Batches = Iterator[tuple[Method, list[Sample]]]

# The module of each kind of task. It has
#   read(config) -> items                                        from data alone, before a model is loaded
#   evaluate(loaded, items, config, methods, done) -> batches    (method, samples) as they come, without those done
#   metrics(samples) -> {name: number}                           over all samples of one method
# and may have versions(items) -> what else belongs into the record's environment,
# and media(folder, samples, config) -> Media, what there is to look at, drawn into the run folder.
KINDS = {
    "generation": "pipelines.generation",
    "classification": "pipelines.harness",
    "question_answering": "pipelines.harness",
    "perplexity": "pipelines.perplexity",
    "fidelity": "pipelines.fidelity",
    "latency": "pipelines.latency",
    "flocking": "pipelines.flocking",
}

# What the jobs of this process came to, for the summary at the end of the call.
finished: list[tuple[str, Record]] = []
failed: list[str] = []
running = False  # whether an exception comes from a job, and not from composing its configuration


def job(cfg: DictConfig) -> None:
    """Run one composed configuration. A user's mistake fails this job alone, in one line, and not the sweep."""
    global running
    running = True
    try:
        finished.extend(run(typed(cfg), HydraConfig.get().runtime.choices.get("experiment")))
    except UserError as error:
        failed.append(str(error))
        print(f"error: {error}", file=sys.stderr)
    running = False


def run(config: RunConfig, experiment: str | None) -> list[tuple[str, Record]]:
    """Evaluate every method of a configuration, skipping those that have a record.

    Returns:
        (method in words, record) of each method.

    Raises:
        UserError: bad data, a model that cannot be had, or an output folder that cannot be written.
    """
    kind = importlib.import_module(KINDS[config.task.kind])
    items = kind.read(config)
    from pipelines.models import device_kind

    device = device_kind(config.device)
    folders: dict[Method, RunFolder] = {}
    records: dict[Method, Record] = {}
    for method in methods(config):
        readable = "-".join([config.task.name, config.model.name, method.label.replace(" ", "-").replace("%", "")])
        folder = folders[method] = RunFolder(
            Path(config.output_dir), run_id(readable, identity(config, method, device))
        )
        record = folder.record()
        if record is not None:
            records[method] = record
            print(f"{folder.path}: finished before, skipped", file=sys.stderr)
    unfinished = {method: folder for method, folder in folders.items() if method not in records}
    if unfinished:
        records |= _evaluate(config, kind, items, unfinished, experiment)
    return [(method.label, records[method]) for method in folders]


def _evaluate(
    config: RunConfig, kind: ModuleType, items: Any, folders: dict[Method, RunFolder], experiment: str | None
) -> dict[Method, Record]:
    """Evaluate what is unfinished, and write each method's record when its last sample is there."""
    for method, folder in folders.items():
        folder.start(run_config(config, method))
    samples = {method: folder.samples() for method, folder in folders.items()}
    done = {method: {sample["index"] for sample in found} for method, found in samples.items()}
    began = time.perf_counter()
    seed = config.seed if config.model.source == "random" else 0  # of the weights: a sweep over seeds loads once
    loaded = _load(OmegaConf.to_yaml(OmegaConf.structured(config.model)), config.device, seed)
    load_seconds = time.perf_counter() - began

    records: dict[Method, Record] = {}
    trackers: dict[Method, Tracker] = {}
    what = f"{config.task.name} {config.model.name}"

    def finish(method: Method) -> None:
        # In the data's order, whatever the order of the batches: sums of floats depend on it.
        samples[method].sort(key=lambda sample: sample["index"])
        timing = {
            "load_seconds": load_seconds,
            "seconds": sum(sample.get("seconds", 0.0) for sample in samples[method]),
        }
        media = kind.media(folders[method].path, samples[method], config) if hasattr(kind, "media") else Media()
        versions = kind.versions(items) if hasattr(kind, "versions") else {}
        origin = {"data": data_digests(config), "command": _command()}
        records[method] = folders[method].finish(
            run_config(config, method), kind.metrics(samples[method]), timing, loaded.device, versions | origin
        )
        trackers[method].finish(records[method], samples[method], media)
        if not records[method]["metrics"]["samples"]:
            reason = samples[method][0]["skipped"] if samples[method] else "no data"
            tqdm.write(f"warning: {folders[method].path}: no sample, all prompts skipped ({reason})", file=sys.stderr)

    with ExitStack() as stack:
        for method, folder in folders.items():
            trackers[method] = stack.enter_context(
                track(
                    config.wandb,
                    folder.path,
                    folder.run_id,
                    name=f"{what} {method.label}",
                    group=config.wandb.group or experiment or f"{config.task.name}-{config.model.name}",
                    job_type=config.task.kind,
                    tags=config.tags,
                    config=run_config(config, method),
                )
            )
        bar = stack.enter_context(
            tqdm(
                total=len(items) * len(folders),
                initial=sum(map(len, done.values())),
                unit="sample",
                mininterval=0.1 if sys.stderr.isatty() else 15,  # seconds: a log file wants no film
            )
        )
        for method, batch in _told(kind.evaluate(loaded, items, config, list(folders), done), config, loaded):
            folders[method].append(batch)
            samples[method] += batch
            metrics = kind.metrics(samples[method])
            bar.update(len(batch))
            bar.set_description(f"{what} {method.label}")
            bar.set_postfix_str(_headline(metrics))
            trackers[method].log(len(samples[method]), metrics)
            if len(samples[method]) == len(items):
                finish(method)
        for method in folders:
            if method not in records:
                finish(method)
    return records


def _command() -> str:
    """The call of this job, as one would type it."""
    return shlex.join(["python", "-m", "pipelines.run", *HydraConfig.get().overrides.task])


def _told(batches: Batches, config: RunConfig, loaded: LoadedModel) -> Batches:
    """The batches as they come; where a method asks what the model cannot do, a line for the user that says so."""
    import griffin

    try:
        yield from batches
    except ValueError as error:
        for method in methods(config):
            if not method.dense:
                try:
                    griffin.prune(loaded.model, **pruner_options(config, method))
                except ValueError as reason:
                    raise UserError(f"model={config.model.name}: {reason}") from error
        raise


def _headline(metrics: dict[str, float]) -> str:
    """The first metric with a standard error, for the progress bar."""
    name = next((name.removesuffix("_stderr") for name in metrics if name.endswith("_stderr")), None)
    return f"{name}={metrics[name]:.4g}" if name else ""


@lru_cache(maxsize=1)
def _load(model_yaml: str, device: str, seed: int) -> LoadedModel:
    """The model, kept from one job of a sweep to the next that uses it too."""
    from pipelines.models import load

    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.create(model_yaml)))
    assert isinstance(config, ModelConfig)
    return load(config, device, seed)
