"""Writes the report as HTML for any screen, light and dark: one page that fetches nothing and runs no script, and for
each model and task a page of all answers, whose only script is its search."""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from analysis.contents import Report
from analysis.drawing import file_name
from analysis.samples import Answers, Example

_VERSIONS = (
    *("griffin-pruning", "git_commit", "torch", "transformers", "lm-eval", "rouge-score", "python", "platform"),
    *("processor", "cpus", "memory", "device", "started", "finished"),
)


def page(report: Report, pictures: Mapping[str, tuple[bytes, bytes]], examples: Mapping[str, Sequence[Example]]) -> str:
    """The page's HTML.

    Args:
        report: what the page shows.
        pictures: name of a drawing -> its SVG in the light theme and in the dark theme.
        examples: by the name of their answers.
    """
    words = {row.run_id: row for row in report.frame.drop_duplicates("run_id").itertuples()}
    runs = [_run(record, words.get(record["run_id"])) for record in report.runs.records]

    of_run = {record["run_id"]: record["environment"].get("command") for record in report.runs.records}
    return _template("report.html.j2").render(
        source=report.source,
        runs=sorted(runs, key=lambda run: (run["model"], run["task"], run["id"])),
        problems=report.runs.problems,
        summary=report.summary,
        notes=report.notes,
        sections=[section for section in report.sections if section.tables or any(g.drawings for g in section.groups)],
        answers=report.answers,
        empty=[group for group in report.groups if not group.drawings],
        images={name: [_data_uri(svg) for svg in pair] for name, pair in pictures.items()},
        anchor=file_name,
        examples=examples,
        commands=lambda run_ids: [command for command in dict.fromkeys(map(of_run.get, run_ids)) if command],
    )


def answers_page(answers: Answers, samples: Sequence[Example]) -> str:
    """The HTML of the page of all answers of a model and task."""
    return _template("answers.html.j2").render(answers=answers, samples=samples)


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(name)


def _run(record: dict[str, Any], row: Any) -> dict[str, Any]:
    """A run as the template takes it; `row` is any of its rows in the DataFrame, None if it has no metrics."""
    environment = dict(record["environment"])
    if environment.get("memory_bytes"):
        environment["memory"] = f"{environment['memory_bytes'] / 2**30:.0f} GiB"
    if environment.get("git_clean") is False:
        environment["git_commit"] += " and changes"
    return {
        "id": record["run_id"],
        "model": row.model if row else record["config"]["model"]["name"],
        "task": row.task if row else record["config"]["task"]["name"],
        "method": record["method"]["label"] if row is None else row.method,
        "command": environment.get("command"),
        "versions": [(name, environment[name]) for name in _VERSIONS if environment.get(name) is not None],
        "samples": record["metrics"].get("samples"),
        "seconds": record["timing"].get("seconds"),
    }


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
