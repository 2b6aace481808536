"""Makes tables from the DataFrame of runs. Every number comes from one record; what was not measured is missing.

A cell shows one run. Its change is relative to the dense run of the same model and task. Runs with another protocol,
limit or data have another task name (`analysis.labels`), so they are never compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd

from analysis.frame import QUALITY, select
from analysis.metrics import Metric, metric, order
from pipelines.tasks.flocking_measures import MEASURES, TEXTS

_DRAFTING = (
    *("acceptance_rate", "tokens_per_check", "drafted_per_check", "dense_steps", "effective_density"),
    *("predicted_speedup", "predicted_draft_tokens"),
)
_LATENCY = (
    *("decode_speedup", "pruned_decode_speedup", "decode_limit", "decode_fraction_of_limit", "prompt_overhead"),
    *("compaction_vs_memcpy", "breakeven_tokens", "total_speedup", "dense_decode_ms", "pruned_decode_ms"),
    *("acceptance_rate", "tokens_per_check", "effective_density"),
    *("draft_ms", "check_ms", "learn_ms", "choose_anew_ms", "learning_overhead"),
)


_LOGARITHMIC = "[one standard error of its logarithm less and more]"

SAMPLES = Metric("samples", "", 0, 0)


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
    def ends(self) -> str:
        """The interval as printed; empty if there is none."""
        return "" if self.interval is None else "[{}, {}]".format(*map(self.metric.text, self.interval))

    @property
    def error(self) -> str:
        """The standard error as printed; empty if there is none, if it is zero, and beside an interval."""
        return "" if not self.stderr or self.interval is not None else self.metric.text(self.stderr)

    @property
    def percent(self) -> str:
        """The change as printed: a percentage, or a factor from ten times dense on; empty if there is none."""
        if self.change is None:
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
        columns: (group, label) of each column of cells.
        rows: (names, cells) of each row; a cell is None if there is no run for it.
    """

    name: str
    title: str
    note: str
    stubs: tuple[str, ...]
    columns: list[tuple[str, str]]
    rows: list[tuple[tuple[str, ...], list[Cell | None]]] = field(default_factory=list)

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(group, number of columns) of each group, in order."""
        found: list[tuple[str, int]] = []
        for group, _ in self.columns:
            if found and found[-1][0] == group:
                found[-1] = (group, found[-1][1] + 1)
            else:
                found.append((group, 1))
        return found

    @property
    def missing(self) -> int:
        """Number of cells without a run."""
        return sum(cell is None for _, cells in self.rows for cell in cells)


def tables(runs: pd.DataFrame) -> list[Table]:
    """All tables that have rows; tables of quality come first."""
    made = [_quality(select(runs, kind=kind), kind, title) for kind, title in QUALITY.items()]
    made += [_perplexity_by_length(runs), _drafting(runs), _latency(runs), *_flocking(runs)]
    samples = dict(zip(runs["run_id"], runs["samples"], strict=True))
    return [_with_samples(table, samples) for table in made if table.rows]


def _with_samples(table: Table, samples: dict[str, float]) -> Table:
    """The table with one more column: of how many samples each row's numbers are."""
    rows = []
    for names, cells in table.rows:
        runs = [cell.run_id for cell in cells if cell is not None and pd.notna(samples[cell.run_id])]
        counts = sorted({int(samples[run_id]) for run_id in runs})
        cell = Cell(counts[-1], SAMPLES, runs[0], words=", ".join(map(str, counts))) if counts else None
        rows.append((names, [*cells, cell]))
    return replace(table, columns=[*table.columns, ("", "n")], rows=rows)


