"""The evaluation of one configuration's unfinished runs: the model, the samples as they come, the records."""

from __future__ import annotations

import gc
import sys
import time
from contextlib import ExitStack, closing, nullcontext
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from griffin.offloading import dense_in_host_memory
from pipelines.batch_size import batch_size, evaluated
from pipelines.composition import Call
from pipelines.config import RunConfig
from pipelines.data import data_revision
from pipelines.errors import UserError
from pipelines.methods import Method, data_digests, described, engine_for, evaluation, label, run_config
from pipelines.model_config import ModelConfig
from pipelines.records import Record, code_versions
from pipelines.run_folder import RunFolder
from pipelines.tasks import drafting
from pipelines.tracking import Media, Tracker, track

if TYPE_CHECKING:
    from pipelines.models import LoadedModel


def evaluate(
    config: RunConfig,
    kind: ModuleType,
    items: Any,
    folders: dict[Method, RunFolder],
    of_call: dict[Method, RunFolder],
    call: Call,
) -> None:
    """Evaluate what is unfinished, and write each method's record when its last sample is there.

    Args:
        config: of the call.
        kind: the module of the task's kind.
        items: what it read.
        folders: of the methods that are unfinished.
        of_call: of all methods of the call. Above `batch_size=1` the numbers of a row depend on the rows beside it, by
            rounding; so methods that have finished since a run began run beside it again.
        call: for the records.
    """
    for method, folder in folders.items():
        folder.start(run_config(config, method), len(items), [other.run_id for other in folders.values()])
    beside = {run_id for folder in folders.values() for run_id in folder.state()["beside"]}
    together = [method for method, folder in of_call.items() if method in folders or folder.run_id in beside]
    samples = {method: folder.samples() for method, folder in folders.items()}
    done = {method: {sample["index"] for sample in found} for method, found in samples.items()}
    done |= {method: {item.index for item in items} for method in together if method not in folders}
    began = time.perf_counter()
    seed = config.seed if config.model.source == "random" else 0  # of the weights: a sweep over seeds loads once
    offloaded = config.offload_dense and config.task.kind != "latency"  # which times dense on the device
    by_onednn = config.cpu_onednn and not config.compile and config.task.kind != "latency"  # which times both ways
    loaded = kept_model(config.model, config.device, seed, offloaded, by_onednn)
    load_seconds = time.perf_counter() - began
    versions = kind.versions(items) if hasattr(kind, "versions") else {}
    revisions = {"model_revision": loaded.revision, "data_revision": data_revision(config.task)}
    versions |= {key: commit for key, commit in revisions.items() if commit}
    for folder in folders.values():
        folder.write_by(code_versions() | versions)

    records: dict[Method, Record] = {}
    trackers: dict[Method, Tracker] = {}
    what = f"{config.task.name} {config.model.name}"

    def finish(method: Method) -> None:
        # In the data's order, whatever the order of the batches: sums of floats depend on it.
        samples[method].sort(key=lambda sample: sample["index"])
        timing = {
            "load_seconds": load_seconds,
            "duration_seconds": time.perf_counter() - began,
            "seconds": sum(sample.get("seconds", 0.0) for sample in samples[method]),
            **drafting.timing(samples[method]),
        }
        media = kind.media(folders[method].path, samples[method], config) if hasattr(kind, "media") else Media()
        origin = {"data": data_digests(config), "command": call.command} | batch_size(samples[method])
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
            tqdm.write(
                f"warning: {folders[method].path}: finished, but every prompt was skipped ({reason}, which is what the "
                "context leaves beside task.max_new_tokens)",
                file=sys.stderr,
            )

    with ExitStack() as stack:
        for method, folder in folders.items():
            trackers[method] = stack.enter_context(
                track(
                    config.wandb,
                    folder.path,
                    folder.run_id,
                    name=f"{what} {label(config, method)}",
                    group=config.wandb.group or call.experiment or f"{config.task.name}-{config.model.name}",
                    job_type=config.task.kind,
                    tags=config.tags,
                    config=run_config(config, method),
                )
            )
        bar = stack.enter_context(
            tqdm(
                total=len(items) * len(folders),
                initial=sum(map(len, samples.values())),
                unit="sample",
                mininterval=0.1 if sys.stderr.isatty() else 15,  # seconds: a log file wants no film
            )
        )
        refusals = {method: refusal for method in together if (refusal := _refusal(loaded, config, method))}
        possible = [method for method in together if method not in refusals]
        stack.enter_context(dense_in_host_memory(loaded.model) if offloaded else nullcontext())
        batches = stack.enter_context(closing(evaluated(kind, loaded, items, config, possible, done)))
        due = dict.fromkeys(folders, 0.0)
        for method, batch in batches if possible else ():
            folders[method].append(batch)
            samples[method] += batch
            bar.update(len(batch))
            count = len(samples[method])
            if count >= due[method] or count == len(items):
                due[method] = 1.01 * count  # metrics are over all samples: at each new one they would take longer
                metrics = kind.metrics(samples[method])
                # Shown when the bar is next drawn: a log file gets a line now and then.
                bar.set_description(f"{what} {label(config, method)}", refresh=False)
                bar.set_postfix_str(_headline(metrics), refresh=False)
                trackers[method].log(count, metrics)
            if count == len(items):
                finish(method)
        for method in possible:
            if method in folders and method not in records:
                finish(method)
        for refusal in refusals.values():
            several = "; for several sparsities: grid.sparsity=[...], or -m" if "sparsity has" in refusal else ""
            raise UserError(f"model={config.model.name}: {refusal}{several}")  # the first: of one model they are alike


def _refusal(loaded: LoadedModel, config: RunConfig, method: Method) -> str | None:
    """Why the model cannot be pruned by this method; None if it can."""
    try:
        method.kept(engine_for(loaded.model, [method], config).widths)
    except ValueError as reason:
        return str(reason)
    return None


def _headline(metrics: dict[str, float]) -> str:
    """The first metric with a standard error, for the progress bar."""
    name = next((name.removesuffix("_stderr") for name in metrics if name.endswith("_stderr")), None)
    return f"{name}={metrics[name]:.4g}" if name else ""


_kept: dict[tuple[Any, ...], LoadedModel] = {}


def kept_model(model: ModelConfig, device: str, seed: int, offload_dense: bool, onednn: bool) -> LoadedModel:
    """The model, kept from one job of a sweep to the next that uses it too; another one goes before it is loaded."""
    from pipelines.models import load

    key = (repr(model), device, seed, offload_dense, onednn)
    if key not in _kept:
        forget_model()
        _kept[key] = load(model, device, seed, offload_dense=offload_dense, onednn=onednn)
    return _kept[key]


def forget_model() -> None:
    """Free the memory of the model that is kept."""
    _kept.clear()
    gc.collect()  # a model's views and its modules may refer to each other
    torch.cuda.empty_cache()
