"""Leaving the context gives the model back as it was, whatever happened inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import reference
import torch
from families import FAMILIES, ONE_PER_LAYOUT, fresh, tiny
from prompts import prompt
from running import generate
from transformers import PreTrainedModel

import griffin
from griffin import Engine, Method
from griffin.executors import CompactProjection

# How experts are put to work.
WAYS = {"compact": {"mode": "compact"}, "masked": {"mode": "masked"}, "offloaded": {"offload_dense": True}}
# Every layout the usual way, and one of them in all ways.
WAYS_AND_FAMILIES = [
    *((WAYS["compact"], family) for family in ONE_PER_LAYOUT),
    *((way, "llama") for way in WAYS.values() if way != WAYS["compact"]),
]
HOOKS = ["_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"]


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model that pruning touches or might touch, objects by identity."""
    return {
        "parameters": [(name, id(parameter)) for name, parameter in model.named_parameters()],
        "storage": [(parameter.data_ptr(), parameter.requires_grad) for parameter in model.parameters()],
        "buffers": [(name, id(buffer)) for name, buffer in model.named_buffers()],
        "state_dict": list(model.state_dict()),
        "attributes": {name: list(vars(module)) for name, module in model.named_modules()},
        "hooks": {name: [list(getattr(module, key)) for key in HOOKS] for name, module in model.named_modules()},
        "nf": {name: getattr(module, "nf", None) for name, module in model.named_modules()},
        "generate": model.generate,
        "forward": model.forward,
    }


@contextmanager
def unchanged(model: PreTrainedModel) -> Iterator[None]:
    """The body leaves the model as it found it: the same objects, the same bits, the same logits."""
    before, ids = state(model), prompt(9, 8)
    bits = [parameter.detach().clone() for parameter in model.parameters()]
    dense = generate(model, ids, max_new_tokens=2)
    yield
    after = state(model)
    for key, value in before.items():
        assert after[key] == value, key
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), bits, strict=True))
    again = generate(model, ids, max_new_tokens=2)
    assert torch.equal(again.sequences, dense.sequences)
    assert all(torch.equal(*steps) for steps in zip(again.logits, dense.logits, strict=True))


@contextmanager
def failing(model: PreTrainedModel, family: str, call: int) -> Iterator[None]:
    """The output projection of the middle layer raises KeyError in its n-th forward call."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == call:
            raise KeyError

    handle = reference.output_projection(model, family, 1).register_forward_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_after_generation(family: str) -> None:
    model = tiny(family)
    with unchanged(model), griffin.prune(model):
        generate(model, prompt(11), max_new_tokens=2)


@pytest.mark.parametrize("options", [{"compensation": "mean"}, {"compensation": "ridge", "refresh": "compensation"}])
@pytest.mark.parametrize(("way", "family"), WAYS_AND_FAMILIES)
def test_after_compensated_generation(family: str, way: dict[str, Any], options: dict[str, str]) -> None:
    model = tiny(family)
    with unchanged(model), griffin.prune(model, **way, **options):
        generate(model, prompt(11), max_new_tokens=10)
        generate(model, prompt(7))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_without_a_prompt(way: dict[str, Any]) -> None:
    model = tiny("llama")
    with unchanged(model), griffin.prune(model, **way):
        pass


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_between_a_prompt_and_its_continuation(way: dict[str, Any]) -> None:
    model = tiny("llama")
    with unchanged(model), griffin.prune(model, **way) as pruner:
        generate(model, prompt(11))
        with pruner.prefill():
            model(prompt(7, 1))


@pytest.mark.parametrize("call", [1, 3], ids=["mid-prefill", "mid-generation"])
@pytest.mark.parametrize(("way", "family"), WAYS_AND_FAMILIES)
def test_after_an_exception(family: str, way: dict[str, Any], call: int) -> None:
    model = tiny(family)
    with (
        unchanged(model),
        failing(model, family, call),
        pytest.raises(KeyError),
        griffin.prune(model, **way),
    ):
        generate(model, prompt(11))


def fail_half_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gathering the experts' weights runs out of memory in the second of three blocks."""
    gather, gathered = CompactProjection.gather, []

    def failing(projection: CompactProjection, neurons_K: torch.Tensor) -> None:
        gathered.append(None)
        if len(gathered) == 5:
            raise torch.OutOfMemoryError("out of memory")
        gather(projection, neurons_K)

    monkeypatch.setattr(CompactProjection, "gather", failing)


