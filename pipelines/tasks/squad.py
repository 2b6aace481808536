"""Exact match and token F1 of short answers, as SQuAD defined them (Rajpurkar et al., arXiv 1606.05250).

transformers carried these functions until version 5, and lm-eval's CoQA still imports them from there;
`provide_to_lm_eval` puts these in the place it looks.
"""

from __future__ import annotations

import re
import string
import sys
from collections import Counter
from types import ModuleType

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
        package, module = "transformers.data.metrics", ModuleType("squad_metrics", __doc__)
        for function in (normalize_answer, compute_exact, compute_f1):
            setattr(module, function.__name__, function)
        holder = ModuleType(package)
        holder.squad_metrics = module  # type: ignore[attr-defined]
        sys.modules[package], sys.modules[f"{package}.squad_metrics"] = holder, module
