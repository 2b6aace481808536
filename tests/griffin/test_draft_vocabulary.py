"""The draft's vocabulary: which tokens it has, and that the output embedding is left as it was."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ref

import pytest
import torch
from engines import prefilled, tokens
from families import VOCABULARY, build, tiny
from running import difference
from torch import Tensor, nn

import griffin
from griffin import Engine, Method, UnsupportedModelError, draft_vocabulary
from griffin.draft_vocabulary import DraftVocabulary, find_likely, output_embedding

METHOD = Method(verification="exact")


def numbers(likely: Tensor | None) -> set[int]:
    assert likely is not None
    return set(likely.tolist())


def head(*, bias: bool = False, vocabulary: int = VOCABULARY) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, vocabulary, bias=bias)


# -- an output embedding that has fewer rows for a while --------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chosen", [[5], [0, 96], [7, 3, 3, 50], list(range(VOCABULARY))])
def test_logits_are_the_dense_ones_of_its_tokens(chosen: list[int], bias: bool) -> None:
    layer, inputs = head(bias=bias), torch.randn(2, 3, 8)
    dense = layer(inputs)
    vocabulary = DraftVocabulary(layer)
    vocabulary.begin(torch.tensor(chosen))
    assert vocabulary.tokens_N.tolist() == sorted(set(chosen))
    assert torch.equal(layer(inputs), dense), "not before it is on"
    vocabulary.on()
    found = layer(inputs)
    assert found.shape == (2, 3, len(set(chosen)))
    assert difference(found, dense[..., vocabulary.tokens_N]) < 1e-6
    vocabulary.off()
    assert torch.equal(layer(inputs), dense)


@torch.no_grad()
def test_tokens_join_while_it_is_on_or_off_and_beginning_forgets_them() -> None:
    layer, inputs = head(), torch.randn(1, 8)
    dense, vocabulary = layer(inputs), DraftVocabulary(layer)
    vocabulary.begin(torch.tensor([9, 4]))
    vocabulary.on()
    vocabulary.add(torch.tensor([4, 6]))
    vocabulary.on()
    assert difference(layer(inputs), dense[:, [4, 6, 9]]) < 1e-6
    vocabulary.off()
    vocabulary.add(torch.tensor([0]))
    vocabulary.begin(torch.tensor([1, 2, 3, 5]))  # as many as before
    vocabulary.on()
    assert vocabulary.tokens_N.tolist() == [1, 2, 3, 5]
    assert difference(layer(inputs), dense[:, [1, 2, 3, 5]]) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma", "phi"])  # untied, tied, with a bias
def test_leaving_restores_the_same_parameters(family: str) -> None:
    model = tiny(family)
    before = {name: (weight, weight.clone()) for name, weight in model.named_parameters()}
    engine = Engine(model)
    engine.vocabulary.begin(torch.tensor([3, 8]))
    engine.vocabulary.on()
    layer = output_embedding(model)
    assert layer.weight.shape[0] == 2
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    engine.use_dense()
    assert {name for name, _ in model.named_parameters()} == set(before)
    for name, weight in model.named_parameters():
        assert weight is before[name][0]
        assert torch.equal(weight, before[name][1])


def test_its_memory_goes_when_the_engine_unloads() -> None:
    gc.disable()
    try:
        engine = Engine(tiny("llama"))
        engine.vocabulary.begin(torch.arange(5))
        engine.vocabulary.on()
        memory = ref(engine.vocabulary)
        engine.unload()
        assert memory() is None
        assert output_embedding(engine.model).weight.shape[0] == VOCABULARY
    finally:
        gc.enable()


def test_an_output_embedding_that_is_not_linear_is_refused() -> None:
    model = build("gpt2", n_embd=16, n_inner=32, n_layer=1, n_head=2, n_positions=64, vocab_size=VOCABULARY)
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UnsupportedModelError, match="expected draft_vocabulary=full"):
        Engine(model).vocabulary  # noqa: B018


# -- what is likely ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("positions", [1, 2, 31, 32, 33, 127, 128, 129, 256, 300])
def test_the_best_tokens_of_every_sampled_position_are_likely(positions: int) -> None:
    layer, hidden = head(vocabulary=1000), torch.randn(positions, 8)
    stride = next(stride for stride in range(1, positions + 1) if len(range(0, positions, stride)) <= 128)
    best = layer(hidden[::stride]).argsort(dim=-1, descending=True)[:, :32]
    found = find_likely(layer, hidden)
    assert set(found.tolist()) == set(best.flatten().tolist())
    assert len(found) == len(best) * 32


@torch.no_grad()
def test_of_no_position_nothing_is_likely_and_of_a_small_vocabulary_all() -> None:
    assert find_likely(head(), torch.randn(0, 8)).tolist() == []
    assert sorted(find_likely(head(vocabulary=3), torch.randn(1, 8)).tolist()) == [0, 1, 2]
    assert find_likely(head(vocabulary=1), torch.randn(2, 8)).tolist() == [0, 0]


@pytest.mark.parametrize("length", [1, 2, 40])
@pytest.mark.parametrize("family", ["llama", "gemma2", "opt_350m", "cohere", "granite", "phi"])
def test_a_prompt_makes_its_own_tokens_and_the_dense_models_best_likely(
    family: str, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where logits are capped or scaled after the embedding, or hidden states projected before it."""
    monkeypatch.setattr(draft_vocabulary, "BEST", 1)
    model, ids = tiny(family), tokens(length)
    state = prefilled(Engine(model), ids, METHOD, likely_tokens=True)
    with torch.no_grad():
        best = model(torch.tensor([ids])).logits[0].argmax(dim=-1).tolist()
    assert numbers(state.likely) == {*ids, *best}


