"""How far each method can prune before quality is lost: its critical sparsity, and quality at the same cost.

The critical sparsity of a method on a task is the largest one that was measured at which the paired 95% interval of its
difference to dense excludes a loss of more than a margin. Nothing is interpolated, and few samples exclude little.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analysis.drawing import Drawing, Group, Styles, add_legend, file_name
from analysis.frame import select
from analysis.metrics import Metric, metric
from analysis.paired import LARGEST, Pair
from analysis.tables import SAMPLES, Cell, Table
from pipelines.figure_style import NEUTRAL, new_figure

TWO_POINTS = 2.0
_SPARSITY = Metric("sparsity", "%", 1, 0)
_DENSE = Metric("dense", "points", 1, 1)


def critical_sparsities(pairs: Sequence[Pair], runs: pd.DataFrame) -> Table:
    """A row per model, task and method without its sparsity.

    Args:
        pairs: every run's difference to dense.
        runs: the DataFrame that they come from.
    """
    note = (
        "The largest measured sparsity at which the paired 95% interval excludes a loss of more than one percent of "
        "dense, or of more than two points, in brackets with the bytes of weights that a token then reads, of dense. "
        "None: no measured sparsity does; more samples may show one that does."
    )
    columns = [("", "samples"), ("", "dense (points)"), ("largest sparsity within", "1% of dense")]
    columns += [("largest sparsity within", "two points"), ("", "largest measured (%)")]
    table = Table("critical_sparsity", "Critical sparsity", note, ("model and task", "metric", "method"), columns)
    densities = {row.run_id: row.value for row in select(runs, metric="effective_density").itertuples()}
    members: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.difference is not None and not math.isnan(pair.row.sparsity):
            members[pair.row.model, pair.row.task, pair.row.family].append(pair)
    for (model, task, family), mine in sorted(members.items()):
        mine = sorted(mine, key=lambda pair: pair.row.sparsity)
        first, last = mine[0], mine[-1]
        dense = 100 * first.other.value / LARGEST[first.row.metric]
        cells: list[Cell | None] = [
            Cell(max(pair.difference.samples for pair in mine if pair.difference), SAMPLES, first.row.run_id),
            Cell(dense, _DENSE, first.other.run_id),
            *(_largest(mine, margin, densities) for margin in (dense / 100, TWO_POINTS)),
            Cell(100 * last.row.sparsity, _SPARSITY, last.row.run_id),
        ]
        table.rows.append(((f"{model}, {task}", first.row.label, family), cells))
    return table


def _largest(pairs: Sequence[Pair], margin: float, densities: dict[str, float]) -> Cell:
    """The last of the pairs, by rising sparsity, that loses no more than so many points."""
    within = [pair for pair in pairs if pair.difference is not None and pair.difference.low >= -margin]
    if not within:
        return Cell(0.0, _SPARSITY, pairs[0].row.run_id, words="none")
    run_id, sparsity = within[-1].row.run_id, 100 * within[-1].row.sparsity
    density = f" ({densities[run_id]:.2f})" if run_id in densities else ""
    return Cell(sparsity, _SPARSITY, run_id, words=f"{sparsity:g}%{density}")


def sentences(pairs: Sequence[Pair], runs: pd.DataFrame) -> list[str]:
    """What the runs show, a sentence for each model and task: which methods stay within two points of dense, up to
    which sparsity, and at which measured speed where that was measured; else which comes closest.

    Args:
        pairs: every run's difference to dense.
        runs: the DataFrame that they come from.
    """
    speeds = select(runs, kind="latency", metric="decode_speedup")
    speed = {(row.model, row.method): row.value for row in speeds.itertuples()}
    members: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.difference is not None and not math.isnan(pair.row.sparsity):
            members[pair.row.model, pair.row.task].append(pair)
    found = []
    for (model, task), mine in sorted(members.items()):
        count = max(pair.difference.samples for pair in mine if pair.difference)
        if count < 2:  # one sample shows nothing
            continue
        largest: dict[str, Pair] = {}
        for pair in sorted(mine, key=lambda pair: pair.row.sparsity):
            if pair.difference is not None and pair.difference.low >= -TWO_POINTS:
                largest[pair.row.family] = pair
        if largest:
            parts = []
            for family, pair in sorted(largest.items(), key=lambda item: (-item[1].row.sparsity, item[0])):
                fast = speed.get((model, pair.row.method))
                times = "" if fast is None else f", {fast:.2f} times as fast as dense"
                parts.append(f"{family} up to {100 * pair.row.sparsity:g}%{times}")
            words = f"within two points of dense stay {'; '.join(parts)}"
        else:
            nearest = max((pair for pair in mine if pair.difference), key=lambda pair: pair.difference.mean)
            difference = nearest.difference
            words = (
                f"nearest to dense is {nearest.row.method}, {difference.mean:+.1f} points "
                f"[{difference.low:.1f}, {difference.high:.1f}]; no method was shown to stay within two points"
            )
        found.append(f"{task}, {model} ({mine[0].row.label}, n = {count}): {words}.")
    return found


def against_bytes(pairs: Sequence[Pair], runs: pd.DataFrame, styles: Styles) -> Group:
    """One figure per model and task with several densities: differences to dense against bytes per token."""
    densities = select(runs, metric="effective_density")[["run_id", "value"]]
    density = dict(zip(densities["run_id"], densities["value"], strict=True))
    members: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs:
        if pair.difference is not None and pair.row.run_id in density:
            members[pair.row.model, pair.row.task].append(pair)
    drawings = [
        Drawing(
            file_name("bytes", model, task),
            f"{task}, {model}",
            "",
            tuple(dict.fromkeys(run_id for pair in mine for run_id in (pair.other.run_id, pair.row.run_id))),
            functools.partial(_figure, mine, density, styles),
        )
        for (model, task), mine in sorted(members.items())
        if len({density[pair.row.run_id] for pair in mine}) > 1
    ]
    note = (
        "What methods score more or less than dense, sample by sample, bars: 95% intervals by the paired bootstrap; "
        "numbers are sparsities in %. The dashed line is the dense model, the grey band two points around it. What is "
        "marked as masked runs no faster: its bytes are what a kernel for it would read."
    )
    command = "python -m pipelines.run experiment=critical_sparsity limit=20"
    return Group("Quality against bytes of weights per token", drawings, command, note)


def _figure(pairs: Sequence[Pair], density: dict[str, float], styles: Styles) -> Figure:
    figure, axis = new_figure()
    axis.axhspan(-TWO_POINTS, TWO_POINTS, color=NEUTRAL, alpha=0.12, linewidth=0)
    axis.axhline(0.0, color=NEUTRAL, linestyle="--", linewidth=1.2, label="dense")
    families: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        families[pair.row.family].append(pair)
    for family, mine in sorted(families.items()):
        mine = sorted(mine, key=lambda pair: density[pair.row.run_id])
        found = [pair.difference for pair in mine if pair.difference is not None]
        across = [density[pair.row.run_id] for pair in mine]
        means = [one.mean for one in found]
        below = [0.0 if math.isnan(one.low) else one.mean - one.low for one in found]
        above = [0.0 if math.isnan(one.high) else one.high - one.mean for one in found]
        axis.errorbar(
            *(across, means, [below, above]),
            color=styles.colour(family),
            marker=styles.marker(family),
            linestyle=":",
            capsize=2,
            elinewidth=1,
            label=family,
        )
        for pair, x, y in zip(mine, across, means, strict=True):
            text = "per layer" if math.isnan(pair.row.sparsity) else f"{100 * pair.row.sparsity:g}"
            axis.annotate(text, (x, y), (4, 4), textcoords="offset points", fontsize=8)
    axis.set_xlabel(metric("effective_density").axis)
    axis.set_ylabel(f"{pairs[0].row.label}, difference to dense (points),\nhigher is better")
    axis.margins(x=0.12)
    add_legend(figure, axis, inside=False)  # points are anywhere
    return figure
