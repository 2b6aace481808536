"""Bytes of weights that a step reads, counted by hand."""

from __future__ import annotations

import pytest
import torch
from families import build, tiny

from griffin import find_feedforward_blocks, neuron_bytes, traffic

V, H, D, LAYERS = 97, 32, 80, 3
ATTENTION = 2 * H * H + 2 * (H // 2) * H  # queries and output; keys and values of half as many heads
NORMS = 2 * H
CONFIG = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": D,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_are_those_counted_by_hand(tied: bool, dtype: torch.dtype) -> None:
    """One embedding is read either way: the output's, which may be the input's too."""
    model = build("llama", **CONFIG, tie_word_embeddings=tied).to(dtype)
    found = traffic(model, [40, 80, 1])
    rest = LAYERS * (ATTENTION + NORMS) + H + V * H
    assert found.dense == dtype.itemsize * (rest + LAYERS * 3 * D * H)
    assert found.pruned == dtype.itemsize * (rest + (40 + 80 + 1) * 3 * H)
    assert (found.output_row, found.vocabulary) == (dtype.itemsize * H, V)


@pytest.mark.parametrize("tied", [False, True])
def test_a_draft_reads_its_own_rows_of_the_output_embedding(tied: bool) -> None:
    found = traffic(build("llama", **CONFIG, tie_word_embeddings=tied), [40] * LAYERS)
    assert found.draft(None) == found.draft(V) == found.pruned
    assert found.draft(10) == 4 * (LAYERS * (ATTENTION + NORMS) + H + 10 * H + LAYERS * 40 * 3 * H)
    assert found.draft(11) - found.draft(10) == 4 * H


def test_nothing_is_dropped_where_all_is_kept() -> None:
    found = traffic(tiny("opt"), [D] * LAYERS)
    assert found.pruned == found.dense


@pytest.mark.parametrize(("family", "matrices"), [("llama", 3), ("phi3", 3), ("opt", 2), ("gpt2", 2)])
def test_a_neuron_is_a_row_of_each_matrix(family: str, matrices: int) -> None:
    assert neuron_bytes(find_feedforward_blocks(tiny(family))) == [4 * matrices * H] * LAYERS
