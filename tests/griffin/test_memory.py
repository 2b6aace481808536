"""Prompt after prompt, buffers stay where they are and nothing is left behind; and an error leaves nothing behind.

Nothing here collects garbage: what is no longer used must go at once, since on a GPU it may be gigabytes.
"""

from __future__ import annotations

import gc
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from engines import begun, generated, never, prefilled, tokens
from families import LAYERS, fresh, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

import griffin
from griffin import Engine, Generation, Method, begin, decode, greedy, prefill, score, wanted

METHODS = [
    Method(),
    Method(compensation="mean"),
    Method(compensation="ridge"),
    Method(refresh="experts", compensation="mean"),
    Method(refresh="compensation", compensation="ridge"),
]
LIMIT = 10  # one refresh
PROMPTS = 20
WATCHED = (3, PROMPTS - 1)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only reference counting frees memory."""
    gc.disable()
    yield
    gc.enable()


class OutOfMemoryError(RuntimeError):
    """What a device raises that has run out of memory."""


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def held() -> tuple[int, int]:
    """How many tensors there are, and how many bytes their storages have."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return len(tensors), sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# -- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compensation", ["none", "mean"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without and with biases of its own
def test_compact_weights_and_the_kv_cache_keep_their_addresses(family: str, compensation: str) -> None:
    model = fresh(family)
    engine, method = Engine(model), Method(compensation=compensation)
    projections = [module for block in engine.blocks for module in (*block.inputs, block.output)]
    dense = {weight.data_ptr() for weight in model.parameters()}
    found: list[list[int]] = []

    def look(*_: Any) -> None:
        assert engine._caches.get(False) is not None
        own = [weight.data_ptr() for module in projections for weight in module.parameters()]
        caches = [
            buffer.data_ptr() for layer in engine._caches.get(False).layers for buffer in (layer.keys, layer.values)
        ]
        found.append([*own, *caches])

    for length in (9, 12, 5, 7):
        row = begun(engine, tokens(length), method)
        handle = model.register_forward_pre_hook(look)
        generated(engine, [row], 1, 3)
        handle.remove()
    assert len(found) == 8
    assert all(one == found[0] for one in found)
    biases = sum(isinstance(module.bias, nn.Parameter) for module in projections)
    dense_biases = 0 if compensation == "mean" else sum(block.output.bias is not None for block in engine.blocks)
    assert len([place for place in found[0] if place in dense]) == dense_biases, "all else is in buffers"
    assert compensation == "none" or biases or family == "llama"


def test_a_larger_prompt_or_batch_moves_the_kv_cache_once() -> None:
    engine, moved = Engine(tiny("llama")), []
    for rows, longest in ((1, 9), (1, 12), (2, 12), (1, 5), (2, 9)):
        before = engine._caches.get(False)
        states = prefill(engine, [tokens(longest, seed) for seed in range(rows)], wanted([Method()]))
        members = [begin(engine, [state], Method(), labels=[label])[0] for label, state in enumerate(states)]
        generated(engine, members, rows, 3, most=rows, longest=longest)
        moved.append(engine._caches.get(False) is not before)
    assert moved == [True, True, True, False, False]


# -- growth -----------------------------------------------------------------------------------------------------------


def test_nothing_grows_with_the_number_of_prompts(no_collector: None) -> None:
    engine, found = Engine(tiny("llama")), []
    for number in range(PROMPTS):
        state = prefilled(engine, tokens(9, number), *METHODS)
        rows = [begin(engine, [state], method, labels=[method])[0] for method in METHODS]
        generated(engine, rows, len(rows), LIMIT, most=1 + number % 2)
        shared = begin(engine, [state, prefilled(engine, tokens(12, 1), *METHODS)], METHODS[3], labels=[0, 1])
        generated(engine, shared, 2, LIMIT, most=2)
        list(score(engine, [(begun(engine, tokens(9, number), METHODS[4]), tokens(LIMIT))], 1))
        del state, rows, shared
        found += [held()] if number in WATCHED else []
    assert found[0] == found[1]


@pytest.mark.parametrize("offload", [False, True])
@torch.no_grad()
def test_nor_in_the_pruner(no_collector: None, offload: bool) -> None:
    model, found = tiny("llama"), []
    with griffin.prune(model, compensation="ridge", offload_dense=offload):
        for number in range(PROMPTS):
            cache = model(torch.tensor([tokens(9, number)]), use_cache=True).past_key_values
            model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
            del cache
            found += [held()] if number in WATCHED else []
    assert found[0] == found[1]


def test_a_prompt_is_forgotten_with_its_last_row(no_collector: None) -> None:
    engine = Engine(tiny("llama"))
    for method in METHODS:
        states = [prefilled(engine, tokens(9, seed), method) for seed in range(2)]
        rows = begin(engine, states, method, labels=[0, 1])
        watched = [ref(thing) for state in states for thing in (state, state.cache, state.logits_TV)]
        watched += [ref(total) for state in states for layers in state.recorded.totals.values() for total in layers]
        watched += [ref(row) for row in rows]
        del states, rows
        assert not [one for one in watched if one() is not None]


# -- errors -----------------------------------------------------------------------------------------------------------


def failing(model: PreTrainedModel, call: int) -> Any:
    """A block in the middle of the model raises in one of the coming forward calls."""
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise OutOfMemoryError("out of memory")

    return griffin.find_feedforward_blocks(model)[1].output.register_forward_hook(fail)


# Compact, one row after the other: 2 is a step, 10 a refresh, 11 the second prompt. Masked, two rows together: 2 is the
# second prompt, 10 a step, 11 the first row's refresh.
@pytest.mark.parametrize("call", [2, 10, 11])
@pytest.mark.parametrize(
    ("method", "most"),
    [(METHODS[1], 2), *itertools.product(METHODS[3:], (1, 2))],
    ids=lambda value: {1: "compact", 2: "masked"}[value] if isinstance(value, int) else value.family,
)
def test_an_error_frees_everything_at_once(no_collector: None, method: Method, most: int, call: int) -> None:
    model = tiny("llama")
    before, dense = held(), weights(model)
    engine = Engine(model)
    caches: list[Any] = []

    def rows(engine: Engine) -> Iterator[griffin.Row]:
        for label in range(2):
            row = begun(engine, tokens(9, label), method, label)
            caches.extend([ref(row), ref(row.state), ref(row.state.cache)])
            yield row

    handle = failing(model, call)
    failed = False
    try:
        deque(decode(engine, rows(engine), 2, most, 9, Generation(LIMIT, greedy, never)), maxlen=0)
    except OutOfMemoryError:
        failed = True
    handle.remove()
    assert failed
    assert hooks(model) == 0
    assert all(weight is dense[name] for name, weight in model.named_parameters())
    caches += [ref(engine), ref(engine._caches.get(False))] if engine._caches.get(False) is not None else [ref(engine)]
    del engine, rows, dense, handle
    assert not [one for one in caches if one() is not None]
    assert held() == before


def test_an_error_in_prefill_or_scoring_leaves_the_model_dense(no_collector: None) -> None:
    model, method = tiny("llama"), METHODS[4]
    dense, engine = weights(model), Engine(model)
    expected = prefilled(engine, tokens(9), method).logits_TV
    for call in (1, 2, 3, 4):
        handle = failing(model, call)
        with pytest.raises(OutOfMemoryError):
            list(score(engine, [(begun(engine, tokens(9), method), tokens(LIMIT))], 1))
        handle.remove()
        assert hooks(model) == 0
        assert all(weight is dense[name] for name, weight in model.named_parameters())
        assert torch.equal(prefilled(engine, tokens(9), method).logits_TV, expected)


def test_a_decoding_that_is_given_up_leaves_the_model_dense(no_collector: None) -> None:
    model = tiny("llama")
    dense, engine = weights(model), Engine(model)
    rows = [begun(engine, tokens(9, label), METHODS[2], label) for label in range(2)]
    texts = decode(engine, rows, 2, 2, 9, Generation(LIMIT, greedy, lambda row: row.label == 0 and len(row.tokens) > 3))
    assert next(texts).label == 0
    assert hooks(model) == 2 * LAYERS, "the other one is still at work"
    del texts
    assert hooks(model) == 0
    assert all(weight is dense[name] for name, weight in model.named_parameters())
