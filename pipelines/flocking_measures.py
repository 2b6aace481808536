"""Flocking in numbers: how alike the sets of a sequence's strongest neurons are, layer by layer.

Dimensions: N = sequences, L = layers, D = FF width.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.records import Sample, mean_and_stderr

# A text as it is; the same tokens in random order; tokens drawn at random.
TEXTS = ("natural", "permuted", "random")
# What is compared: different sequences; the two halves of one; a prompt and what the model continues it with.
MEASURES = ("jaccard_sequences", "jaccard_halves", "jaccard_generation", "kept_energy", "token_energy")


def jaccard(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """|A and B| / |A or B| over the last axis of boolean sets; two empty sets are equal."""
    union = (one | other).sum(axis=-1)
    return np.where(union > 0, (one & other).sum(axis=-1) / np.maximum(union, 1), 1.0)


def chance(kept: float) -> float:
    """The Jaccard similarity of two sets drawn at random, each of a share `kept` of the neurons, in wide layers."""
    return kept / (2 - kept)


def between_sequences(sets_NLD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per layer, and last the mean of all layers: the mean over all pairs of sequences, and its standard error.

    Pairs share sequences, so the error is the jackknife's: from the means without each sequence in turn.

    Args:
        sets_NLD: boolean, N of 2 or more.

    Returns:
        Means and errors, [L + 1] each; errors are 0 for two sequences.
    """
    count = len(sets_NLD)
    pairs = list(itertools.combinations(range(count), 2))
    each_PL = np.array([jaccard(sets_NLD[i], sets_NLD[j]) for i, j in pairs])
    each_PL = np.concatenate([each_PL, each_PL.mean(axis=1, keepdims=True)], axis=1)
    means = each_PL.mean(axis=0)
    if count < 3:
        return means, np.zeros_like(means)
    without = np.array([each_PL[[index not in pair for pair in pairs]].mean(axis=0) for index in range(count)])
    return means, np.sqrt((count - 1) / count * ((without - means) ** 2).sum(axis=0))


def sets_of(samples: Sequence[Sample], text: str) -> np.ndarray:
    """[N, L, D] boolean: the top-k sets of a run's sequences."""
    packed = np.stack([sample["arrays"][f"{text}_sets"] for sample in samples])
    return np.unpackbits(packed, axis=-1).astype(bool)


def layer_table(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Every measure of every text by layer: rows of layer, text, measure, value, stderr."""
    rows = []
    for text, measure in itertools.product(TEXTS, MEASURES):
        found = _by_layer(samples, text, measure)
        for layer, (value, error) in enumerate(found[:-1]):
            rows.append({"layer": layer, "text": text, "measure": measure, "value": value, "stderr": error})
    return rows


def overall(samples: Sequence[Sample]) -> dict[str, float]:
    """Every measure as the mean of all layers, `<measure>_<text>`, with its standard error."""
    values: dict[str, float] = {}
    for text, measure in itertools.product(TEXTS, MEASURES):
        found = _by_layer(samples, text, measure)
        if found:
            values[f"{measure}_{text}"], values[f"{measure}_{text}_stderr"] = found[-1]
    return values


def _by_layer(samples: Sequence[Sample], text: str, measure: str) -> list[tuple[float, float]]:
    """(value, standard error) of each layer, and last of the mean of all layers; empty where nothing was measured."""
    if measure == "jaccard_sequences":
        if len(samples) < 2:
            return []
        means, errors = between_sequences(sets_of(samples, text))
        return [(float(mean), float(error)) for mean, error in zip(means, errors, strict=True)]
    lists = [sample[measure][text] for sample in samples if text in sample[measure]]
    if not lists:
        return []
    columns = [*zip(*lists, strict=True), [math.fsum(values) / len(values) for values in lists]]
    return [mean_and_stderr(list(column)) for column in columns]
