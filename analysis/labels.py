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

Flat = dict[str, Any]

_DIGEST = "sha256:"

# Settings of an evaluation that change rounding and speed, and nothing else.
ROUNDING = ("batch_size", "compile", "cpu_onednn")


@dataclass(frozen=True)
class Labels:
    """The names of one run.

    Attributes:
        model: names a row of a table, together with the method.
        task: names a column.
        family: the method without its sparsity.
        method: the method with its sparsity.
    """

    model: str
    task: str
    family: str
    method: str


def labels(records: Sequence[dict[str, Any]]) -> list[Labels]:
    """The names of all runs that are shown together. No two runs share a model, a task and a method."""
    settings = _with_file_names(records)
    models = _suffixed(
        [record["config"]["model"]["name"] for record in records],
        [{key: value for key, value in one.items() if key.startswith("model.")} for one in settings],
    )
    tasks = _suffixed(
        [record["config"]["task"]["name"] for record in records],
        [{key: value for key, value in one.items() if not key.startswith("model.")} for one in settings],
    )
    methods = [record["method"] | rounding(record) for record in records]
    # Settings that a method's label does not tell, as the mode, are told only where two runs would share a cell.
    cells = list(zip(models, tasks, [method["label"] for method in methods], strict=True))
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
    for record in records:
        apart = rounding(record)
        settings.append({key: value for key, value in record["evaluation"].items() if key not in apart})
    names: dict[str, str] = {}
    for record, one in zip(records, settings, strict=True):
        for key, value in one.items():
            if isinstance(value, str) and value.startswith(_DIGEST):
                path: Any = record["config"]
                for part in key.split("."):
                    path = path.get(part) if isinstance(path, dict) else None
                if isinstance(path, str):
                    names[value] = min(PurePath(path).name, names.get(value, "\uffff"))
    shared = Counter(names.values())
    told = {
        digest: name if shared[name] == 1 else f"{name} {digest[len(_DIGEST) :][:6]}" for digest, name in names.items()
    }
    return [
        {key: told.get(value, value) if isinstance(value, str) else value for key, value in one.items()}
        for one in settings
    ]


def differences(names: Sequence[Hashable], settings: Sequence[Flat]) -> list[str]:
    """For each name, the settings that differ among all that have this name, as `key=value, ...`.

    Args:
        names: any number of them may be equal.
        settings: one entry per name.

    Returns:
        One text per name, empty where equal names have equal settings.
    """
    texts = [{key: _text(value) for key, value in entry.items()} for entry in settings]
    keys: dict[Hashable, set[str]] = defaultdict(set)
    for name, entry in zip(names, texts, strict=True):
        keys[name] |= entry.keys()
    values: dict[Hashable, dict[str, set[str]]] = {name: {key: set() for key in keys[name]} for name in keys}
    for name, entry in zip(names, texts, strict=True):
        for key, seen in values[name].items():
            seen.add(entry.get(key, _text(None)))
    differing = {
        name: sorted((key for key, seen in mine.items() if len(seen) > 1), key=_short) for name, mine in values.items()
    }
    return [
        ", ".join(f"{_short(key)}={entry.get(key, _text(None))}" for key in differing[name])
        for name, entry in zip(names, texts, strict=True)
    ]


def _suffixed(names: Sequence[str], settings: Sequence[Flat]) -> list[str]:
    told = differences(names, settings)
    return [f"{name} [{more}]" if more else name for name, more in zip(names, told, strict=True)]


def _short(key: str) -> str:
    """`task.shots` as `shots`: which of the two it belongs to is clear where it is shown."""
    return key.removeprefix("model.").removeprefix("task.")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.removeprefix(_DIGEST)[:40]
    return "null" if value is None else json.dumps(value)
