"""The figures of flocking: heatmaps of relative activations, score curves and Jaccard similarities by layer.

Dimensions: T = tokens shown, M = neurons shown, N = sequences, L = layers, D = FF width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from pipelines.figure_style import COLOURS, LIGHT, NEUTRAL, drawn_in, new_figure, save
from pipelines.records import Sample
from pipelines.tasks.flocking_measures import chance

_LOOKS = {"natural": (COLOURS[2], "o"), "permuted": (COLOURS[3], "s"), "random": (COLOURS[4], "D")}
_SHADES = 16

# measure: (in words, what it is to be seen against)
MEASURES = {
    "jaccard_sequences": ("different sequences", None),
    "jaccard_halves": ("the two halves of a sequence", "jaccard_other_halves"),
    "jaccard_generation": ("a prompt and its generation", "jaccard_other_generation"),
}


def save_figures(folder: Path, samples: Sequence[Sample], rows: Sequence[dict[str, Any]], kept: float) -> list[Path]:
    """Draw all figures of a run as PNG and PDF.

    Args:
        folder: where to.
        samples: the measured sequences, by index, with their arrays.
        rows: as `flocking_measures.layer_table` gives them.
        kept: share of the neurons in a top-k set.

    Returns:
        The PNG files.
    """
    with drawn_in(LIGHT):
        measured = {row["measure"] for row in rows}
        figures = {name: jaccard_figure(rows, name, kept) for name in MEASURES if name in measured}
        figures["scores"] = score_figure(np.stack([sample["arrays"]["natural_scores"] for sample in samples]))
        layers = len(samples[0]["arrays"]["natural_scores"])
        for layer in shown_layers(layers) if panels(samples) else ():
            for ordered in (False, True):
                name = f"heatmap_layer{layer:02d}{'_sorted' if ordered else ''}"
                figures[name] = heatmap_figure(samples, layer, ordered)
        return [save(figure, folder / name) for name, figure in figures.items()]


def shown_layers(layers: int) -> list[int]:
    """Four layers, evenly from the first to the last."""
    return sorted({round(part * (layers - 1) / 3) for part in range(4)})


def panels(samples: Sequence[Sample]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The heatmaps that a run keeps, in words: two texts and the controls of the first. ([L, T, M], scores [L, D])."""
    found = {}
    for sample, letter in zip(samples, "AB", strict=False):
        arrays = sample["arrays"]
        for text, words in (
            ("natural", f"text {letter}"),
            ("permuted", f"text {letter}, permuted"),
            ("random", "random tokens"),
        ):
            if f"{text}_heatmap" in arrays:
                found[words] = (arrays[f"{text}_heatmap"], arrays[f"{text}_scores"])
    order = ("text A", "text B", "text A, permuted", "random tokens")
    return {words: found[words] for words in order if words in found}


def heatmap_figure(samples: Sequence[Sample], layer: int, ordered: bool = False) -> Figure:
    """Relative activations of one layer, tokens down and neurons across: vertical lines are flocking.

    Args:
        samples: by index, with `panels`.
        layer: which.
        ordered: neurons by their score in text A, the same order in all panels; else as the model has them.
    """
    shown = panels(samples)
    first, scores_LD = shown["text A"] if "text A" in shown else next(iter(shown.values()))
    neurons = first.shape[-1]
    place_M = np.argsort(-scores_LD[layer][:neurons], kind="stable") if ordered else np.arange(neurons)
    top = float(np.quantile(first[layer].astype(np.float32), 0.99)) or 1.0
    shades = mpl.colormaps[mpl.rcParams["image.cmap"]].resampled(_SHADES)
    figure, axes = new_figure(height=5.2, nrows=2, ncols=2, sharex=True, sharey=True, squeeze=False)
    image = None
    for axis, (words, (heat_LTM, _)) in zip(axes.flat, shown.items(), strict=False):
        heat_TM = heat_LTM[layer].astype(np.float32)[:, place_M]
        # One pixel per number, also in SVG and PDF; few shades make small files.
        image = axis.imshow(heat_TM, aspect="auto", cmap=shades, vmin=0, vmax=top, interpolation="none")
        axis.set_title(words)
        axis.grid(False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("neuron, by score in text A" if ordered else "neuron")
    for axis in axes[:, 0]:
        axis.set_ylabel("token")
    figure.suptitle(f"layer {layer}", fontsize=9)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.6, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("relative activation |z| / ‖z‖")
    return figure


def score_figure(scores_NLD: np.ndarray) -> Figure:
    """GRIFFIN's scores in falling order, relative to each layer's largest, as the mean of the sequences."""
    figure, axis = new_figure()
    layers, width = scores_NLD.shape[1:]
    largest_NL1 = np.maximum(scores_NLD.max(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    curves_LD = (-np.sort(-scores_NLD, axis=-1) / largest_NL1).mean(axis=0)
    share_D = 100 * (np.arange(width) + 1) / width
    step = max(1, width // 400)
    shades = sns.color_palette("flare", layers)
    for layer in range(layers):
        label = f"layer {layer}" if layer in shown_layers(layers) else None
        axis.plot(share_D[::step], curves_LD[layer][::step], color=shades[layer], linewidth=1, label=label)
    axis.set_xlabel("neurons, in falling order of score (%)")
    axis.set_ylabel("score / largest score")
    axis.set_xlim(0, 100)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.legend()
    return figure


def jaccard_figure(rows: Sequence[dict[str, Any]], measure: str, kept: float) -> Figure:
    """One measure by layer, a line for every kind of text, dotted what it is to be seen against, and random sets.

    Args:
        rows: layer, text, measure, value and stderr.
        measure: one of `MEASURES` that the rows have.
        kept: share of the neurons in a top-k set.
    """
    words, against = MEASURES[measure]
    figure, axis = new_figure(height=3.5)
    for text, (colour, marker) in _LOOKS.items():
        for name, looks in ((measure, {"marker": marker, "label": text}), (against, {"linestyle": ":"})):
            mine = [row for row in rows if row["measure"] == name and row["text"] == text]
            if mine:
                mine.sort(key=lambda row: row["layer"])
                keys = ("layer", "value", "stderr")
                layers, values, errors = (np.array([float(row[key]) for row in mine]) for key in keys)
                axis.plot(layers, values, color=colour, markersize=3.5, **looks)
                axis.fill_between(layers, values - errors, values + errors, color=colour, alpha=0.25, linewidth=0)
    if against:
        axis.plot([], [], color=NEUTRAL, linestyle=":", label="of different sequences")
    axis.axhline(chance(kept), color=NEUTRAL, linestyle="--", linewidth=1.2, label="random sets")
    axis.set_title(words)
    axis.set_xlabel("layer")
    axis.set_ylabel(f"Jaccard similarity of the top {100 * kept:g}%")
    axis.set_ylim(0, 1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
