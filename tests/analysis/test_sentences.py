"""What runs show, in sentences: counted from the samples, and only what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from made import record, score, write_run

from analysis.contents import make_report

TEXTS = ["a tide", "a reef", "a canal", "a clock"]


def run(root: Path, name: str, texts: list[str], density: float | None = None, **settings: Any) -> None:
    metrics = score(20.0) | ({} if density is None else {"effective_density": density})
    samples = [{"index": index, "rouge1": 20.0, "text": text} for index, text in enumerate(texts)]
    write_run(root, record(name, metrics=metrics, **settings), samples)


def test_verified_texts_are_counted_against_the_dense_models(tmp_path: Path) -> None:
    run(tmp_path, "dense", TEXTS, sparsity=0)
    exact = {"statistic": "impact", "quantization": "int4", "verification": "exact"}
    run(tmp_path, "exact", [*TEXTS[:3], "a cloak"], 0.5869, **exact)
    run(tmp_path, "griffin", TEXTS, 0.7)
    found = make_report(str(tmp_path)).summary
    told = "3 of 4 texts are the dense model's, at 0.587 of its bytes per token (xsum, gemma_7b)."
    assert [sentence for sentence in found if "texts" in sentence] == [f"exact 50%: {told}"]


def test_without_the_dense_texts_nothing_is_said_of_them(tmp_path: Path) -> None:
    run(tmp_path, "exact", TEXTS, 0.5, verification="exact")
    assert make_report(str(tmp_path)).summary == []


def test_divergences_stand_by_size_and_beside_griffins(tmp_path: Path) -> None:
    recipe = {"statistic": "joint", "compensation": "ridge", "budget": "late", "refresh": "compensation"}
    for name, value, settings in (
        ("dense", 0.0, {"sparsity": 0}),
        ("griffin", 0.8, {}),
        ("recipe", 0.4, recipe),
        ("int8", 0.01, {"sparsity": 0, "quantization": "int8"}),
    ):
        write_run(tmp_path, record(name, "fidelity", metrics=score(value, 0.1, "kl"), **settings))
    (sentence,) = make_report(str(tmp_path)).summary
    assert sentence.startswith(
        "KL from the dense model, in nats per token: int8 0.0100, recipe 50% 0.4000, griffin 50% 0"
    )
    assert "; recipe 50% has 0.50 of griffin 50%'s (fidelity, " in sentence
    assert sentence.endswith(", n = 4).")
