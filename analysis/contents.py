"""What a report shows: the runs of a source, and the tables and figures made from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pandas as pd

from analysis import figures
from analysis.critical_sparsity import against_bytes, critical_sparsities
from analysis.drawing import Group, Styles, numbered
from analysis.frame import QUALITY, VERSIONS, frame, select
from analysis.paired import differences, pairs
from analysis.runs import Record, Runs, read_runs
from analysis.samples import Answers, answers, read_scores
from analysis.sentences import sentences
from analysis.tables import Table, tables
from pipelines.errors import UserError

_NOISE = 1.05  # a decode speed-up this many times above its limit can only come from a disturbed measurement


@dataclass(frozen=True)
class Section:
    """Figures and tables of one subject. A group of figures may be empty, all tables have rows."""

    title: str
    groups: list[Group]
    tables: list[Table]


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        source: where the runs were read from, as the user named it.
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
    def shown(self) -> list[Section]:
        """The sections that have a figure or a table."""
        return [section for section in self.sections if section.tables or any(g.drawings for g in section.groups)]

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
        for name in VERSIONS:
            versions = self.frame.drop_duplicates("run_id")[name].dropna().value_counts()
            if len(versions) > 1:
                counts = ", ".join(f"{key} ({count} runs)" for key, count in versions.items())
                found.append(f"{name} differs: {counts}")
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

    def values(record: Record, key: str) -> set[str]:
        if key == "method":
            return {record["method"]["label"], record["method"]["family"]}
        return {*(record["config"].get("tags") or ())} if key == "tags" else {record["config"][key]["name"]}

    left = [record for record in runs.records if all(values(record, key) & words for key, words in wanted.items())]
    if wanted and not left:
        asked = " ".join(f"{key}={only[key]}" for key in wanted)
        found = {key: sorted(set().union(*(values(record, key) for record in runs.records))) for key in wanted}
        there = "; ".join(f"{key}: {', '.join(values)}" for key, values in found.items())
        raise UserError(f"{asked}: no such run among {len(runs.records)}; there are {there}")
    return replace(runs, records=left)


def make_report(source: str, only: Mapping[str, str] | None = None) -> Report:
    """Read the runs of a source and make all tables and figures that they have data for. Figures are drawn later.

    Args:
        source: as in `analysis.runs.read_runs`.
        only: by one of `FILTERS`, values with commas between; empty: all runs.
    """
    runs = _filtered(read_runs(source), only or {})
    table = frame(runs.records)
    styles = Styles(table["family"])
    scores = read_scores(runs, table)
    to_dense, to_griffin = (pairs(scores, table, against) for against in ("dense", "griffin"))
    made = [*tables(table), critical_sparsities(to_dense), differences(to_dense, to_griffin)]
    quality = [make(table, styles) for make in (figures.against_sparsity, figures.against_speed, figures.by_length)]
    parts = [
        ("Quality", quality, (*QUALITY, "perplexity_lengths")),
        ("Differences to dense", [against_bytes(to_dense, styles)], ("critical_sparsity", "differences")),
        ("Verified decoding", [figures.predicted_speed(table, styles)], ("verified",)),
        ("Latency", [figures.latency(table, styles)], ("latency",)),
        ("Flocking", [figures.flocking(runs)], ("flocking", "flocking_generation")),
    ]
    rows = {one.name: one for one in made if one.rows}
    sections = [
        Section(title, [*map(numbered, groups)], [rows[name] for name in names if name in rows])
        for title, groups, names in parts
    ]
    return Report(source, runs, table, sentences(to_dense, table, scores), sections, answers(runs, table, scores))
