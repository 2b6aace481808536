"""What the models wrote, sample by sample and methods side by side: three examples of each task, and all answers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from rich.console import Console
from rich.text import Text

from analysis.drawing import file_name
from analysis.frame import by_task, headlines
from analysis.metrics import Metric, metric
from analysis.runs import Runs, watched
from pipelines.records import DRAFTED, from_json, pieces

_ROLES = ("pruned", "dense", "assisted")  # the scores of the first less those of the next are what ranks samples


@dataclass(frozen=True)
class Answer:
    """What one method wrote; `tokens` is None if the run did not count them. Its text is in pieces, each with whether
    it is drafts that the dense model accepted."""

    method: str
    score: float
    tokens: int | None
    pieces: list[tuple[str, bool]]

    @property
    def text(self) -> str:
        """What it wrote."""
        return "".join(piece for piece, _ in self.pieces)

    @property
    def drafted(self) -> bool:
        """Whether any of it was."""
        return any(drafted for _, drafted in self.pieces)


@dataclass(frozen=True)
class Example:
    """One sample, by its index and its name in the data, with the answers of all methods, dense first.

    Attributes:
        reference: the answer that the data has.
        prompt: its text, in a chat what the user says last; empty if the samples do not say it.
        difference: mean score of the pruned methods less that of dense; without either, the mean score there is.
        rule: why it is an example: `best`, `median` or `worst`.
    """

    index: int
    sample_id: str
    reference: str
    prompt: str
    difference: float
    answers: list[Answer]
    rule: str = ""


@dataclass(frozen=True)
class Scores:
    """The numbers of a run's samples, without their texts.

    Attributes:
        values: of one metric, by the sample's index.
        lengths: tokens of the answers, of the samples that say so.
        texts: the hashes of the answers in words.
    """

    values: dict[int, float] = field(default_factory=dict)
    lengths: dict[int, float] = field(default_factory=dict)
    texts: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Answers:
    """All samples of a model and task that have a text. Texts are read when they are asked for, and not kept.

    Attributes:
        name: file name without suffix.
        metric: the name of the scores.
        compared: whether there are dense and pruned runs, so that differences are to dense.
        differences: by the index of every sample that all runs have, from the best to the worst.
        runs: method, folder and scores of each run, dense first.
    """

    name: str
    model: str
    task: str
    metric: str
    compared: bool
    differences: dict[int, float]
    runs: list[tuple[str, Path, Scores]]

    @property
    def shown(self) -> Metric:
        """How the scores are shown."""
        return metric(self.metric)

    @property
    def scores(self) -> pd.DataFrame:
        """The scores: a row per sample by its index, a column per method."""
        columns = {method: scores.values for method, _, scores in self.runs}
        return pd.DataFrame(columns, index=sorted(self.differences)).rename_axis("sample")

    @property
    def samples(self) -> list[Example]:
        """All samples with their texts, by falling difference."""
        read = [{sample["index"]: sample for sample in read_samples(folder)} for _, folder, _ in self.runs]
        return [self._example(index, [samples[index] for samples in read]) for index in self.differences]

    def _example(self, index: int, samples: list[dict[str, Any]]) -> Example:
        first = samples[0]
        written = [
            Answer(
                method,
                scores.values.get(index, 0.0),
                sample.get("generated_tokens"),
                pieces((_text(sample) or "").rstrip(), sample.get("drafted_spans", ())),
            )
            for (method, _, scores), sample in zip(self.runs, samples, strict=True)
        ]
        reference = first.get("reference", first.get("target", ""))
        words = "\n".join(map(str, reference)) if isinstance(reference, list) else str(reference)
        prompt = str(first.get("prompt", ""))
        return Example(index, str(first.get("id", index)), words, prompt, self.differences[index], written)


def coloured(answers: Sequence[Answers]) -> list[Text]:
    """One text that was drafted and checked, with the accepted drafts in a colour, for terminals that have any."""
    console = Console()
    if console.color_system is None or console.no_color:
        return []
    found = (
        (answer, example)
        for one in answers
        for example in one.samples[:1]
        for answer in example.answers
        if answer.drafted
    )
    for answer, example in found:
        words = f"{answer.method} wrote of sample {example.index}, accepted drafts in {DRAFTED}: "
        written = ((piece, DRAFTED * drafted) for piece, drafted in answer.pieces)
        return [Text.assemble(words, *written)]
    return []


def examples(samples: list[Example]) -> list[Example]:
    """Of samples by falling difference, the best, the median and the worst; all of fewer than three."""
    last = len(samples) - 1
    places = {0: "best", last // 2: "median", last: "worst"} if last > 1 else dict.fromkeys(range(last + 1), "")
    return [replace(samples[place], rule=rule) for place, rule in sorted(places.items())]


def read_samples(folder: Path | None) -> Iterator[dict[str, Any]]:
    """The samples of a run one after the other, with their metrics among their other values; none without a folder."""
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
    values, lengths, texts = {}, {}, {}
    for sample in read_samples(folder):
        if (text := _text(sample)) is not None:
            texts[sample["index"]] = hash(text)
        if name in sample:
            values[sample["index"]] = float(sample[name])
            if "generated_tokens" in sample:
                lengths[sample["index"]] = float(sample["generated_tokens"])
    return Scores(values, lengths, texts)


def answers(runs: Runs, table: pd.DataFrame, scores: Mapping[str, Scores]) -> list[Answers]:
    """The answers of every model and task whose samples have texts, in the order of the tables."""
    found: list[Answers] = []
    for (model, task), mine in by_task(headlines(table).itertuples()).items():
        rows = [row for row in mine if scores[row.run_id].texts]
        shared = set.intersection(*({*scores[row.run_id].values} for row in rows)) if rows else set()
        if not shared:
            continue
        compared = {"dense", "pruned"} <= {row.role for row in rows}
        by_role = [[scores[row.run_id].values for row in rows if row.role == role] for role in _ROLES]
        differences = {}
        for index in sorted(shared):
            first, *others = (fmean(values[index] for values in members) for members in by_role if members)
            differences[index] = first - others[0] if compared else first
        falling = dict(sorted(differences.items(), key=lambda item: (math.isnan(item[1]), -item[1])))
        name = file_name(str(len(found) + 1), model, task)  # numbered: other words may give the same name
        members = [(row.method, runs.folders[row.run_id], scores[row.run_id]) for row in rows]
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