@pytest.mark.parametrize("way", [WAYS["compact"], WAYS["offloaded"]], ids=["compact", "offloaded"])
def test_after_compaction_failed_half_way(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), prompt(11)
    with unchanged(model), griffin.prune(model, **way):
        expected = generate(model, ids).sequences
        fail_half_way(monkeypatch)
        with pytest.raises(torch.OutOfMemoryError):
            generate(model, prompt(7, 1))
        monkeypatch.undo()
        assert torch.equal(generate(model, ids).sequences, expected)


def test_experts_that_were_gathered_half_way_are_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, method, following = tiny("llama"), Method(), [5, 6, 7]
    engine = Engine(model, mode="compact")
    first, second = griffin.prefill(engine, [prompt(7, seed)[0].tolist() for seed in (0, 1)], griffin.wanted([method]))
    experts = griffin.choose(engine, [first], method)

    def scored(state: griffin.PromptState, experts: griffin.Experts | None) -> torch.Tensor:
        ((_, logits_CV),) = griffin.score(engine, [(griffin.Row([state], 0, method, experts), following)], 1)
        return logits_CV

    with unchanged(model):
        expected = scored(first, experts)
        fail_half_way(monkeypatch)
        with pytest.raises(torch.OutOfMemoryError):
            scored(second, griffin.choose(engine, [second], method))
        monkeypatch.undo()
        assert torch.equal(scored(first, experts), expected)


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_context_survives_an_exception_in_generate(way: dict[str, Any], call: int) -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model, **way):
        expected = generate(model, ids)
        with failing(model, "llama", call), pytest.raises(KeyError):
            generate(model, prompt(7, 1), prefill_chunk_size=5)
        found = generate(model, ids)
    assert all(torch.equal(*steps) for steps in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_pruning_works_again(way: dict[str, Any]) -> None:
    model, ids = tiny("llama"), prompt(11)
    pruner = griffin.prune(model, **way)
    outputs = []
    for context in (pruner, griffin.prune(model, **way), pruner):  # the same pruner can be entered again
        with context:
            outputs.append(generate(model, ids).sequences)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_generation_interrupted_by_leaving_the_context_is_never_dense(way: dict[str, Any]) -> None:
    model, ids, tokens = tiny("llama"), prompt(11), prompt(2, 1)
    pruner = griffin.prune(model, **way)
    with pruner:
        cache = model(ids).past_key_values
        model(tokens[:, :1], past_key_values=cache)
        expected = model(tokens[:, 1:], past_key_values=cache).logits
    with pruner:
        cache = model(ids).past_key_values
        model(tokens[:, :1], past_key_values=cache)
    try:
        with pruner:
            found = model(tokens[:, 1:], past_key_values=cache).logits
    except ValueError:
        return  # a pruner that forgets its prompt on leaving has to say so
    assert torch.equal(found, expected)


@pytest.mark.parametrize("again", [lambda model, pruner: griffin.prune(model), lambda model, pruner: pruner])
def test_nesting_is_refused_and_harmless(again: Callable[[PreTrainedModel, griffin.Pruner], griffin.Pruner]) -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model):
        expected = generate(model, ids).sequences
    with unchanged(model), griffin.prune(model) as outer:
        with pytest.raises(RuntimeError, match="pruned already"), again(model, outer):
            pass
        assert torch.equal(generate(model, ids).sequences, expected)


def test_two_models_are_pruned_at_once() -> None:
    first, second, ids = tiny("llama"), tiny("mistral"), prompt(11)
    with griffin.prune(first):
        expected = generate(first, ids).sequences
    with unchanged(first), unchanged(second), griffin.prune(first), griffin.prune(second):
        generate(second, ids)
        assert torch.equal(generate(first, ids).sequences, expected)


def test_a_generate_of_the_users_own_stays() -> None:
    model, ids = fresh("llama"), prompt(11)
    original, calls = model.generate, []

    def generate_and_count(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    model.generate = generate_and_count
    with griffin.prune(model):
        model.generate(ids, max_new_tokens=2)
    assert len(calls) == 1
    assert vars(model).get("generate") is generate_and_count


def test_hooks_of_the_users_own_stay() -> None:
    model, ids, seen = fresh("llama"), prompt(11), []
    model.register_forward_pre_hook(lambda *_: seen.append("model"))
    reference.output_projection(model, "llama", 1).register_forward_pre_hook(lambda *_: seen.append("projection"))
    with unchanged(model), griffin.prune(model):
        seen.clear()
        generate(model, ids, max_new_tokens=2)
        assert seen == ["model", "projection"] * 2
