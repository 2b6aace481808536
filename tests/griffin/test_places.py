"""Where and how weights are read: in host memory, by oneDNN, in half precision, and in torch's gradient modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engines import BATCHED, begun, chosen, generated, prefilled, refuse_parting, scored
from families import IDS, LAYERS, REFRESHED, ROWS, fresh, prompt, tiny, tokens
from running import difference, generate, same, step_logits, text, unchanged
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import griffin
from griffin import Engine, Method, begin, find_feedforward_blocks, prefill, wanted, with_onednn


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_weights_in_host_memory_give_the_same_to_the_bit(family: str) -> None:
    """Compact and masked, generated and scored."""
    model, found = tiny(family), []
    for offload in (False, True):
        engine, mine = Engine(model, offload_dense=offload), []
        states = prefill(engine, [tokens(9, 1), tokens(7, 2)], wanted(BATCHED))
        for most in (1, 3):  # a row alone is compact
            rows = [begin(engine, states[:1], method, labels=[method])[0] for method in BATCHED]
            mine += [logits for _, logits in generated(engine, rows, 10, most=most).values()]
        shared = begin(engine, states, BATCHED[5], labels=[0, 1])
        mine += [logits for _, logits in generated(engine, shared, 10, most=2).values()]
        found.append([*mine, scored(engine, begin(engine, states[1:], BATCHED[-1])[0], tokens(10))])
    assert same(*found)


@torch.no_grad()
def test_a_block_has_weights_of_the_device_while_it_runs_and_all_others_are_away() -> None:
    engine, seen = Engine(tiny("llama"), offload_dense=True), []
    host = [block.weights for block in engine.blocks]
    views = find_feedforward_blocks(engine.dense.module)

    def look(*_: Any) -> None:
        pairs = zip(views, host, strict=True)
        seen.append([all(one is other for one, other in zip(view.weights, away, strict=True)) for view, away in pairs])

    for view in views:
        view.output.register_forward_pre_hook(look)
    one, other = Method(), Method(sparsity=(0.5, 0.0, 0.5))
    state = prefilled(engine, tokens(9), one)
    assert seen == [[layer != running for layer in range(LAYERS)] for running in range(LAYERS)]
    first, second = (chosen(engine, state, method) for method in (one, other))
    for experts in (second, first, second):  # a layer that keeps all is brought again
        engine.compact().load(experts)
    whole = find_feedforward_blocks(engine.compact().module)[1]
    assert not {id(weight) for weight in whole.weights} & {id(weight) for away in host for weight in away}


def test_what_cannot_be_moved_is_refused_by_name_and_an_error_on_entering_restores_the_model() -> None:
    model = fresh("llama")
    first, _, third = model.model.layers
    for shared in (first.mlp.up_proj.weight, nn.Parameter(first.mlp.up_proj.weight[:])):
        third.mlp.up_proj.weight = shared
        refused = pytest.raises(griffin.UnsupportedModelError, match=r"0\.mlp\.up_proj.*2\.mlp\.up_proj")
        with unchanged(model), refused, griffin.prune(model, offload_dense=True):
            pass
        with griffin.prune(model):
            pass
    model = fresh("llama")
    model.lm_head.to("meta")
    with pytest.raises(griffin.UnsupportedModelError, match="cpu, meta"), griffin.prune(model, offload_dense=True):
        pass


def test_all_but_the_dense_weights_can_be_moved() -> None:
    model = fresh("opt")
    stay = {weight for block in find_feedforward_blocks(model) for weight in block.weights}
    griffin.move_without_dense(model, "meta")
    assert {weight for block in find_feedforward_blocks(model) for weight in block.weights} == stay
    assert all(one.is_meta == (one not in stay) for one in [*model.parameters(), *model.buffers()])


INPUTS = 33


def on_onednn(module: nn.Module) -> nn.Module:
    """A module, in a view of a model that it is the head of."""
    model = fresh("llama")
    model.lm_head = module
    return with_onednn(model).lm_head


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 90])
@pytest.mark.parametrize("shape", [(1,), (2,), (40,), (1, 1), (2, 3, 4), (0,), ()])
def test_products_are_those_of_torch(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(INPUTS, outputs, bias=bias), torch.randn(*shape, INPUTS)
    if len(shape) == 3:  # inputs need not be contiguous
        x = torch.randn(INPUTS, *shape).permute(1, 2, 3, 0)
    found, expected = on_onednn(module)(x), functional.linear(x, module.weight, module.bias)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_others_autocast_and_gradients_are_left_to_torch() -> None:
    own = nn.Linear(INPUTS, 40)
    own.forward = torch.neg  # type: ignore[method-assign]
    others = [own, Conv1D(40, INPUTS), type("Scaled", (nn.Linear,), {})(INPUTS, 40)]
    others += [nn.Linear(INPUTS, 40, dtype=dtype) for dtype in (torch.bfloat16, torch.float64)]
    for module in (*others, nn.Linear(INPUTS, 40, device="meta")):
        assert type(on_onednn(module)) is type(module)
    model = fresh("llama").bfloat16()
    assert with_onednn(model) is model, "where nothing applies"
    linear, x = on_onednn(nn.Linear(INPUTS, 40)), torch.randn(2, INPUTS)
    assert type(linear) is not nn.Linear
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [{"sparsity": 0.0}, {"mode": "masked"}, {"compensation": "ridge"}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_dense_compact_and_masked_models_run_by_onednn(family: str, options: dict[str, Any]) -> None:
    model, found = tiny(family), []
    with unchanged(model):
        for one in (model, with_onednn(model)):
            with griffin.prune(one, **options):
                output = generate(one, prompt(12))
            found.append((output.sequences[0, 12:].tolist(), step_logits(output)))
    refuse_parting(*found)
    assert family == "gpt2" or not torch.equal(found[0][1], found[1][1])  # Conv1D


@pytest.mark.parametrize("options", [{}, {"compensation": "ridge"}, REFRESHED])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_bfloat16_is_close_to_float32(family: str, options: dict[str, str], mode: str) -> None:
    # The same weights in both, and so the same experts: what differs is rounding on the way.
    method, found, model = Method("magnitude", **options), [], fresh(family)
    for dtype in (torch.bfloat16, torch.float32):
        engine = Engine(model.to(dtype), mode=mode)
        rows = [begun(engine, ids[0].tolist(), method) for ids in (ROWS if mode == "masked" else ROWS[:1])]
        found.append([logits for _, logits in griffin.score(engine, [(row, tokens(10, 4)) for row in rows], 3)])
        assert found[-1][0].dtype == dtype
    for ours, theirs in zip(*found, strict=True):
        assert bool(ours.isfinite().all())
        assert float((ours.float() - theirs).norm() / theirs.norm()) < 0.05


MODES = {"gradients": torch.enable_grad, "no gradients": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize("first", MODES)
def test_buffers_of_one_gradient_mode_serve_in_every_other(way: dict[str, Any], first: str) -> None:
    model, tokens_1S = tiny("llama"), prompt(4, 1)
    by_hand, found, logits = not {"verification", "refresh"} & {*way}, [], []
    with griffin.prune(model, **{"compensation": "ridge"} | way):
        for name in (first, *MODES):
            with MODES[name]():
                found.append(text(model, IDS, max_new_tokens=12))
                if by_hand:
                    logits.append(model(tokens_1S, past_key_values=model(IDS).past_key_values).logits.detach().clone())
    assert all(torch.equal(one, found[0]) for one in found)
    assert all(difference(one, logits[0]) < 1e-5 for one in logits)


def test_gradients_flow_through_the_experts(mode: str) -> None:
    model, token = fresh("llama"), prompt(1, 1)
    with griffin.prune(model, mode=mode):
        model(token, past_key_values=model(prompt(7)).past_key_values).logits.sum().backward()
    gradient: Tensor | None = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    assert float(gradient[token[0, 0]].abs().max()) > 0
