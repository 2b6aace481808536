"""The kinds of task: a module for each, and what several of them share.

The module of a kind has

    read(config) -> items                                      from data alone, before a model is loaded
    evaluate(loaded, items, config, methods, done) -> batches  (method, samples) as they come, without those done
    metrics(samples) -> {name: number}                         over all samples of one method

and may have

    versions(items) -> {name: version}       what else belongs into the record's environment
    media(folder, samples, config) -> Media  what there is to look at, drawn into the run folder
"""

from __future__ import annotations

import importlib
from types import ModuleType

_MODULES = {
    "generation": "generation",
    "code": "code_generation",
    "classification": "classification_and_qa",
    "question_answering": "classification_and_qa",
    "perplexity": "perplexity",
    "fidelity": "fidelity",
    "latency": "latency",
    "flocking": "flocking",
}


def module_of(kind: str) -> ModuleType:
    """The module that runs a kind of task, imported only now because that takes seconds."""
    return importlib.import_module(f"pipelines.tasks.{_MODULES[kind]}")
