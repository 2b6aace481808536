"""Records as one DataFrame with one row per run and metric. Run folders and W&B give the same DataFrame.

| column | what it is |
|---|---|
| `run_id` | the run folder's name, and the run's id in W&B |
| `model` | the model's name; if runs of this name used different settings of the model, with these: `gemma_7b [dtype=float16]` |
| `kind`, `task` | the kind of task, and its name; if runs of this name were evaluated differently (limit, protocol, decoding, data, ...), with the difference: `xsum [limit=12]` |
| `method` | the method in words: `dense`, `griffin 50%` |
| `family` | the method without its sparsity: `griffin`; it has one colour in all figures |
| `statistic`, `selection`, `compensation`, ... | the settings of the method, by the names that the records of pruned runs have for them; empty for dense |
| `role` | `dense`; `assisted`: dense decoding that something drafted for; or `pruned`, quantised ones included |
| `sparsity` | share of FF neurons dropped; NaN if every layer has its own |
| `metric` | its name in the record, without a suffix for lengths |
| `prompt_length`, `generation_length` | in tokens, for metrics with a suffix `_pP_gG` and for tasks with one pair of lengths; else NaN |
| `value`, `stderr` | the numbers of the record; `stderr` is NaN if there is none, or if it came out so |
| `scored` | whether the record has a standard error for the metric |
| `samples` | number of samples that the value is computed from |
| `seconds` | duration of the whole run |
| `dtype`, `protocol`, `decoding`, `limit`, `offset`, `seed`, `batch_size`, `compile`, `cpu_onednn`, `mode`, `device` | from the record; NaN or None if the run has no such setting |
| `griffin-pruning`, `torch`, `transformers`, `lm-eval` | versions |
| `command` | the command that started the run |

Two runs may be compared if their `evaluation` entries are equal, but for what only changes how numbers are rounded. So
runs of one model or task whose entries differ get different names, which say where they differ: `xsum [limit=12]` and
`xsum [limit=1000]`. Times differ by these settings too, so for latency nothing is left out.

Rows may be compared, or one divided by the other, only within one `model` and one `task`. Among these, `batch_size`,
`compile` and `cpu_onednn` may differ, which change rounding only; `analysis.frame.apart` says where they do.
"""  # noqa: E501 (a table)

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any, TypeVar

import pandas as pd

from analysis.metrics import metric, order
from analysis.runs import at

Flat = dict[str, Any]
Item = TypeVar("Item", bound=Any)

# The kinds of task that measure quality, and their titles.
QUALITY = {
    "generation": "Generation",
    "code": "Code generation",
    "classification": "Classification",
    "question_answering": "Question answering",
    "perplexity": "Perplexity",
    "fidelity": "Fidelity to the dense model",
    "exactness": "Exactness of verified texts",
}

_DIGEST = "sha256:"
# Settings of an evaluation that change rounding and speed, and nothing else.
ROUNDING = ("batch_size", "compile", "cpu_onednn")

_SUFFIX = re.compile(r"(?P<name>.+)_p(?P<prompt>\d+)_g(?P<generation>\d+)")
# These metrics say how much was run, and not how well: the DataFrame has no rows for them.
_COUNTS = (
    *("samples", "skipped_prompts", "prompt_tokens", "generated_tokens"),
    *("peak_memory_bytes", "dense_peak_memory_bytes"),
)

# A record's `method` says these, too; all else that it says is a setting of the method, and a column.
_NO_SETTINGS = ("label", "family", "sparsity", "mode", "shared_experts", "assistance", "assistant")
VERSIONS = ("griffin-pruning", "torch", "transformers", "lm-eval")
_NAMES = ("run_id", "model", "kind", "task", "method", "family", "role")
COLUMNS = (
    *_NAMES,
    *("sparsity", "metric", "prompt_length", "generation_length", "value", "stderr", "scored", "samples", "seconds"),
    *("dtype", "protocol", "decoding", "limit", "offset", "seed", *ROUNDING, "mode", "device"),
    *(*VERSIONS, "command"),
)
# What is shown of a record's evaluation, where it stands there.
_EVALUATION = ("model.dtype", "task.protocol", "task.decoding", "limit", "offset", "seed", "device")
_NUMBERS = (
    *("sparsity", "prompt_length", "generation_length", "value", "stderr", "samples", "seconds"),
    *("limit", "offset", "seed", "batch_size"),
)


def frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The sorted DataFrame of some records in today's form. Without records it still has all of `COLUMNS`."""
    records = sorted(records, key=lambda record: record["run_id"])
    settings = dict.fromkeys(key for record in records for key in record["method"] if key not in _NO_SETTINGS)
    rows = [
        dict.fromkeys(settings, "") | row
        for record, names in zip(records, labels(records), strict=True)
        for row in _rows(record, names)
    ]
    table = pd.DataFrame(rows, columns=[*_NAMES, *settings, *COLUMNS[len(_NAMES) :]])
    table = table.astype({name: "float64" if name in _NUMBERS else object for name in table})
    # Sparsities that differ by layer come last, metrics without lengths first.
    ranked = table.fillna({"sparsity": math.inf, "prompt_length": 0, "generation_length": 0})
    return table.loc[[row.Index for row in sorted(ranked.itertuples(), key=_place)]].reset_index(drop=True)


