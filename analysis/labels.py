"""Names for the model, the task and the method of each run.

Two runs may be compared if their `evaluation` entries are equal, but for what only changes how numbers are rounded. So
runs of one model or task whose entries differ get different names, which say where they differ: `xsum [limit=12]` and
`xsum [limit=1000]`. Times differ by these settings too, so for latency nothing is left out.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from analysis.runs import at

Flat = dict[str, Any]

_DIGEST = "sha256:"

# Settings of an evaluation that change rounding and speed, and nothing else.
ROUNDING = ("batch_size", "compile", "cpu_onednn")


@dataclass(frozen=True)
class Labels:
    """The names of one run; its family is the method without its sparsity."""

    model: str
    task: str
    family: str
    method: str


def labels(records: Sequence[dict[str, Any]]) -> list[Labels]:
    """The names of all runs that are shown together. No two runs share a model, a task and a method."""
    settings = _with_file_names(records)
    named = {}
    for part in ("model", "task"):
        names = [record["config"][part]["name"] for record in records]
        of_model = part == "model"
        told = differences(
            names,
            [{key: value for key, value in one.items() if key.startswith("model.") == of_model} for one in settings],
        )
        named[part] = [f"{name} [{more}]" if more else name for name, more in zip(names, told, strict=True)]
    methods = [record["method"] | rounding(record) for record in records]
    # Settings that a method's label does not tell, as the mode, are told only where two runs would share a cell.
    cells = list(zip(named["model"], named["task"], [method["label"] for method in methods], strict=True))
    told = differences(cells, methods)
    shared = Counter(zip(cells, told, strict=True))
    found = []
    for record, (model, task, label), more in zip(records, cells, told, strict=True):
        family = record["method"]["family"]
        sparsity = label.removeprefix(family)
        family += f" [{more}]" if more else ""
        if shared[(model, task, label), more] > 1:  # nothing in the records tells these runs apart
            family += f" [run {record['run_id'][-10:]}]"
        found.append(Labels(model, task, family, family + sparsity))
    return found


def rounding(record: dict[str, Any]) -> Flat:
    """The run's settings that change only how numbers are rounded; none of latency, where times are the result."""
    if record["config"]["task"]["kind"] == "latency":
        return {}
    return {key: record["evaluation"].get(key, record["config"].get(key)) or False for key in ROUNDING}


def _with_file_names(records: Sequence[dict[str, Any]]) -> list[Flat]:
    """The evaluation entries without `rounding`, where files go by their names; those of one name have a part of their
    digests, too."""
    settings = []
    names: dict[str, str] = {}
    for record in records:
        apart = rounding(record)
        settings.append({key: value for key, value in record["evaluation"].items() if key not in apart})
        for key, value in settings[-1].items():
            path = at(record["config"], key)
            if isinstance(value, str) and value.startswith(_DIGEST) and isinstance(path, str):
                names[value] = min(PurePath(path).name, names.get(value, "\uffff"))
    shared = Counter(names.values())
    told = {
        digest: name if shared[name] == 1 else f"{name} {digest.removeprefix(_DIGEST)[:6]}"
        for digest, name in names.items()
    }
    return [
        {key: told.get(value, value) if isinstance(value, str) else value for key, value in one.items()}
        for one in settings
    ]


def differences(names: Sequence[Hashable], settings: Sequence[Flat]) -> list[str]:
    """For each name, which may be repeated, its settings that differ among all of this name, as `key=value, ...`; empty
    where none does."""
    texts = [{key: _text(value) for key, value in entry.items()} for entry in settings]
    none, members = _text(None), defaultdict(list)
    for name, entry in zip(names, texts, strict=True):
        members[name].append(entry)
    differing = {}
    for name, entries in members.items():
        keys = {key for entry in entries for key in entry}
        differing[name] = sorted((key for key in keys if len({e.get(key, none) for e in entries}) > 1), key=_short)
    return [
        ", ".join(f"{_short(key)}={entry.get(key, none)}" for key in differing[name])
        for name, entry in zip(names, texts, strict=True)
    ]


def _short(key: str) -> str:
    """`task.shots` as `shots`: which of the two it belongs to is clear where it is shown."""
    return key.removeprefix("model.").removeprefix("task.")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.removeprefix(_DIGEST)[:40]
    return "null" if value is None else json.dumps(value)
