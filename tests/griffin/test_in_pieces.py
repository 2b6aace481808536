"""Few tokens, multiplied with a piece of a matrix at a time."""

from __future__ import annotations

import pytest
import torch
from families import ONE_PER_LAYOUT, tiny
from griffin.in_pieces import FEW, dot_products, in_pieces, weighted_sums
from prompts import prompt
from torch import Tensor, nn

import griffin

COLUMNS = 33


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) * 100 + shape[0])).to(dtype)


@pytest.mark.parametrize("rows", [1, 40, 42, 45])  # in one piece, or in two, or in four
@pytest.mark.parametrize("tokens", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_products_are_those_of_the_whole(dtype: torch.dtype, tokens: int, rows: int) -> None:
    matrix, x, activations = (
        random(*shape, dtype=dtype) for shape in ((rows, COLUMNS), (tokens, COLUMNS), (tokens, rows))
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    exact = matrix.double()
    products, sums = dot_products(x, matrix), weighted_sums(activations, matrix)
    assert products.dtype == sums.dtype == dtype
    assert torch.allclose(products.double(), x.double() @ exact.T, atol=tolerance, rtol=tolerance)
    assert torch.allclose(sums.double(), activations.double() @ exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, FEW, FEW + 1])
@torch.no_grad()
def test_a_linear_module_multiplies_few_tokens_in_pieces(tokens: int, bias: bool) -> None:
    module, x = nn.Linear(COLUMNS, 400, bias=bias), random(tokens, 1, COLUMNS)
    plain = module(x)
    with in_pieces(module):
        found = module(x)
    assert found.shape == plain.shape
    torch.testing.assert_close(found, plain)
    if tokens in (1, FEW + 1):
        assert torch.equal(found, plain)
    assert "forward" not in vars(module)


@torch.no_grad()
def test_other_modules_stay_as_they_are() -> None:
    half = nn.Linear(COLUMNS, 40, dtype=torch.bfloat16)
    replaced = nn.Linear(COLUMNS, 40)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    for module in (half, replaced, nn.Conv1d(1, 1, 1), None):
        before = {} if module is None else dict(vars(module))
        with in_pieces(module):
            assert module is None or vars(module) == before
    assert replaced(COLUMNS) == COLUMNS


@pytest.mark.parametrize("compensation", ["none", "mean", "ridge"])
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
@torch.no_grad()
def test_few_tokens_at_once_on_compact_weights(family: str, compensation: str) -> None:
    # Compiled, the module's own forward multiplies with the copies.
    model, found = tiny(family), []
    for compiled in (False, True):
        shared = griffin.SharedPrompt(model, ["griffin"], [compensation], compiled=compiled)
        shared.run_each([prompt(11)[0]])
        experts = shared.experts("griffin", "topk", 0.5)
        with shared.pruned(experts, shared.corrections(compensation, experts), "compact"):
            found.append(model(prompt(5, 3), past_key_values=shared.fork(5), use_cache=True).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
