"""`python -m analysis.leaderboard runs=outputs out=docs/leaderboard.md`: methods ranked per task.

A page in Markdown, from run folders alone. Every run has its row, so that none is chosen by the rows it is judged on;
runs of a model and task are ranked by what they score beside the dense model on the same samples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.frame import VERSIONS, frame
from analysis.metrics import metric
from analysis.output import markdown, template
from analysis.paired import pairs
from analysis.report import key_values
from analysis.runs import read_runs
from analysis.samples import read_scores
from analysis.tables import Cell, Table
from pipelines.errors import UserError

USAGE = "python -m analysis.leaderboard runs=outputs out=docs/leaderboard.md"
_KEYS = {"runs": "folder of runs (several with commas between)", "out": "file that the page is written into"}


def main(arguments: Sequence[str]) -> None:
    """Run the command with arguments of the form KEY=VALUE."""
    given = key_values(arguments, USAGE, _KEYS, {})
    text, ranked = leaderboard(given["runs"])
    out = Path(given["out"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"out={out}: cannot write: {error.strerror}") from error
    print(f"Leaderboard: {out} ({ranked} runs ranked)")


def leaderboard(source: str) -> tuple[str, int]:
    """The page, and how many runs it ranks.

    Args:
        source: as in `analysis.runs.read_runs`; samples are needed, which W&B does not have.
    """
    runs = read_runs(source)
    table = frame(runs.records)
    environments = {record["run_id"]: record["environment"] for record in runs.records}
    columns = ["bytes / dense", "difference to dense (points)", "answer length / dense"]
    boards = []
    for (model, task), mine in pairs(read_scores(runs, table), table).items():
        known = [pair for pair in mine if pair.density is not None]
        if known:
            board = Table("leaderboard", f"{task}, {model}", "", ("", "method"), columns)
            ranked = sorted(known, key=lambda pair: (-pair.difference.rank, pair.density, pair.method))
            for rank, pair in enumerate(ranked, start=1):
                density = Cell(pair.density or math.nan, metric("effective_density"), pair.row.run_id)
                board.rows.append(((str(rank), pair.method), [density, pair.points, pair.longer]))
            environment = environments[known[0].row.run_id]
            versions = ", ".join(f"{name} {environment[name]}" for name in VERSIONS if environment.get(name))
            boards.append((known[0], board, f"{versions}; {environment.get('device')}"))
    if not boards:
        raise UserError(f"runs={source}: expected pruned runs of a task, and a dense run on the same samples")
    text = template("leaderboard.md.j2").render(usage=USAGE, boards=boards, markdown=markdown)
    return text, sum(len(board.rows) for _, board, _ in boards)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
