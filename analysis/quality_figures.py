"""Figures of quality: against sparsity, against prompt and generation length, and against decode speed; and what exact
verification is predicted to bring."""

from __future__ import annotations

import functools
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis.drawing import Drawing, Group, Styles, add_legend, file_name
from analysis.frame import headlines, select
from analysis.metrics import metric
from pipelines.figure_style import NEUTRAL, new_figure

_GRID = "'grid.statistic=[griffin,magnitude]' 'grid.sparsity=[0,0.25,0.5,0.75]'"


def against_sparsity(runs: pd.DataFrame, styles: Styles) -> Group:
    """One figure per model and task with several pruned runs: the task's first metric against sparsity, a line for each
    method."""
    drawings, dense_line = [], False
    for (model, task), mine in headlines(runs).groupby(["model", "task"], sort=True):
        pruned = mine[(mine["role"] == "pruned") & mine["sparsity"].notna()]
        if len(pruned) < 2:
            continue
        dense_line = dense_line or "dense" in set(mine["role"])
        caption = "Runs with one sparsity per layer are in the tables only." if mine["sparsity"].isna().any() else ""
        drawings.append(
            Drawing(
                file_name("sparsity", model, task),
                f"{task}, {model}",
                caption,
                _ids(mine),
                functools.partial(_sparsity_figure, mine, styles),
            )
        )
    note = "Bars: ± standard error." + (" The dashed line is the dense model." if dense_line else "")
    return Group("Quality against sparsity", drawings, f"python -m pipelines.run task=fidelity {_GRID}", note)


def predicted_speed(runs: pd.DataFrame, styles: Styles) -> Group:
    """One figure per model and fidelity task: what exact verification is predicted to bring, against sparsity."""
    runs = select(runs, kind="fidelity", metric="predicted_speedup")
    drawings = []
    for (model, task), mine in runs[runs["sparsity"].notna()].groupby(["model", "task"], sort=True):
        if mine["sparsity"].nunique() > 1:
            drawings.append(
                Drawing(
                    file_name("predicted_speed", model, task),
                    f"{task}, {model}",
                    "",
                    _ids(mine),
                    functools.partial(_predicted_figure, mine, styles),
                )
            )
    command = "python -m pipelines.run task=fidelity 'grid.sparsity=[0.25,0.5,0.75]'"
    note = (
        "Decode speed-up that checking the drafts of a pruned model brings, greedily and with the best fixed number of "
        "drafted tokens, by bytes of weights read. Above the dashed line verified decoding pays."
    )
    return Group("Predicted exact speed-up against sparsity", drawings, command, note)


def by_length(runs: pd.DataFrame, styles: Styles) -> Group:
    """Two figures per model and perplexity task: against prompt length, and against generation length."""
    runs = select(runs, kind="perplexity", metric="perplexity")
    runs = runs[runs["prompt_length"].notna()]
    drawings = []
    for (model, task), mine in runs.groupby(["model", "task"], sort=True):
        for along, fixed, words in (
            ("prompt_length", "generation_length", "generated"),
            ("generation_length", "prompt_length", "prompt"),
        ):
            longest = mine[fixed].max()
            rows = mine[mine[fixed] == longest]
            if rows[along].nunique() > 1:
                name = along.replace("_", " ")
                drawings.append(
                    Drawing(
                        file_name("perplexity_by", along, model, task),
                        f"{task} by {name}, {model}",
                        f"{longest:g} {words} tokens throughout.",
                        _ids(rows),
                        functools.partial(_length_figure, rows, along, styles),
                    )
                )
    command = "python -m pipelines.run experiment=paper_lengths limit=8"
    return Group("Perplexity by prompt and generation length", drawings, command, "Bars: ± standard error.")


def against_speed(runs: pd.DataFrame, styles: Styles) -> Group:
    """One figure per model, task and latency task: quality against decode speed, where several methods have both."""
    speeds = select(runs, kind="latency", metric="decode_speedup")
    drawings = []
    for (model, task), mine in headlines(runs).groupby(["model", "task"], sort=True):
        for timed, speed in speeds[speeds["model"] == model].groupby("task", sort=True):
            longest = speed[["prompt_length", "generation_length"]].max()
            speed = speed[(speed[["prompt_length", "generation_length"]] == longest).all(axis=1)]
            both = mine.merge(speed[["method", "value", "run_id"]], on="method", suffixes=("", "_speed"))
            if len(both) < 2:
                continue
            prompt, generation = longest
            drawings.append(
                Drawing(
                    file_name("pareto", model, task, str(timed)),
                    f"{task}, {model}",
                    f"Speed-up of {timed}, {prompt:g} + {generation:g} tokens.",
                    (*_ids(mine[mine["role"] == "dense"]), *_ids(both), *dict.fromkeys(both["run_id_speed"])),
                    functools.partial(_pareto_figure, mine, both, styles),
                )
            )
    command = f"python -m pipelines.run task=latency model=MODEL {_GRID.replace('[0,', '[')}"
    note = "Numbers are sparsities in %. The grey line joins the methods that no other beats in both."
    return Group("Quality against decode speed", drawings, command, note, "with MODEL as in the quality runs")


