"""`python -m pipelines.status DIR`: what is done, running, failed and missing in an output folder; the time left."""

from __future__ import annotations

import re
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate

from pipelines.run_folder import RunFolder
from pipelines.sweeps import FOLDER, measured, read_entry
from pipelines.sync import output_dir_argument

DONE, RUNNING, FAILED, BROKEN_OFF, MISSING = "done", "running", "failed", "broken off", "missing"


@dataclass(frozen=True)
class Row:
    """One run, or one that is planned.

    Attributes:
        run: the run's id; of a run that has not begun, its task, model, method and what the sweep varies.
        samples: whole ones so far.
        total: samples in the end; None where unknown.
        seconds: computing time of the samples so far.
        reason: of a failure.
        measured: what it measures; see `sweeps.measured`.
    """

    run: str
    state: str
    samples: int = 0
    total: int | None = None
    seconds: float = 0.0
    reason: str = ""
    measured: str = ""

    @property
    def like(self) -> list[str]:
        """The task and the model, which are its first two words: runs of these take about as long."""
        return re.split("[ -]", self.run)[:2]


def read(output_dir: Path) -> list[Row]:
    """The runs of an output folder and the planned ones, by name. Changes nothing, and may be called at any time.

    A try that failed is left out once a run that measures the same is done.
    """
    rows = {path.name: _of_folder(path) for path in output_dir.iterdir() if (path / "config.yaml").exists()}
    planned = []
    for path in sorted((output_dir / FOLDER).glob("*.json")):
        entry = read_entry(path)
        if entry is not None and not rows.keys() & set(entry["runs"] or ()):
            state = FAILED if entry["failed"] else MISSING
            for method, what in zip(entry["methods"], entry["measured"], strict=True):
                words = f"{entry['words']} {method}" + (f" ({entry['swept']})" if entry["swept"] else "")
                planned.append(Row(words, state, reason=entry["failed"] or "", measured=what))
    done = {row.measured for row in rows.values() if row.state == DONE}
    shown = (row for row in (*rows.values(), *planned) if row.state != FAILED or row.measured not in done)
    return sorted(shown, key=lambda row: row.run)


def _of_folder(path: Path) -> Row:
    folder = RunFolder(path.parent, path.name)
    held = folder.held()  # before the record: a run that ends in between is then done, and not broken off
    record, state = folder.record(), folder.state()
    samples, seconds = folder.progress()
    if record is not None:
        return Row(path.name, DONE, samples, samples, seconds, measured=measured(record["config"]))
    name = RUNNING if held else FAILED if state["failed"] else BROKEN_OFF
    what = measured(folder.config()) if name == FAILED else ""
    damage = folder.damage()
    damaged = f"{damage}; the next call of its command mends it" if damage else ""
    reason = "" if held else state["failed"] or damaged
    return Row(path.name, name, samples, state["samples"], seconds, reason, what)


def seconds_left(row: Row, rows: Sequence[Row]) -> float | None:
    """Computing time that a run still needs, by its own pace, else by that of runs of its task and model.

    None if no run of the kind has a sample, or how many samples it will be is unknown.
    """
    if row.state == DONE:
        return 0.0
    alike = [other for other in rows if other.like == row.like]
    total = row.total or max((other.total or 0 for other in alike), default=0)
    paced = [row] if row.samples else [other for other in alike if other.samples]
    if not total or not paced:
        return None
    return max(total - row.samples, 0) * statistics.mean(other.seconds / other.samples for other in paced)


def status_table(rows: Sequence[Row]) -> str:
    """One line per run, the counts, and the time left."""
    left = [seconds_left(row, rows) for row in rows]
    lines = []
    for row, seconds in zip(rows, left, strict=True):
        samples = f"{row.samples} of {row.total}" if row.total is not None else "-"
        lines.append([row.run, row.state, samples, "" if row.state == DONE else duration(seconds), row.reason])
    headers = ["run", "state", "samples", "time left", "reason"]
    table = tabulate(lines, headers, disable_numparse=True, maxcolwidths=[None, None, None, None, 60])
    counts = Counter(row.state for row in rows)
    parts = [f"{counts[state]} {state}" for state in (DONE, RUNNING, FAILED, BROKEN_OFF, MISSING) if counts[state]]
    closing = f"{len(rows)} runs: {', '.join(parts)}"
    if counts[DONE] < len(rows):
        known = sum(seconds for seconds in left if seconds)
        workers = max(counts[RUNNING], 1)
        closing += f"; about {duration(known)} left with {workers} at a time" if known else ""
        unknown = sum(seconds is None for seconds in left)
        closing += f"; no pace known yet of {unknown}" if unknown else ""
    return f"{table}\n\n{closing}"


def duration(seconds: float | None) -> str:
    """Seconds in words, rounded as estimates deserve."""
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def main() -> None:
    """Print the state of an output folder."""
    output_dir = output_dir_argument("pipelines.status", __doc__)
    rows = read(output_dir)
    if not rows:
        sys.exit(f"error: {output_dir}: no runs here; expected an output_dir of pipelines.run")
    print(status_table(rows))


if __name__ == "__main__":
    main()
