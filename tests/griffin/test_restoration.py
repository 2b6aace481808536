"""Within and after the context: errors, nesting, copies and threads leave the model as it is outside."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import reference
import torch
from families import fresh, tiny
from running import ROUTED, hooks, prompt, same, text, unchanged
from transformers import AutoModelForCausalLM, PreTrainedModel, StoppingCriteria

import griffin

IDS = prompt(11)
# How experts are put to work.
WAYS: dict[str, dict[str, Any]] = {
    "compact": {},
    "masked": {"mode": "masked"},
    "offloaded": {"offload_dense": True},
    "refreshed": {"refresh": "experts"},
    "verified": {"verification": "exact"},
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@contextmanager
def failing(model: PreTrainedModel, call: int) -> Iterator[None]:
    """The output projection of the middle layer raises KeyError in its n-th forward call, in every view made here."""
    calls = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == call:
            raise KeyError

    handle = reference.output_projection(model, "llama", 1).register_forward_hook(fail)
    yield
    handle.remove()


@pytest.mark.parametrize("call", [1, 3])  # in the prompt, and behind it
@each_way
def test_an_error_in_generate_leaves_the_model_and_the_pruning_whole(way: dict[str, Any], call: int) -> None:
    model = fresh("llama")
    with griffin.prune(model, **way):
        expected = text(model, IDS)
    with unchanged(model), failing(model, call), griffin.prune(model, **way), pytest.raises(KeyError):
        text(model, prompt(7, 1), max_new_tokens=12)
    with unchanged(model), griffin.prune(model, **way):
        with torch.no_grad(), pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))  # no such token
        assert torch.equal(text(model, IDS), expected)


@each_way
def test_without_a_prompt_between_a_prompt_and_its_continuation_and_again(way: dict[str, Any]) -> None:
    model, outputs = tiny("llama"), []
    pruner = griffin.prune(model, **way)
    with unchanged(model):
        with pruner:
            pass
        with pruner, pruner.prefill():
            model(prompt(7, 1))
        for context in (pruner, griffin.prune(model, **way), pruner):  # the same pruner can be entered again
            with context:
                outputs.append(text(model, IDS))
    assert same(outputs, [outputs[0]] * 3)


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_a_generation_interrupted_by_leaving_the_context_is_never_dense(mode: str) -> None:
    model, tokens, pruner = tiny("llama"), prompt(2, 1), griffin.prune(tiny("llama"), mode=mode)
    with pruner:
        cache = model(IDS).past_key_values
        model(tokens[:, :1], past_key_values=cache)
        expected = model(tokens[:, 1:], past_key_values=cache).logits
    with pruner:
        cache = model(IDS).past_key_values
        model(tokens[:, :1], past_key_values=cache)
    with pruner:
        assert torch.equal(model(tokens[:, 1:], past_key_values=cache).logits, expected)


def test_nesting_is_refused_and_two_models_are_pruned_at_once() -> None:
    model, other = tiny("llama"), tiny("mistral")
    with griffin.prune(model):
        expected = text(model, IDS)
    with unchanged(model), unchanged(other), griffin.prune(model) as outer, griffin.prune(other):
        for again in (griffin.prune(model), outer):
            with pytest.raises(RuntimeError, match="pruned already"), again:
                pass
        text(other, IDS)
        assert torch.equal(text(model, IDS), expected)


def test_a_generate_and_hooks_of_the_users_own_stay() -> None:
    model, calls, seen = fresh("llama"), [], []
    original = model.generate

    def generate_and_count(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return original(*args, **kwargs)

    model.generate = generate_and_count
    model.register_forward_pre_hook(lambda *_: seen.append("model"))
    reference.output_projection(model, "llama", 1).register_forward_pre_hook(lambda *_: seen.append("projection"))
    with unchanged(model), griffin.prune(model):
        seen.clear()
        text(model, IDS, max_new_tokens=2)
        assert seen == ["model", "projection"] * 2
    assert calls == [None]
    assert vars(model).get("generate") is generate_and_count


def copied(model: Any, how: str, path: Any) -> Any:
    if how == "save_pretrained":
        model.save_pretrained(path)
        return AutoModelForCausalLM.from_pretrained(path).eval()
    if how == "torch.save":
        torch.save(model, path / "model")
        return torch.load(path / "model", weights_only=False)
    if how == "state_dict":
        (other := fresh("llama")).load_state_dict(model.state_dict())
        return other
    return copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))


@torch.no_grad()
@each_way
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict", "save_pretrained"])
def test_copies_made_inside_are_the_dense_model(how: str, way: dict[str, Any], tmp_path: Any) -> None:
    model = tiny("llama")
    dense = model(IDS).logits
    with griffin.prune(model, **way):
        expected = text(model, IDS)
        other = copied(model, how, tmp_path)
        assert not {*ROUTED} & {*vars(other)}
        assert hooks(other) == 0
        assert torch.equal(other(IDS).logits, dense)
        assert torch.equal(text(model, IDS), expected), "the model is still pruned"
        with griffin.prune(other, **way):
            assert torch.equal(text(other, IDS), expected), "and the copy can be"
    assert not {*ROUTED} & {*vars(model)}


class Pausing(StoppingCriteria):
    """Stops a generation in its middle until it may go on."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> torch.Tensor:
        self.inside.set()
        assert self.go_on.wait(30)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


@pytest.mark.parametrize("second", ["generate", "forward"])
@each_way
def test_another_thread_waits_until_the_first_is_done(way: dict[str, Any], second: str) -> None:
    model, ids, found = tiny("llama"), prompt(5, 1), {}
    with griffin.prune(model, **way), torch.no_grad():
        expected = text(model, IDS), text(model, ids) if second == "generate" else model(ids).logits
        pausing = Pausing()

        @torch.no_grad()
        def work(which: int) -> None:
            if which == 0:
                found[0] = text(model, IDS, stopping_criteria=[pausing])
            else:
                found[1] = text(model, ids) if second == "generate" else model(ids).logits

        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        threads[0].start()
        assert pausing.inside.wait(30)
        threads[1].start()
        threads[1].join(0.1)
        assert not found
        pausing.go_on.set()
        for thread in threads:
            thread.join(30)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
