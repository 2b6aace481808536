"""Dense FF weights in host memory: everything is to the bit what it is without, and the device holds little of them.

The device is the CPU here, and the copies to it are as real as to any other.
"""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from families import FAMILIES, ONE_PER_LAYOUT, build, fresh, tiny
from prompts import prompt
from running import TOKENS, generate
from torch import nn
from transformers import PreTrainedModel

import griffin

IDS = prompt(11)


def same(found: Any, expected: Any) -> bool:
    """Whether two generations are equal to the bit."""
    pairs = zip(found.logits, expected.logits, strict=True)
    return torch.equal(found.sequences, expected.sequences) and all(torch.equal(*steps) for steps in pairs)


def both(model: PreTrainedModel, *arguments: Any, tokens: int = TOKENS, **options: Any) -> list[Any]:
    """A prompt that follows another one, pruned without offloading and with it."""
    outputs = []
    for offload_dense in (False, True):
        with griffin.prune(model, *arguments, offload_dense=offload_dense, **options):
            generate(model, prompt(7, 1))
            outputs.append(generate(model, IDS, max_new_tokens=tokens))
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_the_same_to_the_bit(family: str) -> None:
    model = tiny(family)
    kept, offloaded = both(model)
    assert same(offloaded, kept)
    assert not same(offloaded, generate(model, IDS)), "a model that was never pruned would pass"


