"""A method: what it allows, what it is called, how much it keeps of each layer, and how it selects."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from families import LAYERS, REFRESHED, ROWS, VERIFIED, prompt, tiny
from running import as_lists, text
from torch import Tensor

import griffin
from griffin import BUDGETS, METHODS, SELECTIONS, Method, Statistic, as_method, kept_neurons, kept_per_layer, select

ALLOWED: dict[str, Any] = {
    "statistic": (*griffin.STATISTICS, *griffin.TOKEN_STATISTICS),
    **{"selection": SELECTIONS, "compensation": griffin.COMPENSATIONS, "budget": BUDGETS, "refresh": griffin.REFRESHES},
    **{"verification": griffin.VERIFICATIONS, "draft_vocabulary": griffin.DRAFT_VOCABULARIES},
}
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({key: "nonesuch"}, f"{key}='nonesuch': expected one of {', '.join(names)}$") for key, names in ALLOWED.items()),
    *(({"sparsity": share}, "expected 0 <= sparsity < 1") for share in (1, 1.5, -0.1, math.nan, (0.5, 1.0, 0.5))),
    *(({"sparsity": share}, f"sparsity={share!r}: expected a number") for share in ("0.5", None, True)),
    ({"sparsity": (0.5, "x", 0.5)}, "sparsity='x': expected a number"),
    ({"statistic": None}, "statistic=None: expected one of"),
    ({"budget": "late", "sparsity": (0.5, 0.25, 0.5)}, "budget='late' with a sparsity for each layer"),
    ({"refresh": "compensation"}, "compensation='none': expected compensation='ridge'"),
    *(
        ({"statistic": "teal", key: value}, f"{key}='{value}' with statistic='teal'.*expected {key}=")
        for key, value in (REFRESHED | VERIFIED | {"selection": "sample"}).items()
    ),
    *((VERIFIED | {"draft_tokens": one}, "expected auto, or 1 to 32") for one in (0, 33, 4.0, "4", None, True)),
    *(({"verification_threshold": one}, f"={one}: expected a probability") for one in (0, 1, 1.5, math.nan)),
    *((VERIFIED | {"sparsity": share}, r"sparsity=0: .* sparsity > 0") for share in (0.0, (0.0, 0.0, 0.0))),
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
    "griffin+ridge refresh=compensation 50%": Method(**REFRESHED),
    "griffin per layer": Method(sparsity=(0.5, 0.0)),
    "teal (by token, masked) 50%": Method("teal"),
    "dense": Method("wanda", "sample", 0, "ridge", "late", "compensation"),
    "griffin verified 50%": Method(**VERIFIED),
}


def test_it_has_a_name() -> None:
    for label, method in NAMES.items():
        assert method.label == label
        assert method.family == label.removesuffix(" per layer").rsplit(" ", label.endswith("%"))[0]
        assert method.dense == (label == "dense")
    assert Method(sparsity=(0.0, 0.0)).label == "dense"


def test_verified_methods_have_different_labels_and_say_what_is_not_exact() -> None:
    learning = ({}, {"compensation": "ridge"}, REFRESHED)
    axes = (("exact", "threshold"), (1, 4, "auto"), griffin.DRAFT_VOCABULARIES, learning)
    keys = ("verification", "draft_tokens", "draft_vocabulary")
    methods = [Method(**dict(zip(keys, one[:3], strict=True)), **one[3]) for one in itertools.product(*axes)]
    methods += [Method(verification="threshold", verification_threshold=threshold) for threshold in (0.05, 0.3)]
    assert len({method.label for method in methods}) == len({method.family for method in methods}) == len(methods)
    assert all(("not exact" in method.label) == (method.verification == "threshold") for method in methods)


def test_a_method_may_be_a_name_a_sparsity_or_a_method_with_some_fields_said_anew() -> None:
    assert as_method() == as_method("griffin") == as_method(0.5) == METHODS["griffin"] == Method()
    assert as_method([0.5, 0.0, 0.25]) == as_method(sparsity=[0.5, 0.0, 0.25]) == Method(sparsity=(0.5, 0.0, 0.25))
    assert as_method(0.25, statistic="wanda") == as_method(Method("wanda"), sparsity=0.25)
    assert griffin.prune(tiny("llama")).method == Method()
    assert as_method("griffin", statistic="impact", quantization="int4", verification="exact") == METHODS["exact"]
    assert as_method("dense").dense


UNFIT: list[tuple[dict[str, Any], str]] = [
    *(({"model": model}, "expected a transformers model") for model in ("gpt2", None, 3, torch.nn.Linear)),
    *(({"sparsity": [0.5] * count}, f"sparsity has {count} values: expected one number, or") for count in (1, 2, 4)),
    ({"method": "griffon"}, f"method='griffon': expected one of {', '.join(METHODS)}"),
    ({"statistics": "wanda"}, "statistics"),
    ({"mode": "nonesuch"}, "mode='nonesuch': expected one of compact, masked"),
    *(({"seed": seed}, f"seed={seed!r}: expected a whole number") for seed in ("1", True)),
    ({"compiled": "yes"}, "compiled='yes': expected True, False or 'auto'"),
    ({"statistic": "oracle"}, "statistic='oracle' knows what comes after the prompt: it cannot generate"),
    ({"mode": "masked", "offload_dense": True}, "mode='masked' with offload_dense=True"),
    (VERIFIED | {"mode": "masked"}, "mode='masked' with verification='exact'.*expected 'compact'"),
    (VERIFIED | {"shared_experts": True}, "shared_experts=True with verification.*expected False"),
    (VERIFIED | {"offload_dense": True}, "offload_dense=True with verification.*expected False"),
    ({"statistic": "cats"}, "mode='compact' with statistic='cats'.*expected 'masked'"),
    ({"statistic": "cats", "mode": "masked", "shared_experts": True}, "shared_experts=True with statistic='cats'"),
]


@pytest.mark.parametrize(("arguments", "words"), UNFIT, ids=str)
def test_arguments_that_cannot_be_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        griffin.prune(**({"model": tiny("llama")} | arguments))


def test_a_statistic_of_ones_own() -> None:
    def last_ones(evidence: griffin.Evidence) -> torch.Tensor:
        return torch.arange(80.0)

    griffins = griffin.STATISTICS["griffin"]
    assert Method(Statistic(last_ones, griffins.activations)).label == "last_ones 50%"
    assert Method(griffins).label == "griffin 50%"
    for options in ({}, {"mode": "masked"}, VERIFIED, REFRESHED):
        with griffin.prune(tiny("llama"), Method(Statistic(last_ones, griffins.activations)), **options) as pruner:
            text(tiny("llama"), prompt(7), max_new_tokens=10)
        assert as_lists(pruner.experts) == [[*range(40, 80)]] * LAYERS
    wrong = Statistic(lambda evidence: evidence.recorded[None], griffins.activations)
    with griffin.prune(tiny("llama"), statistic=wrong), pytest.raises(ValueError, match=r"scores of shape \[1, 80\]"):
        text(tiny("llama"), prompt(7))


DRAWS = 20_000
TOLERANCE = 0.02  # about four standard deviations of a difference of two frequencies


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_experts_are_distinct_ascending_and_in_range(selection: str) -> None:
    assert select(torch.tensor([[0.5]]), 1, selection, torch.tensor([[0.5]])).tolist() == [[0]]
    scores_BD, draws_BD = uniform(50, 12), uniform(50, 12, seed=1)
    for kept in (2, 3, 7, 12):
        found_BK = select(scores_BD, kept, selection, draws_BD)
        assert (found_BK.shape, found_BK.dtype) == ((50, kept), torch.int64)
        assert bool((found_BK.diff(dim=1) > 0).all())
        assert set(found_BK.flatten().tolist()) <= {*range(12)}
    scores_1D = torch.zeros(1, 8)
    scores_1D[0, [2, 5]] = torch.tensor([1e-6, 3.0])
    for experts_K in select(scores_1D.expand(100, -1), 4, selection, uniform(100, 8, seed=1)).tolist():
        assert {2, 5} < set(experts_K), "with too few positive scores all of them are kept"
        assert len(set(experts_K)) == 4


def test_samples_are_distributed_as_multinomial_ones_without_replacement() -> None:
    scores_D = torch.tensor([1.0, 8.0, 2.0, 0.5, 4.0, 0.25])
    torch.manual_seed(0)
    expected = {"sample": torch.multinomial(scores_D.expand(DRAWS, -1), 4)}
    rest_D = scores_D.index_fill(0, torch.tensor([1, 4]), 0.0)  # the best two are certain
    drawn = torch.multinomial(rest_D.expand(DRAWS, -1), 2)
    expected["topk_sample"] = torch.cat([torch.tensor([[1, 4]]).expand(DRAWS, -1), drawn], dim=1)
    for selection, expected_BK in expected.items():
        found_BK = select(scores_D.expand(DRAWS, -1), 4, selection, uniform(DRAWS, 6, seed=1))
        # How often each set of six neurons came up, indexed by the set's bits.
        frequencies = [torch.bincount((2**one).sum(dim=1), minlength=64) / DRAWS for one in (found_BK, expected_BK)]
        torch.testing.assert_close(*frequencies, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("extreme", "kept"), [(0.0, [1, 2]), (1 - 2**-24, [0, 3])])
def test_the_ends_of_the_uniform_range_lose_and_win(extreme: float, kept: list[int]) -> None:
    # Their Gumbel noise is minus infinity, and the largest there is.
    assert select(torch.ones(1, 4), 2, "sample", torch.tensor([[extreme, 0.5, 0.5, extreme]])).tolist() == [kept]


def test_what_cannot_be_selected_is_refused() -> None:
    refused = [((2, "best"), r"selection='best'.*topk, sample, topk_sample")]
    refused += [((kept,), f"kept={kept}: expected 1 to 4") for kept in (0, 5, -1)]
    refused += [((2, name), "needs random numbers") for name in ("sample", "topk_sample")]
    for arguments, words in refused:
        with pytest.raises(ValueError, match=words):
            select(uniform(1, 4), *arguments)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("widths", [[80] * 3, [1536] * 30, [2048] * 18, [64], [7, 7], [80, 160, 80, 160]])
def test_every_budget_keeps_as_many_as_the_paper(widths: list[int], budget: str) -> None:
    for sparsity in (0.0, 0.01, 0.25, 0.5, 0.65, 0.75, 0.9, 0.999):
        kept = kept_per_layer(widths, sparsity, budget)
        assert sum(kept) == sum(kept_neurons(width, sparsity) for width in widths)
        assert all(1 <= count <= width for count, width in zip(kept, widths, strict=True))


def test_what_each_layer_keeps_and_late_keeps_more_towards_the_middle_and_spares_the_first_one() -> None:
    assert Method().kept([80, 81, 7, 1]) == [40, 40, 3, 1]
    assert Method(sparsity=(0.0, 0.75, 0.999)).kept([80, 80, 80]) == [80, 20, 1]
    assert Method(sparsity=0.0, budget="late").kept([80] * 4) == [80] * 4
    assert kept_per_layer([1000, 2000] * 3, 0.5, "late") == [504, 828, 496, 1068, 536, 1068]
    # At 50%, 0.2 of the width from none to the middle.
    assert Method(budget="late").kept([1000] * 11) == [500, 380, 420, 460, 500, *6 * [540]]


STOCHASTIC = [("random", "topk"), ("griffin", "sample"), ("griffin", "topk_sample"), ("magnitude", "sample")]


def drawn(statistic: str, selection: str, ids: Tensor, **options: object) -> list[list[int]]:
    """Each layer's experts for a prompt alone."""
    with torch.no_grad(), griffin.prune(tiny("llama"), statistic=statistic, selection=selection, **options) as pruner:
        tiny("llama")(ids)
    return as_lists(pruner.experts)


@pytest.mark.parametrize(("statistic", "selection"), STOCHASTIC)
def test_a_prompt_draws_the_same_in_any_mode_and_chunking_and_another_others(statistic: str, selection: str) -> None:
    model, before = tiny("llama"), torch.get_rng_state()
    alone = [drawn(statistic, selection, ids) for ids in ROWS[:2]]
    assert drawn(statistic, selection, ROWS[0], mode="masked") == alone[0]
    with griffin.prune(model, statistic=statistic, selection=selection, mode="masked") as pruner:
        text(model, ROWS[0], prefill_chunk_size=5)
        assert as_lists(pruner.experts) == alone[0]
        with pytest.raises(ValueError, match="input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ROWS[0]))
    assert all(one != other for one, other in zip(alone[0], drawn(statistic, selection, ROWS[0], seed=1), strict=True))
    assert all(one != other for one, other in zip(*alone, strict=True)), "another prompt draws others"
    assert len({tuple(experts) for experts in alone[0]}) == LAYERS, "and so does another layer"
    assert torch.equal(torch.get_rng_state(), before), "torch's own generator is left alone"