def test_nothing_is_collected_unless_it_is_asked_for() -> None:
    assert prefilled(Engine(tiny("llama")), tokens(5), METHOD).likely is None


def test_what_follows_a_prompt_and_padding_make_nothing_likely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_vocabulary, "BEST", 1)
    engine, long, short = Engine(tiny("llama")), tokens(9), tokens(4, 1)
    states = griffin.prefill(engine, [long, short], [], prompt_lengths=[6, 3], likely_tokens=True)
    for state, ids in zip(states, (long[:6], short[:3]), strict=True):
        assert numbers(state.likely) == numbers(prefilled(engine, ids, likely_tokens=True).likely)


@pytest.mark.parametrize("begin", [4, 8])
def test_a_prefix_s_likely_tokens_join(begin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_vocabulary, "BEST", 1)
    engine, ids = Engine(tiny("llama")), tokens(9)
    prefix = prefilled(engine, ids[:begin], likely_tokens=True)
    found = prefilled(engine, ids, prefix=prefix, likely_tokens=True)
    whole = prefilled(engine, ids, likely_tokens=True)
    assert numbers(found.likely) == numbers(whole.likely)
    assert numbers(prefix.likely) < numbers(whole.likely)


def test_a_prefix_that_is_the_whole_prompt_gives_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs behind it is a continuation."""
    monkeypatch.setattr(draft_vocabulary, "BEST", 1)
    engine, ids = Engine(tiny("llama")), tokens(9)
    prefix = prefilled(engine, ids[:6], likely_tokens=True)
    found = prefilled(engine, ids, prefix=prefix, prompt_lengths=[6], likely_tokens=True)
    assert numbers(found.likely) == numbers(prefix.likely)


def test_a_prefix_without_likely_tokens_is_refused() -> None:
    engine, ids = Engine(tiny("llama")), tokens(9)
    prefix: Any = prefilled(engine, ids[:6])
    with pytest.raises(ValueError, match="without collecting likely tokens"):
        prefilled(engine, ids, prefix=prefix, likely_tokens=True)
    assert prefilled(engine, ids, prefix=prefix).likely is None


def test_looking_leaves_no_hooks() -> None:
    model = tiny("llama")
    engine = Engine(model)
    prefilled(engine, tokens(5), METHOD, likely_tokens=True)
    with pytest.raises(RuntimeError), engine.hidden_states(True):
        raise RuntimeError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
