"""What only a GPU can show: half precision, CUDA graphs, several devices, offloading, memory that does not grow.

    make test-gpu

torch, transformers and pytest are all that is imported, so that a bare machine can run it. `GRIFFIN_TEST_DEVICE=cpu`
runs there what a CPU allows.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from small import model, prompt
from torch import Tensor

import griffin
from griffin import (
    DENSE,
    RECIPE,
    Engine,
    Generation,
    Method,
    Row,
    begin,
    compiled_call,
    decode,
    prefill,
    quantization,
    wanted,
)
from griffin.offloading import dense_in_host_memory
from griffin.views import Compiler

GRIFFIN = Method()
VERIFIED = replace(RECIPE, budget="uniform", verification="exact", draft_tokens=4, draft_vocabulary="full")
METHODS = {"dense": DENSE, "griffin": GRIFFIN, "recipe": RECIPE}
# Relative to the largest logit: of sums in another order.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
LENGTHS = (40, 17, 33)
LIMIT = 24

DEVICE = torch.device(os.environ.get("GRIFFIN_TEST_DEVICE", "cuda"))  # where models run
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = pytest.mark.skipif(
    DEVICE.type == "cuda" and not torch.cuda.is_available(),
    reason="needs a GPU; GRIFFIN_TEST_DEVICE=cpu runs what a CPU allows",
)


def generated(engine: Engine, ids: list[int], method: Method, forced: Sequence[int] = ()) -> tuple[list[int], Tensor]:
    """The new tokens of a prompt, greedy or as they are given, and the logits that they were picked from."""
    seen: list[Tensor] = []

    def process(rows: Sequence[Row], drafted: Sequence[Tensor | None], logits_BV: Tensor) -> Tensor:
        seen.append(logits_BV[0].clone())
        if forced:
            logits_BV = torch.full_like(logits_BV, -torch.inf)
            logits_BV[0, forced[len(seen) - 1]] = 0.0
        return logits_BV

    rows = begin(engine, prefill(engine, [ids], wanted([method])), method)
    (row,) = decode(engine, rows, Generation(LIMIT, process_logits=process), max_prompt_tokens=max(LENGTHS))
    return row.tokens, torch.stack(seen)


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest of the second."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_without_pruning_and_after_it_the_model_is_what_it_was(dtype: torch.dtype) -> None:
    whole = model(DEVICE, dtype)
    ids = torch.tensor([prompt(40)], device=DEVICE)
    before = whole(ids).logits
    with griffin.prune(whole, 0.0):
        assert torch.equal(whole(ids).logits, before)
    with griffin.prune(whole, 0.5, statistic="joint", compensation="ridge"):
        pruned = whole.generate(ids, max_new_tokens=8, do_sample=False)
    assert pruned.shape[1] == 48
    assert torch.equal(whole(ids).logits, before)


@pytest.mark.parametrize("method", [GRIFFIN, RECIPE], ids=["griffin", "recipe"])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_compact_equals_masked(dtype: torch.dtype, method: Method) -> None:
    whole = model(DEVICE, dtype)
    tokens, compact = generated(Engine(whole, mode="compact"), prompt(40), method)
    _, masked = generated(Engine(whole, mode="masked"), prompt(40), method, tokens)
    assert distance(compact, masked) < TOLERANCES[dtype]


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("method", [DENSE, GRIFFIN, RECIPE], ids=["dense", "griffin", "recipe"])
def test_torchaos_products_are_those_of_rounded_weights(
    method: Method, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    if (precision, DEVICE.type) == ("int4", "cpu"):
        pytest.skip("torchao's int4 product needs a GPU")
    # In layers of 8n inputs: what torch 2.13 makes of the int8 product on a CPU reads beyond other ones.
    whole, method = model(DEVICE, torch.bfloat16), replace(method, budget="uniform", quantization=precision)
    monkeypatch.setattr(quantization, "TORCHAO", ())
    tokens, rounded = generated(Engine(whole, mode="masked"), prompt(40), method)
    monkeypatch.setattr(quantization, "TORCHAO", (DEVICE.type,))
    torch._dynamo.reset()
    engine = Engine(whole, mode="compact", compiler=compiled_call)
    for _ in range(3):  # compiled, warmed up, captured
        _, found = generated(engine, prompt(40), method, tokens)
        layer = engine.compact(precision).module.get_decoder().layers[0].mlp.down_proj
        assert type(layer.weight.data).__module__.startswith("torchao")
        assert distance(found, rounded) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_chooses_nearly_what_single_precision_does(dtype: torch.dtype) -> None:
    chosen = []
    for precision in (torch.float32, dtype):
        engine = Engine(model(DEVICE, precision))
        (row,) = begin(engine, prefill(engine, [prompt(40)], wanted([GRIFFIN])), GRIFFIN)
        assert row.experts is not None
        chosen.append([set(neurons_K.tolist()) for neurons_K in row.experts.neurons])
    for one, other in zip(*chosen, strict=True):
        assert len(one & other) / len(one) > 0.9


@pytest.mark.parametrize("compiler", [None, compiled_call])
def test_verified_text_is_the_dense_models(compiler: Compiler | None) -> None:
    whole = model(DEVICE)
    torch._dynamo.reset()
    dense, logits_NV = generated(Engine(whole, mode="compact"), prompt(40), DENSE)
    engine = Engine(whole, mode="compact", compiler=compiler)
    for _ in range(3 if compiler else 1):  # compiled, warmed up, captured
        verified, _ = generated(engine, prompt(40), VERIFIED)
        differs = [place for place, pair in enumerate(zip(verified, dense, strict=True)) if len({*pair}) > 1]
        for place in differs[:1]:  # only where the dense model has a tie, behind which texts may differ
            best = logits_NV[place].topk(2).values
            assert best[0] - best[1] < 1e-3


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_captured_equals_eager(dtype: torch.dtype) -> None:
    whole = model(DEVICE, dtype)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager = Engine(whole, mode="compact")
    captured = Engine(whole, mode="compact", compiler=compiled_call)
    for length in LENGTHS:
        for method in METHODS.values():
            tokens, expected = generated(eager, prompt(length, length), method)
            for _ in range(3):  # compiled, warmed up, captured
                _, found = generated(captured, prompt(length, length), method, tokens)
            assert distance(found, expected) < TOLERANCES[dtype]
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == len(METHODS)
    assert counters["inductor"]["cudagraph_skips"] == 0, "on a GPU every graph is captured"


@cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_devices() -> None:
    accelerate = pytest.importorskip("accelerate")
    one = model(torch.device("cuda:0"))
    tokens, expected = generated(Engine(one, mode="compact"), prompt(40), RECIPE)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{layer}": layer // 2 for layer in range(4)}
    two = accelerate.dispatch_model(model(torch.device("cpu")), places)
    for mode in ("compact", "masked"):
        _, found = generated(Engine(two, mode=mode), prompt(40), RECIPE, tokens)
        assert distance(found, expected) < TOLERANCES[torch.float32]


def test_offloaded_weights_give_the_same() -> None:
    whole = model(DEVICE)
    tokens, expected = generated(Engine(whole, mode="compact"), prompt(40), RECIPE)
    with dense_in_host_memory(whole):
        found = generated(Engine(whole, offload_dense=True), prompt(40), RECIPE, tokens)[1]
    assert torch.equal(found, expected)


@cuda
def test_offloading_takes_less_memory_than_dense() -> None:
    whole = model(DEVICE, torch.float16, intermediate_size=8192, num_hidden_layers=16)

    def peak(engine: Engine, method: Method) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(DEVICE)
        generated(engine, prompt(40), method)
        return torch.cuda.max_memory_allocated(DEVICE)

    dense = peak(Engine(whole), DENSE)
    with dense_in_host_memory(whole):
        assert peak(Engine(whole, offload_dense=True), GRIFFIN) < dense


@cuda
def test_batch_size_auto_knows_a_gpu_that_is_full() -> None:
    errors = pytest.importorskip("pipelines.errors", exc_type=ImportError)
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)
    assert errors.out_of_memory(raised.value)  # what makes it halve the batch


@cuda
@pytest.mark.parametrize("method", [*METHODS.values(), VERIFIED], ids=[*METHODS, "verified"])
def test_memory_is_the_same_after_a_hundred_prompts(method: Method) -> None:
    engine = Engine(model(DEVICE), mode="compact")

    def run(count: int) -> int:
        for seed in range(count):
            generated(engine, prompt(LENGTHS[seed % 2], seed), method)
        generated(engine, prompt(33, 0), method)  # the last one's experts stay
        gc.collect()
        return torch.cuda.memory_allocated(DEVICE)

    assert run(4) == run(100)
