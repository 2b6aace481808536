"""Figures of quality, against sparsity, prompt and generation length, and decode speed; of speed, measured and
predicted; and of flocking."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.drawing import DENSE_LINE, Drawing, Group, Styles, add_legend, drawing, name_sparsities
from analysis.frame import headlines, labels, nearest, select
from analysis.metrics import metric
from analysis.runs import Runs
from pipelines.figure_style import NEUTRAL, new_figure
from pipelines.records import whole_samples
from pipelines.tasks import flocking_figures

_GRID = "'grid.statistic=[griffin,magnitude]' 'grid.sparsity=[0,0.25,0.5,0.75]'"
_LENGTHS = ["prompt_length", "generation_length"]
_LABEL = 24  # characters per line of a method's label, so that the axes keep their width
# What the curves of flocking show, by their names.
_FLOCKING = {
    "jaccard_sequences": "How alike the top-k sets of different texts are, averaged over all pairs.",
    "jaccard_halves": "How alike the top-k sets of a text's first and second half are, and those of different texts.",
    "jaccard_generation": "How alike the top-k sets of a text and of what the dense model continues it with are, "
    "and with what it continues other texts with.",
}


def against_sparsity(runs: pd.DataFrame, styles: Styles) -> Group:
    """One figure per model and task with several pruned runs: the task's first metric against sparsity, a line for each
    method."""
    drawings, dense_line = [], False
    for (model, task), mine in headlines(runs).groupby(["model", "task"]):
        if len(_pruned(mine)) > 1:
            dense_line = dense_line or "dense" in set(mine["role"])
            by_layer = mine["sparsity"].isna().any()
            caption = "Runs with one sparsity per layer are in the tables only." if by_layer else ""
            draw = functools.partial(_sparsity_figure, mine, styles, select(mine, role="dense")["value"])
            drawings.append(drawing(("sparsity", model, task), f"{task}, {model}", mine["run_id"], draw, caption))
    note = "Bars: ± standard error." + (" The dashed line is the dense model." if dense_line else "")
    return Group("Quality against sparsity", drawings, f"python -m pipelines.run task=fidelity {_GRID}", note)


def predicted_speed(runs: pd.DataFrame, styles: Styles) -> Group:
    """One figure per model and fidelity task: what exact verification is predicted to bring, against sparsity."""
    runs = _pruned(select(runs, kind="fidelity", metric="predicted_speedup"))
    drawings = []
    for (model, task), mine in runs.groupby(["model", "task"]):
        if mine["sparsity"].nunique() > 1:
            draw = functools.partial(_sparsity_figure, mine, styles, [1.0])
            drawings.append(drawing(("predicted_speed", model, task), f"{task}, {model}", mine["run_id"], draw))
    command = "python -m pipelines.run task=fidelity 'grid.sparsity=[0.25,0.5,0.75]'"
    note = (
        "Decode speed-up that checking the drafts of a pruned model brings, greedily and with the best fixed number of "
        "drafted tokens, by bytes of weights read. Above the dashed line verified decoding pays."
    )
    return Group("Predicted exact speed-up against sparsity", drawings, command, note)


def by_length(runs: pd.DataFrame, styles: Styles) -> Group:
    """Two figures per model and perplexity task: against prompt length, and against generation length."""
    runs = select(runs, kind="perplexity", metric="perplexity")
    drawings = []
    for (model, task), mine in runs[runs["prompt_length"].notna()].groupby(["model", "task"]):
        for along, fixed, words in zip(_LENGTHS, _LENGTHS[::-1], ("generated", "prompt"), strict=True):
            rows = select(mine, **{fixed: mine[fixed].max()})
            if rows[along].nunique() > 1:
                title = f"{task} by {along.replace('_', ' ')}, {model}"
                draw = functools.partial(_length_figure, rows, along, styles)
                caption = f"{mine[fixed].max():g} {words} tokens throughout."
                drawings.append(drawing(("perplexity_by", along, model, task), title, rows["run_id"], draw, caption))
    command = "python -m pipelines.run experiment=paper_lengths limit=8"
    return Group("Perplexity by prompt and generation length", drawings, command, "Bars: ± standard error.")


def against_speed(runs: pd.DataFrame, styles: Styles) -> Group:
    """One figure per model, task and latency task: quality against decode speed, where several methods have both."""
    speeds = select(runs, kind="latency", metric="decode_speedup")
    drawings = []
    for (model, task), mine in headlines(runs).groupby(["model", "task"]):
        for timed, speed in select(speeds, model=model).groupby("task"):
            longest = speed[_LENGTHS].max()
            both = mine.merge(
                select(speed, **longest)[["method", "value", "run_id"]], on="method", suffixes=("", "_speed")
            )
            if len(both) > 1:
                caption = "Speed-up of {}, {:g} + {:g} tokens.".format(timed, *longest)
                run_ids = [*select(mine, role="dense")["run_id"], *both["run_id"], *both["run_id_speed"]]
                draw = functools.partial(_pareto_figure, mine, both, styles)
                drawings.append(drawing(("pareto", model, task, timed), f"{task}, {model}", run_ids, draw, caption))
    command = f"python -m pipelines.run task=latency model=MODEL {_GRID.replace('[0,', '[')}"
    note = "Numbers are sparsities in %. The grey line joins the methods that no other beats in both."
    return Group("Quality against decode speed", drawings, command, note, "with MODEL as in the quality runs")


def latency(runs: pd.DataFrame, styles: Styles) -> Group:
    """One figure per model, latency task and pair of lengths with several methods: a bar for each."""
    runs = select(runs, kind="latency")
    runs = runs[runs["metric"].isin(["decode_speedup", "decode_limit"])]
    drawings = []
    for (model, task, *lengths), mine in runs.groupby(["model", "task", *_LENGTHS]):
        if mine["method"].nunique() > 1:
            words = ("latency", model, task, "p{:g}_g{:g}".format(*lengths))
            title = "{}, {:g} + {:g} tokens".format(model, *lengths)
            draw = functools.partial(_latency_figure, mine, styles)
            drawings.append(drawing(words, title, mine["run_id"], draw, f"{task}."))
    command = "python -m pipelines.run task=latency 'grid.statistic=[griffin]' 'grid.sparsity=[0.25,0.5,0.75]'"
    note = (
        "Medians, with prompt + generated tokens. The upright mark at a bar's end is the limit of memory traffic: "
        "bytes of weights read per token, dense over pruned."
    )
    return Group("Decode speed and its limit", drawings, command, note)


def flocking(runs: Runs) -> Group:
    """Jaccard curves, scores and heatmaps of every flocking run. Runs that were read from W&B have curves only."""
    drawings: list[Drawing] = []
    for record, names in zip(runs.records, labels(runs.records), strict=True):
        if record["config"]["task"]["kind"] == "flocking":
            drawings += _flocking_drawings(record, runs, names.model, names.task)
    note = (
        "Jaccard similarities compare the top-k sets of a layer; bands: ± standard error. Permuted: the same tokens in "
        "random order. Random: tokens drawn from the vocabulary. Scores are GRIFFIN's, of all neurons of a layer in "
        "falling order. Heatmaps show the first tokens and neurons, every token's row divided by its norm: upright "
        "lines are flocking, a neuron that is strong for token after token."
    )
    return Group("Flocking", drawings, "python -m pipelines.run task=flocking", note)


def _flocking_drawings(record: dict[str, Any], runs: Runs, model: str, task: str) -> Iterator[Drawing]:
    run_id, kept = record["run_id"], record["config"]["task"]["kept"]
    place = model if task == "flocking" else f"{model}, {task}"
    folder = runs.folders.get(run_id)
    whole = whole_samples(folder / "samples.jsonl")[0] if folder else []
    samples = sorted((sample for sample in whole if "arrays" in sample), key=lambda sample: sample["index"])
    captions = _FLOCKING | {"scores": f"The mean of {len(samples)} texts."}
    for (name, *more), title, draw in flocking_figures.figures(samples, _layer_rows(runs, run_id), kept):
        words, caption = (f"flocking_{name}", model, task, *more), captions.get(name, "")
        yield drawing(words, title.format(place), [run_id], draw, caption)


def _layer_rows(runs: Runs, run_id: str) -> list[dict[str, Any]]:
    """The measures by layer, from W&B or from layers.csv in the run folder; empty if there are none."""
    folder = runs.folders.get(run_id)
    if folder is None or not (folder / "layers.csv").is_file():
        return runs.layers.get(run_id, [])
    return pd.read_csv(folder / "layers.csv").to_dict("records")


def _sparsity_figure(runs: pd.DataFrame, styles: Styles, dense: Iterable[float]) -> Figure:
    """A line per method, from the dense run that is nearest to it if there is any; dashed lines at dense values."""
    figure, axis = new_figure()
    for family, mine in _pruned(runs).groupby("family"):
        start = nearest(next(mine.itertuples()), select(runs, role="dense").itertuples())
        line = mine if start is None or 0.0 in {*mine["sparsity"]} else pd.concat([runs.loc[[start.Index]], mine])
        line = _with_gaps(line, runs, "sparsity")
        axis.errorbar(100 * line["sparsity"], line["value"], _bars(line), **styles.points(str(family)))
    for value in dense:
        axis.axhline(value, **DENSE_LINE)
    axis.set_xlabel("FF sparsity (%)")
    _finish(figure, axis, runs)
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
    _finish(figure, axis, runs)
    return figure


def _pareto_figure(quality: pd.DataFrame, both: pd.DataFrame, styles: Styles) -> Figure:
    figure, axis = new_figure()
    better = metric(quality["metric"].iloc[0]).better
    dense = select(quality, role="dense")["value"].tolist()
    points = [*((1.0, value) for value in dense), *zip(both["value_speed"], both["value"], strict=True)]
    if better:
        front = [one for one in points if not any(_dominates(other, one, better) for other in points)]
        axis.plot(*zip(*sorted(front), strict=True), color=NEUTRAL, linewidth=4, alpha=0.35, solid_capstyle="round")
    for family, mine in both.groupby("family"):
        mine = mine.sort_values("sparsity")
        axis.errorbar(mine["value_speed"], mine["value"], _bars(mine), linestyle=":", **styles.points(str(family)))
        name_sparsities(axis, mine["value_speed"], mine["value"], mine["sparsity"])
    if dense:
        axis.plot(1.0, dense[0], marker="*", markersize=11, color=NEUTRAL, linestyle="none", label="dense")
    axis.set_xlabel("decode speed-up (x), higher is better")
    axis.margins(x=0.12)
    _finish(figure, axis, both)
    return figure


def _dominates(one: tuple[float, float], other: tuple[float, float], better: int) -> bool:
    """Whether one point (speed, quality) is at least as good as the other in both, and is another point."""
    return one != other and one[0] >= other[0] and better * one[1] >= better * other[1]


def _latency_figure(runs: pd.DataFrame, styles: Styles) -> Figure:
    table = runs.pivot(index=["family", "sparsity", "method"], columns="metric", values="value").reset_index()
    table = table.sort_values(["family", "sparsity"])  # sparsities that differ by layer last
    figure, axis = new_figure(height=1.1 + 0.34 * len(table))
    places, limit = np.arange(len(table)), {"color": axis.spines["left"].get_edgecolor(), "lw": 2.5}
    axis.barh(places, table["decode_speedup"], height=0.62, color=[styles.colour(family) for family in table["family"]])
    for place, row in zip(places, table.itertuples(), strict=True):
        axis.text(0.03, place, f"{row.decode_speedup:.2f}", va="center", color="#0d1117", fontsize=8, fontweight="bold")
        axis.plot([row.decode_limit] * 2, [place - 0.38, place + 0.38], **limit)
    axis.plot([], [], label="memory-traffic limit", **limit)
    axis.axvline(1.0, **DENSE_LINE)
    axis.set_yticks(places, [textwrap.fill(method, _LABEL) for method in table["method"]])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("decode speed-up over dense (x)")
    figure.legend(loc="outside upper right", ncols=2)
    return figure


def _pruned(runs: pd.DataFrame) -> pd.DataFrame:
    """The pruned runs with one sparsity for all layers."""
    return runs[(runs["role"] == "pruned") & runs["sparsity"].notna()]


def _with_gaps(line: pd.DataFrame, runs: pd.DataFrame, along: str) -> pd.DataFrame:
    """The line with NaN wherever only other lines have a point, so that no line is drawn across a missing run."""
    everywhere = sorted(runs[along].dropna().unique())
    return line.set_index(along).reindex(everywhere).reset_index()


def _bars(runs: pd.DataFrame) -> np.ndarray | None:
    """How far the error bar of each row reaches down, and how far up; NaN in a gap. None where no row has an error."""
    if runs["stderr"].isna().all():
        return None
    (name,) = runs["metric"].dropna().unique()
    ends = [metric(name).ends(row.value, row.stderr) for row in runs.itertuples()]
    return np.abs(np.array(ends) - runs[["value"]].to_numpy()).T


def _finish(figure: Figure, axis: Any, runs: pd.DataFrame) -> None:
    """Name the axis of the runs' metric, and add a legend. The axis is logarithmic if it shows perplexities that differ
    by orders of magnitude."""
    axis.set_ylabel(metric(runs["metric"].iloc[0]).axis)
    if runs["metric"].iloc[0] == "perplexity" and runs["value"].max() > 10 * runs["value"].min() > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter("")
    add_legend(figure, axis)
