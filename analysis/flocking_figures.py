"""Figures of flocking, drawn from the arrays and tables in the run folders."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from analysis.drawing import Drawing, Group, file_name
from analysis.runs import Runs
from analysis.samples import read_samples
from pipelines.records import Sample, read_arrays
from pipelines.tasks.flocking_figures import MEASURES, heatmap_figure, jaccard_figure, score_figure, shown_layers

_CAPTIONS = {
    "jaccard_sequences": "How alike the top-k sets of different texts are, averaged over all pairs",
    "jaccard_halves": "How alike the top-k sets of a text's first and second half are, and those of different texts",
    "jaccard_generation": "How alike the top-k sets of a text and of what the dense model continues it with are, "
    "and with what it continues other texts with",
}


def flocking(runs: Runs, labels: dict[str, tuple[str, str]]) -> Group:
    """Jaccard curves, scores and heatmaps of every flocking run. Runs that were read from W&B have curves only.

    Args:
        runs: all runs.
        labels: run id -> (model, task), as the tables name them.
    """
    drawings: list[Drawing] = []
    for record in runs.records:
        if record["config"]["task"]["kind"] == "flocking":
            drawings += _drawings(record, runs, labels[record["run_id"]])
    note = (
        "Jaccard similarities compare the top-k sets of a layer; bands: ± standard error. Permuted: the same tokens in "
        "random order. Random: tokens drawn from the vocabulary. Scores are GRIFFIN's, of all neurons of a layer in "
        "falling order. Heatmaps show the first tokens and neurons, every token's row divided by its norm: upright "
        "lines are flocking, a neuron that is strong for token after token."
    )
    return Group("Flocking", drawings, "python -m pipelines.run task=flocking", note)


def _drawings(record: dict[str, Any], runs: Runs, label: tuple[str, str]) -> Iterator[Drawing]:
    run_id, kept = record["run_id"], record["config"]["task"]["kept"]
    model, task = label
    place = model if task == "flocking" else f"{model}, {task}"
    rows = _layer_rows(runs, run_id)
    for measure, (words, _) in MEASURES.items():
        if any(row["measure"] == measure for row in rows):
            yield Drawing(
                file_name("flocking", measure, model, task),
                f"{words[0].upper()}{words[1:]}, {place}",
                f"{_CAPTIONS[measure]}.",
                (run_id,),
                functools.partial(jaccard_figure, rows, measure, kept),
            )
    samples = _samples(runs.folders.get(run_id))
    if not samples:
        return
    scores = np.stack([sample["arrays"]["natural_scores"] for sample in samples])
    yield Drawing(
        file_name("flocking_scores", model, task),
        f"Scores, {place}",
        f"The mean of {len(samples)} texts.",
        (run_id,),
        functools.partial(score_figure, scores),
    )
    if "natural_heatmap" not in samples[0]["arrays"]:
        return
    for layer in shown_layers(scores.shape[1]):
        for ordered in (False, True):
            order = ", neurons sorted by their score in text A" if ordered else ""
            yield Drawing(
                file_name("flocking_heatmap", model, task, f"layer{layer:02d}", *(["sorted"] if ordered else [])),
                f"Relative activations, {place}, layer {layer}{order}",
                "",
                (run_id,),
                functools.partial(heatmap_figure, samples, layer, ordered),
            )


def _layer_rows(runs: Runs, run_id: str) -> list[dict[str, Any]]:
    """The measures by layer, from W&B or from layers.csv in the run folder; empty if there are none."""
    if run_id in runs.layers:
        return runs.layers[run_id]
    folder = runs.folders.get(run_id)
    if folder is None or not (folder / "layers.csv").is_file():
        return []
    with (folder / "layers.csv").open(encoding="utf-8", newline="") as file:
        found: list[dict[str, Any]] = list(csv.DictReader(file))
    return [row | {key: float(row[key]) for key in ("layer", "value", "stderr")} for row in found]


def _samples(folder: Path | None) -> list[Sample]:
    """The samples that have arrays, sorted by index."""
    found = []
    for sample in sorted(read_samples(folder), key=lambda sample: int(sample["index"])):
        arrays = read_arrays(folder / sample["arrays"]) if folder and "arrays" in sample else None
        if arrays is not None:
            found.append(sample | {"arrays": arrays})
    return found
