"""Quantised views: the weights' levels, the same numbers compact and masked, exact text, the bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from threading import Barrier, get_ident
from typing import Any

import pytest
import torch
from engines import begun, chosen, prefilled, scored, uncompiled
from families import FAMILIES, LAYERS, REFRESHED, fresh, prompt, tiny, tokens
from running import difference, generate, text
from torch import Tensor, nn

import griffin
from griffin import Engine, Method, projection, quantization, traffic
from griffin.feedforward import weight_out_in
from griffin.projection import BESIDE

IDS = prompt(11)
INT4 = Method("griffin", "topk", 0.5, "ridge", "uniform", "compensation", "int4")
# Their weights, in the order of their columns, must be what the compact view has.
ROUNDED = {"int8": 1 / 127, "int4": 1 / 8}


@pytest.mark.parametrize("precision", ROUNDED)
def test_a_rounded_weight_is_near_and_rounding_again_changes_nothing(precision: str) -> None:
    weight_OI = torch.randn(7, 45) * torch.logspace(-3, 1, 7).unsqueeze(1)
    weight_OI[3] = 0.0
    found = quantization.rounded(weight_OI, precision)
    assert found.shape == weight_OI.shape
    assert bool(((found - weight_OI).abs() <= weight_OI.abs().amax(1, keepdim=True) * ROUNDED[precision]).all())
    assert difference(quantization.rounded(found, precision), found) < 1e-6
    assert len(found[0].unique()) <= 2 ** int(precision[3:]) * (2 if precision == "int4" else 1)  # two groups


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ROUNDED)
def test_small_weights_and_none_are_rounded_in_half_precision(precision: str, dtype: torch.dtype) -> None:
    weight_OI = (torch.randn(3, 64) * torch.tensor([1.0, 1e-6, 0.0]).unsqueeze(1)).to(dtype)
    found = quantization.rounded(weight_OI, precision)
    near = weight_OI.float().abs().amax(1, keepdim=True) * ROUNDED[precision]
    assert bool(((found.float() - weight_OI.float()).abs() <= near).all())


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("family", FAMILIES)
def test_compact_equals_masked_and_the_model_stays(family: str, precision: str) -> None:
    model = tiny(family)
    before = generate(model, IDS)
    method = Method(compensation="ridge", quantization=precision)
    found = []
    for mode in ("compact", "masked"):
        engine = Engine(model, mode=mode)
        found.append(scored(engine, begun(engine, tokens(9), method), tokens(5, 1)))
    assert difference(*found) < 0.15, "an integer product rounds activations too"
    after = generate(model, IDS)
    assert all(torch.equal(*both) for both in zip(before.logits, after.logits, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_without_pruning_all_linear_layers_are_rounded_and_nothing_else(family: str) -> None:
    model, copy = tiny(family), fresh(family)
    for layer in quantization.linear_layers(copy):
        quantization.quantize(layer, "int4", calls="compiled")
    more = torch.tensor([tokens(5, 1)])
    expected = copy(more, past_key_values=model(IDS).past_key_values).logits[0]
    for mode, near in (("compact", 0.15), ("masked", 1e-5)):
        engine = Engine(model, mode=mode)
        found = scored(engine, begun(engine, IDS[0].tolist(), griffin.METHODS["int4"]), more[0].tolist())
        assert difference(found, expected) < near
    assert difference(found, model(torch.cat([IDS, more], dim=1)).logits[0, -5:]) > 1e-2


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_verified_text_is_the_dense_models(precision: str, sparsity: float) -> None:
    model = tiny("llama")
    dense = text(model, IDS, max_new_tokens=40)
    with griffin.prune(model, griffin.EXACT, sparsity=sparsity, quantization=precision, **REFRESHED) as pruner:
        assert torch.equal(text(model, IDS, max_new_tokens=40), dense)
        assert pruner.stats[0].acceptance is not None
        assert pruner.stats[0].acceptance > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_drafts_follow_lossy_texts_on_one_engine(family: str) -> None:
    engine, ids = Engine(tiny(family)), tokens(9)
    lossy, exact = Method(quantization="int4"), replace(griffin.EXACT, quantization="int4")
    texts = []
    for method in (griffin.DENSE, lossy, exact):
        (row,) = griffin.decode(engine, [begun(engine, ids, method)], griffin.Generation(8))
        texts.append(row.tokens)
    assert texts[2] == texts[0], "the draft has its own rows of an output embedding that is quantised by now"


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("method", ["griffin", "exact"])
def test_compiled_calls_have_rounded_weights_and_no_integer_product(method: str, precision: str) -> None:
    model = tiny("llama")
    expected = text(model, IDS, max_new_tokens=12)
    if method == "griffin":
        with griffin.prune(model, method, mode="masked", quantization=precision):
            expected = text(model, IDS, max_new_tokens=12)
    with griffin.prune(model, method, compiled=True, quantization=precision):
        assert torch.equal(text(model, IDS, max_new_tokens=12), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masked_rows_have_the_compact_views_output_weights_in_half_precision(family: str) -> None:
    engine = Engine(fresh(family).to(torch.bfloat16), mode="compact", compiler=uncompiled)
    view, method = engine.compact("int4"), Method(quantization="int4")
    experts = chosen(engine, prefilled(engine, tokens(9), method), method)
    view.load(experts)
    for layer, block in enumerate(griffin.find_feedforward_blocks(engine.model)):
        mine = griffin.find_feedforward_blocks(view.module)[layer].output
        assert torch.equal(weight_out_in(mine).float(), experts.output_weights(layer, block))


def test_layers_are_packed_on_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    both, threads = Barrier(2, timeout=10), set[int]()

    def job() -> None:
        both.wait()
        threads.add(get_ident())

    quantization.together([job, job], packing=True)
    assert len(threads) == 2
    assert get_ident() not in threads
    with pytest.raises(ValueError, match="of a layer"):
        quantization.together([partial(int, "of a layer")], packing=True)
    quantization.together([partial(threads.add, get_ident())], packing=False)
    assert get_ident() in threads


def test_what_is_learned_stands_beside_the_weights_until_there_is_too_much_of_it() -> None:
    engine = Engine(tiny("llama"))
    view = engine.compact("int4")
    experts = chosen(engine, prefilled(engine, tokens(9), INT4), INT4)
    view.load(experts)

    def written(layer: int) -> Tensor:
        return view.written(layer, torch.eye(len(experts.neurons[layer])))

    (fit,), before, bytes_read = experts.fits, written(0), []
    learned = experts
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        kept, target = (torch.randn(LAYERS, BESIDE // 3, width, generator=generator) for width in before.shape)
        steps, fit = fit.learn(kept, target, view.written)
        corrections = list(steps)
        learned = learned.corrected(dict(corrections))
        expected = written(0) + corrections[0][1].output(torch.eye(len(before)))
        view.learn(corrections)
        bytes_read.append(view.learned_bytes)
        if bytes_read[-1]:
            assert difference(written(0), expected) < 1e-5
    numbers = BESIDE // 3 * sum(len(kept_K) + before.shape[1] for kept_K in experts.neurons)
    assert bytes_read[0] == 4 * numbers, "float32 counts as the model's own 16 bits do"
    assert bytes_read == [bytes_read[0], 2 * bytes_read[0], 3 * bytes_read[0], 0]
    assert difference(written(0), learned.output_weights(0, engine.blocks[0]).T) < 0.02, "made anew from all"


def test_bytes_count_scales_and_all_that_is_read() -> None:
    model = tiny("llama")
    widths = [block.width for block in griffin.find_feedforward_blocks(model)]
    plain = traffic(model, widths)
    layers = quantization.linear_layers(model)
    columns = sum(layer.weight.shape[0] for layer in layers)
    linear = sum(layer.weight.numel() for layer in layers)
    found = traffic(model, widths, quantization="int8")
    # float32 counts as 16 bits a weight: 4 bytes of it are 2.
    assert found.pruned == pytest.approx(plain.dense - 4 * linear + 2 * (linear + 2 * columns), abs=len(layers))
    assert traffic(model, widths, quantization="int4").pruned == pytest.approx(
        plain.dense - 4 * linear + 2 * linear * 4.5 / 8, abs=len(layers)
    )
    half = traffic(model, [width // 2 for width in widths], quantization="int8")
    assert half.dense == plain.dense
    assert half.pruned < found.pruned


def test_rows_of_several_precisions_and_dense_ones_come_together() -> None:
    engine = Engine(tiny("llama"), mode="masked")
    methods = [
        griffin.DENSE,
        Method(),
        Method(quantization="int4"),
        Method(quantization="int8"),
        griffin.METHODS["int4"],
        griffin.as_method("exact", draft_tokens=4),
    ]
    state = prefilled(engine, tokens(9), *methods)
    rows = [griffin.begin(engine, [state], method)[0] for method in methods]
    ended = list(griffin.decode(engine, rows, griffin.Generation(6), batch_size=8))
    assert {id(row) for row in ended} == {id(row) for row in rows}
    alone = [griffin.begin(engine, [state], method)[0] for method in methods]
    for row, together in zip(alone, rows, strict=True):
        list(griffin.decode(engine, [row], griffin.Generation(6)))
        assert row.tokens == together.tokens


def test_what_cannot_be_quantised_is_refused_by_name() -> None:
    model = fresh("llama")
    model.model.layers[1].self_attn.q_proj.weight = nn.Parameter(
        torch.ones(32, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(griffin.UnsupportedModelError, match=r"layers\.1\.self_attn\.q_proj has weights of torch\.int8"):
        Engine(model).compact("int8")
    for wrong, message in (
        ({"statistic": "teal", "quantization": "int8"}, "quantization='int8' with statistic='teal'"),
        ({"quantization": "int2"}, "quantization='int2': expected one of none, int8, int4"),
    ):
        with pytest.raises(ValueError, match=message):
            Method(**wrong)


def test_labels_say_the_precision() -> None:
    found = [
        griffin.METHODS["int8"],
        Method(quantization="int4"),
        replace(griffin.EXACT, draft_tokens=4),
        griffin.EXACT,
        Method(sparsity=0.0, quantization="int8", verification="exact"),
    ]
    assert [method.label for method in found] == [
        "int8",
        "griffin int4 50%",
        "impact int4 verified k=4 50%",
        "exact 50%",
        "int8 verified",
    ]


def test_weights_are_quantised_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, calls = Engine(tiny("llama")), []

    def counted(*arguments: Any, **options: Any) -> None:
        calls.append(arguments[0])
        quantization.quantize(*arguments, **options)

    monkeypatch.setattr(projection, "quantize", counted)
    found = []
    for method, length in ((griffin.METHODS["int4"], 9), (griffin.METHODS["int4"], 5), (INT4, 9), (INT4, 5)):
        row = begun(engine, tokens(length), method)
        calls.clear()
        scored(engine, row, tokens(12, 1))  # refreshed once, after 8 tokens
        found.append(len(calls))
    assert found == [3 * LAYERS, 0, 4 * LAYERS, 4 * LAYERS]
