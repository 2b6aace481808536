"""Methods compared sample by sample: the same prompts, so that what differs is the method.

A difference comes with its 95% interval by the paired bootstrap, right-or-wrong scores also with McNemar's exact test,
and with the number of samples at which a difference of one point would be seen. Runs that do not have the same samples
are not compared, and neither are runs that were evaluated differently (`analysis.labels` gives those other names).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.frame import headlines
from analysis.metrics import Metric
from analysis.runs import Runs
from analysis.samples import read_samples
from analysis.tables import SAMPLES, Cell, Table, method_order

CONFIDENCE = 0.95
POWER = 0.8  # the chance to see the difference of one point
RESAMPLES = 9999

POINTS = Metric("difference", "points", 1, 1)

Scores = Mapping[int, float]  # by the sample's index


@dataclass(frozen=True)
class Difference:
    """What one method scores more than another on the same samples, in points: hundredths of the largest score.

    Attributes:
        samples: how many both have.
        mean: the mean difference.
        low: the lower end of its 95% interval; NaN for fewer than two samples.
        high: the upper end.
        p: McNemar's exact test, where scores are right or wrong; else None.
        needed: samples at which a difference of one point would be seen, four times out of five; NaN where no two
            scores differ.
    """

    samples: int
    mean: float
    low: float
    high: float
    p: float | None
    needed: float


@dataclass(frozen=True)
class Pair:
    """A run and its difference to another one of the same model and task.

    Attributes:
        row: the run's headline, as in the DataFrame.
        other: the other run's.
        difference: of the scores; None where the two do not have the same samples.
        length: how many tokens the answers have over those of the other; None where they are not known.
    """

    row: Any
    other: Any
    difference: Difference | None
    length: float | None = None


def compare(scores: Scores, others: Scores, *, largest: float, exact: bool = False) -> Difference | None:
    """The difference of two runs' scores; None where they do not have the same samples.

    The bootstrap of differences that are all the same has no width, which says too much of few samples. There the
    interval is what may still differ: any larger share of samples that do would show up, 39 times out of 40.

    Args:
        scores: the one run's.
        others: the other's.
        largest: score that there can be.
        exact: whether the two cannot differ, so that zeros are no matter of chance.
    """
    if not scores or scores.keys() != others.keys():
        return None
    point = largest / 100
    each = np.array([scores[index] - others[index] for index in sorted(scores)]) / point
    count, mean = len(each), float(each.mean())
    low = high = math.nan
    if exact and not each.any():
        low = high = 0.0
    elif count > 1 and not (each - mean).any():
        unseen = 100 * (1 - ((1 - CONFIDENCE) / 2) ** (1 / count))
        low, high = max(mean - unseen, -100.0), min(mean + unseen, 100.0)
    elif count > 1:
        found = stats.bootstrap(
            (each,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=max(1, 10**7 // count),  # resamples at a time: memory
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(0),
        ).confidence_interval
        low, high = float(found.low), float(found.high)
    spread = float(each.std(ddof=1)) if count > 1 else 0.0
    reach = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    return Difference(
        count, mean, low, high, _mcnemar(scores, others, largest), (reach * spread) ** 2 if spread else math.nan
    )


def _mcnemar(scores: Scores, others: Scores, largest: float) -> float | None:
    if not {*scores.values(), *others.values()} <= {0.0, largest}:
        return None
    won = sum(scores[index] > others[index] for index in scores)
    lost = sum(scores[index] < others[index] for index in scores)
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def pairs(runs: Runs, table: pd.DataFrame, against: str = "dense") -> list[Pair]:
    """Every pruned run of a task with scores, and its difference to the dense run or to GRIFFIN at its sparsity.

    Args:
        runs: with the folders of the runs; without folders, as from W&B, there are no samples and no pairs.
        table: the DataFrame of the runs.
        against: `dense` or `griffin`.
    """
    found = []
    for _, mine in headlines(table):
        if mine["better"].iloc[0] != 1 or mine["metric"].iloc[0] not in LARGEST:
            continue
        samples = {row.run_id: _read(runs.folders.get(row.run_id), row.metric) for row in mine.itertuples()}
        for row in mine[mine["family"] != "dense"].itertuples():
            others = mine[mine["family"] == against]
            if against != "dense":
                others = others[others["sparsity"] == row.sparsity]
            if row.family == against or others.empty:
                continue
            other = next(others.itertuples())
            (scores, lengths), (their_scores, their_lengths) = samples[row.run_id], samples[other.run_id]
            # lm-eval's tasks have no such setting, and are greedy where their metric is.
            greedy = row.decoding == "greedy" or pd.isna(row.decoding)
            exact = row.verification == "exact" and against == "dense" and greedy
            difference = compare(scores, their_scores, largest=LARGEST[row.metric], exact=exact)
            length = None
            if difference is not None and sum(their_lengths.values()) and lengths.keys() == their_lengths.keys():
                length = sum(lengths.values()) / sum(their_lengths.values())
            found.append(Pair(row, other, difference, length))
    return found


# The largest score that a sample can have, of the metrics that are compared.
LARGEST = {
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), 100.0),
    **dict.fromkeys(("acc", "acc_norm", "f1", "em", "exact_match", "pass_at_1"), 1.0),
}


def _read(folder: Path | None, metric: str) -> tuple[dict[int, float], dict[int, float]]:
    """The scores of a run's samples, and the tokens of their answers, by index."""
    samples = {index: sample for index, sample in read_samples(folder).items() if metric in sample}
    lengths = {i: sample["generated_tokens"] for i, sample in samples.items() if "generated_tokens" in sample}
    return {index: float(sample[metric]) for index, sample in samples.items()}, lengths


