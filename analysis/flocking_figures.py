"""Figures of flocking, drawn from the arrays and tables in the run folders."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from analysis.drawing import Drawing, Group, drawing
from analysis.labels import labels
from analysis.runs import Runs
from pipelines.records import whole_samples
from pipelines.tasks.flocking_figures import figures

_CAPTIONS = {
    "jaccard_sequences": "How alike the top-k sets of different texts are, averaged over all pairs.",
    "jaccard_halves": "How alike the top-k sets of a text's first and second half are, and those of different texts.",
    "jaccard_generation": "How alike the top-k sets of a text and of what the dense model continues it with are, "
    "and with what it continues other texts with.",
}


def flocking(runs: Runs) -> Group:
    """Jaccard curves, scores and heatmaps of every flocking run. Runs that were read from W&B have curves only."""
    drawings: list[Drawing] = []
    for record, names in zip(runs.records, labels(runs.records), strict=True):
        if record["config"]["task"]["kind"] == "flocking":
            drawings += _drawings(record, runs, names.model, names.task)
    note = (
        "Jaccard similarities compare the top-k sets of a layer; bands: ± standard error. Permuted: the same tokens in "
        "random order. Random: tokens drawn from the vocabulary. Scores are GRIFFIN's, of all neurons of a layer in "
        "falling order. Heatmaps show the first tokens and neurons, every token's row divided by its norm: upright "
        "lines are flocking, a neuron that is strong for token after token."
    )
    return Group("Flocking", drawings, "python -m pipelines.run task=flocking", note)


def _drawings(record: dict[str, Any], runs: Runs, model: str, task: str) -> Iterator[Drawing]:
    run_id, kept = record["run_id"], record["config"]["task"]["kept"]
    place = model if task == "flocking" else f"{model}, {task}"
    folder = runs.folders.get(run_id)
    whole = whole_samples(folder / "samples.jsonl")[0] if folder else []
    samples = sorted((sample for sample in whole if "arrays" in sample), key=lambda sample: sample["index"])
    captions = _CAPTIONS | {"scores": f"The mean of {len(samples)} texts."}
    for (name, *more), title, draw in figures(samples, _layer_rows(runs, run_id), kept):
        words, caption = (f"flocking_{name}", model, task, *more), captions.get(name, "")
        yield drawing(words, title.format(place), [run_id], draw, caption)


def _layer_rows(runs: Runs, run_id: str) -> list[dict[str, Any]]:
    """The measures by layer, from W&B or from layers.csv in the run folder; empty if there are none."""
    folder = runs.folders.get(run_id)
    if folder is None or not (folder / "layers.csv").is_file():
        return runs.layers.get(run_id, [])
    return pd.read_csv(folder / "layers.csv").to_dict("records")
