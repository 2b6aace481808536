"""The report as one HTML page: nothing to fetch, no script, light and dark, wide and narrow."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from analysis.drawing import Drawing, file_name
from pipelines.figure_style import DARK, LIGHT, Theme, drawn_in

if TYPE_CHECKING:
    from analysis.report import Report

_VERSIONS = ("griffin-pruning", "torch", "transformers", "lm-eval", "rouge-score", "python", "platform", "device")


def page(report: Report, drawn: Callable[[], Any] = lambda: None) -> str:
    """The page's HTML.

    Args:
        report: what it shows.
        drawn: called once per figure, for a progress bar.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("analysis", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    words = {row.run_id: row for row in report.frame.drop_duplicates("run_id").itertuples()}
    runs = [_run(record, words.get(record["run_id"])) for record in report.runs.records]

    def images(drawing: Drawing) -> dict[str, str]:
        uris = {"light": _data_uri(drawing, LIGHT), "dark": _data_uri(drawing, DARK)}
        drawn()
        return uris

    return environment.get_template("report.html.j2").render(
        source=report.source,
        runs=sorted(runs, key=lambda run: (run["model"], run["task"], run["id"])),
        problems=report.runs.problems,
        notes=report.notes,
        tables=report.tables,
        groups=report.groups,
        images=images,
        anchor=file_name,
        commands=lambda run_ids: _commands(report, run_ids),
    )


def _run(record: dict[str, Any], row: Any) -> dict[str, Any]:
    environment = record["environment"]
    return {
        "id": record["run_id"],
        "model": row.model if row else record["config"]["model"]["name"],
        "task": row.task if row else record["config"]["task"]["name"],
        "method": row.method if row else "",
        "command": environment.get("command"),
        "versions": [(name, environment[name]) for name in _VERSIONS if environment.get(name) is not None],
        "samples": record["metrics"].get("samples"),
        "seconds": record["timing"].get("seconds"),
    }


def _commands(report: Report, run_ids: Sequence[str]) -> list[str]:
    """What made some runs, each command once."""
    wanted = {*run_ids}
    found = (record["environment"].get("command") for record in report.runs.records if record["run_id"] in wanted)
    return list(dict.fromkeys(command for command in found if command))


def _data_uri(drawing: Drawing, theme: Theme) -> str:
    out = io.BytesIO()
    with drawn_in(theme):
        drawing.draw().savefig(out, format="svg", dpi=200, transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
