"""A method: what it allows, what it is called, and how much it keeps; and the arguments of `prune`."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from families import LAYERS, tiny
from running import as_lists, prompt, text

import griffin
from griffin import METHODS, Method, Statistic, as_method

ALLOWED: dict[str, Any] = {
    "statistic": (*griffin.STATISTICS, *griffin.TOKEN_STATISTICS),
    "selection": griffin.SELECTIONS,
    "compensation": griffin.COMPENSATIONS,
    "budget": griffin.BUDGETS,
    "refresh": griffin.REFRESHES,
    "verification": griffin.VERIFICATIONS,
    "draft_vocabulary": griffin.DRAFT_VOCABULARIES,
}


@pytest.mark.parametrize("key", ALLOWED)
def test_an_unknown_name_is_refused_with_those_that_are_known(key: str) -> None:
    for make in (Method, lambda **options: griffin.prune(tiny("llama"), **options)):
        with pytest.raises(ValueError, match=f"{key}='nonesuch': expected one of {', '.join(ALLOWED[key])}$"):
            make(**{key: "nonesuch"})


EXACT = {"verification": "exact"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({"sparsity": share}, "expected 0 <= sparsity < 1") for share in (1, 1.5, -0.1, math.nan, (0.5, 1.0, 0.5))),
    *(({"sparsity": share}, f"sparsity={share!r}: expected a number") for share in ("0.5", None, True)),
    ({"sparsity": (0.5, "x", 0.5)}, "sparsity='x': expected a number"),
    ({"statistic": None}, "statistic=None: expected one of"),
    ({"budget": "late", "sparsity": (0.5, 0.25, 0.5)}, "budget='late' with a sparsity for each layer"),
    *(
        ({"compensation": name, "refresh": "compensation"}, f"='{name}', which cannot .*ridge")
        for name in ("none", "mean")
    ),
    *((EXACT | {"draft_tokens": one}, "expected auto, or 1 to 16") for one in (0, 17, 4.0, "4", None, True)),
    *(({"verification_threshold": one}, f"={one}: expected a probability") for one in (0, 1, 1.5, math.nan)),
    *((EXACT | {"sparsity": share}, r"sparsity=0: .* sparsity > 0") for share in (0.0, (0.0, 0.0, 0.0))),
    ({"prompt_lookup": 1}, "prompt_lookup=1: expected True or False"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_is_out_of_range_or_contradicts_itself_is_refused(options: dict[str, Any], words: str) -> None:
    for make in (Method, lambda **options: griffin.prune(tiny("llama"), **options)):
        with pytest.raises((ValueError, TypeError), match=words):
            make(**options)


NAMES = {
    "griffin 12.5%": Method(sparsity=0.125),
    "wanda sample 90%": Method("wanda", "sample", 0.9),
    "joint+ridge late 50%": Method("joint", compensation="ridge", budget="late"),
    "griffin refresh=experts 50%": Method(refresh="experts"),
    "griffin per layer": Method(sparsity=(0.5, 0.0)),
    "teal (by token, masked) 50%": Method("teal"),
    "dense": Method("wanda", "sample", 0, "ridge", "late", "experts"),
    "griffin verified 50%": Method(verification="exact"),
}


def test_it_has_a_name() -> None:
    for label, method in NAMES.items():
        assert method.label == label
        assert method.family == label.removesuffix(" per layer").rsplit(" ", label.endswith("%"))[0]
        assert method.dense == (label == "dense")
    assert Method(sparsity=(0.0, 0.0)).label == "dense"


def test_verified_methods_have_different_labels_and_say_what_is_not_exact() -> None:
    learning = ({}, {"compensation": "ridge"}, {"compensation": "ridge", "refresh": "compensation"})
    axes = (("exact", "threshold"), (1, 4, "auto"), griffin.DRAFT_VOCABULARIES, (True, False), learning)
    keys = ("verification", "draft_tokens", "draft_vocabulary", "prompt_lookup")
    methods = [Method(**dict(zip(keys, one[:4], strict=True)), **one[4]) for one in itertools.product(*axes)]
    methods += [Method(verification="threshold", verification_threshold=threshold) for threshold in (0.05, 0.3)]
    assert len({method.label for method in methods}) == len({method.family for method in methods}) == len(methods)
    assert all(("not exact" in method.label) == (method.verification == "threshold") for method in methods)


def test_what_each_layer_keeps() -> None:
    assert Method().kept([80, 81]) == [40, 40]
    assert Method(sparsity=(0.0, 0.75, 0.999)).kept([80, 80, 80]) == [80, 20, 1]
    assert Method(sparsity=0.0, budget="late").kept([80] * 4) == [80] * 4
    late = Method(budget="late").kept([80] * 4)
    assert sum(late) == 160
    assert late[1] < late[2] <= late[3]
    for count in (1, LAYERS - 1, LAYERS + 1):
        words = f"sparsity has {count} values: expected one number, or one for each of {LAYERS} layers"
        with pytest.raises(ValueError, match=words):
            griffin.prune(tiny("llama"), [0.5] * count)


def test_a_method_may_be_a_name_a_sparsity_or_a_method_with_some_fields_said_anew() -> None:
    assert as_method() == as_method("griffin") == as_method(0.5) == METHODS["griffin"] == Method()
    assert as_method([0.5, 0.0, 0.25]) == as_method(sparsity=[0.5, 0.0, 0.25]) == Method(sparsity=(0.5, 0.0, 0.25))
    assert as_method(0.25, statistic="wanda") == as_method(Method("wanda"), sparsity=0.25)
    assert griffin.prune(tiny("llama")).method == Method()
    assert as_method("recipe", verification="exact") == METHODS["exact"]
    assert as_method("dense").dense
    with pytest.raises(ValueError, match=f"method='griffon': expected one of {', '.join(METHODS)}"):
        griffin.prune(tiny("llama"), "griffon")
    with pytest.raises(TypeError, match="statistics"):
        griffin.prune(tiny("llama"), statistics="wanda")


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"mode": "nonesuch"}, "mode='nonesuch': expected one of compact, masked"),
    *(({"seed": seed}, f"seed={seed!r}: expected a whole number") for seed in ("1", True)),
    ({"compiled": "yes"}, "compiled='yes': expected True, False or 'auto'"),
    ({"statistic": "oracle"}, "statistic='oracle' knows what comes after the prompt: it cannot generate"),
    ({"mode": "masked", "offload_dense": True}, "mode='masked' with offload_dense=True"),
    (EXACT | {"mode": "masked"}, "mode='masked' with verification='exact'.*expected 'compact'"),
    *(
        (EXACT | {key: True}, f"{key}=True with verification.*expected False")
        for key in ("shared_experts", "offload_dense")
    ),
]


@pytest.mark.parametrize(("arguments", "words"), UNFIT, ids=str)
def test_arguments_that_cannot_be_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        griffin.prune(tiny("llama"), **arguments)


@pytest.mark.parametrize("model", ["gpt2", None, 3, torch.nn.Linear])
def test_what_is_no_model_is_named(model: Any) -> None:
    with pytest.raises(TypeError, match="expected a transformers model"):
        griffin.prune(model)


@pytest.mark.parametrize(
    "options", [{}, {"mode": "masked"}, {"verification": "exact"}, {"refresh": "experts"}], ids=str
)
def test_a_statistic_of_ones_own(options: dict[str, Any]) -> None:
    def last_ones(evidence: griffin.Evidence) -> torch.Tensor:
        assert evidence.total is not None
        return torch.arange(80.0).expand(len(evidence.total), -1)

    griffins = griffin.STATISTICS["griffin"]
    method = Method(Statistic(last_ones, griffins.activations))
    assert method.label == "last_ones 50%"
    with griffin.prune(tiny("llama"), method, **options) as pruner:
        text(tiny("llama"), prompt(7), max_new_tokens=10)
    assert as_lists(pruner.experts) == [[*range(40, 80)]] * LAYERS
    with griffin.prune(tiny("llama"), statistic=griffins) as pruner:
        text(tiny("llama"), prompt(7))
    assert pruner.method == Method(griffins)
    assert pruner.method.label == "griffin 50%"
