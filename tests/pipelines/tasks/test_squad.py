"""Exact match and F1 of short answers."""

from __future__ import annotations

import pytest

from pipelines.tasks.squad import compute_exact, compute_f1, normalize_answer, provide_to_lm_eval


def test_answers_are_normalised() -> None:
    assert normalize_answer(" The  U.S. Army, an  old\none!") == "us army old one"


@pytest.mark.parametrize(
    ("gold", "prediction", "exact", "f1"),
    [
        ("the cat", "Cat.", 1, 1.0),
        ("black cat", "cat", 0, 2 / 3),
        ("cat", "dog", 0, 0.0),
        ("", "", 1, 1.0),
        ("", "cat", 0, 0.0),
        ("a a b b", "b b b", 0, 2 * (2 / 3) * (2 / 2) / (2 / 3 + 2 / 2)),  # articles go, repeated tokens count
    ],
)
def test_scores(gold: str, prediction: str, exact: int, f1: float) -> None:
    assert compute_exact(gold, prediction) == exact
    assert compute_f1(gold, prediction) == pytest.approx(f1)


def test_lm_eval_finds_them_where_it_looks() -> None:
    provide_to_lm_eval()
    from transformers.data.metrics import squad_metrics

    assert squad_metrics.compute_f1("a cat", "cat") == 1.0
