"""A method: what it allows, what it is called, and how much it keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from griffin import (
    BUDGETS,
    COMPENSATIONS,
    DRAFT_VOCABULARIES,
    LEARNING,
    MOST_DRAFTED,
    REFRESHES,
    SELECTIONS,
    STATISTICS,
    TOKEN_STATISTICS,
    VERIFICATIONS,
    Method,
)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("statistic", "griffon", (*STATISTICS, *TOKEN_STATISTICS)),
        ("selection", "best", SELECTIONS),
        ("compensation", "median", COMPENSATIONS),
        ("budget", "early", BUDGETS),
        ("refresh", "always", REFRESHES),
        ("verification", "roughly", VERIFICATIONS),
        ("draft_vocabulary", "half", DRAFT_VOCABULARIES),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_are_known(key: str, value: str, allowed: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}='{value}': expected one of {', '.join(allowed)}$"):
        Method(**{key: value})


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, (0.5, 1.0), (0.5, -0.1, 0.5), float("nan")])
def test_a_share_out_of_range_is_refused(sparsity: Any) -> None:
    with pytest.raises(ValueError, match="expected 0 <= sparsity < 1"):
        Method(sparsity=sparsity)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="budget='late' with a sparsity for each layer"):
        Method(sparsity=(0.5, 0.25), budget="late")
    with pytest.raises(ValueError, match=r"with compensation='mean', which cannot .* expected compensation=ridge"):
        Method(compensation="mean", refresh="compensation")
    assert LEARNING == ("ridge",)


@pytest.mark.parametrize(
    "draft_tokens",
    [
        0,
        -1,
        17,
        4.0,
        "many",
        "4",
        None,
        True,
        False,
    ],
)
def test_a_number_of_drafts_out_of_range_is_refused(draft_tokens: Any) -> None:
    with pytest.raises(ValueError, match=f"draft_tokens={draft_tokens!r}: expected auto, or 1 to 16"):
        Method(verification="exact", draft_tokens=draft_tokens)


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, float("nan")])
def test_a_threshold_that_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"verification_threshold={threshold}: expected a probability"):
        Method(verification="threshold", verification_threshold=threshold)


@pytest.mark.parametrize("sparsity", [0.0, (0.0, 0.0)])
def test_a_dense_draft_is_refused(sparsity: Any) -> None:
    with pytest.raises(ValueError, match=r"verification='exact' with sparsity=0: .* expected sparsity > 0"):
        Method(sparsity=sparsity, verification="exact")


def test_what_is_drafted_may_be_anything_in_range() -> None:
    for draft_tokens in (1, MOST_DRAFTED, "auto"):
        assert Method(verification="exact", draft_tokens=draft_tokens).verified
    assert Method(sparsity=(0.0, 0.5), verification="exact").verified
    assert not Method(draft_tokens=1).verified


def test_only_a_verified_method_can_prune_the_vocabulary() -> None:
    assert Method(verification="exact").prunes_vocabulary
    assert not Method(verification="exact", draft_vocabulary="full").prunes_vocabulary
    assert not Method(draft_vocabulary="prompt").prunes_vocabulary


def test_verified_methods_have_different_labels_and_say_what_is_not_exact() -> None:
    methods = [
        Method(),
        *(
            Method(verification=verification, draft_tokens=draft_tokens, draft_vocabulary=vocabulary, **options)
            for verification in ("exact", "threshold")
            for draft_tokens in (1, 4, 16, "auto")
            for vocabulary in DRAFT_VOCABULARIES
            for options in ({}, {"compensation": "ridge"}, {"compensation": "ridge", "refresh": "compensation"})
        ),
        *(Method(verification="threshold", verification_threshold=threshold) for threshold in (0.05, 0.3)),
    ]
    assert len({method.label for method in methods}) == len({method.family for method in methods}) == len(methods)
    assert all(("not exact" in method.label) == (method.verification == "threshold") for method in methods)
    assert Method(verification="exact").label == "griffin verified 50%"


@pytest.mark.parametrize(
    ("method", "label", "family"),
    [
        (Method(), "griffin 50%", "griffin"),
        (Method(sparsity=0.125), "griffin 12.5%", "griffin"),
        (Method("wanda", "sample", 0.9), "wanda sample 90%", "wanda sample"),
        (Method("joint", compensation="ridge", budget="late"), "joint+ridge late 50%", "joint+ridge late"),
        (Method(refresh="experts"), "griffin refresh=experts 50%", "griffin refresh=experts"),
        (Method(sparsity=(0.5, 0.0)), "griffin per layer", "griffin"),
        (Method("wanda", "sample", 0, "ridge", "late", "experts"), "dense", "dense"),
        (Method(sparsity=(0.0, 0.0)), "dense", "dense"),
    ],
)
def test_it_has_a_name(method: Method, label: str, family: str) -> None:
    assert (method.label, method.family) == (label, family)
    assert method.dense == (label == "dense")


def test_equal_settings_are_one_method() -> None:
    assert {Method("griffin", "topk"), Method(sparsity=0.5)} == {Method()}
    with pytest.raises(dataclasses.FrozenInstanceError):
        Method().sparsity = 0.25  # type: ignore[misc]


def test_what_each_layer_keeps() -> None:
    assert Method().kept([80, 81]) == [40, 40]
    assert Method(sparsity=(0.0, 0.75, 0.999)).kept([80, 80, 80]) == [80, 20, 1]
    assert Method(sparsity=0.0, budget="late").kept([80] * 4) == [80] * 4
    late = Method(budget="late").kept([80] * 4)
    assert sum(late) == 160
    assert late[1] < late[2] <= late[3]
    with pytest.raises(ValueError, match="sparsity has 2 values: expected one number, or one for each of 3 layers"):
        Method(sparsity=(0.5, 0.5)).kept([80, 80, 80])
