"""Rows that are read where they are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from families import ONE_PER_LAYOUT, tiny
from griffin.in_place import PIECES, DotProducts, WeightedSum
from prompts import prompt
from running import difference, generate, step_logits
from torch import Tensor

import griffin
from griffin import compaction

ROWS, COLUMNS = 90, 33


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) * 100 + shape[0])).to(dtype)


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kept", [1, PIECES - 1, PIECES, 45, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_products_are_those_of_the_rows(dtype: torch.dtype, kept: int, bias: bool) -> None:
    matrix, rows = random(ROWS, COLUMNS, dtype=dtype), torch.randperm(ROWS)[:kept].sort().values
    token, activations = random(COLUMNS, dtype=dtype), random(kept, dtype=dtype)
    bias_K, bias_H = (random(size, dtype=dtype) if bias else None for size in (kept, COLUMNS))
    products, sums = DotProducts(matrix, rows, bias_K)(token), WeightedSum(matrix, rows, bias_H)(activations)
    exact, tolerance = matrix[rows].double(), 1e-5 if dtype == torch.float32 else 1e-12
    expected_K = exact @ token.double() + (0 if bias_K is None else bias_K.double())
    expected_H = activations.double() @ exact + (0 if bias_H is None else bias_H.double())
    assert products.dtype == sums.dtype == dtype
    assert torch.allclose(products.double(), expected_K, atol=tolerance, rtol=tolerance)
    assert torch.allclose(sums.double(), expected_H, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kept", [5, 61])
def test_neither_the_place_of_the_rows_nor_the_threads_matter(kept: int, two_threads: None) -> None:
    matrix, rows = random(ROWS, COLUMNS), torch.randperm(ROWS)[:kept].sort().values
    copied, every = matrix[rows].clone(), torch.arange(kept)
    token, activations = random(COLUMNS), random(kept)
    products, sums = DotProducts(matrix, rows, None)(token), WeightedSum(matrix, rows, None)(activations)
    assert torch.equal(DotProducts(copied, every, None)(token), products)
    assert torch.equal(WeightedSum(copied, every, None)(activations), sums)
    torch.set_num_threads(1)
    assert torch.equal(DotProducts(matrix, rows, None)(token), products)
    assert torch.equal(WeightedSum(matrix, rows, None)(activations), sums)


@pytest.mark.parametrize("compensation", ["none", "mean", "ridge"])
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_a_text_read_in_place_is_that_of_the_copies(family: str, compensation: str) -> None:
    model, found = tiny(family), {}
    for compiled in (False, True):
        with griffin.prune(model, 0.5, compensation=compensation, compiled=compiled):
            found[compiled] = generate(model, prompt(11))
    assert torch.equal(found[False].sequences, found[True].sequences)
    assert difference(step_logits(found[False]), step_logits(found[True])) < 1e-5


@pytest.mark.parametrize("compensation", ["none", "ridge"])
@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_when_the_rows_are_copied_changes_no_bit(
    family: str, compensation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = tiny(family), []
    for after in (0, 2, 1000):
        monkeypatch.setattr(compaction, "COPY_AFTER", after)
        with griffin.prune(model, 0.5, compensation=compensation):
            found.append(step_logits(generate(model, prompt(11))))
    assert len(found[0]) > 4
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", ONE_PER_LAYOUT)
def test_one_token_and_many_in_turn(family: str) -> None:
    """Many tokens make copies; the next single one reads in place again."""
    model, ids = tiny(family), prompt(6)
    found = []
    for compiled in (False, True):
        with torch.no_grad(), griffin.prune(model, 0.5, compiled=compiled):
            cache = model(prompt(11)).past_key_values
            found.append([model(part, past_key_values=cache).logits for part in ids.split([1, 2, 1, 2], dim=1)])
    for in_place, copied in zip(*found, strict=True):
        assert difference(in_place, copied) < 1e-5


def test_gradients_and_autocast_are_those_of_the_copies() -> None:
    model, ids = tiny("llama"), prompt(1)
    found = []
    for compiled in (False, True):
        with griffin.prune(model, 0.5, compiled=compiled):
            cache = model(prompt(11)).past_key_values
            model.zero_grad()
            model(ids, past_key_values=cache).logits.sum().backward()
            gradient = model.get_input_embeddings().weight.grad.clone()
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                cache = model(prompt(11)).past_key_values
                found.append((gradient, model(ids, past_key_values=cache).logits))
    model.zero_grad()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_forward_that_was_put_on_a_module_stays() -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model, 0.5):
        expected = step_logits(generate(model, ids))
    output, calls = griffin.find_feedforward_blocks(model)[1].output, []
    plain = output.forward

    def watched(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return plain(x)

    output.forward = watched
    try:
        with griffin.prune(model, 0.5):
            found = step_logits(generate(model, ids))
        assert output.forward is watched
        assert len(calls) == len(found)
        assert difference(found, expected) < 1e-5
    finally:
        del output.forward
