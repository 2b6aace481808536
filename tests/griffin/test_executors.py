"""Executors: the compact one computes what the masked one does, and both leave the model as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from engines import TOLERANCE, prefilled, tokens
from families import LAYERS, ONE_PER_LAYOUT, fresh, tiny
from prompts import prompt
from running import difference
from torch import Tensor
from transformers import PreTrainedModel

from griffin import COMPENSATIONS, Correction, Engine, Experts, Method, choose
from griffin.executors import Compact, Masked
from griffin.feedforward import find_feedforward_blocks

IDS = prompt(5, 3)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def chosen(model: PreTrainedModel, method: Method, seed: int = 0) -> Experts:
    engine = Engine(model)
    experts = choose(engine, [prefilled(engine, tokens(11, seed), method)], method)
    assert experts is not None
    return experts


def logits(model: PreTrainedModel, executor: Compact | Masked, experts: Sequence[Experts | None]) -> Tensor:
    """Of rows of the same ids, each with its own experts."""
    executor.load(experts)
    executor.on()
    found: Tensor = model(IDS.expand(len(experts), -1)).logits
    executor.off()
    return found


def learned(model: PreTrainedModel, experts: Experts, seed: int) -> Experts:
    """The experts with corrections that have learned from some more tokens."""
    compensation = COMPENSATIONS["ridge"]
    assert compensation is not None
    assert compensation.learn is not None
    layers = []
    for block, neurons_K, before in zip(
        find_feedforward_blocks(model), experts.neurons, experts.corrections, strict=True
    ):
        rows_ND = torch.rand(4, block.width, generator=torch.Generator().manual_seed(seed)) / block.width**0.5
        layers.append((*before, compensation.learn(before, rows_ND, block, neurons_K)))
    return Experts(experts.neurons, tuple(layers))


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("family", [*ONE_PER_LAYOUT, "phi", "gemma3_text"])
def test_compact_is_masked(family: str, compensation: str) -> None:
    model = tiny(family)
    blocks = find_feedforward_blocks(model)
    for sparsity in (0.5, (0.0, 0.9, 0.3)):
        experts = chosen(model, Method(sparsity=sparsity, compensation=compensation))
        compact, masked = (logits(model, kind(blocks), [experts]) for kind in (Compact, Masked))
        assert difference(compact, masked) < TOLERANCE
        assert difference(compact, model(IDS).logits) > 1e-2


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_learned_corrections_fold_in_one_by_one_as_all_at_once(family: str) -> None:
    model = tiny(family)
    blocks = find_feedforward_blocks(model)
    steps = [chosen(model, Method(compensation="ridge"))]
    for seed in range(3):
        steps.append(learned(model, steps[-1], seed))
    one_by_one = Compact(blocks)
    found = [logits(model, one_by_one, [step]) for step in steps]
    for step, increments in zip(steps, found, strict=True):
        assert difference(increments, logits(model, Compact(blocks), [step])) < TOLERANCE
        assert difference(increments, logits(model, Masked(blocks), [step])) < TOLERANCE
    assert all(difference(*pair) > 1e-4 for pair in zip(found[1:], found, strict=False)), "each teaches something"


def test_corrections_are_not_folded_in_where_others_have_been() -> None:
    model = tiny("llama")
    blocks = find_feedforward_blocks(model)
    first = chosen(model, Method(compensation="ridge"))
    one, other = learned(model, first, 1), learned(model, first, 2)
    executor = Compact(blocks)
    for experts in (first, one, other, first):
        assert difference(logits(model, executor, [experts]), logits(model, Masked(blocks), [experts])) < TOLERANCE


def test_biases_are_corrected_on_top_of_each_other() -> None:
    for family in ("llama", "mistral"):  # with a bias of its own, and without
        model = tiny(family)
        blocks = find_feedforward_blocks(model)
        experts = chosen(model, Method())
        bias_H = torch.linspace(-1, 1, 32)
        for count in (1, 2, 0):
            corrected = Experts(experts.neurons, ((Correction(bias_H=bias_H),) * count,) * LAYERS)
            compact, masked = (logits(model, kind(blocks), [corrected]) for kind in (Compact, Masked))
            assert difference(compact, masked) < TOLERANCE
        assert difference(compact, logits(model, Compact(blocks), [experts])) == 0


@pytest.mark.parametrize("family", ["llama", "opt"])  # some OPT models flatten rows and positions
def test_every_masked_row_has_its_own_experts(family: str) -> None:
    model = tiny(family)
    blocks = find_feedforward_blocks(model)
    rows = [
        chosen(model, Method()),
        None,
        chosen(model, Method(sparsity=(0.0, 0.9, 0.3)), seed=1),
        chosen(model, Method("wanda", compensation="ridge")),
        chosen(model, Method(compensation="mean"), seed=2),
    ]
    found = logits(model, Masked(blocks), rows)
    for row, experts in enumerate(rows):
        alone = model(IDS).logits if experts is None else logits(model, Masked(blocks), [experts])
        assert difference(found[row], alone[0]) < TOLERANCE


@pytest.mark.parametrize("kind", [Compact, Masked])
def test_loading_while_it_is_on_takes_effect_at_once(kind: type[Compact] | type[Masked]) -> None:
    model = tiny("llama")
    blocks = find_feedforward_blocks(model)
    methods = [
        Method(),
        Method(sparsity=(0.0, 0.9, 0.3)),
        Method("wanda", sparsity=0.75, compensation="mean"),
        Method(),
    ]
    sets = [chosen(model, method, seed) for seed, method in enumerate(methods)]
    expected = [logits(model, kind(blocks), [experts]) for experts in sets]
    executor = kind(blocks)
    found = []
    for experts in sets:
        executor.load([experts])
        executor.on()
        found.append(model(IDS).logits)
    executor.unload()
    assert all(difference(*pair) < TOLERANCE for pair in zip(found, expected, strict=True))
    assert all(difference(*pair) > 1e-2 for pair in zip(expected[1:], expected, strict=False))


@pytest.mark.parametrize("kind", [Compact, Masked])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_off_the_model_is_what_it_was(family: str, kind: type[Compact] | type[Masked]) -> None:
    model = fresh(family)
    parameters = dict(model.named_parameters())
    values = {name: value.clone() for name, value in parameters.items()}
    attributes = [dict(vars(module)) for module in model.modules()]
    before = model(IDS).logits
    executor = kind(find_feedforward_blocks(model))
    experts = chosen(model, Method(compensation="mean"))
    for switch in (executor.off, executor.unload):
        executor.load([experts])
        executor.on()
        assert not torch.equal(model(IDS).logits, before)
        switch()
        assert torch.equal(model(IDS).logits, before)
        assert all(weight is parameters[name] for name, weight in model.named_parameters())
        assert all(torch.equal(weight, values[name]) for name, weight in model.named_parameters())
    for module, then in zip(model.modules(), attributes, strict=True):
        assert {**vars(module), "_parameters": 0} == {**then, "_parameters": 0}
    executor.off()  # once more does no harm


def test_a_layer_that_keeps_all_is_dense_to_the_bit() -> None:
    model = fresh("llama")
    executor = Compact(find_feedforward_blocks(model))
    executor.load([chosen(model, Method(sparsity=(0.0, 0.5, 0.0)))])
    executor.on()
    compact = [block.output.in_features != block.output.weight.shape[1] for block in executor._blocks]
    assert compact == [False, True, False]
    executor.off()


def test_blocks_of_different_widths() -> None:
    model = fresh("llama")
    narrow = copy.deepcopy(model.config)
    narrow.intermediate_size = 48
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(narrow)
    blocks = find_feedforward_blocks(model)
    for experts in (chosen(model, Method()), chosen(model, Method(compensation="ridge"))):
        assert [len(neurons_K) for neurons_K in experts.neurons] == [40, 24, 40]
        compact, masked = (logits(model, kind(blocks), [experts]) for kind in (Compact, Masked))
        assert difference(compact, masked) < TOLERANCE
