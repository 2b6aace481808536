"""`python -m analysis.leaderboard runs=outputs out=docs/leaderboard.md`: methods ranked per task at equal bytes.

A page in Markdown, from run folders alone. At each budget of bytes a method is represented by its best run that reads
no more of the weights per token; methods are ranked by what they score beside the dense model on the same samples.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from analysis.command_line import key_values
from analysis.frame import frame, select
from analysis.paired import LARGEST, Pair, pairs
from analysis.sources import read_runs
from pipelines.errors import UserError

USAGE = "python -m analysis.leaderboard runs=outputs out=docs/leaderboard.md"
_KEYS = {"runs": "folder of runs (several with commas between)", "out": "file that the page is written into"}

# Bytes of weights that a token may read, of what the dense model reads.
BUDGETS = (0.9, 0.8, 0.7, 0.6, 0.5)

_VERSIONS = ("griffin-pruning", "torch", "transformers", "lm-eval")
_HEAD = """# Leaderboard

Which method keeps most of the dense model's quality at the same bytes of weights per token. This page is made from run
folders; [development.md](development.md) says how a new method gets its row.

```sh
{usage}
```

At each budget a method stands with its best run that reads no more bytes per token than that, of what dense decoding
reads. Methods are ranked by their difference to dense on the same samples, in points, with its 95% interval by the
paired bootstrap; where intervals overlap, the order is no finding. What is marked as masked runs no faster: its bytes
are what a kernel for it would read.
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
    densities = select(table, metric="effective_density")
    density = dict(zip(densities["run_id"], densities["value"], strict=True))
    members: dict[tuple[str, str], list[Pair]] = defaultdict(list)
    for pair in pairs(runs, table):
        if pair.difference is not None and pair.row.run_id in density:
            members[pair.row.model, pair.row.task].append(pair)
    if not members:
        raise UserError(f"runs={source}: expected pruned runs of a task, and a dense run on the same samples")
    lines = [_HEAD.format(usage=USAGE)]
    for (model, task), mine in sorted(members.items()):
        first = mine[0]
        dense = 100 * first.other.value / LARGEST[first.row.metric]
        assert first.difference is not None
        lines += [f"## {task}, {model}", ""]
        lines += [f"{first.row.label}, {first.difference.samples} samples; dense: {dense:.1f} points.", ""]
        for budget in BUDGETS:
            lines += _ranking([pair for pair in mine if density[pair.row.run_id] <= budget], budget, density)
        record = next(one for one in runs.records if one["run_id"] == first.row.run_id)
        versions = {name: record["environment"].get(name) for name in _VERSIONS}
        known = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
        lines += [f"{known}; {record['environment'].get('device')}.", ""]
    return "\n".join(lines).rstrip() + "\n", sum(map(len, members.values()))


def _ranking(pairs: Sequence[Pair], budget: float, density: dict[str, float]) -> list[str]:
    best: dict[str, Pair] = {}
    for pair in pairs:
        known = best.get(pair.row.family)
        if known is None or _mean(pair) > _mean(known):
            best[pair.row.family] = pair
    if not best:
        return []
    lines = [f"At most {100 * budget:g}% of the bytes:", ""]
    lines += ["| | method | bytes / dense | difference to dense | answer length / dense |", "|---|---|---|---|---|"]
    for rank, pair in enumerate(sorted(best.values(), key=lambda pair: (-_mean(pair), pair.row.method)), start=1):
        difference = pair.difference
        assert difference is not None
        ends = "" if math.isnan(difference.low) else f" [{difference.low:+.1f}, {difference.high:+.1f}]"
        length = "" if pair.length is None else f"{pair.length:.2f}"
        cells = [str(rank), pair.row.method, f"{density[pair.row.run_id]:.2f}", f"{difference.mean:+.1f}{ends}", length]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _mean(pair: Pair) -> float:
    assert pair.difference is not None
    return pair.difference.mean


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
