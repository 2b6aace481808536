"""The kinds of task: a module for each, and what several of them share.

The module of a kind has

    read(config) -> items               `limit` of them after `offset`, from data alone, before a model is loaded
    evaluate(run, items) -> batches     (method, samples) as they come, without those done; see `prompts.Evaluation`
    metrics(samples) -> {name: number}  over all samples of one method

and may have

    versions(items) -> {name: version}       what else belongs into the record's environment
    media(folder, samples, config) -> Media  what there is to look at, drawn into the run folder

Reading raises UserError where data is missing, malformed or unreachable, or ends before the offset; evaluating, where
the model, its context or a text does not suit the task; drawing, where the folder cannot be written.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType


@dataclass(frozen=True)
class Kind:
    """What a kind of task can do.

    Attributes:
        module: of this package, which runs it.
        title: in reports.
        metric: its headline; empty where lm-eval's task says it.
        batched: its rows, prompts times methods, run together.
        generates: text is decoded, so drafts can be checked, and dense weights are for prompts only.
        compiles: its decoding can be compiled.
        prunes: it compares methods; else it looks at the dense model.
        oracles: it knows the dense continuation, which statistics that are oracles score.
        timed: it measures times, so the machine counts.
    """

    module: str
    title: str
    metric: str
    batched: bool = False
    generates: bool = False
    compiles: bool = False
    prunes: bool = True
    oracles: bool = False
    timed: bool = False


KINDS = {
    "generation": Kind("generation", "Generation", "rouge1", batched=True, generates=True, compiles=True),
    "code": Kind("code_generation", "Code generation", "pass_at_1", batched=True, generates=True),
    "classification": Kind("classification_and_qa", "Classification", "acc", batched=True),
    "question_answering": Kind("classification_and_qa", "Question answering", "", batched=True, generates=True),
    "perplexity": Kind("perplexity", "Perplexity", "perplexity", batched=True),
    "fidelity": Kind("fidelity", "Fidelity to the dense model", "kl", batched=True, oracles=True),
    "exactness": Kind("exactness", "Exactness of verified texts", "equal_texts", generates=True),
    "latency": Kind("latency", "Latency", "decode_speedup", generates=True, compiles=True, timed=True),
    "flocking": Kind("flocking", "Flocking", "jaccard_sequences_natural", prunes=False),
}


def module_of(kind: str) -> ModuleType:
    """The module that runs a kind of task, imported only now because that takes seconds."""
    return importlib.import_module(f"pipelines.tasks.{KINDS[kind].module}")
