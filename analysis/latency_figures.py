"""Figures of latency: the decode speed-up of each method, and the limit that memory traffic sets."""

from __future__ import annotations

import functools
import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.drawing import Drawing, Group, Styles, file_name
from analysis.frame import select
from pipelines.figure_style import NEUTRAL, new_figure

_LABEL = 24  # characters per line of a method's label, so that the axes keep their width


def bars(runs: pd.DataFrame, styles: Styles) -> Group:
    """One figure per model, latency task and pair of lengths with several methods: a bar for each."""
    runs = select(runs, kind="latency")
    runs = runs[runs["metric"].isin(["decode_speedup", "decode_limit"]) & runs["prompt_length"].notna()]
    drawings = []
    for (model, task, prompt, generation), mine in runs.groupby(
        ["model", "task", "prompt_length", "generation_length"], sort=True
    ):
        if mine["method"].nunique() > 1:
            drawings.append(
                Drawing(
                    file_name("latency", model, task, f"p{prompt:g}_g{generation:g}"),
                    f"{model}, {prompt:g} + {generation:g} tokens",
                    f"{task}.",
                    tuple(dict.fromkeys(mine["run_id"])),
                    functools.partial(_figure, mine, styles),
                )
            )
    command = "python -m pipelines.run task=latency 'grid.statistic=[griffin]' 'grid.sparsity=[0.25,0.5,0.75]'"
    note = (
        "Medians, with prompt + generated tokens. The upright mark at a bar's end is the limit of memory traffic: "
        "bytes of weights read per token, dense over pruned."
    )
    return Group("Decode speed and its limit", drawings, command, note)


def _figure(runs: pd.DataFrame, styles: Styles) -> Figure:
    table = runs.pivot(index=["family", "sparsity", "method"], columns="metric", values="value").reset_index()
    table = table.sort_values(["family", "sparsity"], ascending=[True, True])
    figure, axis = new_figure(height=1.1 + 0.34 * len(table))
    places = np.arange(len(table))
    axis.barh(places, table["decode_speedup"], height=0.62, color=[styles.colour(family) for family in table["family"]])
    for place, row in zip(places, table.itertuples(), strict=True):
        axis.text(0.03, place, f"{row.decode_speedup:.2f}", va="center", color="#0d1117", fontsize=8, fontweight="bold")
        axis.plot(
            [row.decode_limit] * 2, [place - 0.38, place + 0.38], color=axis.spines["left"].get_edgecolor(), lw=2.5
        )
    axis.plot([], [], color=axis.spines["left"].get_edgecolor(), lw=2.5, label="memory-traffic limit")
    axis.axvline(1.0, color=NEUTRAL, linestyle="--", linewidth=1.2, label="dense")
    axis.set_yticks(places, [textwrap.fill(method, _LABEL) for method in table["method"]])
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("decode speed-up over dense (x)")
    figure.legend(loc="outside upper right", ncols=2)
    return figure
