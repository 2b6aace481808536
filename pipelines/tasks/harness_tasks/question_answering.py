"""What the YAML files beside this one cannot say: how question answering is scored."""

from __future__ import annotations

from typing import Any

from pipelines.tasks.squad import compute_exact, compute_f1

Doc = dict[str, Any]


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
