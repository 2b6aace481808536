"""One job: a configuration in, a record for each of its methods out, and what became of them.

What takes seconds to import is imported once the configuration is known to be good, so that a mistake is told at
once.
"""

from __future__ import annotations

import importlib
import shlex
import sys
import time
import traceback
from contextlib import ExitStack, closing, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

import griffin
from pipelines.batch_size import batch_size, evaluated
from pipelines.config import ModelConfig, RunConfig, typed
from pipelines.errors import UserError, out_of_memory
from pipelines.methods import Method, data_digests, described, evaluation, identity, methods, pruner_options, run_config
from pipelines.outcomes import FAILED, FINISHED, HELD, SKIPPED, Outcome, held_folders, merged, wait_for
from pipelines.points import Point
from pipelines.records import Record, RunFolder, run_id
from pipelines.tracking import Media, Tracker, track

if TYPE_CHECKING:
    from pipelines.models import LoadedModel

# The module of each kind of task. It has
#   read(config) -> items                                        from data alone, before a model is loaded
#   evaluate(loaded, items, config, methods, done) -> batches    (method, samples) as they come, without those done
#   metrics(samples) -> {name: number}                           over all samples of one method
# and may have versions(items) -> what else belongs into the record's environment,
# and media(folder, samples, config) -> Media, what there is to look at, drawn into the run folder.
KINDS = {
    "generation": "pipelines.generation",
    "classification": "pipelines.harness_evaluation",
    "question_answering": "pipelines.harness_evaluation",
    "perplexity": "pipelines.perplexity",
    "fidelity": "pipelines.fidelity",
    "latency": "pipelines.latency",
    "flocking": "pipelines.flocking",
}

# What became of the runs of each point of this call, for the summary at its end: a sweep or a single job puts it here.
outcomes: list[list[Outcome]] = []


def job(cfg: DictConfig) -> list[Outcome]:
    """Run one composed configuration. Whatever goes wrong fails this job alone, in one line, and not the sweep.

    A single call waits for runs that another process holds; of a sweep's job they are the sweep's business.
    """
    hydra = HydraConfig.get()
    single = hydra.mode == RunMode.RUN
    try:
        config = typed(cfg)
    except UserError as error:
        found = [Outcome(" ".join(hydra.overrides.task), "", FAILED, reason=_told(error))]
    else:
        experiment = hydra.runtime.choices.get("experiment")
        found = attempt(config, experiment)
        while single and (held := held_folders(found)):
            wait_for(held)
            found = merged(found, attempt(config, experiment))
    if single:
        outcomes.append(found)
    return found


def attempt(config: RunConfig, experiment: str | None) -> list[Outcome]:
    """Evaluate every method of a configuration, and say what became of each."""
    try:
        return run(config, experiment)
    except Exception as error:
        reason = _told(error)
    words = f"{config.task.name} {config.model.name}"
    with suppress(UserError):
        Point(config).fail(reason)
    return [Outcome(words, method.label, FAILED, reason=reason) for method in methods(config)]


def run(config: RunConfig, experiment: str | None) -> list[Outcome]:
    """Evaluate every method of a configuration, skipping those that have a record or that another process holds.

    Raises:
        UserError: bad data, or an output folder that cannot be written. What goes wrong later is in the outcomes.
    """
    kind = importlib.import_module(KINDS[config.task.kind])
    items = kind.read(config)
    from pipelines.models import device_kind

    device = device_kind(config.device)
    words = f"{config.task.name} {config.model.name}"
    folders: dict[Method, RunFolder] = {}
    for method in methods(config):
        readable = "-".join([config.task.name, config.model.name, method.label.replace(" ", "-").replace("%", "")])
        folders[method] = RunFolder(Path(config.output_dir), run_id(readable, identity(config, method, device)))
    Point(config).began([folder.run_id for folder in folders.values()])

    states: dict[Method, str] = {}
    reason = None
    with ExitStack() as claims:
        for method, folder in folders.items():
            claims.callback(folder.release)
            if folder.record() is None and not folder.claim():
                states[method] = HELD
            elif folder.record() is not None:  # perhaps since a moment ago
                states[method] = SKIPPED
                print(f"{folder.path}: finished before, skipped", file=sys.stderr)
        unfinished = {method: folder for method, folder in folders.items() if method not in states}
        if unfinished:
            try:
                _evaluate(config, kind, items, unfinished, experiment)
            except Exception as error:
                reason = _told(error)
        for method, folder in unfinished.items():
            states[method] = FINISHED if folder.record() else FAILED
            if states[method] == FAILED:
                folder.fail(reason or "ended without a record")
    return [
        Outcome(words, method.label, states[method], folder.path, reason if states[method] == FAILED else None)
        for method, folder in folders.items()
    ]


