"""Batches, whose rows have experts of their own or share one set; and prompts in chunks and in pieces."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from families import LAYERS, MASKS, REFRESHED, ROWS, WIDTHS, pad, prompt, tiny
from running import TOKENS, as_lists, difference, generate, new_tokens, step_logits, text
from torch import Tensor
from transformers import DynamicCache

import griffin
from griffin import activations, ridge

pytestmark = pytest.mark.usefixtures("no_gradients")


DRAWN = [{"statistic": "random"}, {"selection": "sample"}]  # by the prompt, whatever padding it has


@pytest.mark.parametrize("options", [{}, {"statistic": "magnitude"}, {"compensation": "ridge"}, *DRAWN], ids=str)
@pytest.mark.parametrize("family", MASKS)
def test_rows_of_a_padded_batch_are_scored_and_generate_as_they_do_alone(family: str, options: dict[str, str]) -> None:
    model, (ids_BS, mask_BS) = tiny(family), pad(ROWS)
    with griffin.prune(model, mode="masked", **options) as pruner:
        batch, found = generate(model, ids_BS, mask_BS), [(pruner.experts, pruner.scores)]
        right_BS, right_mask_BS = pad(ROWS, "right")
        model(right_BS, attention_mask=right_mask_BS)
        found.append((pruner.experts, pruner.scores))
        for row, ids in enumerate(ROWS):
            alone = generate(model, ids)
            assert new_tokens(batch, ids_BS)[row] == new_tokens(alone, ids)[0]
            assert difference(step_logits(batch, row), step_logits(alone)) < 2e-5
            for experts, layers in found:
                assert as_lists(experts, row) == as_lists(pruner.experts)
                for found_BD, expected_1D in zip(layers, pruner.scores, strict=True):
                    assert difference(found_BD[row], expected_1D[0]) < 1e-5
    assert {(one.dtype, *one.shape) for one in experts} == {(torch.int64, 4, WIDTHS[family] // 2)}
    static = options.get("statistic") == "magnitude"
    assert len({tuple(experts_K) for experts_K in experts[0].tolist()}) == (1 if static else len(ROWS))


def test_what_does_not_fit_is_refused() -> None:
    model, ids_BS, dense = tiny("llama"), prompt(7).expand(2, -1), tiny("llama")(prompt(11)).past_key_values
    for options in ({}, REFRESHED):
        with griffin.prune(model, **options), pytest.raises(ValueError, match="batch has 2 prompts"):
            text(model, ids_BS)
    for mode in griffin.MODES:
        with griffin.prune(model, mode=mode):
            with pytest.raises(ValueError, match="run the prompt inside the context"):
                model(prompt(1, 1), past_key_values=dense)
            with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
                model(attention_mask=torch.ones(1, 3))
    with griffin.prune(model, mode="masked") as pruner:
        cache = model(ids_BS).past_key_values
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises(ValueError, match="2 rows and its continuation 1"):
            model(prompt(1), past_key_values=cache)
        with pytest.raises(ValueError, match=r"expected \[1, 7\]"):
            model(prompt(7), attention_mask=torch.ones(1, 6, dtype=torch.long))
        with pytest.raises(ValueError, match="2-D attention_mask"):
            model(prompt(7), attention_mask=torch.ones(1, 1, 7, 7, dtype=torch.bool).tril())
        with pruner.prefill():
            cache = model(prompt(7)).past_key_values
            cache.batch_repeat_interleave(2)
            with pytest.raises(ValueError, match="1 rows and its next chunk 2"):
                model(ids_BS, past_key_values=cache)


@pytest.mark.parametrize(("family", "statistic"), [("llama", "griffin"), ("bloom", "griffin"), ("llama", "wanda")])
def test_a_batch_shares_the_aggregated_experts(family: str, statistic: str, mode: str) -> None:
    model, (ids_BS, mask_BS) = tiny(family), pad(ROWS)
    rows = [reference.scores(model, family, statistic, ids) for ids in ROWS]
    lengths_B1 = torch.tensor([[ids.shape[1] ** 0.5] for ids in ROWS]).double()
    scores = [(torch.stack([row[layer] for row in rows]) / lengths_B1).sum(dim=0) for layer in range(LAYERS)]
    experts = [reference.best(scores_D, 0.5) for scores_D in scores]
    with griffin.prune(model, statistic=statistic, mode=mode, shared_experts=True) as pruner:
        batch = generate(model, ids_BS, mask_BS)
    assert as_lists(pruner.experts) == experts
    for found_1D, scores_D in zip(pruner.scores, scores, strict=True):
        assert (found_1D.shape[0], found_1D.dtype) == (1, torch.float32)
        assert difference(found_1D[0], scores_D) < 1e-5
    for row, ids in enumerate(ROWS):
        expected, logits = reference.generate(model, family, ids, experts, TOKENS)
        assert new_tokens(batch, ids_BS)[row] == expected
        assert difference(step_logits(batch, row), logits) < 1e-5


def test_a_shared_correction_is_that_of_all_tokens(mode: str) -> None:
    model, one, other = tiny("llama"), prompt(9), prompt(9, 1)
    with griffin.prune(model, mode=mode, compensation="ridge", shared_experts=True):
        batches = [generate(model, torch.cat(pair)) for pair in ((one, other), (other, one), (one, one))]
        alone = generate(model, one)
    assert difference(step_logits(batches[0], 0), step_logits(batches[1], 1)) < 2e-5
    # Every token twice scales what is solved on both sides.
    assert difference(step_logits(batches[2]), step_logits(alone)) < 2e-5


@pytest.mark.parametrize("statistic", [name for name, one in griffin.STATISTICS.items() if not one.oracle])
def test_a_padded_batch_in_pieces(statistic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that is recorded; of the rows that ridge compensation learns from, only the last ones are kept. What
    recording makes of a piece is bounded by its length."""
    lengths, whole_chunk = [], activations.PrefillChunk

    def noted(z_SD: Tensor, *more: Any) -> activations.PrefillChunk:
        lengths.append(len(z_SD))
        return whole_chunk(z_SD, *more)

    monkeypatch.setattr(activations, "PrefillChunk", noted)
    monkeypatch.setattr(ridge, "ROWS", 4)
    # In chunks of five, the second row's first one is padding only.
    model, batch, whole_piece = tiny("llama"), pad([prompt(11, 0), prompt(3, 1)]), activations.PIECE
    options: dict[str, Any] = {"statistic": statistic, "compensation": "ridge"}
    for more in ({"mode": "masked"}, {"shared_experts": True}):
        with griffin.prune(model, **options, **more) as pruner:
            whole, scores = generate(model, *batch), pruner.scores
            for chunk, piece, longest in ((5, whole_piece, 5), (1, whole_piece, 1), (None, 3 * WIDTHS["llama"], 3)):
                monkeypatch.setattr(activations, "PIECE", piece)
                lengths.clear()
                found = generate(model, *batch, prefill_chunk_size=chunk)
                assert max(lengths) == longest
                for found_BD, expected_BD in zip(pruner.scores, scores, strict=True):
                    assert difference(found_BD, expected_BD) < 1e-5
                for row in range(2):
                    assert difference(step_logits(found, row), step_logits(whole, row)) < 2e-5
            monkeypatch.setattr(activations, "PIECE", whole_piece)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_forward_calls_in_chunks_equal_one_call(family: str, mode: str) -> None:
    model, ids, token = tiny(family), prompt(11), prompt(1, 1)
    with griffin.prune(model, mode=mode) as pruner:
        output = model(ids)
        expected, experts = model(token, past_key_values=output.past_key_values).logits, as_lists(pruner.experts)
        for lengths in ([11], [4, 6, 1], [1, 10]):
            cache = DynamicCache(config=model.config)
            with pruner.prefill():
                for chunk in ids.split(lengths, dim=1):
                    model(chunk, past_key_values=cache)
            assert difference(model(token, past_key_values=cache).logits, expected) < 1e-5
            assert as_lists(pruner.experts) == experts
        with pruner.prefill():  # which is dense, whatever it begins with, and may be read early
            cache = model(ids[:, :8]).past_key_values
            early = as_lists(pruner.experts)
            assert difference(model(ids[:, 8:], past_key_values=cache).logits, output.logits[:, 8:]) < 1e-5
            assert as_lists(pruner.experts) == experts != early
            model(ids[:, :3])  # another prompt
            model(ids)
        assert as_lists(pruner.experts) == experts
        cache = model(ids).past_key_values
        with pytest.raises(ValueError, match="input_ids"), pruner.prefill():
            model()
        assert torch.equal(model(token, past_key_values=cache).logits, expected), "it ends by an exception too"