def _quality(runs: pd.DataFrame, kind: str, title: str) -> Table:
    """A row per model and method, a column per task and metric."""
    runs = runs[runs["stderr"].notna() & runs["prompt_length"].isna()]
    columns = sorted({(row.task, row.metric) for row in runs.itertuples()}, key=lambda pair: (pair[0], order(pair[1])))
    error = f"{_LOGARITHMIC}," if kind == "perplexity" else "± standard error over samples,"
    note = (
        f"Value {error} and the change relative to the dense model. Bold: the best method at a sparsity, where several "
        "were run and one is best. n: samples."
    )
    table = Table(kind, title, note, ("model", "method"), [(task, _heading(metric(name))) for task, name in columns])
    found = {(row.model, row.method, row.task, row.metric): row for row in runs.itertuples()}
    rivals: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for row in runs[runs["family"] != "dense"].itertuples():
        rivals[row.model, row.task, row.metric, _amount(row)].append(metric(row.metric).text(row.value))
    rows = runs.drop_duplicates(["model", "method"])
    for row in sorted(rows.itertuples(), key=method_order):
        cells: list[Cell | None] = []
        for task, name in columns:
            mine = found.get((row.model, row.method, task, name))
            dense = found.get((row.model, "dense", task, name))
            others = rivals[row.model, task, name, _amount(row)]
            cells.append(None if mine is None else _cell(mine, dense, others))
        table.rows.append(((row.model, row.method), cells))
    return table


def _perplexity_by_length(runs: pd.DataFrame) -> Table:
    """A row per model, method and prompt length, a column per task and generation length."""
    runs = select(runs, kind="perplexity", metric="perplexity")
    runs = runs[runs["prompt_length"].notna()]
    columns = sorted({(row.task, row.generation_length) for row in runs.itertuples()})
    note = f"Perplexity of the tokens that follow a prompt, {_LOGARITHMIC}, and the change relative to dense."
    labels = [(task, f"{length:g} generated tokens") for task, length in columns]
    table = Table("perplexity_lengths", "Perplexity by length", note, ("model", "method", "prompt tokens"), labels)
    found = {
        (row.model, row.method, row.prompt_length, row.task, row.generation_length): row for row in runs.itertuples()
    }
    if len({key[2:] for key in found}) < 2:
        return table  # the table of quality shows a single pair of lengths
    rows = runs.drop_duplicates(["model", "method", "prompt_length"])
    for row in sorted(rows.itertuples(), key=lambda row: (*method_order(row), row.prompt_length)):
        cells = []
        for place in columns:
            mine = found.get((row.model, row.method, row.prompt_length, *place))
            dense = found.get((row.model, "dense", row.prompt_length, *place))
            cells.append(None if mine is None else _cell(mine, dense, []))
        table.rows.append(((row.model, row.method, f"{row.prompt_length:g}"), cells))
    return table


def _drafting(runs: pd.DataFrame) -> Table:
    """A row per model, task and method that was verified, or predicted to be; a column per metric."""
    runs = runs[(runs["kind"] != "latency") & runs["metric"].isin(_DRAFTING)]
    runs = runs[runs["run_id"].isin(runs[runs["metric"] != "effective_density"]["run_id"])]
    names = [name for name in _DRAFTING if (runs["metric"] == name).any()]
    note = (
        "Tokens that the pruned model drafts and the dense model checks. The effective density is bytes of weights "
        "read per token, of drafts and checks over dense, and the predicted speed-up its inverse; for fidelity, that "
        "of greedy decoding with the best fixed number of drafted tokens."
    )
    headings = [("", _heading(metric(name))) for name in names]
    table = Table("verified", "Verified decoding", note, ("model and task", "method"), headings)
    found = {(row.model, row.task, row.method, row.metric): row for row in runs.itertuples()}
    rows = runs.drop_duplicates(["model", "task", "method"])
    for row in sorted(rows.itertuples(), key=lambda row: (row.model, row.task, *method_order(row))):
        place = (row.model, row.task, row.method)
        cells = [_cell(found[*place, name], None, []) if (*place, name) in found else None for name in names]
        table.rows.append(((f"{row.model}, {row.task}", row.method), cells))
    return table