def _told(error: Exception) -> str:
    """Tell the user what went wrong, and return it as one line. Only a fault of our own gets a traceback."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    if isinstance(error, UserError):
        reason = str(error)
    elif out_of_memory(error):
        reason = f"out of memory ({first}); use a smaller batch_size or model, or a larger device"
        _load.cache_clear()
    else:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {first}"
    tqdm.write(f"error: {reason}", file=sys.stderr)
    return reason


def _evaluate(
    config: RunConfig, kind: ModuleType, items: Any, folders: dict[Method, RunFolder], experiment: str | None
) -> None:
    """Evaluate what is unfinished, and write each method's record when its last sample is there."""
    for method, folder in folders.items():
        folder.start(run_config(config, method), len(items))
    samples = {method: folder.samples() for method, folder in folders.items()}
    done = {method: {sample["index"] for sample in found} for method, found in samples.items()}
    began = time.perf_counter()
    seed = config.seed if config.model.source == "random" else 0  # of the weights: a sweep over seeds loads once
    offloaded = config.offload_dense and config.task.kind != "latency"  # which times dense on the device
    loaded = _load(OmegaConf.to_yaml(OmegaConf.structured(config.model)), config.device, seed, offloaded)
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
        origin = {"data": data_digests(config), "command": _command()} | batch_size(samples[method])
        records[method] = folders[method].finish(
            run_config(config, method),
            kind.metrics(samples[method]),
            timing,
            loaded.device,
            versions | origin,
            method=described(config, method),
            evaluation=evaluation(config, method, loaded.device),
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
        refusals = {method: refusal for method in folders if (refusal := _refusal(loaded, config, method))}
        possible = [method for method in folders if method not in refusals]
        stack.enter_context(griffin.Offload(loaded.model) if offloaded else nullcontext())
        # Closed whatever happens here: the model may be pruned in between.
        batches = stack.enter_context(closing(evaluated(kind, loaded, items, config, possible, done)))
        for method, batch in batches if possible else ():
            folders[method].append(batch)
            samples[method] += batch
            metrics = kind.metrics(samples[method])
            bar.update(len(batch))
            # Shown when the bar is next drawn: a log file gets a line now and then.
            bar.set_description(f"{what} {method.label}", refresh=False)
            bar.set_postfix_str(_headline(metrics), refresh=False)
            trackers[method].log(len(samples[method]), metrics)
            if len(samples[method]) == len(items):
                finish(method)
        for method in possible:
            if method not in records:
                finish(method)
        for refusal in refusals.values():
            raise UserError(f"model={config.model.name}: {refusal}")  # the first: of one model they are alike


def _command() -> str:
    """The call of this job, as one would type it."""
    return shlex.join(["python", "-m", "pipelines.run", *HydraConfig.get().overrides.task])


def _refusal(loaded: LoadedModel, config: RunConfig, method: Method) -> str | None:
    """Why the model cannot be pruned by this method; None if it can."""
    if not method.dense:
        try:
            griffin.prune(loaded.model, **pruner_options(config, method))
        except ValueError as reason:
            return str(reason)
    return None


def _headline(metrics: dict[str, float]) -> str:
    """The first metric with a standard error, for the progress bar."""
    name = next((name.removesuffix("_stderr") for name in metrics if name.endswith("_stderr")), None)
    return f"{name}={metrics[name]:.4g}" if name else ""


@lru_cache(maxsize=1)
def _load(model_yaml: str, device: str, seed: int, offload_dense: bool) -> LoadedModel:
    """The model, kept from one job of a sweep to the next that uses it too."""
    from pipelines.models import load

    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.create(model_yaml)))
    assert isinstance(config, ModelConfig)
    return load(config, device, seed, offload_dense)
