"""Figures of flocking, drawn from the arrays and tables in the run folders."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from analysis.drawing import Drawing, Group, drawing
from analysis.labels import labels
from analysis.runs import Runs
from pipelines.records import whole_samples
from pipelines.tasks.flocking_figures import COMPARED, heatmap_figure, jaccard_figure, score_figure, shown_layers

_CAPTIONS = {
    "jaccard_sequences": "How alike the top-k sets of different texts are, averaged over all pairs",
    "jaccard_halves": "How alike the top-k sets of a text's first and second half are, and those of different texts",
    "jaccard_generation": "How alike the top-k sets of a text and of what the dense model continues it with are, "
    "and with what it continues other texts with",
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
    rows = _layer_rows(runs, run_id)
    for measure, (words, _) in COMPARED.items():
        if any(row["measure"] == measure for row in rows):
            title = f"{words[0].upper()}{words[1:]}, {place}"
            draw = functools.partial(jaccard_figure, rows, measure, kept)
            yield drawing(("flocking", measure, model, task), title, [run_id], draw, f"{_CAPTIONS[measure]}.")
    folder = runs.folders.get(run_id)
    whole = whole_samples(folder / "samples.jsonl")[0] if folder else []
    samples = sorted((sample for sample in whole if "arrays" in sample), key=lambda sample: sample["index"])
    if not samples:
        return
    scores = np.stack([sample["arrays"]["natural_scores"] for sample in samples])
    draw = functools.partial(score_figure, scores)
    caption = f"The mean of {len(samples)} texts."
    yield drawing(("flocking_scores", model, task), f"Scores, {place}", [run_id], draw, caption)
    if "natural_heatmap" not in samples[0]["arrays"]:
        return
    for layer in shown_layers(scores.shape[1]):
        for ordered in (False, True):
            order = ", neurons sorted by their score in text A" if ordered else ""
            name = ("flocking_heatmap", model, task, f"layer{layer:02d}", *(["sorted"] if ordered else []))
            title = f"Relative activations, {place}, layer {layer}{order}"
            yield drawing(name, title, [run_id], functools.partial(heatmap_figure, samples, layer, ordered))


def _layer_rows(runs: Runs, run_id: str) -> list[dict[str, Any]]:
    """The measures by layer, from W&B or from layers.csv in the run folder; empty if there are none."""
    folder = runs.folders.get(run_id)
    if folder is None or not (folder / "layers.csv").is_file():
        return runs.layers.get(run_id, [])
    return pd.read_csv(folder / "layers.csv").to_dict("records")
