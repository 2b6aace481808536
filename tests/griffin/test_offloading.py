"""Dense FF weights in host memory: everything is to the bit what it is without, and the device holds little of them.

The device is the CPU here, and the copies to it are as real as to any other.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from engines import generated, tokens
from families import LAYERS, build, fresh, tiny
from prompts import prompt
from running import generate
from torch import Tensor, nn
from transformers import PreTrainedModel

import griffin
from griffin import Engine, Method, begin, prefill, prepare, score, wanted

IDS = prompt(11)
METHODS = [
    *(Method(sparsity=0.0), Method(), Method("magnitude"), Method("glass"), Method("wanda", "sample")),
    *(Method("random", sparsity=(0.5, 0.0, 0.75)), Method("joint", compensation="mean", budget="late")),
    *(Method(compensation="ridge"), Method(compensation="ridge", refresh="compensation"), Method(refresh="experts")),
]


def same(found: Any, expected: Any) -> bool:
    """Whether two generations are equal to the bit."""
    pairs = zip(found.logits, expected.logits, strict=True)
    return torch.equal(found.sequences, expected.sequences) and all(torch.equal(*steps) for steps in pairs)


def on_the_engine(model: PreTrainedModel) -> list[Tensor]:
    """All logits of prompts under every method, compact and masked, generated and scored."""
    engine, found = Engine(model), []
    prepare(engine, METHODS)
    states = prefill(engine, [tokens(9, 1), tokens(7, 2)], wanted(METHODS))
    for most in (1, 3):  # a row alone is compact
        rows = [begin(engine, states[:1], method, labels=[method])[0] for method in METHODS]
        found += [logits for _, logits in generated(engine, rows, len(rows), 10, most=most).values()]
    shared = begin(engine, states, METHODS[-1], labels=[0, 1])
    found += [logits for _, logits in generated(engine, shared, 2, 10, most=2).values()]
    (row,) = begin(engine, states[1:], METHODS[-2])
    return [*found, *(logits for _, logits in score(engine, [(row, tokens(10))], 1))]


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_the_engine_gives_the_same_to_the_bit(family: str) -> None:
    model = tiny(family)
    expected = on_the_engine(model)
    with griffin.Offload(model):
        offloaded = on_the_engine(model)
    again = on_the_engine(model)
    for one, other, third in zip(expected, offloaded, again, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


@pytest.mark.parametrize(
    "options",
    [{}, {"sparsity": [0.5, 0.0, 0.75]}, {"compensation": "ridge", "refresh": "compensation"}, {"sparsity": 0}],
    ids=["griffin", "per-layer", "refresh", "dense"],
)
@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_so_does_the_pruner(family: str, options: dict[str, Any]) -> None:
    model, outputs = tiny(family), []
    for offload_dense in (False, True):
        with griffin.prune(model, offload_dense=offload_dense, **options):
            model.generate(prompt(7, 1), max_new_tokens=3)
            outputs.append(model.generate(IDS, max_new_tokens=10))
    assert torch.equal(*outputs)


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


def test_one_within_the_other_is_the_outer_one() -> None:
    model = tiny("llama")
    dense = generate(model, IDS)
    with griffin.prune(model):
        expected = generate(model, IDS)
    with griffin.Offload(model):
        assert same(generate(model, IDS), dense)
        with griffin.prune(model, offload_dense=True):
            assert same(generate(model, IDS), expected)
        assert same(generate(model, IDS), dense)
    assert same(generate(model, IDS), dense)


@torch.no_grad()
def test_a_block_runs_on_a_copy_and_all_others_are_away() -> None:
    model = tiny("llama")
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
    assert len(seen) == LAYERS
    for running, places in enumerate(seen):
        for layer, (place, away) in enumerate(zip(places, home, strict=True)):
            assert (place != away) == (layer == running)
    (slot,) = {tuple(places[layer]) for layer, places in enumerate(seen)}  # one for all blocks
    assert not {*slot} & {place for places in home for place in places}
    assert [[weight.data_ptr() for weight in block.weights] for block in blocks] == home


def matrices() -> dict[int, int]:
    """The bytes of all float32 storages that are as large as the matrices of a block's experts, by their place."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.dtype == torch.float32]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes() >= 4 * 40 * 32}


@torch.no_grad()
def test_beside_the_host_there_are_the_experts_and_one_block() -> None:
    model = tiny("gpt2")
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


def test_a_layer_that_keeps_all_again_is_brought_again() -> None:
    """Loaded after experts of which that layer kept some."""
    model = tiny("llama")
    engine = Engine(model)
    methods = [Method(), Method(sparsity=(0.5, 0.0, 0.5))]
    states = prefill(engine, [tokens(9)], wanted(methods))
    some, all_of_one = (begin(engine, states, method)[0].experts for method in methods)
    found = []
    with torch.no_grad(), griffin.Offload(model):
        for before in (all_of_one, some):
            engine.load([before])
            engine.load([all_of_one])
            found.append(model(IDS).logits)
            engine.unload()
    assert torch.equal(*found)


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
