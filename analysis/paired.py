"""Methods compared sample by sample: the same prompts, so that what differs is the method.

A difference comes with its 95% interval by the paired bootstrap, right-or-wrong scores also with McNemar's exact test,
and with the number of samples at which a difference of one point would be seen. Runs that do not have the same samples
are not compared, and neither are runs that were evaluated differently (`analysis.frame` gives those other names).
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from analysis.frame import apart, by_task, headlines, nearest, select
from analysis.metrics import Metric
from analysis.samples import Scores
from analysis.tables import DASH, SAMPLES, Cell, Table

CONFIDENCE = 0.95
POWER = 0.8  # the chance to see the difference of one point
RESAMPLES = 9999

POINTS = Metric("difference", "points", 1, 1)
_P = Metric("p", "", 0, 3)
_RATIO = Metric("answer length / dense", "", 0, 2)

# The largest score that a sample can have, of the metrics that are compared.
LARGEST = {
    **dict.fromkeys(("rouge1", "rouge2", "rougeL"), 100.0),
    **dict.fromkeys(("acc", "acc_norm", "f1", "em", "exact_match", "pass_at_1"), 1.0),
}

Values = Mapping[int, float]  # by the sample's index


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

    @property
    def rank(self) -> float:
        """The mean to sort by; what is no number comes last."""
        return self.mean if math.isfinite(self.mean) else -math.inf


@dataclass(frozen=True)
class Pair:
    """A run and its difference to another one of the same model and task, on the same samples.

    Attributes:
        row: the run's headline, as in the DataFrame.
        other: the other run's.
        difference: of the scores.
        length: how many tokens the answers have over those of the other; None where they are not known.
        density: bytes of weights that a token reads, of dense; None where they are not known.
    """

    row: Any
    other: Any
    difference: Difference
    length: float | None
    density: float | None

    @property
    def method(self) -> str:
        """The run's method, and where the two differ in what changes rounding."""
        return f"{self.row.method}{apart(self.row, self.other)}"

    @property
    def dense(self) -> float:
        """What the other run scores, in points."""
        return float(100 * self.other.value / LARGEST[self.row.metric])

    @property
    def points(self) -> Cell:
        """The mean difference and its interval."""
        ends = self.difference.low, self.difference.high
        return Cell(self.difference.mean, POINTS, self.row.run_id, interval=None if math.isnan(ends[0]) else ends)

    @property
    def p(self) -> Cell:
        """McNemar's test; a dash of scores that are neither right nor wrong."""
        p = self.difference.p
        words = DASH if p is None else "<0.001" if p < 0.001 else ""
        return Cell(math.nan if p is None else p, _P, self.row.run_id, words=words)

    @property
    def longer(self) -> Cell | None:
        """The lengths' ratio; None where it is not known."""
        return None if self.length is None else Cell(self.length, _RATIO, self.row.run_id)


# By model and task, each method's pair in the order of the tables.
Pairs = Mapping[tuple[str, str], Sequence[Pair]]


