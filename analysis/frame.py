"""Records as one DataFrame with one row per run and metric. Run folders and W&B give the same DataFrame.

| column | what it is |
|---|---|
| `run_id` | the run folder's name, and the run's id in W&B |
| `model` | the model's name; if runs of this name used different settings of the model, with these: `gemma_7b [dtype=float16]` |
| `kind`, `task` | the kind of task, and its name; if runs of this name were evaluated differently (limit, protocol, decoding, data, ...), with the difference: `xsum [limit=12]` |
| `method` | the method in words: `dense`, `griffin 50%` |
| `family` | the method without its sparsity: `griffin`; it has one colour in all figures |
| `statistic`, `selection`, `compensation`, `budget`, `refresh`, `verification`, `draft_tokens`, `draft_vocabulary`, `prompt_lookup`, `verification_threshold` | the settings of the method; empty for dense |
| `sparsity` | share of FF neurons dropped; NaN if every layer has its own |
| `metric` | its name in the record, without a suffix for lengths |
| `prompt_length`, `generation_length` | in tokens, for metrics with a suffix `_pP_gG` and for tasks with one pair of lengths; else NaN |
| `value`, `stderr` | the numbers of the record; `stderr` is NaN if there is none |
| `samples` | number of samples that the value is computed from |
| `seconds` | duration of the whole run |
| `dtype`, `protocol`, `decoding`, `limit`, `offset`, `seed`, `batch_size`, `mode`, `device` | from the record; NaN or None if the run has no such setting |
| `griffin-pruning`, `torch`, `transformers`, `lm-eval` | versions |
| `command` | the command that started the run |

Rows may be compared, or one divided by the other, only within one `model` and one `task`.
"""  # noqa: E501 (a table)

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.labels import Labels, labels
from analysis.metrics import metric, order

# The kinds of task that measure quality, and their titles.
QUALITY = {
    "generation": "Generation",
    "code": "Code generation",
    "classification": "Classification",
    "question_answering": "Question answering",
    "perplexity": "Perplexity",
    "fidelity": "Fidelity to the dense model",
}

_SUFFIX = re.compile(r"(?P<name>.+)_p(?P<prompt>\d+)_g(?P<generation>\d+)")
# These metrics say how much was run, and not how well: the DataFrame has no rows for them.
_COUNTS = (
    "samples",
    "skipped_prompts",
    "prompt_tokens",
    "generated_tokens",
    "peak_memory_bytes",
    "dense_peak_memory_bytes",
)

_METHOD = (
    *("statistic", "selection", "compensation", "budget", "refresh"),
    *("verification", "draft_tokens", "draft_vocabulary", "prompt_lookup", "verification_threshold"),
)
_VERSIONS = ("griffin-pruning", "torch", "transformers", "lm-eval")
COLUMNS = (
    *("run_id", "model", "kind", "task", "method", "family", *_METHOD),
    *("sparsity", "metric", "prompt_length", "generation_length", "value", "stderr", "samples", "seconds"),
    *("dtype", "protocol", "decoding", "limit", "offset", "seed", "batch_size", "mode", "device"),
    *(*_VERSIONS, "command"),
)
_NUMBERS = (
    *("sparsity", "prompt_length", "generation_length", "value", "stderr", "samples", "seconds"),
    *("limit", "offset", "seed", "batch_size"),
)


def frame(records: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The sorted DataFrame of some records in today's form. Without records it still has all its columns."""
    records = sorted(records, key=lambda record: record["run_id"])
    rows = [row for record, names in zip(records, labels(records), strict=True) for row in _rows(record, names)]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    for name in COLUMNS:
        table[name] = table[name].astype("float64" if name in _NUMBERS else object)
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


def headlines(table: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """Per model and task that measures quality, the rows of the task's first metric; `better` and `label` are its."""
    table = table[table["kind"].isin(QUALITY) & table["stderr"].notna() & table["prompt_length"].isna()]
    found = []
    for (model, task), mine in table.groupby(["model", "task"], sort=True):
        first = min(mine["metric"], key=order)
        shown = metric(first)
        mine = mine[mine["metric"] == first].assign(better=shown.better, label=shown.label)
        found.append(((str(model), str(task)), mine))
    return found


def _rows(record: dict[str, Any], names: Labels) -> list[dict[str, Any]]:
    method, evaluation = record["method"], record["evaluation"]
    config, metrics, environment = record["config"], record["metrics"], record["environment"]
    sparsity = method["sparsity"]
    # For batch_size=auto the environment holds the size that fitted into memory.
    batch_size = environment.get("batch_size", evaluation.get("batch_size"))
    shared = {
        "run_id": record["run_id"],
        "model": names.model,
        "kind": config["task"]["kind"],
        "task": names.task,
        "method": names.method,
        "family": names.family,
        **{name: method.get(name, "") for name in _METHOD},
        "sparsity": float("nan") if isinstance(sparsity, list) else float(sparsity),
        "samples": metrics.get("samples"),
        "seconds": record["timing"].get("seconds"),
        "dtype": evaluation.get("model.dtype"),
        "protocol": evaluation.get("task.protocol"),
        "decoding": evaluation.get("task.decoding"),
        **{name: evaluation.get(name) for name in ("limit", "offset", "seed", "device")},
        "batch_size": None if batch_size == "auto" else batch_size,
        "mode": method.get("mode"),
        "command": environment.get("command"),
        **{name: environment.get(name) for name in _VERSIONS},
    }
    return [
        shared | _lengths(name, config["task"]) | {"value": value, "stderr": metrics.get(f"{name}_stderr")}
        for name, value in metrics.items()
        if name not in _COUNTS and not name.endswith("_stderr")
    ]


def _lengths(name: str, task: dict[str, Any]) -> dict[str, Any]:
    """A metric's name without its suffix, and the prompt and generation length that it was measured at."""
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
