"""Writes a report: into W&B, and into files; tables as text: Markdown, LaTeX (booktabs) and CSV.

Its HTML is for any screen, light and dark: one page that fetches nothing and runs no script, and for each model and
task a page of all answers, whose only script is its search.
"""

from __future__ import annotations

import base64
import csv
import functools
import io
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jinja2

from analysis.contents import Report
from analysis.drawing import MOST_SHOWN, file_name
from analysis.frame import labels
from analysis.runs import watched
from analysis.samples import Example, examples
from analysis.tables import DASH, Cell, Table
from pipelines.errors import UserError
from pipelines.figure_style import save, styled, themed
from pipelines.tracking import Media, track

_VERSIONS = (
    *("griffin-pruning", "git_commit", "torch", "transformers", "lm-eval", "rouge-score", "python", "platform"),
    *("processor", "cpus", "memory", "device", "started", "finished"),
)
_WRITTEN = ".written"  # lists the tables and figures that a report wrote, by their paths in its folder
_PICTURES = (".png", ".pdf", ".svg", "_dark.svg")
MISSING = "missing"

_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "‖": r"$\Vert$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "\N{MINUS SIGN}": "$-$",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    '"': "''",
}


def write_report(report: Report, out: Path) -> Path:
    """Write all files of a report.

    Returns:
        The path of the HTML page.
    """
    drawings = [drawing for group in report.groups for drawing in group.drawings]
    names = [f"tables/{table.name}.{suffix}" for table in report.tables for suffix in _TEXTS]
    names += [f"figures/{drawing.name}{suffix}" for drawing in drawings for suffix in _PICTURES]
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
            for suffix, as_text in _TEXTS.items():
                (out / "tables" / f"{table.name}.{suffix}").write_text(as_text(table), encoding="utf-8")
        text = template("report.md.j2").render(report=report, markdown=markdown)
        (out / "report.md").write_text(text, encoding="utf-8")
        chosen = {}
        for number, answers in enumerate(watched(report.answers, "pages")):
            samples = answers.samples
            text = template("answers.html.j2").render(answers=answers, samples=samples)
            (out / "answers" / f"{answers.name}.html").write_text(text, encoding="utf-8")
            if number < MOST_SHOWN:
                chosen[answers.name] = examples(samples)
        pictures = {}
        for drawing in watched(drawings, "figures"):
            with styled():
                figure = drawing.draw()
                save(figure, out / "figures" / drawing.name)
                light, dark = themed(figure)
            for text, theme in ((light, ""), (dark, "_dark")):
                (out / "figures" / f"{drawing.name}{theme}.svg").write_text(text, encoding="utf-8")
            pictures[drawing.name] = _data_uri(light), _data_uri(dark)
        (out / "index.html").write_text(_page(report, pictures, chosen), encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={out}: cannot write {error.filename or out}: {error.strerror}") from error
    return out / "index.html"


def log_report(report: Report, out: Path, entity: str | None, project: str) -> None:
    """Log the tables and figures in `out` to W&B, as one run of job type `report`."""
    images = [out / "figures" / f"{drawing.name}.png" for group in report.groups for drawing in group.drawings]
    runs = report.frame.astype(object).where(report.frame.notna(), None)
    rows: dict[str, list[dict[str, Any]]] = {"runs": runs.to_dict("records")}
    for table in report.tables:
        rows[table.name] = [
            dict(zip(table.stubs, names, strict=True))
            | {label: plain(cell) for label, cell in zip(table.columns, cells, strict=True)}
            for names, cells in table.rows
        ]
    settings = SimpleNamespace(mode="online", project=project, entity=entity)
    config = {"runs": report.source, "run_ids": [record["run_id"] for record in report.runs.records]}
    words = {"name": f"report on {report.source}", "group": "report", "job_type": "report", "tags": []}
    with track(settings, out, f"report-{project}", config=config, **words) as tracker:
        tracker.show(Media(images, rows))


def _page(report: Report, pictures: Mapping[str, tuple[str, str]], examples: Mapping[str, Sequence[Example]]) -> str:
    """The HTML of the page, with pictures in the light theme and in the dark theme by the names of their drawings, and
    examples by those of their answers."""
    records = report.runs.records
    runs = zip(labels(records), records, strict=True)
    of_run = {record["run_id"]: record["environment"].get("command") for record in records}
    return template("report.html.j2").render(
        report=report,
        runs=sorted(runs, key=lambda run: (run[0].model, run[0].task, run[1]["run_id"])),
        images=pictures,
        examples=examples,
        anchor=file_name,
        versions=_versions,
        commands=lambda run_ids: [command for command in dict.fromkeys(map(of_run.get, run_ids)) if command],
    )


def _versions(environment: dict[str, Any]) -> list[tuple[str, Any]]:
    """What a run ran on, as far as it is known."""
    known = {name: value for name, value in environment.items() if value is not None}
    if "memory_bytes" in known:
        known["memory"] = f"{known['memory_bytes'] / 2**30:.0f} GiB"
    if known.get("git_clean") is False:
        known["git_commit"] += " and changes"
    return [(name, known[name]) for name in _VERSIONS if name in known]


def _data_uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


# -- templates, and tables as text -------------------------------------------------------------------------------------


@functools.cache
def template(name: str) -> jinja2.Template:
    """One of `templates/`. What goes into HTML is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", "templates"),
        autoescape=lambda name: name is not None and ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def markdown(table: Table) -> str:
    """The table in Markdown."""
    headers = [*table.stubs, *table.columns]
    rows = [headers, ["---"] * len(headers)]
    for names, cells in table.rows:
        rows.append([*(name.replace("|", "\\|") for name in names), *map(_markdown_cell, cells)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def latex(table: Table) -> str:
    """The table as a LaTeX `table` environment. The document must use the package booktabs."""
    stubs, count = len(table.stubs), len(table.columns)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering\\small",
        f"\\caption{{{_tex(table.title)}. {_tex(table.note)}}}",
        f"\\label{{tab:{table.name.replace('_', '-')}}}",
        f"\\begin{{tabular}}{{{'l' * stubs}{'r' * count}}}",
        "\\toprule",
    ]
    lines += [" & ".join(_tex(text) for text in (*table.stubs, *table.columns)) + " \\\\", "\\midrule"]
    before = None
    for names, cells in table.rows:
        if before is not None and names[0] != before:
            lines.append("\\midrule")
        shown = ("" if names[0] == before else names[0], *names[1:])
        before = names[0]
        lines.append(" & ".join([*(_tex(name) for name in shown), *(_latex_cell(cell) for cell in cells)]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}", ""])


def comma_separated(table: Table) -> str:
    """One line of CSV per cell, with all digits. A cell without a number has the status `missing`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ("column", "value", "stderr", "low", "high", "change_from_dense", "best", "run_id", "status")
    writer.writerow([*table.stubs, *header])
    for names, cells in table.rows:
        for label, cell in zip(table.columns, cells, strict=True):
            if cell is None:
                writer.writerow([*names, label, *[""] * 7, MISSING])
            else:
                numbers = [
                    repr(float(value)) if value is not None else ""
                    for value in (cell.value, cell.stderr, *(cell.interval or (None, None)), cell.change)
                ]
                status = "none" if cell.words == DASH else "measured"
                writer.writerow([*names, label, *numbers, cell.best, cell.run_id, status])
    return out.getvalue()


def plain(cell: Cell | None) -> str:
    """The text of a cell, without markup."""
    return _markdown_cell(cell).replace("*", "")


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return MISSING
    return " ".join([f"**{cell.number}**" if cell.best else cell.number, *cell.beside])


def _latex_cell(cell: Cell | None) -> str:
    if cell is None:
        return "--"
    number = f"\\textbf{{{cell.number}}}" if cell.best else cell.number
    return number + "".join(f" {{\\scriptsize {_tex(part)}}}" for part in cell.beside)


def _tex(text: str) -> str:
    """Text in ASCII for LaTeX. A character that has no Latin form becomes a question mark."""
    characters = []
    for character in text:
        plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
        characters.append(_LATEX.get(character, plain or "?"))
    return "".join(characters)


_TEXTS = {"md": markdown, "tex": latex, "csv": comma_separated}
