"""What a report shows: the runs of a source, and the tables and figures made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd

from analysis import critical_sparsity, latency_figures, quality_figures
from analysis.drawing import Group, Styles, numbered
from analysis.flocking_figures import flocking
from analysis.frame import QUALITY, frame, select
from analysis.paired import differences, pairs
from analysis.runs import Record, Runs
from analysis.samples import Answers, answers, read_scores
from analysis.sources import read_runs
from analysis.tables import Table, tables
from pipelines.errors import UserError

_NOISE = 1.05  # a decode speed-up this many times above its limit can only come from a disturbed measurement


@dataclass(frozen=True)
class Section:
    """Figures and tables of one subject.

    Attributes:
        title: heading above them.
        groups: the figures; a group may be empty.
        tables: the tables that have rows.
    """

    title: str
    groups: list[Group]
    tables: list[Table]


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        source: where the runs were read from, as the user named it.
        runs: records and problems.
        frame: the records as a DataFrame.
        summary: what the runs show, in sentences.
        sections: figures and tables by their subjects.
        answers: what the models wrote, by model and task; empty for runs of W&B.
    """

    source: str
    runs: Runs
    frame: pd.DataFrame
    summary: list[str]
    sections: list[Section]
    answers: list[Answers]

    @property
    def tables(self) -> list[Table]:
        """The tables of all sections."""
        return [table for section in self.sections for table in section.tables]

    @property
    def groups(self) -> list[Group]:
        """The figures of all sections."""
        return [group for section in self.sections for group in section.groups]

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


# By what the runs of a report can be chosen.
FILTERS = ("tags", "model", "task", "method")


def _filtered(runs: Runs, only: Mapping[str, str]) -> Runs:
    wanted = {key: {word.strip() for word in text.split(",")} for key, text in only.items() if text.strip()}
    if not wanted:
        return runs

    def values(record: Record) -> dict[str, set[str]]:
        config, method = record["config"], record["method"]
        return {
            "tags": {*(config.get("tags") or ())},
            "model": {config["model"]["name"]},
            "task": {config["task"]["name"]},
            "method": {method["label"], method["family"]},
        }

    known = [(record, values(record)) for record in runs.records]
    left = [record for record, mine in known if all(mine[key] & words for key, words in wanted.items())]
    if not left:
        asked = " ".join(f"{key}={only[key]}" for key in wanted)
        found = {key: sorted({value for _, mine in known for value in mine[key]}) for key in wanted}
        there = "; ".join(f"{key}: {', '.join(values)}" for key, values in found.items())
        raise UserError(f"{asked}: no such run among {len(known)}; there are {there}")
    return replace(runs, records=left)


def make_report(source: str, only: Mapping[str, str] | None = None) -> Report:
    """Read the runs of a source and make all tables and figures that they have data for. Figures are drawn later.

    Args:
        source: as in `analysis.sources.read_runs`.
        only: by one of `FILTERS`, values with commas between; empty: all runs.

    Raises:
        UserError: the source does not exist, or holds no run, or none of those that are asked for.
    """
    runs = _filtered(read_runs(source), only or {})
    table = frame(runs.records)
    styles = Styles(table["family"])
    scores = read_scores(runs, table)
    to_dense, to_griffin = (pairs(scores, table, against) for against in ("dense", "griffin"))
    compared = [critical_sparsity.critical_sparsities(to_dense), differences(to_dense, to_griffin)]
    labels = {row.run_id: (row.model, row.task) for row in table.itertuples()}
    made = {one.name: one for one in [*tables(table), *compared] if one.rows}
    figures = numbered(
        [
            quality_figures.against_sparsity(table, styles),
            quality_figures.against_speed(table, styles),
            quality_figures.by_length(table, styles),
            critical_sparsity.against_bytes(to_dense, styles),
            quality_figures.predicted_speed(table, styles),
            latency_figures.bars(table, styles),
            flocking(runs, labels),
        ]
    )
    parts = [
        ("Quality", figures[:3], (*QUALITY, "perplexity_lengths")),
        ("Differences to dense", figures[3:4], ("critical_sparsity", "differences")),
        ("Verified decoding", figures[4:5], ("verified",)),
        ("Latency", figures[5:6], ("latency",)),
        ("Flocking", figures[6:], ("flocking", "flocking_generation")),
    ]
    sections = [
        Section(title, groups, [made[name] for name in names if name in made]) for title, groups, names in parts
    ]
    summary = critical_sparsity.sentences(to_dense, table)
    return Report(source, runs, table, summary, sections, answers(runs, table, scores))
