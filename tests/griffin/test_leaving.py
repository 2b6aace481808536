"""Errors, nesting, copies and threads leave a model as it is outside; what may be kept: experts, and pruned models."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from families import IDS, VERIFIED, fresh, prompt, tiny
from running import ROUTED, as_lists, difference, failing, same, text, unchanged
from transformers import AutoModelForCausalLM

import griffin
from griffin import Engine, Experts, UnsupportedModelError, compact_model

pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.mark.parametrize("call", [1, 3])  # in the prompt, and behind it
def test_an_error_in_generate_leaves_the_model_and_the_pruning_whole(way: dict[str, Any], call: int) -> None:
    model = fresh("llama")
    with griffin.prune(model, **way):
        expected = text(model, IDS)
    with unchanged(model), failing(model, call), griffin.prune(model, **way), pytest.raises(torch.OutOfMemoryError):
        text(model, prompt(7, 1), max_new_tokens=12)
    with unchanged(model), griffin.prune(model, **way):
        with pytest.raises(IndexError):
            model(torch.tensor([[10**6]]))  # no such token
        assert torch.equal(text(model, IDS), expected)


def test_a_generation_interrupted_by_leaving_the_context_is_never_dense(mode: str) -> None:
    model, tokens, pruner = tiny("llama"), prompt(2, 1), griffin.prune(tiny("llama"), mode=mode)
    with pruner:
        cache = model(IDS).past_key_values
        model(tokens[:, :1], past_key_values=cache)
        expected = model(tokens[:, 1:], past_key_values=cache).logits
        cache.crop(-1)
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
    model.generate = lambda *args, **options: calls.append(None) or original(*args, **options)
    own = model.generate
    model.register_forward_pre_hook(lambda *_: seen.append("model"))
    reference.output_projection(model, "llama", 1).register_forward_pre_hook(lambda *_: seen.append("projection"))
    with unchanged(model), griffin.prune(model):
        seen.clear()
        text(model, IDS, max_new_tokens=2)
        assert seen == ["model", "projection"] * 2
    assert calls == [None]
    assert vars(model).get("generate") is own


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "torch.save": lambda model, path: torch.save(model, path / "x") or torch.load(path / "x", weights_only=False),
    "save_pretrained": lambda model, path: model.save_pretrained(path) or AutoModelForCausalLM.from_pretrained(path),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_made_inside_are_the_dense_model(copied: Any, way: dict[str, Any], tmp_path: Any) -> None:
    model = tiny("llama")
    dense = model(IDS).logits
    with griffin.prune(model, **way):
        expected = text(model, IDS)
        other = copied(model, tmp_path).eval()
        assert not {*ROUTED} & {*vars(other)}
        assert torch.equal(other(IDS).logits, dense)
        assert torch.equal(text(model, IDS), expected), "the model is still pruned"
        with griffin.prune(other, **way):
            assert torch.equal(text(other, IDS), expected), "and the copy can be"
    assert not {*ROUTED} & {*vars(model)}


@pytest.mark.parametrize("call", [text, lambda model, ids: model(ids).logits], ids=["generate", "forward"])
def test_another_thread_waits_until_the_first_is_done(way: dict[str, Any], call: Any) -> None:
    model, ids, inside, go_on = tiny("llama"), prompt(5, 1), threading.Event(), threading.Event()

    def pause(ids_BS: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        inside.set()
        assert go_on.wait(30)
        return torch.zeros(len(ids_BS), dtype=torch.bool)

    without_gradients = {"initializer": torch.set_grad_enabled, "initargs": (False,)}
    with griffin.prune(model, **way), ThreadPoolExecutor(**without_gradients) as threads:
        expected = text(model, IDS), call(model, ids)
        first = threads.submit(text, model, IDS, stopping_criteria=[pause])
        assert inside.wait(30)
        second = threads.submit(call, model, ids)
        with pytest.raises(TimeoutError):
            second.result(0.1)
        go_on.set()
        assert same((first.result(30), second.result(30)), expected)


OTHER = prompt(9, 5)


def experts_of(family: str, **options: Any) -> Experts:
    with griffin.prune(tiny(family), **options) as pruner:
        text(tiny(family), IDS)
    (experts,) = pruner.chosen
    assert experts is not None
    return experts


@pytest.mark.parametrize("compensation", ["none", "ridge"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_compact_checkpoint_is_an_ordinary_smaller_one(family: str, compensation: str, tmp_path: Any) -> None:
    model, engine, experts = tiny(family), Engine(tiny(family)), experts_of(family, compensation=compensation)
    engine.compact().load(experts)
    compact_model(model, experts).save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {block.width for block in griffin.find_feedforward_blocks(found)} == {40}
    assert sum(one.numel() for one in found.parameters()) < sum(one.numel() for one in model.parameters())
    assert difference(found(OTHER).logits, engine.compact().module(OTHER).logits) < 1e-6
    assert torch.equal(text(found, OTHER), text(engine.compact().module, OTHER))


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("bloom", {}, "no config for an FF width of 64"),
        ("llama", {"sparsity": [0.5, 0.25, 0.5]}, "layers keep 40 to 60 neurons: a checkpoint has one FF width"),
        ("llama", {"budget": "late"}, "expected budget='uniform' and one sparsity"),
    ],
)
def test_what_has_no_config_says_so(
    family: str, options: dict[str, Any], words: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(griffin.selection, "late", lambda layers: [-1.0, 0.0, 1.0])  # its own is flat in so few layers
    engine, experts = Engine(tiny(family)), experts_of(family, **options)
    engine.compact().load(experts)
    pruned = compact_model(tiny(family), experts)
    assert torch.equal(text(pruned, OTHER), text(engine.compact().module, OTHER))
    with pytest.raises(UnsupportedModelError, match=words):
        pruned.save_pretrained(tmp_path)


@pytest.mark.parametrize("compensation", griffin.COMPENSATIONS)
def test_experts_that_are_given_serve_every_prompt(compensation: str, mode: str) -> None:
    model, experts = tiny("llama"), experts_of("llama", compensation=compensation, sparsity=[0.5, 0.0, 0.9])
    found = []
    with griffin.prune(model, [0.5, 0.0, 0.9], mode=mode, experts=experts) as pruner:
        for _ in range(2):
            found.append(text(model, OTHER))
            assert as_lists(pruner.experts) == as_lists(experts.neurons, None)
    assert torch.equal(*found)
    with pytest.raises(ValueError, match="expected"):
        griffin.prune(model, 0.75, experts=experts)


@pytest.mark.parametrize("options", [{"refresh": "compensation"}, VERIFIED, {}], ids=str)
def test_experts_that_are_given_learn_nothing(options: dict[str, Any]) -> None:
    model, experts = tiny("llama"), experts_of("llama", compensation="ridge")
    with griffin.prune(model, compensation="ridge", experts=experts, **options) as pruner:
        first = text(model, OTHER, max_new_tokens=20)
        text(model, IDS, max_new_tokens=20)
        assert torch.equal(text(model, OTHER, max_new_tokens=20), first)
    learned = [len(corrections) for corrections in pruner.chosen[0].corrections]
    assert learned == ([0] if "verification" in options else [1]) * 3, "a draft has them in its weights"


def adapted(*modules: str) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(fresh("llama"), peft.LoraConfig(target_modules=[*modules])).eval()
    for name, one in model.named_parameters():
        if "lora_B" in name:
            one.normal_(std=0.3)
    return model


def test_lora_on_attention_is_pruned_and_kept() -> None:
    model, found = adapted("q_proj", "v_proj"), []
    dense = text(model, IDS, max_new_tokens=12)
    assert not torch.equal(dense, text(fresh("llama"), IDS, max_new_tokens=12)), "the adapter does something"
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode):
            found.append(text(model, IDS, max_new_tokens=12))
    assert torch.equal(*found)
    assert not torch.equal(found[0], dense)
    with griffin.prune(model, **VERIFIED):
        assert torch.equal(text(model, IDS, max_new_tokens=12), dense)
    assert torch.equal(text(model, IDS, max_new_tokens=12), dense)


def test_lora_on_feedforward_blocks_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj"):
        griffin.prune(adapted("up_proj"))
