"""Linear layers by oneDNN, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from engines import begun, generated, refuse_parting, tokens
from families import ONE_PER_LAYOUT, fresh, tiny
from running import difference
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

import griffin
from griffin import Engine, Method, onednn_linear

INPUTS = 33


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def replaced(module: nn.Linear) -> bool:
    return "forward" in vars(module)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 90])
@pytest.mark.parametrize("shape", [(1,), (2,), (40,), (1, 1), (2, 3, 4), (0,), ()])
def test_products_are_those_of_torch(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(INPUTS, outputs, bias=bias), torch.randn(*shape, INPUTS)
    expected = functional.linear(x, module.weight, module.bias)
    with onednn_linear(module):
        found = module(x)
    assert found.shape == expected.shape
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_inputs_need_not_be_contiguous() -> None:
    module, x = nn.Linear(INPUTS, 90), torch.randn(INPUTS, 2, 4).permute(1, 2, 0)
    with onednn_linear(module):
        assert difference(module(x), functional.linear(x, module.weight, module.bias)) < 1e-5


def own_forward(x: Tensor) -> Tensor:
    return x


def with_own_forward() -> nn.Linear:
    module = nn.Linear(INPUTS, 40)
    module.forward = own_forward  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "make",
    [
        lambda: Conv1D(40, INPUTS),
        lambda: nn.Linear(INPUTS, 40, dtype=torch.bfloat16),
        lambda: nn.Linear(INPUTS, 40, dtype=torch.float64),
        lambda: nn.Linear(INPUTS, 40, device="meta"),
        lambda: type("Scaled", (nn.Linear,), {})(INPUTS, 40),
        with_own_forward,
    ],
    ids=["Conv1D", "half", "double", "device", "subclass", "own-forward"],
)
def test_others_are_left_alone(make: Callable[[], nn.Module]) -> None:
    module = make()
    before = dict(vars(module))
    with onednn_linear(nn.ModuleList([module])):
        assert vars(module) == before
    assert vars(module) == before


def test_autocast_is_left_to_torch() -> None:
    module, x = nn.Linear(INPUTS, 40), torch.randn(2, INPUTS)
    with onednn_linear(module), torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == torch.bfloat16


def test_gradients_are_left_to_torch() -> None:
    module, x = nn.Linear(INPUTS, 40), torch.randn(2, INPUTS)
    with torch.enable_grad(), onednn_linear(module):
        module(x).sum().backward()
    assert module.weight.grad is not None


def test_every_layer_is_given_back_after_an_exception() -> None:
    model = fresh("llama")
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    with onednn_linear(model):
        with pytest.raises(ZeroDivisionError), onednn_linear(model):
            raise ZeroDivisionError
        assert all(map(replaced, layers)), "the outer one's still"
    assert not any(map(replaced, layers))
    with pytest.raises(ZeroDivisionError), onednn_linear(model):
        raise ZeroDivisionError
    assert not any(map(replaced, layers))


@pytest.mark.parametrize("family", [*ONE_PER_LAYOUT, "gemma3_text"])
def test_dense_compact_and_masked_rows_run_by_onednn(family: str) -> None:
    model, found = tiny(family), []
    methods = [Method(sparsity=0.0), Method("wanda", sparsity=0.3, compensation="ridge"), Method(compensation="mean")]

    def texts() -> list[tuple[list[int], Tensor]]:
        together, apart = Engine(model), Engine(model)
        rows = [begun(together, tokens(12), method, method) for method in methods]
        texts = [*generated(together, rows, 3, 5, most=3).values()]
        rows = [begun(apart, tokens(12), method, method) for method in methods]
        return [*texts, *generated(apart, rows, 3, 5).values()]

    expected = texts()
    with onednn_linear(model):
        found = texts()
    assert sum(refuse_parting(*pair) for pair in zip(found, expected, strict=True)) == 0
    if family != "gpt2":  # Conv1D
        assert not all(torch.equal(one[1], other[1]) for one, other in zip(found, expected, strict=True))


def test_the_pruner_runs_by_onednn_too() -> None:
    model, ids = tiny("llama"), torch.tensor([tokens(12)])
    with griffin.prune(model):
        expected = model.generate(ids, max_new_tokens=6)
        with onednn_linear(model):
            assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
        assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
    with onednn_linear(model), griffin.prune(model):
        assert torch.equal(model.generate(ids, max_new_tokens=6), expected)
