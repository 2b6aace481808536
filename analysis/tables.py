"""Makes tables from the DataFrame of runs. Every number comes from one record; what was not measured is missing.

A row is a model, a task and a method, a cell a metric of its run. Its change is relative to the dense run of the same
model and task. Runs with another protocol, limit or data have another task name (`analysis.frame`), so they are never
compared; where only the rounding differs, they are, and the row says so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from analysis.frame import QUALITY, apart, by_task, nearest, select
from analysis.metrics import Metric, metric, order
from pipelines.tasks.flocking_figures import MEASURES, TEXTS

_DRAFTING = (
    *("acceptance_rate", "tokens_per_check", "drafted_per_check", "dense_steps", "effective_density"),
    *("predicted_speedup", "predicted_speedup_charged", "predicted_draft_tokens"),
)
_LATENCY = (
    *("decode_speedup", "pruned_decode_speedup", "decode_limit", "decode_fraction_of_limit", "prompt_overhead"),
    *("compaction_vs_memcpy", "breakeven_tokens", "total_speedup", "dense_decode_ms", "pruned_decode_ms"),
    *("acceptance_rate", "tokens_per_check", "effective_density"),
    *("draft_ms", "check_ms", "learn_ms", "learning_overhead"),
)

_BY_LENGTH = ("model and task", "method", "tokens")
SAMPLES = Metric("samples", "", 0, 0)
DASH = "\N{EN DASH}"  # of what there cannot be


@dataclass(frozen=True)
class Cell:
    """One number of one run.

    Attributes:
        value: the number in the record.
        metric: how it is shown.
        run_id: the run.
        stderr: its standard error; None if the record has none.
        change: (value - dense) / dense; None for dense itself, without a dense run, and if dense is 0.
        best: whether several methods were run at this sparsity, and none has a better printed number.
        interval: the ends of its interval, as the table's note says; None if there is none.
        words: what is shown instead of the number; empty: the number.
    """

    value: float
    metric: Metric
    run_id: str
    stderr: float | None = None
    change: float | None = None
    best: bool = False
    interval: tuple[float, float] | None = None
    words: str = ""

    @property
    def number(self) -> str:
        """The value as printed."""
        return self.words or self.metric.text(self.value)

    @property
    def beside(self) -> list[str]:
        """What is printed beside the value: its interval or its standard error, and its change."""
        ends = "" if self.interval is None else "[{}, {}]".format(*map(self.metric.text, self.interval))
        error, percent = self.error and f"± {self.error}", self.percent and f"({self.percent})"
        return [text for text in (error, ends, percent) if text]

    @property
    def error(self) -> str:
        """The standard error as printed; empty if there is none, if it is zero, and beside an interval."""
        return "" if not self.stderr or self.interval is not None else self.metric.text(self.stderr)

    @property
    def percent(self) -> str:
        """The change as printed: a percentage, or a factor from ten times dense on; empty if there is none, and of a
        value that is no number."""
        if self.change is None or not math.isfinite(self.change):
            return ""
        if self.change >= 9:
            return f"{1 + self.change:,.0f}x dense"
        return f"{100 * self.change:+.1f}%".replace("-", "\N{MINUS SIGN}")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: file name without suffix.
        title: heading above the table.
        note: how to read it.
        stubs: headers of the columns that name a row.
        columns: headers of the columns of cells.
        rows: (names, cells) of each row; a cell is None if what it shows was not measured.
    """

    name: str
    title: str
    note: str
    stubs: tuple[str, ...] = ("model and task", "method")
    columns: list[str] = field(default_factory=list)
    rows: list[tuple[tuple[str, ...], list[Cell | None]]] = field(default_factory=list)

    @property
    def missing(self) -> int:
        """Number of cells that were not measured."""
        return sum(cell is None for _, cells in self.rows for cell in cells)


def tables(runs: pd.DataFrame) -> list[Table]:
    """All tables that have rows; tables of quality come first."""
    logarithmic = "[one standard error of its logarithm less and more]"
    made = []
    for kind, title in QUALITY.items():
        scored = select(runs, kind=kind, scored=True)
        error = f"{logarithmic}," if kind == "perplexity" else "± standard error over samples,"
        note = (
            f"Value {error} and the change relative to the dense model. Bold: the best method at a sparsity, where "
            "several were run and one is best. n: samples."
        )
        made.append(_filled(Table(kind, title, note), scored[scored["prompt_length"].isna()], compared=True))
    with_lengths = runs[runs["prompt_length"].notna()]
    lengths = select(with_lengths, kind="perplexity", metric="perplexity")
    note = f"Perplexity of the tokens that follow a prompt, {logarithmic}, and the change relative to dense."
    if len(lengths.groupby(["prompt_length", "generation_length"])) > 1:  # the table of quality shows a single pair
        table = Table("perplexity_lengths", "Perplexity by length", note, _BY_LENGTH)
        made.append(_filled(table, lengths, compared=True))
    note = (
        "Tokens that the pruned model drafts and the dense model checks. The effective density is bytes of weights "
        "read per token, of drafts and checks over dense, and the predicted speed-up its inverse; for fidelity, that "
        "of greedy decoding with the best fixed number of drafted tokens."
    )
    drafting = runs[(runs["kind"] != "latency") & runs["metric"].isin(_DRAFTING)]
    drafting = drafting[drafting["run_id"].isin(drafting[drafting["metric"] != "effective_density"]["run_id"])]
    made.append(_filled(Table("verified", "Verified decoding", note), drafting, _DRAFTING))
    note = (
        "Medians of repeats, dense and pruned in turn. The limit of the decode speed-up is bytes of weights read per "
        "token, dense over pruned or, for a verified method, over drafts and checks. The break-even is missing where "
        "pruning does not pay."
    )
    latency = Table("latency", "Latency", note, _BY_LENGTH)
    made.append(_filled(latency, select(with_lengths, kind="latency"), _LATENCY))
    return [table for table in [*made, *_flocking(runs)] if table.rows]


