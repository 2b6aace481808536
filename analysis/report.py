"""`python -m analysis.report runs=outputs out=report`: tables, figures and one page of all of it, from finished runs.

out/index.html      everything on one page that needs no network and no script
    report.md       the tables with their runs, in Markdown
    runs.csv        the DataFrame of `analysis.frame`
    tables/*.tex, *.csv, *.md
    figures/*.png, *.pdf
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from analysis import latency_figures, quality_figures, render
from analysis.drawing import Group, Looks, named_apart
from analysis.flocking_figures import flocking
from analysis.frame import frame, select
from analysis.page import page
from analysis.run_folders import Problem, Runs
from analysis.sources import WANDB, read_runs
from analysis.tables import Table, tables
from pipelines.errors import UserError
from pipelines.figure_style import DARK, LIGHT, as_svg, drawn_in, save
from pipelines.tracking import Media, track

_KEYS = {
    "runs": "folder of runs (several with commas between), or wandb:entity/project",
    "out": "folder that the report is written into",
    "log": "none, or wandb: the report as a run of its own in the runs' project; wandb:entity/project names another",
}

_TEXTS = {"md": render.markdown, "tex": render.latex, "csv": render.comma_separated}
_NOISE = 1.05  # times the limit of the decode speed-up: more cannot be
_WRITTEN = ".written"  # the names of the tables and figures below the report's folder


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        source: where the runs came from, as the user named it.
        runs: records and problems.
        frame: the records as a DataFrame.
        tables: those that have rows.
        groups: the figures; a group without any says what would make its data.
    """

    source: str
    runs: Runs
    frame: pd.DataFrame
    tables: list[Table]
    groups: list[Group]

    @property
    def notes(self) -> list[str]:
        """What a reader must know before comparing: versions that differ, and times that cannot be."""
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
    """Read runs and decide what there is to show.

    Args:
        source: as `analysis.sources.read_runs`.

    Raises:
        UserError: the source is not there, or holds no run.
    """
    runs = read_runs(source)
    table = frame(runs.records)
    looks = Looks(table["family"])
    labels = {row.run_id: (row.model, row.task) for row in table.itertuples()}
    groups = [
        quality_figures.against_sparsity(table, looks),
        quality_figures.against_speed(table, looks),
        latency_figures.bars(table, looks),
        quality_figures.by_length(table, looks),
        flocking(runs, labels),
    ]
    return Report(source, runs, table, tables(table), named_apart(groups))


