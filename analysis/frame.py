"""Records as one DataFrame, the same from run folders and from W&B: one row per run and metric.

| column | what it is |
|---|---|
| `run_id` | the run folder's name, and the run's id in W&B |
| `model` | the model's name; with what tells it apart where two runs of this name differ, as in `gemma_7b [dtype=float16]` |
| `kind`, `task` | the kind of task, and its name; with what tells it apart (limit, protocol, decoding, data, ...), as `xsum [limit=12]` |
| `method` | in words: `dense`, `griffin 50%` |
| `family` | the method without its sparsity: `griffin`; what has one colour in all figures |
| `statistic`, `selection`, `compensation`, `budget`, `refresh` | the axes of the method; `none` and `uniform` where a record has no such axis, empty for dense |
| `sparsity` | share of FF neurons dropped; NaN where it is one number per layer |
| `metric` | its name in the record, without a length suffix |
| `prompt_length`, `generation_length` | in tokens, of metrics that have a suffix `_pP_gG` or a single pair of lengths; else NaN |
| `value`, `stderr` | the numbers of the record; `stderr` is NaN where there is none |
| `samples` | how many samples the value is of |
| `seconds` | of the whole run |
| `dtype`, `protocol`, `decoding`, `limit`, `offset`, `seed`, `batch_size`, `mode`, `device` | from the record; NaN or None where its task has none |
| `griffin-pruning`, `torch`, `transformers`, `lm-eval` | versions |
| `command` | what the run was started with |

Rows may be compared, or one divided by the other, only within one `model` and one `task`.
"""  # noqa: E501 (a table)

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis import labels
from analysis.metrics import order

_SUFFIX = re.compile(r"(?P<name>.+)_p(?P<prompt>\d+)_g(?P<generation>\d+)")
_COUNTS = (
    "samples",
    "skipped_prompts",
    "prompt_tokens",
    "generated_tokens",
    "peak_memory_bytes",
    "dense_peak_memory_bytes",
)

STRINGS = (
    *("run_id", "model", "kind", "task", "method", "family"),
    *("statistic", "selection", "compensation", "budget", "refresh"),
)
COLUMNS = (
    *STRINGS,
    *("sparsity", "metric", "prompt_length", "generation_length", "value", "stderr", "samples", "seconds"),
    *("dtype", "protocol", "decoding", "limit", "offset", "seed", "batch_size", "mode", "device"),
    *("griffin-pruning", "torch", "transformers", "lm-eval", "command"),
)
NUMBERS = (
    "sparsity",
    "prompt_length",
    "generation_length",
    "value",
    "stderr",
    "samples",
    "seconds",
    "limit",
    "offset",
    "seed",
)


def frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The DataFrame that this module describes, sorted, with all its columns also where there is no record."""
    records = sorted(records, key=lambda record: record["run_id"])
    models = _labelled([record["config"]["model"]["name"] for record in records], map(labels.model_part, records))
    tasks = _labelled([record["config"]["task"]["name"] for record in records], map(labels.task_part, records))
    parts = [labels.method_part(record) for record in records]
    families = [labels.family(part) for part in parts]
    # What has no word of its own (the mode, sparsities by layer) is told only where two runs would share a cell.
    cells = [(*place, labels.amount(part)) for *place, part in zip(models, tasks, families, parts, strict=True)]
    families = _labelled(families, map(labels.unnamed, parts), names=cells)
    cells = list(zip(models, tasks, families, map(labels.amount, parts), strict=True))
    families = _never_twice(families, cells, records)
    rows = [
        row
        for record, *words, part in zip(records, models, tasks, families, parts, strict=True)
        for row in _rows(record, *words, part)
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for name in COLUMNS:
        table[name] = table[name].astype("float64" if name in (*NUMBERS, "batch_size") else object)
    keys = pd.DataFrame(
        {
            "place": [f"{row.model}\0{row.kind}\0{row.task}" for row in table.itertuples()],
            "dense": table["family"] != "dense",
            "family": table["family"],
            "sparsity": table["sparsity"],
            "run_id": table["run_id"],
            "metric": [order(name) for name in table["metric"]],
            "lengths": list(zip(table["prompt_length"].fillna(0), table["generation_length"].fillna(0), strict=True)),
        }
    )
    return table.loc[keys.sort_values(list(keys)).index].reset_index(drop=True)


def select(table: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The rows whose columns have these values."""
    for name, value in wanted.items():
        table = table[table[name] == value]
    return table


def _labelled(words: Sequence[str], parts: Any, names: Sequence[Any] | None = None) -> list[str]:
    told = labels.told_apart(words if names is None else names, list(parts))
    return [f"{word} [{more}]" if more else word for word, more in zip(words, told, strict=True)]


def _never_twice(families: list[str], cells: list[Any], records: Sequence[dict[str, Any]]) -> list[str]:
    """Runs that nothing in their records tells apart are told by their id, rather than taken for one."""
    times = Counter(cells)
    return [
        f"{family} [run {record['run_id'][-10:]}]" if times[cell] > 1 else family
        for family, cell, record in zip(families, cells, records, strict=True)
    ]


def _rows(record: dict[str, Any], model: str, task: str, family: str, part: labels.Flat) -> list[dict[str, Any]]:
    config, metrics, environment = record["config"], record["metrics"], record["environment"]
    sparsity = part.get("sparsity", 0.0)
    batch_size = environment.get("batch_size", config.get("batch_size"))  # the environment has what auto came to
    shared = {
        "run_id": record["run_id"],
        "model": model,
        "kind": config["task"]["kind"],
        "task": task,
        "method": f"{family} {labels.amount(part)}".strip(),
        "family": family,
        "statistic": part.get("statistic", ""),
        **{name: part.get(name, "") for name in ("selection", "compensation", "budget", "refresh")},
        "sparsity": float("nan") if isinstance(sparsity, list) else float(sparsity),
        "samples": metrics.get("samples"),
        "seconds": record["timing"].get("seconds"),
        "dtype": config["model"].get("dtype"),
        "protocol": config["task"].get("protocol"),
        "decoding": config["task"].get("decoding"),
        "limit": config.get("limit"),
        "offset": config.get("offset", 0),
        "seed": config.get("seed"),
        "batch_size": None if batch_size == "auto" else batch_size,
        "mode": config.get("mode"),
        "device": environment.get("device"),
        "command": environment.get("command"),
        **{name: environment.get(name) for name in ("griffin-pruning", "torch", "transformers", "lm-eval")},
    }
    return [
        shared | _lengths(name, config["task"]) | {"value": value, "stderr": metrics.get(f"{name}_stderr")}
        for name, value in metrics.items()
        if name not in _COUNTS and not name.endswith("_stderr")
    ]


def _lengths(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """A metric's name without its lengths, and the lengths."""
    found = _SUFFIX.fullmatch(name)
    if found:
        return {
            "metric": found["name"],
            "prompt_length": int(found["prompt"]),
            "generation_length": int(found["generation"]),
        }
    prompts, generations = task.get("prompt_lengths") or [], task.get("generation_lengths") or []
    if task["kind"] == "latency" and len(prompts) == len(generations) == 1:
        return {"metric": name, "prompt_length": prompts[0], "generation_length": generations[0]}
    return {"metric": name, "prompt_length": None, "generation_length": None}
