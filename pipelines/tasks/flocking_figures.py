"""Flocking in numbers and figures: how alike the sets of a sequence's strongest neurons are, layer by layer; heatmaps
of relative activations and score curves.

Dimensions: T = tokens shown, M = neurons shown, N = sequences, L = layers, D = FF width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure

from pipelines.figure_style import COLOURS, NEUTRAL, new_figure
from pipelines.records import Sample, mean_and_stderr

Plan = tuple[tuple[str, ...], str, Callable[[], Figure]]

# A text as it is; the same tokens in random order; tokens drawn at random.
TEXTS = ("natural", "permuted", "random")
# What is compared, per text. A half has half the tokens, and a generation has few, so each is also compared with
# those of the other sequences: what they share beyond that is the sequence's own.
MEASURES = (
    "jaccard_sequences",  # different sequences
    "jaccard_halves",  # the halves of one sequence
    "jaccard_other_halves",  # the first half of one, the second of another
    "jaccard_generation",  # a prompt and what the dense model continues it with
    "jaccard_other_generation",  # a prompt and what another is continued with
    "kept_energy",  # share of the squared relative activations that the sequence's top-k set holds
    "token_energy",  # the same of every token's own top-k set
)
_PAIRS = {
    "jaccard_sequences": ("", ""),
    "jaccard_other_halves": ("_first", "_second"),
    "jaccard_other_generation": ("", "_generation"),
}

_LOOKS = {"natural": (COLOURS[2], "o"), "permuted": (COLOURS[3], "s"), "random": (COLOURS[4], "D")}
_SHADES = 16

# The panels of a heatmap: which sequence of a run, and which of its texts.
_PANELS = {
    "text A": (0, "natural"),
    "text B": (1, "natural"),
    "text A, permuted": (0, "permuted"),
    "random tokens": (0, "random"),
}

# measure: (in words, what it is to be seen against)
COMPARED = {
    "jaccard_sequences": ("different sequences", None),
    "jaccard_halves": ("the two halves of a sequence", "jaccard_other_halves"),
    "jaccard_generation": ("a prompt and its generation", "jaccard_other_generation"),
}


def jaccard(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """|A and B| / |A or B| over the last axis of boolean sets; two empty sets are equal."""
    union = (one | other).sum(axis=-1)
    return np.where(union > 0, (one & other).sum(axis=-1) / np.maximum(union, 1), 1.0)


def chance(kept: float) -> float:
    """The Jaccard similarity of two sets drawn at random, each of a share `kept` of the neurons, in wide layers."""
    return kept / (2 - kept)


def between_sequences(one_NLD: np.ndarray, other_NLD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard similarity of one sequence's set and another's: the mean over all pairs, and its standard error.

    A pair is a row of the one boolean array, which has 2 or more, and another row of the other. Pairs share sequences,
    so the error is the jackknife's: from the means without each sequence in turn.

    Returns:
        Means and errors of each layer and, last, of the mean of all layers: [L + 1]; errors are 0 for two sequences.
    """
    count = len(one_NLD)
    shared_LNN = np.einsum("nld,mld->lnm", one_NLD.astype(np.float32), other_NLD.astype(np.float32), optimize=True)
    union_LNN = one_NLD.sum(axis=-1).T[:, :, None] + other_NLD.sum(axis=-1).T[:, None, :] - shared_LNN
    each_LNN = np.where(union_LNN > 0, shared_LNN / np.maximum(union_LNN, 1), 1.0).astype(np.float64)
    each_LNN = np.concatenate([each_LNN, each_LNN.mean(axis=0, keepdims=True)])
    different = ~np.eye(count, dtype=bool)
    means = each_LNN[:, different].mean(axis=1)
    if count < 3:
        return means, np.zeros_like(means)
    # The sum over the pairs without a sequence is that of all, less its row and its column.
    each_LNN[:, ~different] = 0.0
    sums_LN = each_LNN.sum(axis=(1, 2))[:, None] - each_LNN.sum(axis=1) - each_LNN.sum(axis=2)
    without = (sums_LN / ((count - 1) * (count - 2))).T
    return means, np.sqrt((count - 1) / count * ((without - means) ** 2).sum(axis=0))


def sets_of(samples: Sequence[Sample], name: str) -> np.ndarray:
    """[N, L, D] boolean: the sets of a run's sequences that have this name in their arrays."""
    packed = np.stack([sample["arrays"][name] for sample in samples])
    return np.unpackbits(packed, axis=-1).astype(bool)


