"""`python -m analysis.report runs=outputs out=report`: tables, figures and one page of all of it, from finished runs.

out/index.html      everything on one page that needs no network and no script
    report.md       the tables in Markdown, with the runs behind them
    runs.csv        the DataFrame of `analysis.frame`
    tables/*.tex, *.csv, *.md
    figures/*.png, *.pdf, *.svg, *_dark.svg
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from analysis.contents import FILTERS, Report, make_report
from analysis.output import log_report, write_report
from analysis.runs import WANDB
from pipelines.errors import UserError, did_you_mean

_KEYS = {
    "runs": "folder of runs (several with commas between), or wandb:entity/project",
    "out": "folder that the report is written into",
    "tags": "only runs that have one of these tags, with commas between; so too for the next three keys",
    "model": "only runs of these models",
    "task": "only runs of these tasks",
    "method": "only runs of these methods, with or without their sparsity, as the tables name them: griffin 50%",
    "log": "none, or wandb: the report as a run of its own in the runs' project; wandb:entity/project names another",
}
_LOG = r"none|wandb(:([^/:\s]+/)?[A-Za-z0-9_.-]{1,128})?"  # the characters that W&B allows in the name of a project


def main(arguments: Sequence[str]) -> None:
    """Run the command with arguments of the form KEY=VALUE."""
    given = _parse(arguments)
    report = make_report(given["runs"], {key: given[key] for key in FILTERS})
    index = write_report(report, Path(given["out"]))
    if given["log"] != "none":
        target = given["runs"] if given["log"] == "wandb" and given["runs"].startswith(WANDB) else given["log"]
        entity, _, project = target.removeprefix("wandb").removeprefix(":").rpartition("/")
        log_report(report, Path(given["out"]), entity or None, project or "griffin")
    print(summary(report, index))


def summary(report: Report, index: Path) -> str:
    """Lines for the terminal: the runs that were left out, where the report is, and what it holds."""
    figures = sum(len(group.drawings) for group in report.groups)
    found = f"{len(report.runs.records)} runs, {len(report.tables)} tables, {figures} figures"
    left_out = [f"  left out: {one.run_id}: {one.state}, {one.reason}" for one in report.runs.problems]
    return "\n".join([*left_out, f"Report: {index} ({found})"])


def _parse(arguments: Sequence[str]) -> dict[str, str]:
    defaults = {"log": "none", **dict.fromkeys(FILTERS, "")}
    given = key_values(arguments, "python -m analysis.report runs=outputs out=report", _KEYS, defaults)
    if not re.fullmatch(_LOG, given["log"]):
        raise UserError(f"log={given['log']}: expected none, wandb or wandb:entity/project")
    return given


def key_values(
    arguments: Sequence[str], usage: str, keys: Mapping[str, str], defaults: Mapping[str, str]
) -> dict[str, str]:
    """The values by their keys, of which those without a default must be given. `--help` prints the usage and what each
    key means, and ends the process.
    """
    given = dict(defaults)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument in ("-h", "--help"):
            print("\n".join([usage, "", *(f"  {key:8}{text}" for key, text in keys.items())]))
            raise SystemExit(0)
        if not equals:
            raise UserError(f"{argument}: expected KEY=VALUE, as in {usage}")
        if key not in keys:
            raise UserError(f"{key}: no such key{did_you_mean(key, keys)}; expected {', '.join(keys)}")
        given[key] = value
    for key in keys.keys() - defaults.keys():
        if not given.get(key, "").strip():
            raise UserError(f"{key}=: expected a {keys[key]}, as in {usage}")
    return given


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing of the runs was touched")
