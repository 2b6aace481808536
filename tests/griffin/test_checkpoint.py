"""Experts and pruned models for good; and LoRA adapters, which go with pruning where they leave FF blocks alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import fresh, tiny
from running import as_lists, difference, prompt, text
from transformers import AutoModelForCausalLM

import griffin
from griffin import Engine, Experts, Method, UnsupportedModelError, compact_model

IDS, OTHER = prompt(11), prompt(9, 5)


def experts_of(family: str, **options: Any) -> Experts:
    with griffin.prune(tiny(family), **options) as pruner:
        text(tiny(family), IDS)
    (experts,) = pruner.chosen
    assert experts is not None
    return experts


@torch.no_grad()
@pytest.mark.parametrize("compensation", ["none", "ridge"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_compact_checkpoint_is_an_ordinary_smaller_one(family: str, compensation: str, tmp_path: Any) -> None:
    experts = experts_of(family, compensation=compensation)
    engine = Engine(tiny(family))
    engine.compact.load(experts)
    compact_model(tiny(family), experts).save_pretrained(tmp_path)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert {block.width for block in griffin.find_feedforward_blocks(found)} == {40}
    assert sum(one.numel() for one in found.parameters()) < sum(one.numel() for one in tiny(family).parameters())
    assert difference(found(OTHER).logits, engine.compact.module(OTHER).logits) < 1e-6
    assert torch.equal(text(found, OTHER), text(engine.compact.module, OTHER))


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("bloom", {}, "no config for an FF width of 64"),
        ("llama", {"sparsity": [0.5, 0.25, 0.5]}, "layers keep 40 to 60 neurons: a checkpoint has one FF width"),
        ("llama", {"budget": "late"}, "expected budget='uniform' and one sparsity"),
        ("mistral", {"compensation": "mean"}, "no config for an FF width of 40 with these biases"),
    ],
)
def test_what_has_no_config_says_so(
    family: str, options: dict[str, Any], words: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(griffin.BUDGETS, "late", lambda layers: [-1.0, 0.0, 1.0])  # its own is flat in so few layers
    experts = experts_of(family, **options)
    pruned = compact_model(tiny(family), experts)
    engine = Engine(tiny(family))
    engine.compact.load(experts)
    assert torch.equal(text(pruned, OTHER), text(engine.compact.module, OTHER))
    with pytest.raises(UnsupportedModelError, match=words):
        pruned.save_pretrained(tmp_path)


@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("compensation", griffin.COMPENSATIONS)
def test_experts_that_were_saved_give_the_same_text(compensation: str, mode: str, tmp_path: Any) -> None:
    model, experts = tiny("llama"), experts_of("llama", compensation=compensation, sparsity=[0.5, 0.0, 0.9])
    experts.save(tmp_path / "experts.safetensors")
    loaded = Experts.load(tmp_path / "experts.safetensors")
    found = []
    for one in (experts, loaded):
        with griffin.prune(model, [0.5, 0.0, 0.9], mode=mode, experts=one) as pruner:
            found += [text(model, OTHER), text(model, OTHER)]
            assert as_lists(pruner.experts) == as_lists(experts.neurons, None)
    assert all(torch.equal(one, found[0]) for one in found)
    with pytest.raises(ValueError, match="expected"):
        griffin.prune(model, 0.75, experts=loaded)
    by_token = griffin.choose(Engine(model), [], Method("teal"))
    assert by_token is not None
    with pytest.raises(ValueError, match="each token has experts of its own"):
        by_token.save(tmp_path / "none")


@pytest.mark.parametrize("options", [{"refresh": "compensation"}, {"verification": "exact"}, {}], ids=str)
def test_experts_that_are_given_learn_nothing_from_text_to_text(options: dict[str, Any]) -> None:
    model, experts = tiny("llama"), experts_of("llama", compensation="ridge")
    with griffin.prune(model, compensation="ridge", experts=experts, **options):
        first = text(model, OTHER, max_new_tokens=20)
        text(model, IDS, max_new_tokens=20)
        assert torch.equal(text(model, OTHER, max_new_tokens=20), first)


def adapted(*modules: str) -> Any:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(fresh("llama"), peft.LoraConfig(target_modules=[*modules])).eval()
    with torch.no_grad():
        for name, one in model.named_parameters():
            if "lora_B" in name:
                one.normal_(std=0.3)
    return model


@torch.no_grad()
def test_lora_on_attention_is_pruned_and_kept() -> None:
    model, found = adapted("q_proj", "v_proj"), []
    dense = text(model, IDS, max_new_tokens=12)
    assert not torch.equal(dense, text(fresh("llama"), IDS, max_new_tokens=12)), "the adapter does something"
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode):
            cache = model(IDS).past_key_values
            by_hand = model(IDS[:, :3], past_key_values=cache).logits
            found.append((text(model, IDS, max_new_tokens=12), by_hand))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][0], dense)
    assert difference(found[0][1], found[1][1]) < 1e-5
    with griffin.prune(model, verification="exact"):
        assert torch.equal(text(model, IDS, max_new_tokens=12), dense)
    assert torch.equal(text(model, IDS, max_new_tokens=12), dense)


def test_lora_on_feedforward_blocks_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj"):
        griffin.prune(adapted("up_proj"))