def _sparsity_figure(runs: pd.DataFrame, styles: Styles) -> Figure:
    figure, axis = new_figure()
    dense = runs[runs["role"] == "dense"]
    for family, mine in runs[(runs["role"] == "pruned") & runs["sparsity"].notna()].groupby("family", sort=True):
        line = _with_gaps(pd.concat([dense, mine]), runs, "sparsity")
        axis.errorbar(100 * line["sparsity"], line["value"], _bars(line), **styles.points(str(family)))
    _dense_line(axis, dense)
    axis.set_xlabel("FF sparsity (%)")
    axis.set_ylabel(metric(runs["metric"].iloc[0]).axis)
    _scale(axis, runs)
    add_legend(figure, axis)
    return figure


def _predicted_figure(runs: pd.DataFrame, styles: Styles) -> Figure:
    figure, axis = new_figure()
    for family, mine in runs.groupby("family", sort=True):
        line = _with_gaps(mine, runs, "sparsity")
        axis.errorbar(100 * line["sparsity"], line["value"], **styles.points(str(family)))
    axis.axhline(1.0, color=NEUTRAL, linestyle="--", linewidth=1.2, label="dense")
    axis.set_xlabel("FF sparsity (%)")
    axis.set_ylabel(metric("predicted_speedup").axis)
    add_legend(figure, axis)
    return figure


def _length_figure(runs: pd.DataFrame, along: str, styles: Styles) -> Figure:
    figure, axis = new_figure()
    for method, mine in runs.groupby("method", sort=False):
        family, dense = mine["family"].iloc[0], mine["role"].iloc[0] == "dense"
        mine = _with_gaps(mine, runs, along)
        looks = styles.points(family) | {"label": method, "linestyle": "--" if dense else "-"}
        axis.errorbar(mine[along], mine["value"], _bars(mine), **looks)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(runs[along].unique()), [f"{value:g}" for value in sorted(runs[along].unique())])
    axis.minorticks_off()
    axis.set_xlabel(f"{along.replace('_', ' ')} (tokens)")
    axis.set_ylabel(metric("perplexity").axis)
    _scale(axis, runs)
    add_legend(figure, axis)
    return figure


def _pareto_figure(quality: pd.DataFrame, both: pd.DataFrame, styles: Styles) -> Figure:
    figure, axis = new_figure()
    shown = metric(quality["metric"].iloc[0])
    dense = quality[quality["role"] == "dense"]
    points = [(1.0, float(value)) for value in dense["value"]]
    points += list(zip(both["value_speed"], both["value"], strict=True))
    if shown.better:
        front = [one for one in points if not any(_dominates(other, one, shown.better) for other in points)]
        axis.plot(*zip(*sorted(front), strict=True), color=NEUTRAL, linewidth=4, alpha=0.35, solid_capstyle="round")
    for family, mine in both.groupby("family", sort=True):
        mine = mine.sort_values("sparsity")
        axis.errorbar(mine["value_speed"], mine["value"], _bars(mine), linestyle=":", **styles.points(str(family)))
        for row in mine.itertuples():
            text = "per layer" if pd.isna(row.sparsity) else f"{100 * row.sparsity:g}"
            axis.annotate(text, (row.value_speed, row.value), (4, 4), textcoords="offset points", fontsize=8)
    if not dense.empty:
        value = dense["value"].iloc[0]
        axis.plot(1.0, value, marker="*", markersize=11, color=NEUTRAL, linestyle="none", label="dense")
    axis.set_xlabel("decode speed-up (x), higher is better")
    axis.set_ylabel(shown.axis)
    _scale(axis, both)
    axis.margins(x=0.12)
    add_legend(figure, axis)
    return figure


def _dominates(one: tuple[float, float], other: tuple[float, float], better: int) -> bool:
    """Whether one point (speed, quality) is at least as good as the other in both, and is another point."""
    return one != other and one[0] >= other[0] and better * one[1] >= better * other[1]


def _with_gaps(line: pd.DataFrame, runs: pd.DataFrame, along: str) -> pd.DataFrame:
    """The line with NaN wherever only other lines have a point, so that no line is drawn across a missing run."""
    everywhere = sorted(runs[along].dropna().unique())
    return line.set_index(along).reindex(everywhere).reset_index()


def _scale(axis: Any, runs: pd.DataFrame) -> None:
    """Make the axis logarithmic if it shows perplexities that differ by orders of magnitude."""
    if runs["metric"].iloc[0] == "perplexity" and runs["value"].max() > 10 * runs["value"].min() > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter("")


def _bars(runs: pd.DataFrame) -> list[list[float]]:
    """How far the error bar of each row reaches down, and how far up; NaN in a gap."""
    (name,) = runs["metric"].dropna().unique()
    ends = [metric(name).ends(row.value, row.stderr) for row in runs.itertuples()]
    values = list(runs["value"])
    return [
        [value - low for value, (low, _) in zip(values, ends, strict=True)],
        [high - value for value, (_, high) in zip(values, ends, strict=True)],
    ]


def _dense_line(axis: Any, dense: pd.DataFrame) -> None:
    for value in dense["value"]:
        axis.axhline(value, color=NEUTRAL, linestyle="--", linewidth=1.2, label="dense")


def _ids(runs: pd.DataFrame) -> tuple[str, ...]:
    return tuple(dict.fromkeys(runs["run_id"]))