def _latency(runs: pd.DataFrame) -> Table:
    """A row per model, task, method and pair of lengths, a column per metric."""
    runs = select(runs, kind="latency")
    names = [name for name in _LATENCY if (runs["metric"] == name).any()]
    note = (
        "Medians of repeats, dense and pruned in turn. The limit of the decode speed-up is bytes of weights read per "
        "token, dense over pruned or, for a verified method, over drafts and checks. The break-even is missing where "
        "pruning does not pay."
    )
    stubs = ("model and task", "method", "tokens")
    table = Table("latency", "Latency", note, stubs, [("", _heading(metric(name))) for name in names])
    keys = ["model", "task", "method", "prompt_length", "generation_length"]
    found = {(*(getattr(row, key) for key in keys), row.metric): row for row in runs.itertuples()}
    rows = runs[runs["prompt_length"].notna()].drop_duplicates(keys)
    for row in sorted(rows.itertuples(), key=lambda row: (row.model, row.task, *method_order(row), row.prompt_length)):
        place = tuple(getattr(row, key) for key in keys)
        cells = [_cell(found[*place, name], None, []) if (*place, name) in found else None for name in names]
        length = f"{row.prompt_length:g} + {row.generation_length:g}"
        table.rows.append(((f"{row.model}, {row.task}", row.method, length), cells))
    return table


def _flocking(runs: pd.DataFrame) -> list[Table]:
    """A row per model, task and kind of text, a column per measure. Only natural text has measures of generation."""
    runs = select(runs, kind="flocking")
    note = (
        "Jaccard similarities of the sets of a layer's strongest neurons, means over sequences and layers ± standard "
        "error. Energy: the share of the squared relative activations that the sequence's own set holds, and that each "
        "token's own set would hold."
    )
    generation = [name for name in MEASURES if name.endswith("generation")]
    others = [name for name in MEASURES if name not in generation]
    made = []
    for name, title, measures, texts in (
        ("flocking", "Flocking: sets of neurons", others, TEXTS),
        ("flocking_generation", "Flocking: prompt and generation", generation, TEXTS[:1]),
    ):
        stubs = ("model and task", "text")
        table = Table(name, title, note, stubs, [("", metric(measure).label) for measure in measures])
        for model, task in dict.fromkeys((row.model, row.task) for row in runs.itertuples()):
            mine = {row.metric: row for row in select(runs, model=model, task=task).itertuples()}
            for text in texts:
                found = [(measure, mine.get(f"{measure}_{text}")) for measure in measures]
                cells = [row and _cell(row, None, [], metric(measure)) for measure, row in found]
                table.rows.append(((f"{model}, {task}", text), cells))
        made.append(table)
    return made


def _cell(row: Any, dense: Any, rivals: Sequence[str], shown: Metric | None = None) -> Cell:
    shown = shown or metric(row.metric)
    change = None
    if dense is not None and row.family != "dense" and dense.value:
        change = (row.value - dense.value) / dense.value
    best = False
    if row.family != "dense" and shown.better and len(rivals) > 1:
        numbers = [shown.better * float(text) for text in rivals]
        mine = shown.better * float(shown.text(row.value))
        best = mine == max(numbers) and numbers.count(mine) == 1
    stderr = None if pd.isna(row.stderr) or row.samples == 1 else row.stderr
    interval = shown.ends(row.value, stderr) if stderr and shown.logarithmic else None
    return Cell(row.value, shown, row.run_id, stderr, change, best, interval)


def _heading(shown: Metric) -> str:
    arrow = {1: " ↑", -1: " ↓", 0: ""}[shown.better]
    return f"{shown.label} ({shown.unit}){arrow}" if shown.unit else shown.label + arrow


def method_order(row: Any) -> tuple[Any, ...]:
    """A sort key: dense first, then by method and sparsity."""
    return row.model, row.family != "dense", row.family, _amount(row)


def _amount(row: Any) -> float:
    """The sparsity as a number to sort by; sparsities that differ by layer come last."""
    return float(row.sparsity) if pd.notna(row.sparsity) else 2.0
