"""Views: which of them rows run on, and the bytes that these read; and what is held in memory while texts are made.

Prompt after prompt, nothing is left behind, nor after an error; and a prompt's memory goes when its text begins.
Nothing here collects garbage: what is no longer used must go at once, since on a GPU it may be gigabytes.
"""

from __future__ import annotations

import copy
import gc
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any
from weakref import ref

import pytest
import torch
from engines import begun, generated, prefilled, scored, verified
from families import LAYERS, REFRESHED, SMALL, VOCABULARY, build, fresh, prompt, tiny, tokens
from running import difference, failing, text, unchanged
from torch import Tensor, nn

import griffin
from griffin import Engine, Experts, Generation, Method, Row, begin, decode, refuse_uncroppable, traffic, view_of
from griffin.projection import CompactProjection

pytestmark = pytest.mark.usefixtures("no_collector")
IDS = prompt(5, 3)


def experts(engine: Engine, method: Method, seed: int = 0) -> Experts:
    return begun(engine, tokens(11, seed), method).experts


def test_a_view_shares_every_tensor_and_has_modules_and_hooks_of_its_own() -> None:
    model = fresh("llama")
    model.get_decoder().register_forward_pre_hook(lambda *_: None)
    with unchanged(model):
        view: Any = view_of(model, [model.get_output_embeddings()])
        for kind in ("parameters", "buffers"):
            assert [*map(id, getattr(view, kind)())] == [*map(id, getattr(model, kind)())]
        assert {*view.modules()} & {*model.modules()} == {model.get_output_embeddings()}, "as it was asked to"
        assert view.config is model.config
        assert torch.equal(view(IDS).logits, model(IDS).logits)
        assert view.get_decoder()._forward_pre_hooks
        view.get_decoder()._forward_pre_hooks.clear()


def test_a_layer_that_keeps_all_has_the_models_own_weights_and_widths_may_differ() -> None:
    engine = Engine(tiny("llama"))
    engine.compact().load(experts(engine, Method(sparsity=(0.0, 0.5, 0.0))))
    pairs = zip(griffin.find_feedforward_blocks(engine.compact().module), engine.blocks, strict=False)
    assert [ours.output.weight is theirs.output.weight for ours, theirs in pairs] == [True, False, True]
    model = fresh("llama")
    narrow = copy.deepcopy(model.config)
    narrow.intermediate_size = 48
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(narrow)
    engine = Engine(model)
    for method in (Method(), Method(compensation="ridge"), Method(compensation="ridge", refresh="compensation")):
        assert [len(neurons_K) for neurons_K in experts(engine, method).neurons] == [40, 24, 40]
        modes = [Engine(model, mode=mode) for mode in griffin.MODES]
        assert difference(*(scored(one, begun(one, tokens(9), method), tokens(20, 1)) for one in modes)) < 2e-5


def test_experts_that_were_gathered_half_way_are_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, load, calls = Engine(tiny("llama")), CompactProjection.load, count(1)
    first, second = (experts(engine, Method(), seed) for seed in range(2))
    view = engine.compact()
    view.load(first)
    expected = view.module(IDS).logits

    def failing(*args: Any) -> None:
        if next(calls) == 5:  # in the second of three blocks
            raise torch.OutOfMemoryError("out of memory")
        load(*args)

    monkeypatch.setattr(CompactProjection, "load", failing)
    with pytest.raises(torch.OutOfMemoryError):
        view.load(second)
    monkeypatch.undo()
    view.load(first)
    assert torch.equal(view.module(IDS).logits, expected)


def test_rows_that_share_experts_run_compact_and_others_masked() -> None:
    engine, masked = Engine(tiny("llama")), Engine(tiny("llama"), mode="masked")
    one, other = (experts(engine, Method(), seed) for seed in range(2))
    rows = ([one], [one, one], [one, other], [None, one], [None], [other], [None, None], [one, None], [one])
    names = ["compact", "compact", "masked", "masked", "dense", "compact", "dense", "masked", "compact"]
    for members, name in zip(rows, names, strict=True):
        for owner, expected in ((engine, name), (masked, name.replace("compact", "masked"))):
            view = {"compact": owner.compact(), "masked": owner.masked(), "dense": owner.dense}[expected]
            assert owner.view(members) is view
    with pytest.raises(ValueError, match="mode='fast': expected one of auto, compact, masked"):
        Engine(tiny("llama"), mode="fast")


