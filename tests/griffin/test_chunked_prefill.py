"""A prompt in chunks gives the experts and tokens of the whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VARIED, WIDTHS, tiny
from prompts import pad, prompt
from running import as_lists, difference, generate, new_tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

import griffin
from griffin import Pruner, activations


# In chunks of 5: whole, exactly one chunk, a last chunk of three tokens; and for every layout of one.
@pytest.mark.parametrize(
    ("family", "length"), [("llama", 1), ("llama", 5), ("llama", 13), *((family, 11) for family in VARIED)]
)
def test_generate_in_chunks_equals_generate(family: str, length: int) -> None:
    model, ids = tiny(family), prompt(length)
    with griffin.prune(model) as pruner:
        whole = generate(model, ids)
        experts = as_lists(pruner.experts)
        chunked = generate(model, ids, prefill_chunk_size=5)
        assert as_lists(pruner.experts) == experts
    assert new_tokens(chunked, ids) == new_tokens(whole, ids)


@pytest.mark.parametrize("statistic", [name for name, one in griffin.STATISTICS.items() if not one.oracle])
def test_a_padded_batch_in_chunks(statistic: str) -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad([prompt(11, 0), prompt(3, 1)], "left")  # the second row's first chunk is padding only
    with griffin.prune(model, statistic=statistic, mode="masked") as pruner:
        whole = generate(model, ids_BS, mask_BS)
        scores = pruner.scores
        chunked = generate(model, ids_BS, mask_BS, prefill_chunk_size=5)
        for found_BD, expected_BD in zip(pruner.scores, scores, strict=True):
            assert difference(found_BD, expected_BD) < 1e-5
    assert new_tokens(chunked, ids_BS) == new_tokens(whole, ids_BS)


def test_shared_experts_count_the_tokens_of_all_chunks() -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad([prompt(11, 0), prompt(3, 1)], "left")
    with griffin.prune(model, shared_experts=True) as pruner:
        generate(model, ids_BS, mask_BS)
        scores = pruner.scores
        generate(model, ids_BS, mask_BS, prefill_chunk_size=5)
        for found_1D, expected_1D in zip(pruner.scores, scores, strict=True):
            assert difference(found_1D, expected_1D) < 1e-5


def forward_in_chunks(model: PreTrainedModel, pruner: Pruner, ids: Tensor, lengths: list[int]) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with pruner.prefill():
        for chunk in ids.split(lengths, dim=1):
            model(chunk, past_key_values=cache)
    return cache


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_forward_calls_in_chunks_equal_one_call(family: str, mode: str) -> None:
    model, ids, token = tiny(family), prompt(11), prompt(1, 1)
    with griffin.prune(model, mode=mode) as pruner:
        expected = model(token, past_key_values=model(ids).past_key_values).logits
        experts = as_lists(pruner.experts)
        for lengths in ([11], [4, 6, 1], [1, 10]):
            cache = forward_in_chunks(model, pruner, ids, lengths)
            found = model(token, past_key_values=cache).logits
            assert as_lists(pruner.experts) == experts
            assert difference(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("mode", griffin.MODES)
def test_chunks_run_dense(mode: str) -> None:
    model, ids = tiny("llama"), prompt(11)
    expected = model(ids).logits[:, -3:]
    with griffin.prune(model, mode=mode) as pruner, pruner.prefill():
        found = model(ids[:, 8:], past_key_values=model(ids[:, :8]).past_key_values).logits
    assert difference(found, expected) < 1e-5


@torch.no_grad()
def test_reading_experts_between_chunks_does_not_fix_them() -> None:
    model, ids = tiny("llama"), prompt(11)
    with griffin.prune(model) as pruner:
        model(ids)
        expected = as_lists(pruner.experts)
        with pruner.prefill():
            cache = model(ids[:, :6]).past_key_values
            early = as_lists(pruner.experts)
            model(ids[:, 6:], past_key_values=cache)
        assert as_lists(pruner.experts) == expected != early


@torch.no_grad()
def test_two_prompts_in_one_prefill_are_two_prompts() -> None:
    model = tiny("llama")
    with griffin.prune(model) as pruner:
        model(prompt(7, 1))
        expected = as_lists(pruner.experts)
        with pruner.prefill():
            model(prompt(11))
            model(prompt(7, 1))
        assert as_lists(pruner.experts) == expected


@torch.no_grad()
def test_prefill_ends_with_its_context_even_after_an_exception() -> None:
    model, ids, token = tiny("llama"), prompt(7), prompt(1, 1)
    with griffin.prune(model) as pruner:
        expected = model(token, past_key_values=model(ids).past_key_values).logits
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match="input_ids"), pruner.prefill():
            model()
        assert torch.equal(model(token, past_key_values=cache).logits, expected)


@torch.no_grad()
def test_a_chunk_with_other_rows_is_refused() -> None:
    model = tiny("llama")
    with griffin.prune(model, mode="masked") as pruner, pruner.prefill():
        cache = model(prompt(7)).past_key_values
        cache.batch_repeat_interleave(2)
        with pytest.raises(ValueError, match="1 rows and its next chunk 2"):
            model(prompt(2).expand(2, -1), past_key_values=cache)


@pytest.mark.parametrize("compensation", griffin.COMPENSATIONS)
@pytest.mark.parametrize("statistic", [name for name, one in griffin.STATISTICS.items() if not one.oracle])
def test_a_call_that_is_recorded_in_pieces(statistic: str, compensation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    ids_BS, mask_BS = pad([prompt(11, 0), prompt(3, 1)], "left")  # the second row's first pieces are padding only
    with griffin.prune(model, statistic=statistic, compensation=compensation, mode="masked") as pruner:
        whole = generate(model, ids_BS, mask_BS)
        scores = pruner.scores
        monkeypatch.setattr(activations, "PIECE", 2 * 3 * WIDTHS["llama"])  # three positions at a time
        pieces = generate(model, ids_BS, mask_BS)
        for found_BD, expected_BD in zip(pruner.scores, scores, strict=True):
            assert difference(found_BD, expected_BD) < 1e-5
    assert new_tokens(pieces, ids_BS) == new_tokens(whole, ids_BS)


class Largest(TorchDispatchMode):
    """The most numbers that any operation has made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:  # no view
            self.numbers = max(self.numbers, made.numel())
        return made


@pytest.mark.parametrize("statistic", ["griffin", "wanda", "max"])
def test_what_recording_makes_is_bounded(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = griffin.find_feedforward_blocks(tiny("llama"))
    z_SD = torch.randn(64, WIDTHS["llama"], dtype=torch.bfloat16)
    monkeypatch.setattr(activations, "PIECE", 8 * WIDTHS["llama"])
    recorder = activations.Recorder(blocks, griffin.wanted([griffin.Method(statistic)]))
    recorder.begin(activations.Recorded(torch.zeros(1, dtype=torch.int64)))
    recorder.expect(1, 64, None)
    with Largest() as largest:
        recorder.record(0, z_SD)
    assert largest.numbers == 8 * WIDTHS["llama"]
