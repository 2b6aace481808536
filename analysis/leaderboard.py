"""`python -m analysis.leaderboard runs=outputs out=docs/leaderboard.md`: methods ranked per task.

A page in Markdown, from run folders alone. Every run has its row, so that none is chosen by the rows it is judged on;
runs of a model and task are ranked by what they score beside the dense model on the same samples.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.command_line import key_values
from analysis.frame import VERSIONS, frame
from analysis.metrics import metric
from analysis.paired import pairs, pairs_by_task
from analysis.render import markdown
from analysis.samples import read_scores
from analysis.sources import read_runs
from analysis.tables import Cell, Table
from pipelines.errors import UserError

USAGE = "python -m analysis.leaderboard runs=outputs out=docs/leaderboard.md"
_KEYS = {"runs": "folder of runs (several with commas between)", "out": "file that the page is written into"}

_HEAD = """# Leaderboard

Which method keeps most of the dense model's quality at the same bytes of weights per token. This page is made from run
folders; [development.md](development.md) says how a new method gets its row.

```sh
{usage}
```

Every run has its row: choosing a method's best run by the rows it is judged on would flatter it. Runs are ranked by
their difference to dense on the same samples, in points, with its 95% interval by the paired bootstrap; where intervals
overlap, the order is no finding. Bytes are those of the weights that a token reads, of what dense decoding reads. A run
that differs from its dense run in what only changes rounding, such as the batch size, says so in brackets. What is
marked as masked runs no faster: its bytes are what a kernel for it would read.
"""


def main(arguments: Sequence[str]) -> None:
    """Run the command with arguments of the form KEY=VALUE.

    Raises:
        UserError: an argument is wrong, the runs cannot be read or compared, or the page cannot be written.
    """
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
        source: as in `analysis.sources.read_runs`; samples are needed, which W&B does not have.

    Raises:
        UserError: no run can be compared with a dense one.
    """
    runs = read_runs(source)
    table = frame(runs.records)
    members = pairs_by_task([pair for pair in pairs(read_scores(runs, table), table) if pair.density is not None])
    if not members:
        raise UserError(f"runs={source}: expected pruned runs of a task, and a dense run on the same samples")
    environments = {record["run_id"]: record["environment"] for record in runs.records}
    lines = [_HEAD.format(usage=USAGE)]
    for (model, task), mine in members.items():
        first = mine[0]
        lines += [f"## {task}, {model}", ""]
        lines += [f"{first.row.label}, {first.difference.samples} samples; dense: {first.dense:.1f} points.", ""]
        columns = ["bytes / dense", "difference to dense (points)", "answer length / dense"]
        board = Table("leaderboard", task, "", ("", "method"), columns)
        ranked = sorted(mine, key=lambda pair: (-pair.difference.rank, pair.density, pair.method))
        for rank, pair in enumerate(ranked, start=1):
            density = Cell(pair.density or math.nan, metric("effective_density"), pair.row.run_id)
            board.rows.append(((str(rank), pair.method), [density, pair.points, pair.longer]))
        lines.append(markdown(board))
        environment = environments[first.row.run_id]
        known = ", ".join(f"{name} {environment[name]}" for name in VERSIONS if environment.get(name))
        lines += [f"{known}; {environment.get('device')}.", ""]
    return "\n".join(lines).rstrip() + "\n", sum(map(len, members.values()))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
