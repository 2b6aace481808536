"""Records and run folders as the pipeline writes them, with any numbers and without running a model."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from griffin import Method
from pipelines.method_keys import AXES
from pipelines.methods import _flat
from pipelines.records import digests
from pipelines.tasks.flocking_measures import MEASURES, TEXTS

Record = dict[str, Any]

LAYERS, NEURONS, TOKENS = 1, 24, 12  # of the arrays of a flocking run

_TASKS: dict[str, dict[str, Any]] = {
    "generation": {"name": "xsum", "decoding": "greedy", "shots": 1, "data_files": None, "shots_file": None},
    "classification": {"name": "piqa", "protocol": "paper", "data_files": None},
    "perplexity": {"name": "perplexity", "prompt_lengths": [64, 128], "generation_lengths": [32]},
    "fidelity": {"name": "fidelity", "shots": 1},
    "latency": {"name": "latency", "prompt_lengths": [64], "generation_lengths": [32]},
    "flocking": {"name": "flocking", "kept": 0.5},
}


def record(run_id: str, kind: str = "generation", sparsity: Any = 0.5, **more: Any) -> Record:
    """A record with its method and evaluation; the arguments are those of `_unsaid`."""
    unsaid = _unsaid(run_id, kind, sparsity, **more)
    config, environment = unsaid["config"], unsaid["environment"]
    method = Method(**{key: value for key, value in config.items() if key in AXES})
    shared = " shared" if config["shared_experts"] and not method.dense else ""
    entry = {"label": method.label.replace(method.family, method.family + shared), "family": method.family + shared}
    held = {} if method.dense else {key: config[key] for key in ("mode", "shared_experts")}
    entry |= (method.settings if method.dense else asdict(method) | {"sparsity": sparsity}) | held
    assisted = {key: config[key] for key in ("assistance", "assistant") if key in config}
    entry |= assisted
    apart = {
        *(() if kind == "latency" else ("offload_dense",)),
        *AXES,
        *assisted,
        "mode",
        "shared_experts",
        "output_dir",
        "tags",
        "wandb",
        "grid",
        "device",
    }
    evaluation = {key: value for key, value in config.items() if key not in apart}
    evaluation["model"] = {key: value for key, value in config["model"].items() if key != "licence_gate"}
    evaluation["task"] = config["task"] | environment.get("data", {})
    machine = ("device", "platform", "cpus") if kind == "latency" else ("device",)
    evaluation |= {key: environment.get(key) for key in machine}
    return unsaid | {"method": entry, "evaluation": _flat(evaluation)}


def _unsaid(run_id: str, kind: str, sparsity: Any, **more: Any) -> Record:
    """A record that does not say its method and evaluation yet.

    Args:
        run_id: its name.
        kind: of its task.
        sparsity: 0 is dense.
        more: `metrics`; any root key of the configuration; `task_KEY`, `model_KEY`, `environment_KEY`.
    """
    metrics = more.pop("metrics", {"rouge1": 20.0, "rouge1_stderr": 1.0, "samples": 4})
    config: dict[str, Any] = {
        "model": {"name": "gemma_7b", "source": "hub", "dtype": "bfloat16", "licence_gate": None},
        "task": {"kind": kind, **copy.deepcopy(_TASKS[kind])},
        "statistic": "griffin",
        "selection": "topk",
        "sparsity": sparsity,
        "mode": "compact",
        "shared_experts": False,
        "offload_dense": False,
        "batch_size": 1,
        "limit": None,
        "seed": 0,
        "device": "auto",
        "output_dir": "outputs",
        "tags": [],
        "wandb": {"mode": "disabled"},
    }
    environment = {"device": "cpu", "cpus": 2, "platform": "Linux", "torch": "2.13.0", "command": "python -m x 'y'"}
    for key, value in more.items():
        place, _, name = key.partition("_")
        if place in ("task", "model"):
            config[place][name] = value
        elif place == "environment":
            environment[name] = value
        else:
            config[key] = value
    return {
        "run_id": run_id,
        "status": "finished",
        "config": config,
        "metrics": metrics,
        "timing": {"load_seconds": 1.0, "seconds": 2.0},
        "environment": environment,
    }


def score(value: float, error: float = 0.5, name: str = "rouge1") -> dict[str, float]:
    """The metrics of a run with one score."""
    return {name: value, f"{name}_stderr": error, "samples": 4}


def write_run(root: Path, record: Record) -> Path:
    """The run folder of a record, with samples that agree with it."""
    folder, metrics = root / record["run_id"], record["metrics"]
    folder.mkdir(parents=True)
    scores = {name: value for name, value in metrics.items() if f"{name}_stderr" in metrics}
    samples: list[dict[str, Any]] = [{"index": index, **scores} for index in range(metrics["samples"])]
    if record["config"]["task"]["kind"] == "flocking":
        _write_arrays(folder, samples)
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    record = {"digests": digests(metrics, folder / "samples.jsonl")} | record
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


def layer_rows() -> list[dict[str, Any]]:
    """The measures by layer of a flocking run."""
    return [
        {"layer": layer, "text": text, "measure": measure, "value": 0.5 + layer / 10, "stderr": 0.1}
        for measure in MEASURES
        for text in TEXTS
        for layer in range(LAYERS)
    ]


def _write_arrays(folder: Path, samples: list[dict[str, Any]]) -> None:
    """The files that only a flocking run has."""
    rows = layer_rows()
    lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
    (folder / "layers.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "arrays").mkdir()
    random = np.random.default_rng(0)
    for sample in samples:
        sample["arrays"] = f"arrays/{sample['index']}.npz"
        arrays = {f"{text}_scores": random.random((LAYERS, NEURONS)) for text in TEXTS}
        arrays |= {f"{text}_heatmap": random.random((LAYERS, TOKENS, NEURONS)) for text in TEXTS}
        np.savez(folder / sample["arrays"], **arrays)


def few() -> list[Record]:
    """A dense and two pruned generation runs, and a latency run: three figures."""
    fast = {"decode_speedup": 1.4, "decode_limit": 1.5, "decode_fraction_of_limit": 0.93, "samples": 4}
    return [
        record("xsum-dense", sparsity=0, metrics=score(20.0)),
        record("xsum-griffin-50", metrics=score(17.0)),
        record("xsum-magnitude-50", statistic="magnitude", metrics=score(5.0)),
        record("latency-griffin-50", "latency", metrics=fast),
    ]


def every_kind() -> list[Record]:
    """Runs of every kind of task: all tables and figures have data."""
    perplexity = [
        record(
            f"perplexity-{sparsity}",
            "perplexity",
            sparsity=sparsity,
            metrics=score(9.0, name="perplexity")
            | {"perplexity_p64_g32": 9.5, "perplexity_p64_g32_stderr": 0.5, "perplexity_p128_g32": 8.5}
            | {"perplexity_p128_g32_stderr": 0.5},
        )
        for sparsity in (0, 0.25, 0.5)
    ]
    flocking = {f"{measure}_{text}": 0.5 for measure in MEASURES for text in TEXTS}
    flocking |= {f"{name}_stderr": 0.1 for name in flocking}
    return [
        *few(),
        record("latency-magnitude-50", "latency", statistic="magnitude", metrics=few()[-1]["metrics"]),
        *perplexity,
        record("piqa-dense", "classification", sparsity=0, metrics=score(0.5, 0.1, "acc")),
        record("fidelity-dense", "fidelity", sparsity=0, metrics=score(0.0, 0.0, "kl")),
        record("flocking-dense", "flocking", sparsity=0, metrics=flocking | {"samples": 2}),
    ]


def write_samples(folder: Path, samples: list[dict[str, Any]]) -> None:
    """Other samples of a run, which its record's digests know."""
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples), encoding="utf-8")
    written = json.loads((folder / "record.json").read_text(encoding="utf-8"))
    written["digests"] = digests(written["metrics"], folder / "samples.jsonl")
    (folder / "record.json").write_text(json.dumps(written), encoding="utf-8")