def _flocking(runs: pd.DataFrame) -> list[Table]:
    """A row per model, task and kind of text, a column per measure. Only natural text has measures of generation."""
    note = (
        "Jaccard similarities of the sets of a layer's strongest neurons, means over sequences and layers ± standard "
        "error. Energy: the share of the squared relative activations that the sequence's own set holds, and that each "
        "token's own set would hold."
    )
    runs = select(runs, kind="flocking")
    parts = runs["metric"].str.extract(rf"(?P<metric>.+)_(?P<method>{'|'.join(TEXTS)})$")
    found = runs.assign(**parts).dropna(subset="metric").sort_values("method", kind="stable")
    of_generation = found["metric"].str.endswith("generation")
    stubs = ("model and task", "text")
    sets = Table("flocking", "Flocking: sets of neurons", note, stubs)
    generation = Table("flocking_generation", "Flocking: prompt and generation", note, stubs)
    parts = ((sets, ~of_generation), (generation, of_generation))
    return [_filled(table, found[part], MEASURES) for table, part in parts]


def _filled(table: Table, runs: pd.DataFrame, metrics: Iterable[str] = (), *, compared: bool = False) -> Table:
    """The table with a row per model, task and method, and pair of lengths where it has a stub for these; a column per
    metric, and one of how many samples the numbers are.

    Args:
        table: without columns and rows.
        runs: the metrics that it shows.
        metrics: those that have a column, in order; empty: all there are.
        compared: whether cells say how they differ from dense, and which method is best.
    """
    present = set(runs["metric"])
    names = [metric for metric in metrics if metric in present] if metrics else sorted(present, key=order)
    table.columns.extend([*(_heading(metric(column)) for column in names), "n"])
    rows: dict[tuple[Any, ...], dict[str, Any]] = defaultdict(dict)
    measured: dict[tuple[str, str], set[str]] = defaultdict(set)
    dense: dict[tuple[Any, ...], list[Any]] = defaultdict(list)
    rivals: dict[tuple[Any, ...], list[str]] = defaultdict(list)

    def place(row: Any) -> tuple[Any, ...]:
        tokens = f"{row.prompt_length:g} + {row.generation_length:g}"
        return row.model, row.task, *([tokens] if table.stubs == _BY_LENGTH else [])

    for row in (row for mine in by_task(runs.itertuples()).values() for row in mine):
        rows[*place(row), row.method][row.metric] = row
        measured[row.model, row.task].add(row.metric)
        if row.role == "dense" and compared:
            dense[*place(row), row.metric].append(row)
        elif compared:
            rivals[*place(row), row.metric, str(row.sparsity)].append(metric(row.metric).text(row.value))
    for (model, task, *tokens, method), mine in rows.items():
        first = next(iter(mine.values()))
        cells: list[Cell | None] = []
        for column in names:
            row = mine.get(column)
            if row is not None:
                against = nearest(row, dense[*place(row), column])
                cells.append(_cell(row, against, rivals[*place(row), column, str(row.sparsity)]))
            else:
                known = column in measured[model, task]
                cells.append(None if known else Cell(math.nan, metric(column), first.run_id, words=DASH))
        cells.append(Cell(float(first.samples), SAMPLES, first.run_id) if pd.notna(first.samples) else None)
        differing = apart(first, nearest(first, dense[*place(first), first.metric]))
        table.rows.append(((f"{model}, {task}", f"{method}{differing}", *tokens), cells))
    return table


def _cell(row: Any, dense: Any, rivals: Sequence[str]) -> Cell:
    shown = metric(row.metric)
    change = None
    if dense is not None and row.role != "dense" and dense.value:
        change = (row.value - dense.value) / dense.value
    best = False
    if row.role == "pruned" and shown.better and len(rivals) > 1:
        numbers = [shown.better * float(text) for text in rivals if text != "nan"]
        mine = shown.better * float(shown.text(row.value))
        best = mine == max(numbers, default=None) and numbers.count(mine) == 1
    stderr = None if not row.scored or row.samples == 1 else row.stderr
    interval = None
    if stderr and shown.logarithmic and math.isfinite(row.value):
        interval = shown.ends(row.value, stderr)
    return Cell(row.value, shown, row.run_id, stderr, change, best, interval)


def _heading(shown: Metric) -> str:
    arrow = {1: " ↑", -1: " ↓", 0: ""}[shown.better]
    return f"{shown.label} ({shown.unit}){arrow}" if shown.unit else shown.label + arrow