def write_report(report: Report, out: Path) -> Path:
    """Write all files of a report.

    Returns:
        The page.

    Raises:
        UserError: the folder cannot be written.
    """
    drawings = [drawing for group in report.groups for drawing in group.drawings]
    names = [f"tables/{table.name}.{suffix}" for table in report.tables for suffix in _TEXTS]
    names += [f"figures/{drawing.name}.{suffix}" for drawing in drawings for suffix in ("png", "pdf")]
    try:
        for folder in ("tables", "figures"):
            (out / folder).mkdir(parents=True, exist_ok=True)
        # What an earlier report has written and this one will not must not stay; other people's files must.
        for line in (out / _WRITTEN).read_text(encoding="utf-8").splitlines() if (out / _WRITTEN).is_file() else ():
            if re.fullmatch(r"(tables|figures)/[^/]+", line):
                (out / line).unlink(missing_ok=True)
        (out / _WRITTEN).write_text("\n".join(names) + "\n", encoding="utf-8")
        report.frame.to_csv(out / "runs.csv", index=False)
        for table in report.tables:
            for suffix, text in _TEXTS.items():
                (out / "tables" / f"{table.name}.{suffix}").write_text(text(table), encoding="utf-8")
        (out / "report.md").write_text(_markdown(report), encoding="utf-8")
        pictures = {}
        for drawing in tqdm(drawings, unit="figure", desc="report", disable=not sys.stderr.isatty()):
            with drawn_in(LIGHT):
                figure = drawing.draw()
                save(figure, out / "figures" / drawing.name)
                light = as_svg(figure)
            with drawn_in(DARK):
                pictures[drawing.name] = light, as_svg(drawing.draw())
        (out / "index.html").write_text(page(report, pictures), encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={out}: cannot write {error.filename or out}: {error.strerror}") from error
    return out / "index.html"


def log_report(report: Report, out: Path, entity: str | None, project: str) -> None:
    """Log tables and figures as a run of its own, job type `report`; its files stay below `out`."""
    from pipelines.config import WandbConfig  # with all that a run needs, torch first; a report needs none of it

    images = [out / "figures" / f"{drawing.name}.png" for group in report.groups for drawing in group.drawings]
    rows: dict[str, list[dict[str, Any]]] = {
        "runs": report.frame.astype(object).where(report.frame.notna(), None).to_dict("records")
    }
    for table in report.tables:
        rows[table.name] = [
            dict(zip(table.stubs, names, strict=True))
            | {
                f"{group} {label}".strip(): render.plain(cell)
                for (group, label), cell in zip(table.columns, cells, strict=True)
            }
            for names, cells in table.rows
        ]
    settings = WandbConfig(mode="online", project=project, entity=entity)
    config = {"runs": report.source, "run_ids": [record["run_id"] for record in report.runs.records]}
    with track(
        settings, out, f"report-{project}", f"report on {report.source}", "report", "report", [], config
    ) as tracker:
        tracker.show(Media(images, rows))


def main(arguments: Sequence[str]) -> None:
    """The command line: KEY=VALUE, as everywhere in this project."""
    given = _parse(arguments)
    report = make_report(given["runs"])
    index = write_report(report, Path(given["out"]))
    if given["log"] != "none":
        target = given["runs"] if given["log"] == "wandb" and given["runs"].startswith(WANDB) else given["log"]
        entity, _, project = target.removeprefix("wandb").removeprefix(":").rpartition("/")
        log_report(report, Path(given["out"]), entity or None, project or "griffin")
    print(summary(report, index))


def summary(report: Report, index: Path) -> str:
    """What was made of what, and where it is."""
    figures = sum(len(group.drawings) for group in report.groups)
    found = f"{len(report.runs.records)} runs, {len(report.tables)} tables, {figures} figures"
    left_out = [f"  left out: {problem.run_id}: {_words(problem)}" for problem in report.runs.problems]
    return "\n".join([*left_out, f"Report: {index} ({found})"])


def _words(problem: Problem) -> str:
    return f"{problem.state}, {problem.reason}"


def _markdown(report: Report) -> str:
    lines = ["# GRIFFIN: results", "", f"From `{report.source}`: {len(report.runs.records)} runs.", ""]
    if report.runs.problems:
        lines += ["Left out:", "", *(f"- `{one.run_id}`: {_words(one)}" for one in report.runs.problems), ""]
    lines += [line for note in report.notes for line in (f"Note: {note}.", "")]
    for table in report.tables:
        lines += [f"## {table.title}", "", table.note, "", render.markdown(table)]
    lines += ["## Figures", ""]
    for group in report.groups:
        lines += [f"### {group.title}", ""]
        if not group.drawings:
            lines += [f"No data. This makes it{', ' + group.hint if group.hint else ''}: `{group.command}`", ""]
        for drawing in group.drawings:
            lines += [f"![{drawing.title}](figures/{drawing.name}.png)", "", f"{drawing.title}. {drawing.caption}", ""]
    lines += ["## Runs", ""]
    for record in sorted(report.runs.records, key=lambda record: record["run_id"]):
        environment = record["environment"]
        versions = ", ".join(f"{key} {environment.get(key)}" for key in ("griffin-pruning", "torch", "transformers"))
        lines += [
            f"- `{record['run_id']}`: {versions}, {environment.get('device')}",
            f"  `{environment.get('command')}`",
        ]
    return "\n".join(lines) + "\n"


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    usage = "python -m analysis.report runs=outputs out=report"
    given = {"log": "none"}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument in ("-h", "--help"):
            print("\n".join([usage, "", *(f"  {key:6}{text}" for key, text in _KEYS.items())]))
            raise SystemExit(0)
        if not equals:
            raise UserError(f"{argument}: expected KEY=VALUE, as in {usage}")
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise UserError(f"{key}: no such key{hint}; expected {', '.join(_KEYS)}")
        given[key] = value
    for key in ("runs", "out"):
        if not given.get(key, "").strip():
            raise UserError(f"{key}=: expected a {_KEYS[key]}, as in {usage}")
    if not re.fullmatch(r"none|wandb(:([^/:\s]+/)?[^/:\s]+)?", given["log"]):
        raise UserError(f"log={given['log']}: expected none, wandb or wandb:entity/project")
    return given


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing of the runs was touched")