def test_a_model_that_only_runs_dense_may_have_any_blocks_but_must_be_croppable() -> None:
    model = build("mixtral", **SMALL, num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(griffin.UnsupportedModelError, match="mixture of experts"):
        Engine(model)
    engine = Engine(model, pruning=False)
    ((said, found),) = generated(engine, [begun(engine, tokens(5), Method(sparsity=0.0))], 4).values()
    assert difference(found, model(torch.tensor([[*tokens(5), *said[:-1]]])).logits[0, 4:]) < 1e-5
    refuse_uncroppable(tiny("gemma3_text"))
    with pytest.raises(griffin.UnsupportedModelError, match="Linear is not a transformers language model"):
        refuse_uncroppable(nn.Linear(1, 1))


def test_the_decoding_cache_is_the_same_where_it_is_large_enough_and_goes_with_unloading() -> None:
    engine = Engine(tiny("llama"))
    first = engine.decoding_cache(2, 20)
    assert engine.decoding_cache(1, 9) is engine.decoding_cache(2, 20) is first
    assert engine.decoding_cache(3, 20) is not first
    assert engine.decoding_cache(1, 21).columns == 21
    first = engine.decoding_cache(2, 20, static=True)
    assert first.static
    assert engine.decoding_cache(2, 9, static=True) is first
    assert engine.decoding_cache(1, 9, static=True) is not first, "a compiled graph is for so many rows"
    generated(engine, [begun(engine, tokens(9), Method(), label) for label in range(2)], 3, most=2)
    scored(engine, begun(engine, tokens(9), Method()), tokens(3))
    watched = [ref(engine.dense), ref(engine.compact()), ref(engine.masked()), ref(engine.decoding_cache(1, 2))]
    engine.unload()
    assert all(one() is None for one in watched)
    assert len(generated(engine, [begun(engine, tokens(9), Method())], 3)) == 1


V, H, D = VOCABULARY, 32, 80
ATTENTION = 2 * H * H + 2 * (H // 2) * H  # queries and output; keys and values of half as many heads
REST = LAYERS * (ATTENTION + 2 * H) + H


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_counted_by_hand(tied: bool, dtype: torch.dtype) -> None:
    """One embedding is read either way: the output's, which may be the input's too. A draft reads rows of it."""
    found = traffic(build("llama", **SMALL, tie_word_embeddings=tied).to(dtype), [40, 80, 1])
    pruned = REST + (40 + 80 + 1) * 3 * H
    assert found.dense == dtype.itemsize * (REST + V * H + LAYERS * 3 * D * H)
    assert found.pruned == found.draft(None) == found.draft(V) == dtype.itemsize * (pruned + V * H)
    assert found.draft(10) == dtype.itemsize * (pruned + 10 * H)
    assert (found.output_row, found.vocabulary) == (dtype.itemsize * H, V)


@pytest.mark.parametrize(("family", "matrices"), [("llama", 3), ("phi3", 3), ("opt", 2), ("gpt2", 2)])
def test_a_neuron_is_a_row_of_each_matrix_and_saves_those_behind_its_score(family: str, matrices: int) -> None:
    model, kept = tiny(family), [griffin.kept_neurons(D, 0.6)] * LAYERS
    assert griffin.neuron_bytes(griffin.find_feedforward_blocks(model)) == [4 * matrices * H] * LAYERS
    whole, pruned = traffic(model, [D] * LAYERS), traffic(model, kept)
    assert whole.pruned == whole.dense == pruned.dense
    for name, one in griffin.TOKEN_STATISTICS.items():
        saved = (pruned.dense - traffic(model, kept, one).pruned) / (pruned.dense - pruned.pruned)
        expected = 2 / 3 if name == "cats" and matrices == 3 else 1 / matrices
        assert saved == pytest.approx(expected, rel=0.02)


METHODS = [
    *(Method(), Method(compensation="ridge"), Method("joint", **REFRESHED)),
    verified(("ridge", "compensation"), draft_tokens=4),
    verified(("ridge", "compensation"), draft_tokens=4, draft_vocabulary="full"),
]
LIMIT = 10  # one refresh


def held() -> tuple[int, int]:
    """How many tensors there are, and how many bytes their storages have."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return len(tensors), sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_nothing_grows_with_the_number_of_prompts(compiler: Any) -> None:
    engine, found = Engine(tiny("llama"), compiler=compiler), []
    for number in range(12):
        state = prefilled(engine, tokens(9, number), *METHODS)
        rows = [begin(engine, [state], method, labels=[method])[0] for method in METHODS]
        generated(engine, rows, LIMIT, most=1 + number % 2)
        shared = begin(engine, [state, prefilled(engine, tokens(12, 1), *METHODS)], METHODS[2], labels=[0, 1])
        generated(engine, shared, LIMIT, most=2)
        scored(engine, begun(engine, tokens(9, number), METHODS[2]), tokens(LIMIT))
        del state, rows, shared
        found += [held()] if number in (3, 11) else []
    assert found[0] == found[1]


# Three layers; a prompt of 600 tokens. Its keys and values, and what ridge compensation records of it, in bytes:
CACHE, RECORDED = 3 * 2 * 600 * 16 * 4, 3 * 300 * (80 + 32) * 4


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
@pytest.mark.parametrize("way", ["engine", "prune"])
def test_while_a_text_is_generated_its_prompts_statistics_and_cache_are_gone(way: str, method: Method) -> None:
    """But for statistics that are to be refreshed, what a fit knows, and the one cache that is decoded from. A prompt
    runs when there is room for it."""
    model, steps, peaks, before, engine = tiny("mistral"), Counter[int](), [], held()[1], Engine(tiny("mistral"))

    def look(*arguments: Any) -> Any:
        steps[number] += 1
        if steps[number] == 5 and number in (1, 5, 9):
            peaks.append(held()[1] - before)
        return arguments[-1]

    def coming() -> Iterator[Row]:
        nonlocal number
        for number in range(10):
            yield begun(engine, tokens(600, number), method)

    number = 0
    if way == "engine":
        deque(decode(engine, coming(), Generation(LIMIT, process_logits=look), max_prompt_tokens=600), 0)
    else:
        with griffin.prune(model, method):
            for number in range(10):
                text(model, prompt(600, number), max_new_tokens=LIMIT, logits_processor=[look])
    learns = method.refresh != "none" and method.compensation == "ridge"
    corrections = 3 * 40 * (40 + 32) * 4 if method.compensation == "ridge" and not method.verified else 0
    least = CACHE + 3 * 3 * 40 * 32 * 4 + (3 * 40 * 40 * 4 if learns else 0) + corrections
    assert CACHE < min(peaks) <= max(peaks) < least + min(CACHE, RECORDED) // 2
    assert max(peaks) - min(peaks) < 3000, "and nothing grows"


@pytest.mark.parametrize("call", [1, 2, 4, 10, 11])  # one row after the other: a step, a refresh, the second prompt
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.label)
def test_an_error_frees_everything_at_once(method: Method, most: int, call: int) -> None:
    model, caches, before = tiny("llama"), [], held()

    def rows(engine: Engine) -> Iterator[Row]:
        for label in range(2):
            row = begun(engine, tokens(9, label), method, label)
            caches.extend([ref(row), ref(row.state), ref(row.state.cache)])
            yield row

    engine = Engine(model)
    with failing(model, call), suppress(torch.OutOfMemoryError):
        deque(decode(engine, rows(engine), Generation(LIMIT), batch_size=most), 0)
        pytest.fail("it ran")
    caches.append(ref(engine))
    del engine, rows
    assert not [one for one in caches if one() is not None]
    assert held() == before
