"""Records and run folders as the pipeline writes them, with any numbers and without running a model."""

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from griffin import Method
from pipelines.method_keys import AXES
from pipelines.records import append_samples, digests
from pipelines.tasks.flocking_figures import MEASURES, TEXTS

Record = dict[str, Any]

LAYERS, NEURONS, TOKENS = 1, 24, 12  # of the arrays of a flocking run
COMMAND = "python -m x 'y'"
FAST = {"decode_speedup": 1.4, "decode_limit": 1.5, "decode_fraction_of_limit": 0.93, "samples": 4}

_TASKS: dict[str, dict[str, Any]] = {
    "generation": {"name": "xsum", "decoding": "greedy", "shots": 1, "data_files": None, "shots_file": None},
    "classification": {"name": "piqa", "protocol": "paper", "data_files": None},
    "perplexity": {"name": "perplexity", "prompt_lengths": [64, 128], "generation_lengths": [32]},
    "fidelity": {"name": "fidelity", "shots": 1},
    "latency": {"name": "latency", "prompt_lengths": [64], "generation_lengths": [32]},
    "flocking": {"name": "flocking", "kept": 0.5},
}
_COMPARED = {"seed": 0, "limit": None, "batch_size": 1, "offload_dense": False}
_NEVER_COMPARED = {"device": "auto", "output_dir": "outputs", "tags": [], "wandb": {"mode": "disabled"}}
_HELD = {"mode": "compact", "shared_experts": False}


def record(run_id: str, kind: str = "generation", sparsity: Any = 0.5, **more: Any) -> Record:
    """A record.

    Args:
        run_id: its name.
        kind: of its task.
        sparsity: 0 is dense.
        more: `metrics`; any root key of the configuration; `task_KEY`, `model_KEY`, `environment_KEY`.
    """
    metrics = more.pop("metrics", None) or score(20.0, 1.0)
    config: dict[str, Any] = {"statistic": "griffin", "sparsity": sparsity, **_COMPARED, **_NEVER_COMPARED, **_HELD}
    parts: dict[str, dict[str, Any]] = {
        "model": {"name": "gemma_7b", "source": "hub", "dtype": "bfloat16"},
        "task": {"kind": kind, **copy.deepcopy(_TASKS[kind])},
        "environment": {"device": "cpu", "cpus": 2, "platform": "Linux", "torch": "2.13.0", "command": COMMAND},
    }
    for key, value in more.items():
        place, _, name = key.partition("_")
        if place in parts:
            parts[place][name] = value
        else:
            config[key] = value
    environment = parts.pop("environment")
    method = Method(**{key: value for key, value in config.items() if key in AXES})
    shared = " shared" if config["shared_experts"] and not method.dense else ""
    held = {} if method.dense else {key: config[key] for key in _HELD}
    assisted = {key: config[key] for key in ("assistance", "assistant") if key in config}
    settings = method.settings if method.dense else asdict(method) | {"sparsity": sparsity}
    apart = {*AXES, *assisted, *_HELD, *_NEVER_COMPARED, *(() if kind == "latency" else ("offload_dense",))}
    evaluation = {key: value for key, value in config.items() if key not in apart}
    evaluation |= {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    evaluation |= {f"task.{key}": value for key, value in environment.get("data", {}).items()}
    machine = ("device", "platform", "cpus")[: 3 if kind == "latency" else 1]
    evaluation |= {key: environment[key] for key in machine}
    label, family = method.label.replace(method.family, method.family + shared), method.family + shared
    return {
        "run_id": run_id,
        "status": "finished",
        "config": config | parts,
        "method": {"label": label, "family": family, **settings, **held, **assisted},
        "evaluation": evaluation,
        "metrics": metrics,
        "timing": {"load_seconds": 1.0, "seconds": 2.0},
        "environment": environment,
    }


def records(*changes: dict[str, Any], **shared: Any) -> list[Record]:
    """Records named a, b, c, ...: one for each change."""
    return [record(name, **shared | change) for name, change in zip("abcdefghij", changes, strict=False)]


def score(value: float, error: float = 0.5, name: str = "rouge1") -> dict[str, float]:
    """The metrics of a run with one score."""
    return {name: value, f"{name}_stderr": error, "samples": 4}


def scores(**values: float) -> dict[str, float]:
    """The metrics of a run with several scores."""
    return {key: number for name, value in values.items() for key, number in score(value, name=name).items()}


def write_run(root: Path, record: Record, samples: list[dict[str, Any]] | None = None) -> Path:
    """The run folder of a record, with its samples, or with some that agree with it."""
    folder, metrics = root / record["run_id"], record["metrics"]
    folder.mkdir(parents=True)
    if samples is None:
        scores = {name: value for name, value in metrics.items() if f"{name}_stderr" in metrics}
        samples = [{"index": index, **scores} for index in range(metrics["samples"])]
    if record["config"]["task"]["kind"] == "flocking":
        pd.DataFrame(layer_rows()).to_csv(folder / "layers.csv", index=False)
        random = np.random.default_rng(0).random
        for sample in samples:
            sample["arrays"] = {f"{text}_scores": random((LAYERS, NEURONS)) for text in TEXTS}
            sample["arrays"] |= {f"{text}_heatmap": random((LAYERS, TOKENS, NEURONS)) for text in TEXTS}
    append_samples(folder / "samples.jsonl", samples)
    change(folder, **{"digests": digests(metrics, folder / "samples.jsonl")} | record)
    return folder


def change(folder: Path, **values: Any) -> None:
    """Other values of a record that a run folder has, at places like `metrics__rouge1`; `...` takes a value away."""
    path = folder / "record.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for place, value in values.items():
        *where, key = place.split("__")
        part = written
        for name in where:
            part = part[name]
        part[key] = value
        if value is ...:
            del part[key]
    path.write_text(json.dumps(written), encoding="utf-8")


def layer_rows() -> list[dict[str, Any]]:
    """The measures by layer of a flocking run."""
    return [
        {"layer": layer, "text": text, "measure": measure, "value": 0.5 + layer / 10, "stderr": 0.1}
        for measure in MEASURES
        for text in TEXTS
        for layer in range(LAYERS)
    ]


def few() -> list[Record]:
    """A dense and two pruned generation runs, and a latency run: three figures."""
    return [
        record("xsum-dense", sparsity=0, metrics=score(20.0)),
        record("xsum-griffin-50", metrics=score(17.0)),
        record("xsum-magnitude-50", statistic="magnitude", metrics=score(5.0)),
        record("latency-griffin-50", "latency", metrics=FAST),
    ]


def every_kind() -> list[Record]:
    """Runs of every kind of task: all tables and figures have data."""
    perplexity = scores(perplexity=9.0, perplexity_p64_g32=9.5, perplexity_p128_g32=8.5)
    flocking = {f"{measure}_{text}": 0.5 for measure in MEASURES for text in TEXTS}
    flocking |= {f"{name}_stderr": 0.1 for name in flocking}
    return [
        *few(),
        record("latency-magnitude-50", "latency", statistic="magnitude", metrics=FAST),
        *(record(f"perplexity-{share}", "perplexity", share, metrics=perplexity) for share in (0, 0.25, 0.5)),
        record("piqa-dense", "classification", sparsity=0, metrics=score(0.5, 0.1, "acc")),
        record("fidelity-dense", "fidelity", sparsity=0, metrics=score(0.0, 0.0, "kl")),
        record("flocking-dense", "flocking", sparsity=0, metrics=flocking | {"samples": 2}),
    ]
