"""Finding the FF blocks, and refusing what cannot be pruned by naming the module."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from families import FAMILIES, LAYERS, WIDTHS, build, fresh, tiny
from torch import nn
from transformers.integrations.finegrained_fp8 import FP8Linear

from griffin import UnsupportedModelError, find_feedforward_blocks

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_has_one_block_in_layer_order(family: str) -> None:
    blocks = find_feedforward_blocks(tiny(family))
    assert [block.name for block in blocks] == [reference.module_name(family, layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_holds_the_projections_of_its_layer(family: str) -> None:
    model, paths = tiny(family), reference.PATHS[family]
    for layer, block in enumerate(find_feedforward_blocks(model)):
        module = model.get_submodule(reference.module_name(family, layer))
        assert block.output is reference.output_projection(model, family, layer)
        assert len(block.inputs) == len(paths.inputs)
        assert all(found is getattr(module, name) for found, name in zip(block.inputs, paths.inputs, strict=True))
        assert block.width == WIDTHS[family]
        assert block.parts == (2 if paths.fused else 1)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("mixtral", {"num_local_experts": 4}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
        ("gpt_oss", {"num_local_experts": 4}),
    ],
)
def test_a_mixture_of_experts_is_refused_by_name(model_type: str, options: dict[str, int]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.0\.mlp'.* mixture of experts"):
        find_feedforward_blocks(build(model_type, **(SMALL | options)))


def test_a_mixture_of_experts_behind_dense_layers_is_refused_by_name() -> None:
    options = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0, 1]}
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.2\.mlp'"):
        find_feedforward_blocks(build("qwen3_moe", **(SMALL | options)))


class Unknown(nn.Module):
    """A projection of a kind the library has never heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(80, 32))


def int8_linear() -> nn.Linear:
    linear = nn.Linear(32, 80)
    linear.weight = nn.Parameter(torch.zeros(80, 32, dtype=torch.int8), requires_grad=False)
    return linear


def reparametrised_linear() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(32, 80))  # its weight is computed, not stored


@pytest.mark.parametrize(
    "projection",
    [
        Unknown(),
        nn.Identity(),
        nn.Linear(32, 80, device="meta"),
        int8_linear(),
        # Its weight counts as floating point, but means nothing without the scale beside it.
        FP8Linear(32, 80),
        reparametrised_linear(),
    ],
    ids=["unknown", "weightless", "meta", "int8", "fp8", "reparametrised"],
)
def test_an_unplain_projection_is_refused_by_name(projection: nn.Module) -> None:
    model = fresh("llama")
    model.model.layers[1].mlp.up_proj = projection
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.mlp\.up_proj'"):
        find_feedforward_blocks(model)


def test_an_unplain_output_projection_is_refused_by_name() -> None:
    model = fresh("opt")
    model.model.decoder.layers[2].fc2 = nn.Linear(80, 32, device="meta")
    with pytest.raises(UnsupportedModelError, match=r"'model\.decoder\.layers\.2\.fc2'"):
        find_feedforward_blocks(model)


def test_an_input_projection_of_another_width_is_refused_by_name() -> None:
    model = fresh("llama")
    model.model.layers[1].mlp.gate_proj = nn.Linear(32, 79)
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.mlp\.gate_proj' has 79"):
        find_feedforward_blocks(model)


def test_an_unknown_layout_is_refused_by_the_layers_name() -> None:
    model = fresh("llama")
    del model.model.layers[1].mlp.gate_proj
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1'.*gate_proj \+ up_proj -> down_proj"):
        find_feedforward_blocks(model)


def test_two_blocks_in_a_layer_are_refused_by_name() -> None:
    model = fresh("llama")
    model.model.layers[1].second = copy.deepcopy(model.model.layers[1].mlp)
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.1\.mlp', 'model\.layers\.1\.second'"):
        find_feedforward_blocks(model)


def test_a_module_that_is_not_a_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="Sequential is not a transformers language model"):
        find_feedforward_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_the_refusal_is_a_value_error() -> None:
    assert issubclass(UnsupportedModelError, ValueError)
