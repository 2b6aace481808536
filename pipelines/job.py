"""One job: a configuration in, a record for each of its methods out.

What takes seconds to import is imported once configuration and data are known to be good, so that a mistake is
told at once.
"""

from __future__ import annotations

import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from pipelines.config import ModelConfig, RunConfig, typed
from pipelines.errors import UserError
from pipelines.methods import Method, identity, methods, run_config
from pipelines.prompts import Prompt, read_prompts
from pipelines.records import Record, RunFolder, run_id
from pipelines.tracking import track

if TYPE_CHECKING:
    from pipelines.models import LoadedModel

# What the jobs of this process came to, for the summary at the end of the call.
finished: list[tuple[str, Record]] = []
failed: list[str] = []


def job(cfg: DictConfig) -> None:
    """Run one composed configuration. A user's mistake fails this job alone, in one line, and not the sweep."""
    try:
        finished.extend(run(typed(cfg), HydraConfig.get().runtime.choices.get("experiment")))
    except UserError as error:
        failed.append(str(error))
        print(f"error: {error}", file=sys.stderr)


def run(config: RunConfig, experiment: str | None) -> list[tuple[str, Record]]:
    """Evaluate every method of a configuration, skipping those that have a record.

    Returns:
        (method in words, record) of each method.

    Raises:
        UserError: bad data, a model that cannot be had, or an output folder that cannot be written.
    """
    prompts = read_prompts(config.task, config.limit)
    from pipelines.models import device_kind

    device = device_kind(config.device)
    results = []
    for method in methods(config):
        readable = "-".join([config.task.name, config.model.name, method.label.replace(" ", "-").replace("%", "")])
        folder = RunFolder(Path(config.output_dir), run_id(readable, identity(config, method, device)))
        record = folder.record()
        if record is None:
            record = _run_method(config, method, folder, prompts, experiment)
        else:
            print(f"{folder.path}: finished before, skipped", file=sys.stderr)
        results.append((method.label, record))
    return results


def _run_method(
    config: RunConfig,
    method: Method,
    folder: RunFolder,
    prompts: list[Prompt],
    experiment: str | None,
) -> Record:
    from pipelines import generation

    plain = run_config(config, method)
    folder.start(plain)
    samples = folder.samples()
    done = {sample["index"] for sample in samples}
    start = time.perf_counter()
    loaded = _load(OmegaConf.to_yaml(OmegaConf.structured(config.model)), config.device, config.seed)
    load_seconds = time.perf_counter() - start
    label = f"{config.task.name} {config.model.name} {method.label}"
    with (
        track(
            config.wandb,
            folder.path,
            folder.run_id,
            name=label,
            group=config.wandb.group or experiment or f"{config.task.name}-{config.model.name}",
            job_type=config.task.kind,
            tags=config.tags,
            config=plain,
        ) as tracker,
        tqdm(total=len(prompts), initial=len(done), desc=label, unit="sample") as bar,
    ):
        remaining = [prompt for prompt in prompts if prompt.index not in done]
        for batch in generation.evaluate(loaded, remaining, config, method):
            folder.append(batch)
            samples += batch
            bar.update(len(batch))
            metrics = generation.metrics(samples)
            if metrics["samples"]:
                bar.set_postfix(rouge1=f"{metrics['rouge1']:.1f}")
            tracker.log(len(samples), metrics)
        timing = {
            "load_seconds": load_seconds,
            "generate_seconds": sum(sample.get("seconds", 0.0) for sample in samples),
        }
        record = folder.finish(plain, generation.metrics(samples), timing, loaded.device)
        tracker.finish(record, samples)
    return record


@lru_cache(maxsize=1)
def _load(model_yaml: str, device: str, seed: int) -> LoadedModel:
    """The model, kept from one job of a sweep to the next that uses it too."""
    from pipelines.models import load

    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.create(model_yaml)))
    assert isinstance(config, ModelConfig)
    return load(config, device, seed)
