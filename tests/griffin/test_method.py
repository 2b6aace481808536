"""A method: what it allows, what it is called, and how much it keeps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from griffin import BUDGETS, COMPENSATIONS, LEARNING, REFRESHES, SELECTIONS, STATISTICS, Method


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("statistic", "griffon", STATISTICS),
        ("selection", "best", SELECTIONS),
        ("compensation", "median", COMPENSATIONS),
        ("budget", "early", BUDGETS),
        ("refresh", "always", REFRESHES),
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
