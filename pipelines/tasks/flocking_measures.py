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


def jaccard(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """|A and B| / |A or B| over the last axis of boolean sets; two empty sets are equal."""
    union = (one | other).sum(axis=-1)
    return np.where(union > 0, (one & other).sum(axis=-1) / np.maximum(union, 1), 1.0)


def chance(kept: float) -> float:
    """The Jaccard similarity of two sets drawn at random, each of a share `kept` of the neurons, in wide layers."""
    return kept / (2 - kept)


def between_sequences(one_NLD: np.ndarray, other_NLD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Jaccard similarity of one sequence's set and another's: the mean over all pairs, and its standard error.

    Pairs share sequences, so the error is the jackknife's: from the means without each sequence in turn.

    Args:
        one_NLD: boolean, N of 2 or more.
        other_NLD: boolean; a pair is a row of `one_NLD` and another row of this.

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
