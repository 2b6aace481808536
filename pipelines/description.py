"""How a run is described: its method, and the settings that determine its result.

Every function takes a resolved configuration as nested plain values and returns plain values. Nothing heavy is
imported here, because records are also read on machines without torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

Plain = dict[str, Any]

# These settings say how a run pruned; a dense run has none of them. All others say how a run was evaluated.
METHOD = (
    *("statistic", "selection", "compensation", "budget", "refresh", "sparsity", "mode", "shared_experts"),
    *("verification", "draft_tokens", "draft_vocabulary", "prompt_lookup", "verification_threshold"),
)

# These say how a dense run generated.
ASSISTED = ("assistance", "assistant")

# Settings that were added after runs had been recorded. A run with these values is the run that it was before.
LATER: Plain = {
    "compensation": "none",
    "budget": "uniform",
    "refresh": "none",
    "verification": "none",
    "draft_tokens": "auto",
    "draft_vocabulary": "prompt",
    "prompt_lookup": False,
    "verification_threshold": 0.1,
    "assistance": "none",
    "assistant": None,
    "offset": 0,
    "compile": False,
    "offload_dense": False,
    "cpu_onednn": False,
}

# The same of a task's settings, of the kinds that lm-eval defines.
HARNESS = ("classification", "question_answering")
LATER_OF_TASK: Plain = {"shots": 0, "shots_file": None, "chat_template": False, "max_new_tokens": None, "filter": None}

# What says how drafts are made and checked; the last of them is read with `verification=threshold` only.
_DRAFTING = ("draft_tokens", "draft_vocabulary", "prompt_lookup", "verification_threshold")

# A file that is named on the command line is read instead of the data that the task names.
INSTEAD_OF = {"data_files": ("embedded", "hub"), "shots_file": ("embedded_shots",)}

# These settings change no result; `device` counts as the device that it stands for.
_IDLE = ("output_dir", "tags", "wandb", "grid", "device")
_IDLE_MODEL = ("licence_gate", "install")


def is_dense(sparsity: Any) -> bool:
    """Whether this sparsity, one number or one per layer, prunes nothing."""
    return not any(sparsity) if isinstance(sparsity, list | tuple) else not sparsity


def method_entry(config: Plain, label: str, family: str) -> Plain:
    """The record's `method`: its words, and the settings in `METHOD`; of a dense run only the sparsity, 0, and what
    assisted it.

    Args:
        config: the resolved configuration of one run.
        label: `griffin.Method.label`.
        family: `griffin.Method.family`, the label without the sparsity.
    """
    dense = is_dense(config["sparsity"])
    shared = " shared" if config["shared_experts"] and not dense else ""
    settings = {"sparsity": 0.0} if dense else {key: config.get(key, LATER.get(key)) for key in METHOD}
    if dense and config.get("assistance", "none") != "none":
        settings |= {key: config[key] for key in ASSISTED}
        words = {"prompt_lookup": "prompt lookup", "model": f"assistant {PurePath(str(config['assistant'])).name}"}
        label = family = f"dense, {words[config['assistance']]}"
    return {"label": label.replace(family, family + shared, 1), "family": family + shared, **settings}


def evaluation_entry(config: Plain, environment: Plain) -> Plain:
    """The record's `evaluation`: all that two runs must share to be compared, under dotted keys.

    This is the model, the task, the data, the rows, the seed, the batch size and the device. Times are compared on one
    kind of machine only.

    Args:
        config: the resolved configuration of one run.
        environment: the record's; its `data` holds the digests of the files that were read.
    """
    settings = determining(config, environment.get("data") or {})
    for key in (*METHOD, *ASSISTED):
        settings.pop(key, None)
    if settings["task"].get("shots") == 0:  # no shots are read
        settings["task"] |= dict.fromkeys(("embedded_shots", "shots_file"))
    machine = ("device", "platform", "cpus") if settings["task"]["kind"] == "latency" else ("device",)
    return _flat(settings | {key: environment.get(key) for key in machine})


def determining(config: Plain, data: Mapping[str, str]) -> Plain:
    """The settings that determine a run's result, nested as in its configuration, without the device.

    Args:
        config: the resolved configuration of one run.
        data: the digests of the files that it reads, by the keys of the task that name them.
    """
    later = LATER_OF_TASK if config["task"]["kind"] in HARNESS else {"chat_template": False}
    task = {key: value for key, value in config["task"].items() if key not in later or value != later[key]}
    for local, unread in INSTEAD_OF.items():
        if task.get(local) is not None:
            task |= dict.fromkeys(unread)
    dense = is_dense(config["sparsity"])
    # Where the dense weights lie changes times only, and who multiplies on a CPU, times and rounding.
    idle = {*_IDLE, *(METHOD if dense else ()), *(() if task["kind"] == "latency" else ("offload_dense", "cpu_onednn"))}
    whole = LATER | config
    unread = {"none": _DRAFTING, "exact": _DRAFTING[-1:]}.get(whole["verification"], ())
    whole |= {key: LATER[key] for key in unread}
    settings = {key: value for key, value in whole.items() if key not in idle}
    settings["model"] = {key: value for key, value in config["model"].items() if key not in _IDLE_MODEL}
    return settings | {"task": task | data} | ({"sparsity": 0.0} if dense else {})


def unused(overrides: Sequence[str], config: Plain) -> list[str]:
    """Those of a call's overrides that change nothing about its runs.

    Args:
        overrides: as typed.
        config: the resolved configuration of one of its runs; of a pruned one, if there is any.
    """
    kind, dense = config["task"]["kind"], is_dense(config["sparsity"])
    idle: set[str] = set()
    if kind == "flocking":  # looks at the dense model
        idle |= {*METHOD, *ASSISTED, "batch_size", "compile", "offload_dense"}
    elif dense:
        idle |= {*METHOD} - {"sparsity"}
        idle -= {"draft_tokens"} if config.get("assistance", "none") != "none" else set()
    elif config.get("verification", "none") == "none":
        idle |= {*_DRAFTING}
    elif config["verification"] == "exact":
        idle |= {"verification_threshold"}
    if kind == "latency":
        idle |= {"limit", "offset"}
    grids = {f"grid.{key}" for key in idle} if kind == "flocking" or not dense else set()
    return [text for text in overrides if text.lstrip("+").partition("=")[0] in idle | grids]


def _flat(values: Plain, prefix: str = "") -> Plain:
    """Nested values under dotted keys; a list is a value."""
    found: Plain = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
