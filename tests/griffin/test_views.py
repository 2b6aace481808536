"""Views: the compact one computes what the masked one does; the engine has rows run on one of them; and their bytes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import count
from typing import Any
from weakref import ref

import pytest
import torch
from engines import begun, chosen, generated, prefilled, scored
from families import LAYERS, SMALL, VOCABULARY, build, fresh, prompt, tiny, tokens
from running import TOLERANCE, difference, unchanged
from torch import Tensor, nn

import griffin
from griffin import Correction, Engine, Experts, Method, refuse_uncroppable, traffic, view_of
from griffin.projection import CompactProjection

pytestmark = pytest.mark.usefixtures("no_gradients")
IDS = prompt(5, 3)


def experts(engine: Engine, method: Method, seed: int = 0) -> Experts:
    return chosen(engine, prefilled(engine, tokens(11, seed), method), method)


def logits(engine: Engine, mode: str, rows: Sequence[Experts | None]) -> Tensor:
    """Of rows of the same ids, each with its own experts."""
    view = engine.compact() if mode == "compact" else engine.masked()
    view.load(rows[0] if mode == "compact" else rows)
    found: Tensor = view.module(IDS.expand(len(rows), -1)).logits
    return found


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


def learned(one: Experts, seed: int) -> Experts:
    """Experts with further corrections."""
    torch.manual_seed(seed)
    parts = [[torch.randn(4, size) / 30 for size in (len(neurons_K), 32)] for neurons_K in one.neurons]
    return one.corrected({layer: Correction(*mine) for layer, mine in enumerate(parts)})


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])  # with biases of its own, and without
def test_corrections_fold_in_one_by_one_as_all_at_once_and_not_where_others_have_been(family: str) -> None:
    engine = Engine(tiny(family))
    first = experts(engine, Method(compensation="ridge"))
    one, other = learned(first, 1), learned(first, 2)
    steps = [first, one, learned(one, 3), other, first, learned(other, 4)]
    found = [logits(engine, "compact", [step]) for step in steps]
    for step, increments in zip(steps, found, strict=True):
        assert difference(increments, logits(Engine(engine.model), "compact", [step])) < TOLERANCE
        assert difference(increments, logits(engine, "masked", [step])) < TOLERANCE
    assert all(difference(*pair) > 1e-4 for pair in zip(found[1:], found, strict=False)), "each teaches something"
    plain = experts(engine, Method())
    assert torch.equal(logits(engine, "compact", [plain]), logits(Engine(engine.model), "compact", [plain]))


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
        one = experts(engine, method)
        assert [len(neurons_K) for neurons_K in one.neurons] == [40, 24, 40]
        assert difference(*(logits(engine, mode, [one]) for mode in griffin.MODES)) < TOLERANCE
        modes = [Engine(model, mode=mode) for mode in griffin.MODES]
        assert difference(*(scored(one, begun(one, tokens(9), method), tokens(20, 1)) for one in modes)) < 2e-5


def test_experts_that_were_gathered_half_way_are_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, load, calls = Engine(tiny("llama")), CompactProjection.load, count(1)
    first, second = (experts(engine, Method(), seed) for seed in range(2))
    expected = logits(engine, "compact", [first])

    def failing(*args: Any) -> None:
        if next(calls) == 5:  # in the second of three blocks
            raise torch.OutOfMemoryError("out of memory")
        load(*args)

    with unchanged(engine.model):
        monkeypatch.setattr(CompactProjection, "load", failing)
        with pytest.raises(torch.OutOfMemoryError):
            logits(engine, "compact", [second])
        monkeypatch.undo()
        assert torch.equal(logits(engine, "compact", [first]), expected)


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
    ((text, found),) = generated(engine, [begun(engine, tokens(5), Method(sparsity=0.0))], 4).values()
    assert difference(found, model(torch.tensor([[*tokens(5), *text[:-1]]])).logits[0, 4:]) < 1e-5
    refuse_uncroppable(tiny("gemma3_text"))
    with pytest.raises(griffin.UnsupportedModelError, match="Linear is not a transformers language model"):
        refuse_uncroppable(nn.Linear(1, 1))


def test_the_decoding_cache_is_the_same_where_it_is_large_enough_and_goes_with_unloading(no_collector: None) -> None:
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
