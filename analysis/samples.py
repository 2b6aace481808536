"""What the models wrote, sample by sample and methods side by side: three examples of each task, and all answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from analysis.drawing import file_name
from analysis.frame import by_task, headlines
from analysis.metrics import Metric, metric
from analysis.runs import Runs, watched
from analysis.tables import method_order
from pipelines.records import from_json


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
class Scores:
    """The numbers of a run's samples, without their texts.

    Attributes:
        values: of one metric, by the sample's index.
        lengths: tokens of the answers, of the samples that say so.
        texts: whether any sample has an answer in words.
    """

    values: dict[int, float] = field(default_factory=dict)
    lengths: dict[int, float] = field(default_factory=dict)
    texts: bool = False


@dataclass(frozen=True)
class Answers:
    """All samples of a model and task that have a text. Texts are read when they are asked for, and not kept.

    Attributes:
        name: file name without suffix.
        model: the model's name.
        task: the task's.
        metric: the name of the scores.
        compared: whether there are dense and pruned runs, so that differences are to dense.
        differences: by the index of every sample that all runs have, from the best to the worst.
        runs: id, method, folder and scores of each run, dense first.
    """

    name: str
    model: str
    task: str
    metric: str
    compared: bool
    differences: dict[int, float]
    runs: list[tuple[str, str, Path, Scores]]

    @property
    def shown(self) -> Metric:
        """How the scores are shown."""
        return metric(self.metric)

    @property
    def scores(self) -> pd.DataFrame:
        """The scores: a row per sample by its index, a column per method."""
        columns = {method: scores.values for _, method, _, scores in self.runs}
        return pd.DataFrame(columns, index=sorted(self.differences)).rename_axis("sample")

    @property
    def samples(self) -> list[Example]:
        """All samples with their texts, by falling difference."""
        read = [{sample["index"]: sample for sample in read_samples(folder)} for _, _, folder, _ in self.runs]
        return [self._example(index, [samples[index] for samples in read]) for index in self.differences]

    def _example(self, index: int, samples: list[dict[str, Any]]) -> Example:
        first = samples[0]
        written = [
            Answer(run_id, method, scores.values.get(index, 0.0), sample.get("generated_tokens"), _text(sample) or "")
            for (run_id, method, _, scores), sample in zip(self.runs, samples, strict=True)
        ]
        reference = first.get("reference", first.get("target", ""))
        words = "\n".join(map(str, reference)) if isinstance(reference, list) else str(reference)
        return Example(index, str(first.get("id", index)), words, self.differences[index], written)


def examples(samples: list[Example]) -> list[Example]:
    """Of samples by falling difference, the best, the median and the worst; all of fewer than three."""
    last = len(samples) - 1
    places = {0: "best", last // 2: "median", last: "worst"} if last > 1 else dict.fromkeys(range(last + 1), "")
    return [replace(samples[place], rule=rule) for place, rule in sorted(places.items())]


def read_samples(folder: Path | None) -> Iterator[dict[str, Any]]:
    """The samples of a run one after the other, with their metrics among their other values.

    Args:
        folder: the run folder; None, as for runs that were read from W&B, has no samples.
    """
    if folder is None or not (folder / "samples.jsonl").is_file():
        return
    with (folder / "samples.jsonl").open(encoding="utf-8") as file:
        for line in file:
            sample = from_json(line)
            yield sample | (sample.get("metrics") or {})


def read_scores(runs: Runs, table: pd.DataFrame) -> dict[str, Scores]:
    """By run id, the scores of the runs that measure quality, by their task's first metric."""
    rows = list(headlines(table).itertuples())
    return {row.run_id: _scores(runs.folders.get(row.run_id), row.metric) for row in watched(rows, "samples")}


def _scores(folder: Path | None, name: str) -> Scores:
    values, lengths, texts = {}, {}, False
    for sample in read_samples(folder):
        texts = texts or _text(sample) is not None
        if name in sample:
            values[sample["index"]] = float(sample[name])
            if "generated_tokens" in sample:
                lengths[sample["index"]] = float(sample["generated_tokens"])
    return Scores(values, lengths, texts)


def answers(runs: Runs, table: pd.DataFrame, scores: Mapping[str, Scores]) -> list[Answers]:
    """The answers of every model and task whose samples have texts, in the order of the tables.

    Args:
        runs: with their folders.
        table: the DataFrame of the runs.
        scores: as `read_scores` gives them.
    """
    found: list[Answers] = []
    for (model, task), mine in by_task(headlines(table)).items():
        rows = [row for row in sorted(mine, key=method_order) if scores[row.run_id].texts]
        shared = set.intersection(*({*scores[row.run_id].values} for row in rows)) if rows else set()
        if not shared:
            continue
        compared = {"dense", "pruned"} <= {row.role for row in rows}
        differences = {}
        for index in sorted(shared):
            means = [
                fmean(scores[row.run_id].values[index] for row in rows if row.role == role)
                for role in ("pruned", "dense", "assisted")
                if any(row.role == role for row in rows)
            ]
            differences[index] = means[0] - means[1] if compared else means[0]
        order = sorted(differences, key=lambda index: (math.isnan(differences[index]), -differences[index]))
        name = file_name(str(len(found) + 1), model, task)  # numbered: other words may give the same name
        members = [(row.run_id, row.method, runs.folders[row.run_id], scores[row.run_id]) for row in rows]
        falling = {index: differences[index] for index in order}
        found.append(Answers(name, model, task, rows[0].metric, compared, falling, members))
    return found


def _text(sample: Mapping[str, Any]) -> str | None:
    """What the model wrote; None if it only rated given answers."""
    if isinstance(sample.get("text"), str):
        return str(sample["text"])
    written = sample.get("answers")
    if isinstance(written, list) and written and all(isinstance(answer, str) for answer in written):
        return "\n".join(written)
    return None