@pytest.mark.parametrize(
    "options",
    [
        *({"compensation": "mean"}, {"compensation": "ridge"}, {"statistic": "magnitude"}, {"statistic": "glass"}),
        *({"refresh": "experts"}, {"refresh": "compensation", "compensation": "ridge"}),
        *({"statistic": "wanda", "selection": "sample"}, {"statistic": "random"}, {"sparsity": [0.5, 0.0, 0.75]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_so_is_every_part_of_a_method(family: str, options: dict[str, Any]) -> None:
    kept, offloaded = both(tiny(family), tokens=12, **options)  # more than `refresh` waits for
    assert same(offloaded, kept)


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_sparsity_0_is_bit_identical_to_dense(family: str) -> None:
    model = tiny(family)
    _, offloaded = both(model, 0)
    assert same(offloaded, generate(model, IDS))


def test_in_inference_mode_and_out_of_it() -> None:
    model = fresh("llama")
    with griffin.prune(model):
        expected = generate(model, IDS)
    with torch.inference_mode(), griffin.prune(model, offload_dense=True):
        assert same(generate(model, IDS), expected)
    with griffin.prune(model, offload_dense=True):
        assert same(generate(model, IDS), expected)
        with torch.inference_mode():
            assert same(generate(model, IDS), expected)
        assert same(generate(model, IDS), expected)


def test_blocks_of_different_widths() -> None:
    model = fresh("llama")
    narrow = copy.deepcopy(model.config)
    narrow.intermediate_size = 48
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(narrow)
    kept, offloaded = both(model)
    assert same(offloaded, kept)


@torch.no_grad()
def test_a_dense_model_and_its_shared_prompts_run_offloaded() -> None:
    model, token = tiny("llama"), prompt(1, 1)
    shared = griffin.SharedPrompt(model, ["griffin", "wanda"], ["ridge"])
    dense = generate(model, IDS)

    def continued() -> list[torch.Tensor]:
        found = [shared.run_each([IDS[0]])]
        for statistic in ("griffin", "wanda"):
            experts = shared.experts(statistic, "topk", 0.5)
            for mode in griffin.MODES:
                with shared.pruned(experts, shared.corrections("ridge", experts), mode):
                    found.append(model(token, past_key_values=shared.fork(1), use_cache=True).logits)
        return found

    with griffin.Offload(model):
        assert same(generate(model, IDS), dense)
        offloaded = continued()
        with griffin.prune(model, offload_dense=True):  # one in the other is the outer one
            pruned = generate(model, IDS)
        assert same(generate(model, IDS), dense)
    assert all(
        torch.equal(*pair) for pair in zip(offloaded, continued(), strict=True)
    )  # the same buffers, on the device
    with griffin.prune(model):
        assert same(generate(model, IDS), pruned)


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
@torch.no_grad()
def test_a_block_runs_on_a_copy_and_all_others_are_away(family: str) -> None:
    model = tiny(family)
    blocks = griffin.find_feedforward_blocks(model)
    home = [[weight.data_ptr() for weight in block.weights] for block in blocks]
    seen = []

    def look(*_: Any) -> None:
        seen.append([[weight.data_ptr() for weight in block.weights] for block in blocks])

    with griffin.prune(model, offload_dense=True):
        handles = [block.output.register_forward_pre_hook(look) for block in blocks]
        model(IDS)
        for handle in handles:
            handle.remove()
    assert len(seen) == len(blocks)
    for running, places in enumerate(seen):
        for layer, (place, away) in enumerate(zip(places, home, strict=True)):
            assert (place != away) == (layer == running)
    (slot,) = {tuple(places[layer]) for layer, places in enumerate(seen)}  # one for all blocks
    assert not set(slot) & {place for places in home for place in places}


def matrices() -> dict[int, int]:
    """The bytes of all float32 storages that are as large as the matrices of a block's experts, by their place."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    dense = [tensor for tensor in tensors if tensor.dtype == torch.float32 and tensor.layout == torch.strided]
    storages = [tensor.untyped_storage() for tensor in dense]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes() >= 4 * 40 * 32}


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
@torch.no_grad()
def test_beside_the_host_there_are_the_experts_and_one_block(family: str) -> None:
    model = tiny(family)
    blocks = [sum(4 * weight.numel() for weight in block.weights) for block in griffin.find_feedforward_blocks(model)]
    before = matrices()
    with griffin.prune(model, 0.5, offload_dense=True):
        cache = model(IDS).past_key_values
        model(IDS[:, :1], past_key_values=cache)
        there = {place: size for place, size in matrices().items() if place not in before}
    assert sum(there.values()) == sum(blocks) // 2 + blocks[0]


def test_hooks_are_off_while_experts_are_at_work() -> None:
    model = tiny("llama")
    inputs = [module for block in griffin.find_feedforward_blocks(model) for module in block.inputs]
    with torch.no_grad(), griffin.prune(model, [0.5, 0.0, 0.5], offload_dense=True):
        cache = model(IDS).past_key_values
        assert all(module._forward_pre_hooks for module in inputs)
        model(IDS[:, :1], past_key_values=cache)
        assert [bool(module._forward_pre_hooks) for module in inputs] == [False] * 2 + [True] * 2 + [False] * 2
        model(IDS)
        assert all(module._forward_pre_hooks for module in inputs)
    assert not any(module._forward_pre_hooks for module in inputs)


def test_an_error_on_entering_restores_the_model() -> None:
    model = build(
        "llama", hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, vocab_size=97
    )
    model.config.bos_token_id = None
    with pytest.raises(ValueError, match="bos_token_id"), griffin.prune(model, statistic="glass", offload_dense=True):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())
    with griffin.prune(model, offload_dense=True):  # neither pruned nor offloaded still
        pass


def test_masked_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="offload_dense=True with mode='masked'"):
        griffin.prune(tiny("llama"), mode="masked", offload_dense=True)


def test_shared_weights_are_refused_by_name() -> None:
    model = fresh("llama")
    first, _, third = model.model.layers
    third.mlp.up_proj.weight = first.mlp.up_proj.weight
    with pytest.raises(griffin.UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj.*layers\.2\.mlp\.up_proj"):
        griffin.prune(model, offload_dense=True)
    third.mlp.up_proj.weight = nn.Parameter(first.mlp.up_proj.weight[:])  # another parameter on the same memory
    with pytest.raises(griffin.UnsupportedModelError, match=r"layers\.0\.mlp\.up_proj.*layers\.2\.mlp\.up_proj"):
        griffin.Offload(model)


def test_several_devices_are_refused_by_name() -> None:
    model = fresh("llama")
    model.lm_head.to("meta")
    with pytest.raises(griffin.UnsupportedModelError, match="cpu, meta"):
        griffin.prune(model, offload_dense=True)


def test_all_but_the_dense_weights_can_be_moved() -> None:
    model = fresh("opt")
    stay = {weight for block in griffin.find_feedforward_blocks(model) for weight in block.weights}
    griffin.move_without_dense(model, "meta")
    assert {weight for block in griffin.find_feedforward_blocks(model) for weight in block.weights} == stay
    for tensor in [*model.parameters(), *model.buffers()]:
        assert tensor.is_meta == (tensor not in stay)
