"""What makes two runs the same run, and how a run is described."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import griffin
from griffin import Method as Method
from pipelines.config import RunConfig
from pipelines.data import EMBEDDED, digest, folder_digest
from pipelines.method_keys import AXES
from pipelines.records import environment

if TYPE_CHECKING:
    from torch import nn

Plain = dict[str, Any]

# These say how a pruned run held its experts.
_HELD = ("mode", "shared_experts")
# These say how a dense run generated.
_ASSISTED = ("assistance", "assistant")
# A file that is named on the command line is read instead of the data that the task names.
_INSTEAD_OF = {"data_files": ("embedded", "hub"), "shots_file": ("embedded_shots",)}
# These settings change no result; `device` counts as the device that it stands for.
_IDLE = ("output_dir", "tags", "wandb", "grid", "device")
_IDLE_MODEL = ("licence_gate", "install")
_DEFAULTS = {key.name: key.default for key in fields(RunConfig) if key.default is not MISSING}


def run_config(config: RunConfig, method: Method) -> Plain:
    """The configuration of one method's run, as plain nested values: what a call for it alone would have."""
    plain = asdict(config)
    del plain["grid"]
    pruning = asdict(method) | ({"mode": "masked"} if method.by_token and not method.dense else {})
    pruning |= {"draft_tokens": config.draft_tokens} if config.assistance != "none" else {}
    return plain | {key: list(value) if isinstance(value, tuple) else value for key, value in pruning.items()}


def described(config: RunConfig, method: Method) -> Plain:
    """The `method` of a run's record: its words, and all settings that say how the run pruned; of a dense run only the
    sparsity, 0, and what assisted it."""
    plain = run_config(config, method)
    label, family = method.label, method.family
    if not method.dense:
        shared = " shared" if config.shared_experts else ""
        words = {"label": label.replace(family, family + shared, 1), "family": family + shared}
        return words | {key: plain[key] for key in (*AXES, *_HELD)}
    if config.assistance == "none":
        return {"label": label, "family": family, "sparsity": 0.0}
    assistant = PurePath(str(config.assistant)).name
    label = f"dense, {'prompt lookup' if config.assistance == 'prompt_lookup' else f'assistant {assistant}'}"
    return {"label": label, "family": label, "sparsity": 0.0} | {key: plain[key] for key in _ASSISTED}


def label(config: RunConfig, method: Method) -> str:
    """The method in words, with what assisted it."""
    words: str = described(config, method)["label"]
    return words


def evaluation(config: RunConfig, method: Method, device: str) -> Plain:
    """The `evaluation` of a run's record: all that two runs must share to be compared, under dotted keys.

    This is the model, the task, the data, the rows, the seed, the batch size and the device, in words. Times are
    compared on one kind of machine only.
    """
    settings = _determining(config, method)
    settings = {key: value for key, value in settings.items() if key not in (*AXES, *_HELD, *_ASSISTED, "check_costs")}
    if settings["task"].get("shots") == 0:  # no shots are read
        settings["task"] |= dict.fromkeys(("embedded_shots", "shots_file"))
    machine = ("device", "platform", "cpus") if config.kind.timed else ("device",)
    ran_on = environment(device)
    return _flat(settings | {key: ran_on[key] for key in machine})


def identity(config: RunConfig, method: Method, device: str) -> Plain:
    """All that determines a run's result, and nothing else: equal identities are the same run.

    Keys with their default values are left out, so a new key changes no identity. What has no meaning for a method is
    at its default. Data files count by their content, not by their place. What is `auto` counts as it was typed:
    machines where it stands for different things differ in their kind of device.
    """
    settings = _determining(config, method)
    changed = {key: value for key, value in settings.items() if key not in _DEFAULTS or value != _DEFAULTS[key]}
    return changed | {"device": device}


def _determining(config: RunConfig, method: Method) -> Plain:
    """The settings that determine a run's result, nested as in its configuration, without the device."""
    plain = run_config(config, method)
    digests = data_digests(config)
    folders: Plain = {key: digests.pop(key) for key in ("repo", "assistant") if key in digests}
    task = plain["task"] | dict.fromkeys(_unread(config)) | digests
    model = {key: folders.pop(key, value) for key, value in plain["model"].items() if key not in _IDLE_MODEL}
    used = _used(config, method)
    settings = {key: folders.get(key, value) for key, value in plain.items() if key in used and key not in _IDLE}
    return settings | {"model": model, "task": task}


def _used(config: RunConfig, method: Method) -> set[str]:
    """The root's keys that mean something for a method."""
    idle = {*AXES} - {*method.settings}
    if method.dense:
        idle |= {*_HELD}
    if config.assistance != "none":
        idle -= {"draft_tokens"}
    if not method.verified and config.assistance == "none":
        idle |= {"check_costs"}
    if not config.kind.timed:  # where the dense weights lie changes times only, and who multiplies, times and rounding
        idle |= {"offload_dense", "cpu_onednn"}
    return {key.name for key in fields(RunConfig)} - idle


def unused(overrides: Sequence[str], config: RunConfig) -> list[str]:
    """Those of a call's overrides, as typed, that change nothing about any of its runs."""
    used = set().union(*(_used(config, method) for method in config.methods()))
    idle = {key for key in (*AXES, *_HELD) if key not in used}
    idle |= {"limit", "offset"} if config.kind.timed else set()
    if not config.kind.prunes:
        idle |= {*AXES, *_HELD, *_ASSISTED, "method", "batch_size", "compile", "offload_dense"}
    idle |= {f"grid.{key}" for key in idle} | {key for key in AXES if getattr(config.grid, key)}
    return [text for text in overrides if text.lstrip("+").partition("=")[0] in idle]


def _unread(config: RunConfig) -> list[str]:
    """The keys of the task that name data which is not read."""
    return [key for local, keys in _INSTEAD_OF.items() if getattr(config.task, local, None) is not None for key in keys]


def data_digests(config: RunConfig) -> dict[str, str]:
    """The files that a run reads, and models in folders, by the keys that name them, as digests of their content."""
    task = config.task
    models = {"repo": config.model.repo if config.model.source == "hub" else None, "assistant": config.assistant}
    folders = {"data_files": Path(), "shots_file": Path(), "embedded": EMBEDDED, "embedded_shots": EMBEDDED}
    return {key: folder_digest(Path(place)) for key, place in models.items() if place and Path(place).is_dir()} | {
        key: digest(folder / getattr(task, key))
        for key, folder in folders.items()
        if key not in _unread(config) and getattr(task, key, None) is not None
    }


def _flat(values: Plain, prefix: str = "") -> Plain:
    """Nested values under dotted keys; a list is a value."""
    flat: Plain = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def engine_for(model: nn.Module, methods: Sequence[Method], config: RunConfig) -> griffin.Engine:
    """The engine that evaluates these methods in the configuration's mode; UnsupportedModelError where it cannot."""
    griffin.refuse_uncroppable(model)
    if any(method.prunes_vocabulary for method in methods):
        griffin.output_embedding(model)  # refuses what has none
    return griffin.Engine(
        model,
        pruning=config.offload_dense or any(not method.dense for method in methods),
        mode=config.mode,
        compiler=griffin.compiled_call if config.compile is True else None,
        offload_dense=config.offload_dense,
    )