def _place(row: Any) -> tuple[Any, ...]:
    """A sort key: by model and task, dense first, then by method."""
    method = ("dense", "assisted", "pruned").index(row.role), row.family, row.sparsity, row.run_id
    return row.model, row.kind, row.task, *method, order(row.metric), row.prompt_length, row.generation_length


def select(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The rows whose columns have these values."""
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table


def headlines(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first metric of every task that measures quality; `label` is the metric's."""
    table = table[table["kind"].isin(QUALITY) & table["scored"].astype(bool) & table["prompt_length"].isna()]
    first = {place: min((row.metric for row in rows), key=order) for place, rows in by_task(table.itertuples()).items()}
    table = table[table["metric"] == [first[place] for place in zip(table["model"], table["task"], strict=True)]]
    return table.assign(label=[metric(name).label for name in table["metric"]])


def by_task(rows: Iterable[Item]) -> dict[tuple[str, str], list[Item]]:
    """What has a model and a task, by the two."""
    found: dict[tuple[str, str], list[Item]] = defaultdict(list)
    for row in rows:
        found[row.model, row.task].append(row)
    return dict(sorted(found.items()))


def nearest(row: Any, others: Iterable[Any]) -> Any:
    """Of runs that a row may be compared with, the one that shares most of the settings that change rounding, the first
    of several; None without any."""
    return max(others, key=lambda other: sum(_same(row, other, name) for name in ROUNDING), default=None)


def apart(row: Any, other: Any) -> str:
    """Where two runs that are compared differ in what changes rounding: ` [batch_size=1, of dense 8]`; else empty."""
    if row is None or other is None:
        return ""
    words = (
        f"{name}={getattr(row, name):g}, of {other.family.split(' [')[0]} {getattr(other, name):g}"
        for name in ROUNDING
        if not _same(row, other, name)
    )
    text = "; ".join(words)
    return f" [{text}]" if text else ""


def _same(row: Any, other: Any, name: str) -> bool:
    mine, theirs = getattr(row, name), getattr(other, name)
    return bool(pd.isna(mine) or pd.isna(theirs) or mine == theirs)


def _rows(record: dict[str, Any], names: Labels) -> list[dict[str, Any]]:
    method, evaluation = record["method"], record["evaluation"]
    config, metrics, environment = record["config"], record["metrics"], record["environment"]
    sparsity = method["sparsity"]
    # For batch_size=auto the environment holds the size that fitted into memory.
    batch_size = environment.get("batch_size", evaluation.get("batch_size"))
    shared = {
        **asdict(names),
        "run_id": record["run_id"],
        "kind": config["task"]["kind"],
        "role": "assisted" if "assistance" in method else "dense" if method["family"] == "dense" else "pruned",
        **{key: value for key, value in method.items() if key not in _NO_SETTINGS},
        "sparsity": float("nan") if isinstance(sparsity, list) else float(sparsity),
        "samples": metrics.get("samples"),
        "seconds": record["timing"].get("seconds"),
        **{place.rpartition(".")[2]: evaluation.get(place) for place in _EVALUATION},
        **rounding(record),
        "batch_size": None if batch_size == "auto" else batch_size,
        "mode": method.get("mode"),
        "command": environment.get("command"),
        **{name: environment.get(name) for name in VERSIONS},
    }
    return [
        shared
        | _lengths(name, config["task"])
        | {"value": value, "stderr": metrics.get(f"{name}_stderr"), "scored": f"{name}_stderr" in metrics}
        for name, value in metrics.items()
        if name not in _COUNTS and not name.endswith("_stderr")
    ]


def _lengths(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """A metric's name without its suffix, and the prompt and generation length that it was measured at."""
    found = _SUFFIX.fullmatch(name)
    prompts, generations = task.get("prompt_lengths") or [], task.get("generation_lengths") or []
    lengths: tuple[int | None, int | None] = (None, None)
    if found:
        name, lengths = found["name"], (int(found["prompt"]), int(found["generation"]))
    elif task["kind"] == "latency" and len(prompts) == len(generations) == 1:
        lengths = prompts[0], generations[0]
    return {"metric": name, "prompt_length": lengths[0], "generation_length": lengths[1]}


# -- names for the model, the task and the method of each run ----------------------------------------------------------


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
        mine = [{key: value for key, value in one.items() if key.startswith("model.") == of_model} for one in settings]
        told = differences(names, mine)
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
    for digest, name in names.items():
        names[digest] = name if shared[name] == 1 else f"{name} {digest.removeprefix(_DIGEST)[:6]}"
    for one in settings:
        one |= {key: names[value] for key, value in one.items() if isinstance(value, str) and value in names}
    return settings


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
