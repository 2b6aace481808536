"""What a report shows: the runs of a source, and the tables and figures made from them."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from analysis import critical_sparsity, latency_figures, quality_figures
from analysis.drawing import Group, Styles, numbered
from analysis.flocking_figures import flocking
from analysis.frame import frame, select
from analysis.paired import differences, pairs
from analysis.runs import Runs
from analysis.sources import read_runs
from analysis.tables import Table, tables

_NOISE = 1.05  # a decode speed-up this many times above its limit can only come from a disturbed measurement


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        source: where the runs were read from, as the user named it.
        runs: records and problems.
        frame: the records as a DataFrame.
        tables: the tables that have rows.
        groups: the figures; a group may be empty.
    """

    source: str
    runs: Runs
    frame: pd.DataFrame
    tables: list[Table]
    groups: list[Group]

    @property
    def notes(self) -> list[str]:
        """Warnings for readers who compare runs: versions that differ, and disturbed time measurements."""
        found = []
        for name in ("griffin-pruning", "torch", "transformers", "lm-eval"):
            versions = self.frame.drop_duplicates("run_id")[name].dropna().value_counts()
            if len(versions) > 1:
                found.append(
                    f"{name} differs: " + ", ".join(f"{key} ({count} runs)" for key, count in versions.items())
                )
        above = select(self.frame, metric="decode_fraction_of_limit")
        for row in above[above["value"] > _NOISE].itertuples():
            found.append(
                f"{row.run_id}: decoding is {row.value:.2f} times as fast as its limit allows, so the machine was busy "
                "with other things while dense was timed"
            )
        return found


def make_report(source: str) -> Report:
    """Read the runs of a source and make all tables and figures that they have data for. Figures are drawn later.

    Args:
        source: as in `analysis.sources.read_runs`.

    Raises:
        UserError: the source does not exist, or holds no run.
    """
    runs = read_runs(source)
    table = frame(runs.records)
    styles = Styles(table["family"])
    to_dense, to_griffin = (pairs(runs, table, against) for against in ("dense", "griffin"))
    compared = [critical_sparsity.critical_sparsities(to_dense, table), differences(to_dense, to_griffin)]
    labels = {row.run_id: (row.model, row.task) for row in table.itertuples()}
    groups = [
        quality_figures.against_sparsity(table, styles),
        critical_sparsity.against_bytes(to_dense, table, styles),
        quality_figures.against_speed(table, styles),
        quality_figures.predicted_speed(table, styles),
        latency_figures.bars(table, styles),
        quality_figures.by_length(table, styles),
        flocking(runs, labels),
    ]
    shown = [*tables(table), *(one for one in compared if one.rows)]
    return Report(source, runs, table, shown, numbered(groups))
