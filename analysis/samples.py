"""What the models wrote, sample by sample and methods side by side: three examples of each task, and all answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from analysis.drawing import file_name
from analysis.frame import headlines
from analysis.metrics import Metric, metric
from analysis.runs import Runs
from analysis.tables import method_order


@dataclass(frozen=True)
class Answer:
    """What one method wrote.

    Attributes:
        run_id: the run.
        method: in words.
        score: of the sample.
        tokens: of the answer; None if the run did not count them.
        text: the answer.
    """

    run_id: str
    method: str
    score: float
    tokens: int | None
    text: str


@dataclass(frozen=True)
class Example:
    """One sample with the answers of all methods, dense first.

    Attributes:
        index: of the sample in its data.
        sample_id: its name in the data.
        reference: the answer that the data has.
        difference: mean score of the pruned methods less that of dense; without either, the mean score there is.
        answers: one per method.
        rule: why it is an example: `best`, `median` or `worst`.
    """

    index: int
    sample_id: str
    reference: str
    difference: float
    answers: list[Answer]
    rule: str = ""


@dataclass(frozen=True)
class Answers:
    """All samples of a model and task that have a text, by falling difference.

    Attributes:
        name: file name without suffix.
        model: the model's name.
        task: the task's.
        metric: the name of the scores.
        compared: whether there are dense and pruned runs, so that differences are to dense.
        samples: those that all runs have.
    """

    name: str
    model: str
    task: str
    metric: str
    compared: bool
    samples: list[Example]

    @property
    def shown(self) -> Metric:
        """How the scores are shown."""
        return metric(self.metric)

    @property
    def scores(self) -> pd.DataFrame:
        """The scores: a row per sample by its index, a column per method."""
        rows = {one.index: {answer.method: answer.score for answer in one.answers} for one in self.samples}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("sample").sort_index()

    @property
    def examples(self) -> list[Example]:
        """The sample with the best, the median and the worst difference."""
        last = len(self.samples) - 1
        places = {0: "best", last // 2: "median", last: "worst"} if last > 1 else dict.fromkeys(range(last + 1), "")
        return [replace(self.samples[place], rule=rule) for place, rule in sorted(places.items())]


def read_samples(folder: Path | None) -> dict[int, dict[str, Any]]:
    """The samples of a run by their indices, with their metrics among their other values.

    Args:
        folder: the run folder; None, as for runs that were read from W&B, has no samples.
    """
    path = None if folder is None else folder / "samples.jsonl"
    samples = {}
    for line in path.read_text(encoding="utf-8").split("\n") if path is not None and path.is_file() else ():
        if line:
            sample = json.loads(line)
            samples[sample["index"]] = sample | (sample.get("metrics") or {})
    return samples


def answers(runs: Runs, table: pd.DataFrame) -> list[Answers]:
    """The answers of every model and task whose samples have texts, in the order of the tables.

    Args:
        runs: with their folders.
        table: the DataFrame of the runs.
    """
    found = []
    for (model, task), mine in headlines(table):
        rows = sorted(mine.itertuples(), key=method_order)
        samples = {row.run_id: read_samples(runs.folders.get(row.run_id)) for row in rows}
        rows = [row for row in rows if any(_text(sample) is not None for sample in samples[row.run_id].values())]
        shared = set.intersection(*(set(samples[row.run_id]) for row in rows)) if rows else set()
        examples = [_example(index, rows, samples) for index in sorted(shared)]
        if examples:
            compared = {row.family == "dense" for row in rows} == {True, False}
            examples.sort(key=lambda example: -example.difference)
            name = file_name(str(len(found) + 1), model, task)  # numbered: other words may give the same name
            found.append(Answers(name, model, task, rows[0].metric, compared, examples))
    return found


def _example(index: int, rows: Sequence[Any], samples: Mapping[str, Mapping[int, dict[str, Any]]]) -> Example:
    mine = {row.run_id: samples[row.run_id][index] for row in rows}
    scores = {row.run_id: float(mine[row.run_id].get(row.metric, 0.0)) for row in rows}
    dense = [scores[row.run_id] for row in rows if row.family == "dense"]
    pruned = [scores[row.run_id] for row in rows if row.family != "dense"]
    first = mine[rows[0].run_id]
    return Example(
        index,
        str(first.get("id", index)),
        _words(first.get("reference", first.get("target", ""))),
        fmean(pruned) - fmean(dense) if dense and pruned else fmean(dense or pruned),
        [
            Answer(
                row.run_id,
                row.method,
                scores[row.run_id],
                mine[row.run_id].get("generated_tokens"),
                _text(mine[row.run_id]) or "",
            )
            for row in rows
        ],
    )


def _text(sample: Mapping[str, Any]) -> str | None:
    """What the model wrote; None if it only rated given answers."""
    if isinstance(sample.get("text"), str):
        return str(sample["text"])
    written = sample.get("answers")
    if isinstance(written, list) and written and all(isinstance(one, str) for one in written):
        return "\n".join(written)
    return None


def _words(reference: Any) -> str:
    """A reference, or several of which any will do."""
    return "\n".join(map(str, reference)) if isinstance(reference, list) else str(reference)
