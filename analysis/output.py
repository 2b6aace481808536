"""Writes a report: into W&B, and into files.

Its HTML is for any screen, light and dark: one page that fetches nothing and runs no script, and for each model and
task a page of all answers, whose only script is its search.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matplotlib.figure import Figure

from analysis import render
from analysis.contents import Report
from analysis.drawing import MOST_SHOWN, file_name
from analysis.labels import labels
from analysis.runs import watched
from analysis.samples import Example, examples
from pipelines.errors import UserError
from pipelines.figure_style import DARK, LIGHT, as_svg, drawn_in, save
from pipelines.tracking import Media, track

_TEXTS = {"md": render.markdown, "tex": render.latex, "csv": render.comma_separated}
_VERSIONS = (
    *("griffin-pruning", "git_commit", "torch", "transformers", "lm-eval", "rouge-score", "python", "platform"),
    *("processor", "cpus", "memory", "device", "started", "finished"),
)
_WRITTEN = ".written"  # lists the tables and figures that a report wrote, by their paths in its folder


def write_report(report: Report, out: Path) -> Path:
    """Write all files of a report.

    Returns:
        The path of the HTML page.
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
            for suffix, as_text in _TEXTS.items():
                (out / "tables" / f"{table.name}.{suffix}").write_text(as_text(table), encoding="utf-8")
        text = render.template("report.md.j2").render(report=report, markdown=render.markdown)
        (out / "report.md").write_text(text, encoding="utf-8")
        chosen = {}
        for number, answers in enumerate(watched(report.answers, "pages")):
            samples = answers.samples
            text = render.template("answers.html.j2").render(answers=answers, samples=samples)
            (out / "answers" / f"{answers.name}.html").write_text(text, encoding="utf-8")
            if number < MOST_SHOWN:
                chosen[answers.name] = examples(samples)
        pictures = {}
        for drawing in watched(drawings, "figures"):
            with drawn_in(LIGHT):
                figure = drawing.draw()
                save(figure, out / "figures" / drawing.name)
                light = _data_uri(figure)
            with drawn_in(DARK):
                pictures[drawing.name] = light, _data_uri(drawing.draw())
        (out / "index.html").write_text(_page(report, pictures, chosen), encoding="utf-8")
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
    words = {"name": f"report on {report.source}", "group": "report", "job_type": "report", "tags": []}
    with track(settings, out, f"report-{project}", config=config, **words) as tracker:
        tracker.show(Media(images, rows))


def _page(report: Report, pictures: Mapping[str, tuple[str, str]], examples: Mapping[str, Sequence[Example]]) -> str:
    """The HTML of the page, with pictures in the light theme and in the dark theme by the names of their drawings, and
    examples by those of their answers."""
    records = report.runs.records
    runs = zip(labels(records), records, strict=True)
    of_run = {record["run_id"]: record["environment"].get("command") for record in records}
    return render.template("report.html.j2").render(
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


def _data_uri(figure: Figure) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(as_svg(figure)).decode()
