"""Records for tests of what is made of them: as the pipeline writes them, with any numbers."""

from __future__ import annotations

import copy
from typing import Any

Record = dict[str, Any]

_TASKS: dict[str, dict[str, Any]] = {
    "generation": {"name": "xsum", "decoding": "greedy", "shots": 1, "data_files": None, "shots_file": None},
    "classification": {"name": "piqa", "protocol": "paper", "data_files": None},
    "perplexity": {"name": "perplexity", "prompt_lengths": [64, 128], "generation_lengths": [32]},
    "fidelity": {"name": "fidelity", "shots": 1},
    "latency": {"name": "latency", "prompt_lengths": [64], "generation_lengths": [32]},
}


def record(run_id: str, kind: str = "generation", sparsity: Any = 0.5, **more: Any) -> Record:
    """A record of a finished run.

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
        "batch_size": 1,
        "limit": None,
        "seed": 0,
        "device": "auto",
        "output_dir": "outputs",
        "tags": [],
        "wandb": {"mode": "disabled"},
    }
    environment = {"device": "cpu", "cpus": 2, "platform": "Linux", "torch": "2.13.0", "command": "python -m x"}
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
