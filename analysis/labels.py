"""Names for the model, the task and the method of each run.

Two runs may be compared if their `evaluation` entries are equal. So runs of one model or task whose entries differ get
different names, which say where they differ: `xsum [limit=12]` and `xsum [limit=1000]`.
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
    methods = [record["method"] for record in records]
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


def _with_file_names(records: Sequence[dict[str, Any]]) -> list[Flat]:
    """The evaluation entries, where files go by their names; those of one name have a part of their digests, too."""
    settings = [dict(record["evaluation"]) for record in records]
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
    of_name: dict[Hashable, list[Flat]] = defaultdict(list)
    for name, one in zip(names, settings, strict=True):
        if one not in of_name[name]:
            of_name[name].append(one)
    told = []
    for name, one in zip(names, settings, strict=True):
        keys = sorted({key for other in of_name[name] for key in other}, key=_short)
        differing = [key for key in keys if len({_text(other.get(key)) for other in of_name[name]}) > 1]
        told.append(", ".join(f"{_short(key)}={_text(one.get(key))}" for key in differing))
    return told


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
