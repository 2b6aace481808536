"""How far each method can prune before quality is lost: its critical sparsity, and quality at the same cost.

The critical sparsity of a method on a task is the largest one that was measured at which the paired 95% interval of its
difference to dense excludes a loss of more than a margin. Nothing is interpolated, and few samples exclude little.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from analysis.drawing import DENSE_LINE, Group, Styles, add_legend, drawing, name_sparsities
from analysis.metrics import Metric, metric
from analysis.paired import Pair, Pairs
from analysis.tables import SAMPLES, Cell, Table
from pipelines.figure_style import NEUTRAL, new_figure

TWO_POINTS = 2.0
_SPARSITY = Metric("sparsity", "%", 1, 0)
_DENSE = Metric("dense", "points", 1, 1)


def critical_sparsities(pairs: Pairs) -> Table:
    """A row per model, task and method without its sparsity, from every run's difference to dense."""
    note = (
        "The largest measured sparsity at which the paired 95% interval excludes a loss of more than one percent of "
        "dense, or of more than two points, in brackets with the bytes of weights that a token then reads, of dense. "
        "None: no measured sparsity does; more samples may show one that does."
    )
    columns = ["samples", "dense (points)", "largest sparsity within 1% of dense"]
    columns += ["largest sparsity within two points", "largest measured (%)"]
    table = Table("critical_sparsity", "Critical sparsity", note, ("model and task", "metric", "method"), columns)
    for (model, task), rows in pairs.items():
        for family, mine in families(rows).items():
            first, last = mine[0], mine[-1]
            cells: list[Cell | None] = [
                Cell(max(pair.difference.samples for pair in mine), SAMPLES, first.row.run_id),
                Cell(first.dense, _DENSE, first.other.run_id),
                *(_largest(mine, margin) for margin in (first.dense / 100, TWO_POINTS)),
                Cell(100 * last.row.sparsity, _SPARSITY, last.row.run_id),
            ]
            table.rows.append(((f"{model}, {task}", first.row.label, family), cells))
    return table


def families(pairs: Sequence[Pair], along: str = "row.sparsity") -> dict[str, list[Pair]]:
    """The pairs that have this number by their methods without sparsity, each by rising number."""
    number, family = operator.attrgetter(along), operator.attrgetter("row.family")
    known = sorted(sorted((pair for pair in pairs if not math.isnan(number(pair))), key=number), key=family)
    return {name: [*mine] for name, mine in itertools.groupby(known, key=family)}


def within(pairs: Sequence[Pair], margin: float) -> Pair | None:
    """The last of the pairs, by rising sparsity, that loses no more than so many points."""
    return next((pair for pair in reversed(pairs) if pair.difference.low >= -margin), None)


def _largest(pairs: Sequence[Pair], margin: float) -> Cell:
    pair = within(pairs, margin)
    if pair is None:
        return Cell(0.0, _SPARSITY, pairs[0].row.run_id, words="none")
    sparsity = 100 * pair.row.sparsity
    density = "" if pair.density is None else f" ({pair.density:.2f})"
    return Cell(sparsity, _SPARSITY, pair.row.run_id, words=f"{sparsity:g}%{density}")


def against_bytes(pairs: Pairs, styles: Styles) -> Group:
    """One figure per model and task with several densities: differences to dense against bytes per token."""
    drawings = []
    for (model, task), rows in pairs.items():
        mine = [pair for pair in rows if pair.density is not None]
        if len({pair.density for pair in mine}) > 1:
            run_ids = [run_id for pair in mine for run_id in (pair.other.run_id, pair.row.run_id)]
            draw = functools.partial(_figure, mine, styles)
            drawings.append(drawing(("bytes", model, task), f"{task}, {model}", run_ids, draw))
    note = (
        "What methods score more or less than dense, sample by sample, bars: 95% intervals by the paired bootstrap; "
        "numbers are sparsities in %. The dashed line is the dense model, the grey band two points around it. What is "
        "marked as masked runs no faster: its bytes are what a kernel for it would read."
    )
    command = "python -m pipelines.run experiment=critical_sparsity limit=20"
    return Group("Quality against bytes of weights per token", drawings, command, note)


def _figure(pairs: Sequence[Pair], styles: Styles) -> Figure:
    figure, axis = new_figure()
    axis.axhspan(-TWO_POINTS, TWO_POINTS, color=NEUTRAL, alpha=0.12, linewidth=0)
    axis.axhline(0.0, **DENSE_LINE)
    for family, mine in families(pairs, "density").items():
        across, means = [pair.density or 0.0 for pair in mine], [pair.difference.mean for pair in mine]
        ends = np.array([(pair.difference.low, pair.difference.high) for pair in mine]).T
        axis.errorbar(across, means, np.nan_to_num(np.abs(ends - means)), linestyle=":", **styles.points(family))
        name_sparsities(axis, across, means, [pair.row.sparsity for pair in mine])
    axis.set_xlabel(metric("effective_density").axis)
    axis.set_ylabel(f"{pairs[0].row.label}, difference to dense (points),\nhigher is better")
    axis.margins(x=0.12)
    add_legend(figure, axis, inside=False)  # points are anywhere
    return figure