# -- the table --------------------------------------------------------------------------------------------------------

_P = Metric("p", "", 0, 3)
_RATIO = Metric("answer length / dense", "", 0, 2)


def differences(to_dense: Sequence[Pair], to_griffin: Sequence[Pair]) -> Table:
    """A row per model, task and method: its differences to dense and to GRIFFIN."""
    note = (
        "Differences sample by sample, in points, with their 95% intervals by the paired bootstrap; to GRIFFIN at the "
        "same sparsity. p is McNemar's exact test, of answers that are right or wrong, for each row by itself. The "
        "last column says how many samples would show a difference of one point, four times out of five. Runs that do "
        "not share their samples are not compared."
    )
    columns = [("", "samples"), ("to dense", "points"), ("to dense", "p"), ("to GRIFFIN", "points")]
    columns += [("to GRIFFIN", "p"), ("", "answer length / dense"), ("", "samples for one point")]
    table = Table("differences", "Differences sample by sample", note, ("model and task", "metric", "method"), columns)
    griffin = {pair.row.run_id: pair for pair in to_griffin}
    for pair in sorted(to_dense, key=lambda pair: (pair.row.model, pair.row.task, *method_order(pair.row))):
        row, difference, other = pair.row, pair.difference, griffin.get(pair.row.run_id)
        if difference is None:
            continue
        names = (f"{row.model}, {row.task}", row.label, row.method)
        cells = [
            Cell(difference.samples, SAMPLES, row.run_id),
            *_points(row.run_id, difference),
            *_to_griffin(row, other),
            None if pair.length is None else Cell(pair.length, _RATIO, row.run_id),
            None if math.isnan(difference.needed) else Cell(math.ceil(difference.needed), SAMPLES, row.run_id),
        ]
        table.rows.append((names, cells))
    return table


def _to_griffin(row: Any, pair: Pair | None) -> tuple[Cell | None, Cell | None]:
    if row.family == "griffin":
        return Cell(0.0, POINTS, row.run_id, words="itself"), Cell(1.0, _P, row.run_id, words="\N{EN DASH}")
    return (None, None) if pair is None else _points(row.run_id, pair.difference)


def _points(run_id: str, difference: Difference | None) -> tuple[Cell | None, Cell | None]:
    if difference is None:
        return None, None
    interval = None if math.isnan(difference.low) else (difference.low, difference.high)
    if difference.p is None:
        p = Cell(math.nan, _P, run_id, words="\N{EN DASH}")
    else:
        p = Cell(difference.p, _P, run_id, words="<0.001" if difference.p < 0.001 else "")
    return Cell(difference.mean, POINTS, run_id, interval=interval), p
