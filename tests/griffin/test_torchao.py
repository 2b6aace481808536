"""Weights as torchao's products for GPUs take them, as far as a CPU can tell."""

from __future__ import annotations

import pytest
import torch
from running import difference
from torch import nn
from torch._subclasses import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from griffin import quantization


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 1024), (13, 45)])
def test_torchaos_int8_weights_are_the_rounded_ones_and_do_not_move(
    outputs: int, inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantization, "TORCHAO", ("cpu",))
    layer, input_NI = nn.Linear(inputs, outputs, dtype=torch.bfloat16), torch.randn(3, inputs, dtype=torch.bfloat16)
    addresses = set()
    for _ in range(2):
        weight_OI = torch.randn(outputs, inputs, dtype=torch.bfloat16)
        source = nn.Linear(inputs, outputs, dtype=torch.bfloat16)
        source.weight = nn.Parameter(weight_OI)
        quantization.quantize(layer, "int8", source, calls="compiled")
        assert type(layer.weight.data).__name__ == "Int8Tensor"
        addresses.add(layer.weight.qdata.data_ptr())  # type: ignore[operator]
        expected = nn.functional.linear(input_NI, quantization.rounded(weight_OI, "int8"), source.bias)
        assert difference(layer(input_NI), expected) < 0.02
    assert len(addresses) == 1


@pytest.mark.parametrize(("outputs", "inputs"), [(16, 1024), (13, 45)])
def test_int4_tiles_are_what_the_product_for_gpus_takes(outputs: int, inputs: int) -> None:
    weight_OI, input_NI = torch.randn(outputs, inputs, dtype=torch.bfloat16), torch.randn(3, inputs).bfloat16()
    tiles_OI, scales_GO2 = quantization.int4_tiles(weight_OI)
    # The product for CPUs takes levels and scales of the same meaning, in an order of its own.
    levels_OI = torch.stack([tiles_OI >> 4, tiles_OI & 15], dim=-1).flatten(1).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels_OI, 1)
    padded_NI = nn.functional.pad(input_NI, (0, -inputs % 1024))
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(padded_NI, packed, quantization.GROUP, scales_GO2)
    expected = nn.functional.linear(input_NI, quantization.rounded(weight_OI, "int4"))
    assert difference(found[:, :outputs], expected) < 0.02


def test_torchaos_int4_weights_pass_torchs_checks_of_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    monkeypatch.setattr(quantization, "TORCHAO", ("cpu",))
    with FakeTensorMode():  # the product itself needs a GPU
        layer = nn.Linear(45, 13, dtype=torch.bfloat16)
        quantization.quantize(layer, "int4", calls="compiled")
        assert type(layer.weight.data).__name__ == "Int4TilePackedTo4dTensor"
        assert layer(torch.empty(2, 3, 45, dtype=torch.bfloat16)).shape == (2, 3, 13)


def test_layers_that_are_not_linear_and_eager_int8_have_rounded_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "_runs_torchao", lambda weight_OI: True)
    with torch.device("meta"):  # no CPU, whose own product would be taken
        cases = [(Conv1D(13, 45), "compiled"), (nn.Linear(45, 13), "eager"), (nn.Linear(45, 13), "masked")]
    for layer, calls in cases:
        quantization.quantize(layer.to(torch.bfloat16), "int8", calls=calls)
        assert type(layer.weight) is nn.Parameter, (
            "torchao would multiply Conv1D otherwise, and write eager weights anew"
        )
