"""The evaluation of one configuration's unfinished runs: the model, the samples as they come, the records.

With `batch_size=auto` as many rows run at once as the device's memory holds. Results do not depend on it: every row has
its own experts. So it begins with many, and whenever memory runs out what is missing is run with half as many; batches
hold rows of like length, the longest first, so that this happens early.
"""

from __future__ import annotations

import gc
import sys
import time
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from griffin.offloading import dense_in_host_memory
from pipelines.composition import Call
from pipelines.config import ModelConfig, RunConfig
from pipelines.data import data_revision
from pipelines.errors import UserError, out_of_memory
from pipelines.methods import Method, data_digests, described, engine_for, evaluation, label, run_config
from pipelines.records import Record, code_versions
from pipelines.run_folder import RunFolder
from pipelines.tasks.answers import learning_overhead
from pipelines.tasks.prompts import Batches, Evaluation
from pipelines.tracking import Media, Tracker, track

if TYPE_CHECKING:
    from pipelines.models import LoadedModel

# What `batch_size=auto` begins with. A CPU has cores for few rows, and rarely tells in time that its memory is short.
ROWS_GPU = 64
ROWS_CPU = 8


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
        kind: the module of the task's kind, which read the items.
        folders: of the methods that are unfinished.
        of_call: of all methods of the call. Above `batch_size=1` the numbers of a row depend on the rows beside it, by
            rounding; so methods that have finished since a run began run beside it again.
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
        found = sorted(samples[method], key=lambda sample: sample["index"])
        timing = {
            "load_seconds": load_seconds,
            "duration_seconds": time.perf_counter() - began,
            "seconds": sum(sample.get("seconds", 0.0) for sample in found),
            **learning_overhead(found),
        }
        media = kind.media(folders[method].path, found, config) if hasattr(kind, "media") else Media()
        origin: dict[str, Any] = {"data": data_digests(config), "command": call.command}
        sizes = [sample["batch_size"] for sample in found if "batch_size" in sample]
        origin |= {"batch_size": min(sizes)} if sizes else {}  # what an automatic one came down to
        records[method] = folders[method].finish(
            loaded.device,
            versions | origin,
            config=run_config(config, method),
            metrics=kind.metrics(found),
            timing=timing,
            method=described(config, method),
            evaluation=evaluation(config, method, loaded.device),
        )
        trackers[method].finish(records[method], found, media)
        if not records[method]["metrics"]["samples"]:
            reason = found[0]["skipped"] if found else "no data"
            words = f"every prompt was skipped ({reason}, which is what the context leaves beside task.max_new_tokens)"
            tqdm.write(f"warning: {folders[method].path}: finished, but {words}", file=sys.stderr)

    with ExitStack() as stack:
        group = config.wandb.group or call.experiment or f"{config.task.name}-{config.model.name}"
        words = {"group": group, "job_type": config.task.kind, "tags": config.tags}
        for method, folder in folders.items():
            words |= {"name": f"{what} {label(config, method)}", "config": run_config(config, method)}
            trackers[method] = stack.enter_context(track(config.wandb, folder.path, folder.run_id, **words))
        before, interval = sum(map(len, samples.values())), 0.1 if sys.stderr.isatty() else 15  # a log wants no film
        total = len(items) * len(folders)
        bar = stack.enter_context(tqdm(total=total, initial=before, desc=what, unit="sample", mininterval=interval))
        refusals: dict[Method, str] = {}
        for method in together:
            try:
                method.kept(engine_for(loaded.model, [method], config).widths)
            except ValueError as reason:
                refusals[method] = str(reason)
        possible = [method for method in together if method not in refusals]
        stack.enter_context(dense_in_host_memory(loaded.model) if offloaded else nullcontext())
        batches = stack.enter_context(closing(evaluated(kind, Evaluation(loaded, config, possible, done), items)))
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
                headline = next((name.removesuffix("_stderr") for name in metrics if name.endswith("_stderr")), None)
                bar.set_postfix_str(f"{headline}={metrics[headline]:.4g}" if headline else "", refresh=False)
                trackers[method].log(count, metrics)
            if count == len(items):
                finish(method)
        for method in possible:
            if method in folders and method not in records:
                finish(method)
        for refusal in refusals.values():
            several = "; for several sparsities: grid.sparsity=[...], or -m" if "sparsity has" in refusal else ""
            raise UserError(f"model={config.model.name}: {refusal}{several}")  # the first: of one model they are alike


def evaluated(kind: ModuleType, run: Evaluation, items: Any) -> Batches:
    """What `kind.evaluate` gives, with the configuration's batch size or, where it is auto, with what fits.

    Samples of an automatic batch size say what it was, at most. What is done grows by what was given.
    """
    if run.config.batch_size != "auto":
        yield from kind.evaluate(run, items)
        return
    rows = ROWS_GPU if run.loaded.model.device.type == "cuda" else ROWS_CPU
    while True:
        try:
            for method, samples in kind.evaluate(replace(run, config=replace(run.config, batch_size=rows)), items):
                yield method, [sample | {"batch_size": rows} for sample in samples]
                run.done[method] |= {sample["index"] for sample in samples}
            return
        except (RuntimeError, MemoryError) as error:
            if rows == 1 or not out_of_memory(error):
                raise
        rows //= 2
        tqdm.write(f"batch_size=auto: out of memory, goes on with {rows}", file=sys.stderr)
        torch.cuda.empty_cache()


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
