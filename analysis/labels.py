"""What runs are called, and which of them may stand side by side.

Two runs are compared, or stand in one row or column, only if nothing but the method tells them apart. What else
differs between runs of one name (limit, protocol, decoding, data, dtype, ...) is told in the label.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

Flat = dict[str, Any]

# What of a run's configuration says how it pruned. All else is how it was evaluated, also keys that this module has
# never heard of; but for what changes no number.
_METHOD = ("statistic", "selection", "compensation", "budget", "refresh", "sparsity", "mode", "shared_experts")
_IDLE = ("model", "task", "device", "output_dir", "tags", "wandb", "grid", "offload_dense")
# What means that nothing is done there, and what a record from before a key was there would have had.
_PLAIN = {"selection": "topk", "compensation": "none", "budget": "uniform", "refresh": "none", "shared_experts": False}
_LATER = {"offset": 0, "compile": False}


def flat(values: dict[str, Any], prefix: str = "") -> Flat:
    """Nested values under dotted keys; lists are values."""
    found: Flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def model_part(record: dict[str, Any]) -> Flat:
    """What says which model a run is of."""
    return {key: value for key, value in flat(record["config"]["model"]).items() if key not in ("name", "licence_gate")}


def task_part(record: dict[str, Any]) -> Flat:
    """What says how a run was evaluated: task, data, rows, seed, batch and device.

    Data files are told by their content where the record has it, as in a run's identity.
    """
    config, environment = record["config"], record["environment"]
    task = dict(config["task"])
    if task.get("data_files"):
        task |= dict.fromkeys(("embedded", "hub"))
    if task.get("shots_file"):
        task |= dict.fromkeys(("embedded_shots",))
    if task.get("shots") == 0:
        task |= dict.fromkeys(("embedded_shots", "shots_file"))
    task |= {key: value for key, value in (environment.get("data") or {}).items() if task.get(key) is not None}
    part = flat({key: value for key, value in task.items() if key != "name"})
    part |= _LATER | flat({key: value for key, value in config.items() if key not in (*_METHOD, *_IDLE)})
    part["device"] = environment.get("device")
    if task["kind"] == "latency":  # times are of one machine
        part |= {key: environment.get(key) for key in ("platform", "cpus")}
        part["offload_dense"] = config.get("offload_dense", False)
    return part


def method_part(record: dict[str, Any]) -> Flat:
    """What says how a run pruned; empty for dense."""
    config = record["config"]
    part = _PLAIN | {key: config[key] for key in _METHOD if config.get(key) is not None}
    return {} if is_dense(part.get("sparsity")) else part


def is_dense(sparsity: Any) -> bool:
    """Whether nothing is pruned."""
    return not any(sparsity) if isinstance(sparsity, list) else not sparsity


def family(part: Flat) -> str:
    """A method without its sparsity, in words: what has one colour in all figures."""
    if not part:
        return "dense"
    statistic, compensation = str(part.get("statistic", "?")), part["compensation"]
    words = [statistic if compensation == _PLAIN["compensation"] else f"{statistic} + {compensation}"]
    words += [str(part[key]) for key in ("selection", "budget") if part[key] != _PLAIN[key]]
    words += [f"refresh={part['refresh']}"] if part["refresh"] != _PLAIN["refresh"] else []
    return " ".join([*words, *(["shared"] if part["shared_experts"] else [])])


def amount(part: Flat) -> str:
    """The sparsity in words; empty for dense."""
    if not part:
        return ""
    sparsity = part.get("sparsity")
    return "per layer" if isinstance(sparsity, list) else f"{100 * float(sparsity or 0):g}%"


def unnamed(part: Flat) -> Flat:
    """What of a method its words do not tell."""
    return {key: value for key, value in part.items() if key == "mode" or isinstance(value, list)}


def told_apart(names: Sequence[Hashable], parts: Sequence[Flat]) -> list[str]:
    """What each of several parts of one name must be told by: `key=value`, ...; empty where a name has one part.

    Args:
        names: what the parts are called.
        parts: as many; those of one name that are equal are the same thing.
    """
    of_name: dict[Hashable, list[Flat]] = defaultdict(list)
    for name, part in zip(names, parts, strict=True):
        if part not in of_name[name]:
            of_name[name].append(part)
    told = []
    for name, part in zip(names, parts, strict=True):
        keys = sorted({key for one in of_name[name] for key in one})
        differing = [key for key in keys if len({_text(one.get(key)) for one in of_name[name]}) > 1]
        told.append(", ".join(f"{key}={_text(part.get(key))}" for key in differing))
    return told


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.removeprefix("sha256:")[:40]
    return "null" if value is None else json.dumps(value)
