"""Writes a report: into files, and into W&B."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from analysis import render
from analysis.contents import Report
from analysis.drawing import MOST_SHOWN
from analysis.page import answers_page, page
from analysis.runs import watched
from analysis.samples import examples
from pipelines.errors import UserError
from pipelines.figure_style import DARK, LIGHT, as_svg, drawn_in, save
from pipelines.tracking import Media, track

_TEXTS = {"md": render.markdown, "tex": render.latex, "csv": render.comma_separated}
_WRITTEN = ".written"  # lists the tables and figures that a report wrote, by their paths in its folder


def write_report(report: Report, out: Path) -> Path:
    """Write all files of a report.

    Returns:
        The path of the HTML page.

    Raises:
        UserError: the folder cannot be written.
    """
    drawings = [drawing for group in report.groups for drawing in group.drawings]
    names = [f"tables/{table.name}.{suffix}" for table in report.tables for suffix in _TEXTS]
    names += [f"figures/{drawing.name}.{suffix}" for drawing in drawings for suffix in ("png", "pdf")]
    names += [f"answers/{answers.name}.html" for answers in report.answers]
    try:
        for folder in ("tables", "figures", *(["answers"] if report.answers else [])):
            (out / folder).mkdir(parents=True, exist_ok=True)
        # Delete what an earlier report wrote here, but no file of the user's.
        for line in (out / _WRITTEN).read_text(encoding="utf-8").splitlines() if (out / _WRITTEN).is_file() else ():
            if re.fullmatch(r"(tables|figures|answers)/[^/]+", line):
                (out / line).unlink(missing_ok=True)
        (out / _WRITTEN).write_text("\n".join(names) + "\n", encoding="utf-8")
        report.frame.to_csv(out / "runs.csv", index=False)
        for table in report.tables:
            for suffix, text in _TEXTS.items():
                (out / "tables" / f"{table.name}.{suffix}").write_text(text(table), encoding="utf-8")
        (out / "report.md").write_text(_markdown(report), encoding="utf-8")
        chosen = {}
        for number, answers in enumerate(watched(report.answers, "pages")):
            samples = answers.samples
            (out / "answers" / f"{answers.name}.html").write_text(answers_page(answers, samples), encoding="utf-8")
            if number < MOST_SHOWN:
                chosen[answers.name] = examples(samples)
        pictures = {}
        for drawing in watched(drawings, "figures"):
            with drawn_in(LIGHT):
                figure = drawing.draw()
                save(figure, out / "figures" / drawing.name)
                light = as_svg(figure)
            with drawn_in(DARK):
                pictures[drawing.name] = light, as_svg(drawing.draw())
        (out / "index.html").write_text(page(report, pictures, chosen), encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={out}: cannot write {error.filename or out}: {error.strerror}") from error
    return out / "index.html"


def log_report(report: Report, out: Path, entity: str | None, project: str) -> None:
    """Log the tables and figures in `out` to W&B, as one run of job type `report`."""
    images = [out / "figures" / f"{drawing.name}.png" for group in report.groups for drawing in group.drawings]
    rows: dict[str, list[dict[str, Any]]] = {
        "runs": report.frame.astype(object).where(report.frame.notna(), None).to_dict("records")
    }
    for table in report.tables:
        rows[table.name] = [
            dict(zip(table.stubs, names, strict=True))
            | {label: render.plain(cell) for label, cell in zip(table.columns, cells, strict=True)}
            for names, cells in table.rows
        ]
    settings = SimpleNamespace(mode="online", project=project, entity=entity)
    config = {"runs": report.source, "run_ids": [record["run_id"] for record in report.runs.records]}
    with track(
        settings, out, f"report-{project}", f"report on {report.source}", "report", "report", [], config
    ) as tracker:
        tracker.show(Media(images, rows))


def _markdown(report: Report) -> str:
    """The text of report.md."""
    lines = ["# GRIFFIN: results", "", f"From `{report.source}`: {len(report.runs.records)} runs.", ""]
    lines += [*(f"- {sentence}" for sentence in report.summary), ""] if report.summary else []
    if report.runs.problems:
        problems = (f"- `{one.run_id}`: {one.state}, {one.reason}" for one in report.runs.problems)
        lines += ["Left out:", "", *problems, ""]
    lines += [line for note in report.notes for line in (f"Note: {note}.", "")]
    for section in report.sections:
        lines += (
            [f"## {section.title}", ""] if section.tables or any(group.drawings for group in section.groups) else []
        )
        for group in (group for group in section.groups if group.drawings):
            lines += [f"### {group.title}", "", group.note, ""]
            for drawing in group.drawings:
                words = ". ".join(filter(None, (drawing.title, drawing.caption)))
                lines += [f"![{drawing.title}](figures/{drawing.name}.png)", "", words, ""]
        for table in section.tables:
            lines += [f"### {table.title}", "", table.note, "", render.markdown(table)]
    for group in (group for group in report.groups if not group.drawings):
        lines += [f"{group.title}: too few runs; this makes more{', ' + group.hint if group.hint else ''}:", ""]
        lines += [f"`{group.command}`", ""]
    lines += ["## Runs", ""]
    for record in sorted(report.runs.records, key=lambda record: record["run_id"]):
        environment = record["environment"]
        versions = ", ".join(f"{key} {environment.get(key)}" for key in ("griffin-pruning", "torch", "transformers"))
        lines += [
            f"- `{record['run_id']}`: {versions}, {environment.get('device')}",
            f"  `{environment.get('command')}`",
        ]
    return "\n".join(lines) + "\n"
