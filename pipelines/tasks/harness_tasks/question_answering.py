"""What the YAML files beside this one cannot say: how question answering is scored.

Exact match and token F1 of short answers are as SQuAD defined them (Rajpurkar et al., arXiv 1606.05250). transformers
carried these functions until version 5, and lm-eval's CoQA still imports them from there; `provide_to_lm_eval` puts
these in the place it looks.
"""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from types import ModuleType
from typing import Any

Doc = dict[str, Any]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation, articles and repeated white space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def compute_exact(a_gold: str, a_pred: str) -> int:
    """1 if the answers are equal once normalised, else 0."""
    return int(normalize_answer(a_gold) == normalize_answer(a_pred))


def compute_f1(a_gold: str, a_pred: str) -> float:
    """Harmonic mean of precision and recall of the answers' tokens; two empty answers agree."""
    gold, prediction = normalize_answer(a_gold).split(), normalize_answer(a_pred).split()
    if not gold or not prediction:
        return float(gold == prediction)
    common = sum((Counter(gold) & Counter(prediction)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def provide_to_lm_eval() -> None:
    """Make `transformers.data.metrics.squad_metrics` importable where transformers has it no more."""
    try:
        import transformers.data.metrics.squad_metrics  # noqa: F401 (only whether it is there)
    except ModuleNotFoundError:
        package = "transformers.data.metrics"
        sys.modules[package] = holder = ModuleType(package)
        holder.squad_metrics = sys.modules[f"{package}.squad_metrics"] = sys.modules[__name__]  # type: ignore[attr-defined]


def briefs_qa(doc: Doc, results: list[str]) -> dict[str, float]:
    """Exact match and token F1 of the first line, normalised as in SQuAD."""
    prediction, answer = results[0].strip().split("\n")[0], doc["answers"][1]
    return {"em": float(compute_exact(answer, prediction)), "f1": compute_f1(answer, prediction)}


def qasper_docs(dataset: Any) -> Any:
    """One document a question: rows that repeat it hold other annotators' answers."""
    answers: dict[str, list[str]] = {}
    for row in dataset:
        answers.setdefault(row["id"], []).append(row["output"])
    first = {row["id"]: number for number, row in reversed(list(enumerate(dataset)))}

    def document(row: Doc) -> Doc:
        question, _, text = row["input"].partition("\n\n")
        return {"question": question, "text": text, "outputs": answers[row["id"]]}

    return dataset.select(sorted(first.values())).map(document)


def qasper(doc: Doc, results: list[str]) -> dict[str, float]:
    """Token F1 against the best matching annotator; no answer counts as "Unanswerable", as in lm-eval."""
    prediction = results[0].strip() or "Unanswerable"
    return {"f1": max(compute_f1(answer, prediction) for answer in doc["outputs"])}
