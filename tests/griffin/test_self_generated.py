"""What a model writes by itself, and the statistic that weighs prompts against it."""

from __future__ import annotations

import pytest
import torch
from engines import plain_logits, prefilled, tokens
from families import LAYERS, fresh, tiny
from running import difference
from torch import Tensor

import griffin
from griffin import Engine, Method, choose, prepare, self_generated
from griffin.self_generated import TEXTS, TOKENS, sample

GLASS = Method("glass")


@pytest.fixture(scope="module")
def texts() -> Tensor:
    return sample(Engine(tiny("llama")))


def test_texts_are_the_same_for_the_same_seed(texts: Tensor) -> None:
    assert texts.shape == (TEXTS, 1 + TOKENS)
    assert texts[:, 0].tolist() == [1] * TEXTS
    torch.manual_seed(5)
    assert torch.equal(sample(Engine(tiny("llama"))), texts), "the generator of others plays no part"
    assert not torch.equal(sample(Engine(tiny("llama")), seed=1), texts)
    assert len({tuple(text) for text in texts.tolist()}) == TEXTS


def test_tokens_are_drawn_from_the_whole_distribution(texts: Tensor) -> None:
    """The first token's frequencies are the plain model's."""
    torch.manual_seed(0)
    logits_V = plain_logits(tiny("llama"), [1])[0][-1]
    numbers = torch.Generator().manual_seed(0)
    expected = torch.multinomial(logits_V.softmax(dim=-1).expand(TEXTS, -1), 1, generator=numbers)
    assert torch.equal(texts[:, 1:2], expected)


def test_what_is_recorded_is_that_of_the_texts_without_their_first_token(texts: Tensor) -> None:
    engine = Engine(tiny("llama"))
    prepare(engine, [GLASS])
    (statistic,) = engine.self_generated
    summed = [torch.zeros(80, dtype=torch.float64) for _ in range(LAYERS)]
    for text in texts.tolist():
        with griffin.record_activations(engine.model, lambda layer, z_SD: z_SD.double()) as seen:
            plain_logits(engine.model, text)
        for layer, ((z_SD,), total_D) in enumerate(zip(seen, summed, strict=True)):
            assert z_SD.shape == (1 + TOKENS, 80), layer
            total_D += (z_SD[1:] / z_SD[1:].norm(dim=1, keepdim=True)).square().sum(dim=0)
    for found, expected in zip(engine.self_generated[statistic], summed, strict=True):
        assert found.shape == (1, 80)
        assert difference(found[0], expected) < 1e-5


def test_glass_adds_the_ranks_of_both() -> None:
    engine = Engine(tiny("llama"))
    prepare(engine, [GLASS])
    state = prefilled(engine, tokens(9), GLASS)
    experts = choose(engine, [state], GLASS)
    assert experts is not None
    (statistic,) = engine.self_generated
    for layer, neurons_K in enumerate(experts.neurons):
        both = state.recorded.totals[statistic][layer][0], engine.self_generated[statistic][layer][0]
        ranks = [{neuron: rank for rank, neuron in enumerate(total.argsort().tolist())} for total in both]
        sums = {neuron: ranks[0][neuron] + ranks[1][neuron] for neuron in range(80)}
        worst_kept = min(sums[neuron] for neuron in neurons_K.tolist())
        assert all(sums[neuron] <= worst_kept for neuron in {*range(80)} - {*neurons_K.tolist()})


def test_a_model_writes_once_and_where_it_is_asked_only(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    plain = self_generated.sample

    def watched(engine: Engine) -> Tensor:
        written.append(engine)
        return plain(engine)

    monkeypatch.setattr(self_generated, "sample", watched)
    model = fresh("opt")
    prepare(Engine(model), [Method(), Method("oracle"), Method("glass", sparsity=0.0)])
    assert not written
    engines = [Engine(model), Engine(model)]
    for engine in engines:
        prepare(engine, [GLASS, Method("glass", sparsity=0.75)])
    assert len(written) == 1
    (one,), (other,) = (engine.self_generated.values() for engine in engines)
    assert one is other
    with griffin.prune(model, statistic="glass"):
        pass
    assert len(written) == 1


def test_it_needs_a_token_to_begin_from() -> None:
    model = fresh("llama")
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="names no bos_token_id"):
        prepare(Engine(model), [GLASS])
