"""What the runs show, in sentences that a reader can repeat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pandas as pd

from analysis.critical_sparsity import TWO_POINTS, families, within
from analysis.frame import by_task, headlines, nearest, select
from analysis.metrics import metric
from analysis.paired import Pairs
from analysis.samples import Scores

_LISTED = 5  # methods in one sentence


def sentences(to_dense: Pairs, runs: pd.DataFrame, scores: Mapping[str, Scores]) -> list[str]:
    """Whose texts are the dense model's, how far others are from it, and how much quality is lost."""
    return [*_same_texts(runs, scores), *_divergences(runs), *_within_two_points(to_dense, runs)]


def _same_texts(runs: pd.DataFrame, scores: Mapping[str, Scores]) -> Iterator[str]:
    """A sentence for each verified run: how many texts are the dense model's, and the bytes that they took."""
    densities = {row.run_id: row.value for row in select(runs, metric="effective_density").itertuples()}
    for (model, task), rows in by_task(headlines(runs).itertuples()).items():
        for row in rows:
            dense = nearest(row, [other for other in rows if other.role == "dense"])
            greedy = row.decoding == "greedy" or pd.isna(row.decoding)  # drawn texts share a distribution only
            exact = getattr(row, "verification", None) == "exact"
            if not (exact and greedy and dense is not None and row.run_id in densities):
                continue
            mine, theirs = scores[row.run_id].texts, scores[dense.run_id].texts
            shared = mine.keys() & theirs.keys()
            same = sum(mine[index] == theirs[index] for index in shared)
            density = metric("effective_density").text(densities[row.run_id])
            if shared:
                words = f"{same} of {len(shared)} texts are the dense model's, at {density} of its bytes per token"
                yield f"{row.method}: {words} ({task}, {model})."


def _divergences(runs: pd.DataFrame) -> Iterator[str]:
    """A sentence for each model and task of fidelity: the methods that are nearest to the dense model."""
    for (model, task), rows in by_task(select(headlines(runs), metric="kl", role="pruned").itertuples()).items():
        near = sorted(rows, key=lambda row: float(row.value))[:_LISTED]
        listed = ", ".join(f"{row.method} {metric('kl').text(row.value)}" for row in near)
        plain = {row.sparsity: row for row in rows if row.family == "griffin" and row.value}
        beside = [(row, plain[row.sparsity]) for row in near if row.sparsity in plain and row.family != "griffin"]
        shares = "".join(
            f"; {one.method} has {one.value / other.value:.2f} of {other.method}'s" for one, other in beside
        )
        where = f"{task}, {model}, n = {near[0].samples:g}"
        yield f"KL from the dense model, in nats per token: {listed}{shares} ({where})."


def _within_two_points(pairs: Pairs, runs: pd.DataFrame) -> Iterator[str]:
    """A sentence for each model and task: which methods stay within two points of dense, up to which sparsity, and at
    which measured speed where that was measured; else which comes closest."""
    speeds = select(runs, kind="latency", metric="decode_speedup")
    speed = {(row.model, row.method): row.value for row in speeds.itertuples()}
    for (model, task), rows in pairs.items():
        mine_by_family = families(rows)
        mine = [pair for members in mine_by_family.values() for pair in members]
        count = max((pair.difference.samples for pair in mine), default=0)
        if count < 2:  # one sample shows nothing
            continue
        near = [pair for members in mine_by_family.values() if (pair := within(members, TWO_POINTS))]
        if near:
            parts = []
            for pair in sorted(near, key=lambda pair: (-pair.row.sparsity, pair.row.family)):
                fast = speed.get((model, pair.row.method))
                times = "" if fast is None else f", {fast:.2f} times as fast as dense"
                share = f" up to {100 * pair.row.sparsity:g}%" if pair.row.sparsity else ""
                parts.append(f"{pair.row.family}{share}{times}")
            words = f"within two points of dense stay {'; '.join(parts)}"
        else:
            best = max(mine, key=lambda pair: pair.difference.rank)
            difference = best.difference
            words = (
                f"nearest to dense is {best.row.method}, {difference.mean:+.1f} points "
                f"[{difference.low:.1f}, {difference.high:.1f}]; no method was shown to stay within two points"
            )
        yield f"{task}, {model} ({mine[0].row.label}, n = {count}): {words}."