def layer_table(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Every measure of every text by layer: rows of layer, text, measure, value, stderr."""
    return [
        {"layer": layer, "text": text, "measure": measure, "value": value, "stderr": error}
        for text, measure in itertools.product(TEXTS, MEASURES)
        for layer, (value, error) in enumerate(_by_layer(samples, text, measure)[:-1])
    ]


def overall(samples: Sequence[Sample]) -> dict[str, float]:
    """Every measure as the mean of all layers, `<measure>_<text>`, with its standard error."""
    values: dict[str, float] = {}
    for text, measure in itertools.product(TEXTS, MEASURES):
        for value, error in _by_layer(samples, text, measure)[-1:]:
            values |= {f"{measure}_{text}": value, f"{measure}_{text}_stderr": error}
    return values


def _by_layer(samples: Sequence[Sample], text: str, measure: str) -> list[tuple[float, float]]:
    """(value, standard error) of each layer, and last of the mean of all layers; empty where nothing was measured."""
    if measure in _PAIRS:
        names = [f"{text}_sets{part}" for part in _PAIRS[measure]]
        if len(samples) < 2 or any(name not in samples[0]["arrays"] for name in names):
            return []
        means, errors = between_sequences(*(sets_of(samples, name) for name in names))
        return [(float(mean), float(error)) for mean, error in zip(means, errors, strict=True)]
    lists = [sample[measure][text] for sample in samples if text in sample[measure]]
    if not lists:
        return []
    columns = [*zip(*lists, strict=True), [math.fsum(values) / len(values) for values in lists]]
    return [mean_and_stderr(list(column)) for column in columns]


def figures(samples: Sequence[Sample], rows: Sequence[dict[str, Any]], kept: float) -> Iterator[Plan]:
    """The figures of a run: the words of each one's name, its title with a place for what it is of, how it is drawn.

    The samples are the measured sequences, by index, with their arrays, the rows are those of `layer_table`, and
    `kept` is the share of the neurons in a top-k set. The heatmaps are of the middle layer.
    """
    for name, (words, _) in COMPARED.items():
        if any(row["measure"] == name for row in rows):
            yield (name,), f"{words[0].upper()}{words[1:]}, {{}}", partial(jaccard_figure, rows, name, kept)
    if not samples:
        return
    scores_NLD = np.stack([sample["arrays"]["natural_scores"] for sample in samples])
    yield ("scores",), "Scores, {}", partial(score_figure, scores_NLD)
    if panels(samples):
        layer = scores_NLD.shape[1] // 2
        place, title = ("heatmap",), f"Relative activations, {{}}, layer {layer}"
        yield place, title, partial(heatmap_figure, samples, layer)
        title += ", neurons sorted by their score in text A"
        yield (*place, "sorted"), title, partial(heatmap_figure, samples, layer, ordered=True)


def panels(samples: Sequence[Sample]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The heatmaps that a run keeps, in words: two texts and the controls of the first. ([L, T, M], scores [L, D])."""
    kept = {words: (samples[place]["arrays"], text) for words, (place, text) in _PANELS.items() if place < len(samples)}
    return {
        words: (arrays[f"{text}_heatmap"], arrays[f"{text}_scores"])
        for words, (arrays, text) in kept.items()
        if f"{text}_heatmap" in arrays
    }


def heatmap_figure(samples: Sequence[Sample], layer: int, ordered: bool = False) -> Figure:
    """Relative activations of one layer, tokens down and neurons across: vertical lines are flocking.

    With `ordered`, neurons are in the order of their scores in text A in all panels; else as the model has them.
    """
    shown = panels(samples)
    first, scores_LD = next(iter(shown.values()))
    neurons = first.shape[-1]
    place_M = np.argsort(-scores_LD[layer][:neurons], kind="stable") if ordered else np.arange(neurons)
    top = float(np.quantile(first[layer].astype(np.float32), 0.99)) or 1.0
    shades = mpl.colormaps[mpl.rcParams["image.cmap"]].resampled(_SHADES)
    figure, axes = new_figure(height=5.2, nrows=2, ncols=2, sharex=True, sharey=True, squeeze=False)
    for axis, (words, (heat_LTM, _)) in zip(axes.flat, shown.items(), strict=False):
        heat_TM = heat_LTM[layer].astype(np.float32)[:, place_M]
        # One pixel per number, also in SVG and PDF; few shades make small files.
        image = axis.imshow(heat_TM, aspect="auto", cmap=shades, vmin=0, vmax=top, interpolation="none")
        axis.set_title(words)
        axis.grid(False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.set(xlabel="neuron, by score in text A" if ordered else "neuron", ylabel="token")
        axis.label_outer()
    figure.suptitle(f"layer {layer}", fontsize=9)
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
    named = {round(part * (layers - 1) / 3) for part in range(4)}  # evenly from the first to the last
    for layer in range(layers):
        label = f"layer {layer}" if layer in named else None
        axis.plot(share_D[::step], curves_LD[layer][::step], color=shades[layer], linewidth=1, label=label)
    axis.set(xlabel="neurons, in falling order of score (%)", ylabel="score / largest score")
    axis.set(xlim=(0, 100), yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.legend()
    return figure


def jaccard_figure(rows: Sequence[dict[str, Any]], measure: str, kept: float) -> Figure:
    """One of `COMPARED` by layer, from the rows of `layer_table`: a line for every kind of text, dotted what it is to
    be seen against, and sets of the share `kept` of the neurons, drawn at random."""
    words, against = COMPARED[measure]
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
    axis.set(title=words, xlabel="layer", ylabel=f"Jaccard similarity of the top {100 * kept:g}%", ylim=(0, 1))
    axis.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=3)
    return figure