def compare(scores: Values, others: Values, *, largest: float, exact: bool = False) -> Difference | None:
    """The difference of two runs' scores; None where they do not have the same samples.

    The bootstrap of differences that are all the same has no width, which says too much of few samples. There the
    interval is what may still differ: any larger share of samples that do would show up, 39 times out of 40.
    Where two runs are `exact`, they cannot differ, and zeros are no matter of chance.
    """
    if not scores or scores.keys() != others.keys():
        return None
    point = largest / 100
    each = np.array([scores[index] - others[index] for index in sorted(scores)]) / point
    count, mean = len(each), float(each.mean())
    low = high = math.nan
    if exact and not each.any():
        low = high = 0.0
    elif not math.isfinite(mean):
        pass  # a score that is no number leaves no interval
    elif count > 1 and not (each - mean).any():
        unseen = 100 * (1 - ((1 - CONFIDENCE) / 2) ** (1 / count))
        low, high = max(mean - unseen, -100.0), min(mean + unseen, 100.0)
    elif count > 1:
        random, size = np.random.default_rng(0), max(1, 10**7 // count)  # resamples at a time: memory
        drawn = [
            each[random.integers(0, count, (min(size, RESAMPLES - first), count))].mean(axis=1)
            for first in range(0, RESAMPLES, size)
        ]
        tail = 50 * (1 - CONFIDENCE)
        low, high = map(float, np.percentile(np.concatenate(drawn), [tail, 100 - tail]))
    spread = float(each.std(ddof=1)) if count > 1 and math.isfinite(mean) else 0.0
    reach = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
    needed = (reach * spread) ** 2 if spread else math.nan
    return Difference(count, mean, low, high, _mcnemar(scores, others, largest), needed)


def _mcnemar(scores: Values, others: Values, largest: float) -> float | None:
    if not {*scores.values(), *others.values()} <= {0.0, largest}:
        return None
    won = sum(scores[index] > others[index] for index in scores)
    lost = sum(scores[index] < others[index] for index in scores)
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def pairs(scores: Mapping[str, Scores], table: pd.DataFrame, against: str = "dense") -> Pairs:
    """Every pruned run of a task with scores, and its difference to the dense run or to GRIFFIN at its sparsity, on the
    same samples; of several such runs, to the one that shares most of what changes rounding. W&B has no scores of
    samples, so there are no pairs."""
    found: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    densities = dict(select(table, metric="effective_density")[["run_id", "value"]].itertuples(index=False))
    for place, rows in by_task(headlines(table).itertuples()).items():
        if rows[0].metric not in LARGEST:
            continue
        others: dict[float, list[Any]] = defaultdict(list)
        for row in rows:
            if (row.role if against == "dense" else _plain(row)) == against:
                others[row.sparsity].append(row)
        for row in rows:
            other = nearest(row, others[0.0 if against == "dense" else row.sparsity])
            if row.role != "pruned" or _plain(row) == against or other is None:
                continue
            numbers, theirs = scores[row.run_id], scores[other.run_id]
            # lm-eval's tasks have no such setting, and are greedy where their metric is.
            greedy = row.decoding == "greedy" or pd.isna(row.decoding)
            exact = getattr(row, "verification", None) == "exact" and against == "dense" and greedy
            difference = compare(numbers.values, theirs.values, largest=LARGEST[row.metric], exact=exact)
            if difference is not None:
                tokens = sum(theirs.lengths.values())
                known = tokens and numbers.lengths.keys() == theirs.lengths.keys()
                length = sum(numbers.lengths.values()) / tokens if known else None
                found[place].append(Pair(row, other, difference, length, densities.get(row.run_id)))
    return found


def _plain(row: Any) -> str:
    """The method without sparsity, and without the settings that tell two such runs apart."""
    return str(row.family.partition(" [")[0])


# -- the table --------------------------------------------------------------------------------------------------------


def differences(to_dense: Pairs, to_griffin: Pairs) -> Table:
    """A row per model, task and method: its differences to dense and to GRIFFIN."""
    note = (
        "Differences sample by sample, in points, with their 95% intervals by the paired bootstrap; to GRIFFIN at the "
        "same sparsity. p is McNemar's exact test, of answers that are right or wrong, for each row by itself. The "
        "last column says how many samples would show a difference of one point, four times out of five. Runs that do "
        "not share their samples are not compared."
    )
    columns = ["samples", "to dense: points", "to dense: p", "to GRIFFIN: points", "to GRIFFIN: p"]
    columns += ["answer length / dense", "samples for one point"]
    table = Table("differences", "Differences sample by sample", note, ("model and task", "metric", "method"), columns)
    griffin = {pair.row.run_id: pair for pairs in to_griffin.values() for pair in pairs}
    for pair in itertools.chain.from_iterable(to_dense.values()):
        row, difference, other = pair.row, pair.difference, griffin.get(pair.row.run_id)
        to_other: Sequence[Cell | None] = (None, None) if other is None else (other.points, other.p)
        if _plain(row) == "griffin":
            to_other = Cell(0.0, POINTS, row.run_id, words="itself"), Cell(1.0, _P, row.run_id, words=DASH)
        cells = [
            Cell(difference.samples, SAMPLES, row.run_id),
            pair.points,
            pair.p,
            *to_other,
            pair.longer,
            None if math.isnan(difference.needed) else Cell(math.ceil(difference.needed), SAMPLES, row.run_id),
        ]
        table.rows.append(((f"{row.model}, {row.task}", row.label, pair.method), cells))
    return table
