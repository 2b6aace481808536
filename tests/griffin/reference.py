"""GRIFFIN written down from its formulas, without the library: no KV cache, no batches, no padding, float64 scores.

Generation with pruned neurons is one full pass over prompt and continuation in which z is masked at the positions
of the continuation: the same by causality, since no position sees a later one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from families import LAYERS
from torch import Tensor, nn
from transformers import PreTrainedModel


class Paths(NamedTuple):
    """Where a family keeps its FF projections; `{}` is the layer."""

    module: str
    inputs: tuple[str, ...]
    output: str
    fused: bool = False  # gate and up are the halves of one matrix
    transposed: bool = False  # weights are [in, out]


_GATED = Paths("model.layers.{}.mlp", ("gate_proj", "up_proj"), "down_proj")
_FUSED = Paths("model.layers.{}.mlp", ("gate_up_proj",), "down_proj", fused=True)
_OPT = Paths("model.decoder.layers.{}", ("fc1",), "fc2")
PATHS = {
    **dict.fromkeys(["llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"], _GATED),
    **dict.fromkeys(["stablelm", "olmo2", "cohere", "granite"], _GATED),
    **dict.fromkeys(["phi3", "glm"], _FUSED),
    **dict.fromkeys(["opt", "opt_350m"], _OPT),
    "phi": Paths("model.layers.{}.mlp", ("fc1",), "fc2"),
    "gpt_neox": Paths("gpt_neox.layers.{}.mlp", ("dense_h_to_4h",), "dense_4h_to_h"),
    **dict.fromkeys(["falcon", "bloom"], Paths("transformer.h.{}.mlp", ("dense_h_to_4h",), "dense_4h_to_h")),
    "gpt2": Paths("transformer.h.{}.mlp", ("c_fc",), "c_proj", transposed=True),
    "starcoder2": Paths("model.layers.{}.mlp", ("c_fc",), "c_proj"),
}


def module_name(family: str, layer: int) -> str:
    """The module that holds a layer's projections."""
    return PATHS[family].module.format(layer)


def output_projection(model: PreTrainedModel, family: str, layer: int) -> nn.Module:
    """The projection whose input is z."""
    return model.get_submodule(f"{module_name(family, layer)}.{PATHS[family].output}")


def input_matrices(model: PreTrainedModel, family: str, layer: int) -> list[Tensor]:
    """Wg and Wu, or W1: [D, H] each, float64."""
    paths = PATHS[family]
    modules = [model.get_submodule(f"{module_name(family, layer)}.{name}") for name in paths.inputs]
    weights = [module.weight.detach().double() for module in modules]
    if paths.transposed:
        weights = [weight.T for weight in weights]
    if paths.fused:
        half = weights[0].shape[0] // 2
        weights = [weights[0][:half], weights[0][half:]]
    return weights


def output_matrix(model: PreTrainedModel, family: str, layer: int) -> Tensor:
    """Wd or W2, [H, D], float64."""
    weight = output_projection(model, family, layer).weight.detach().double()
    return weight.T if PATHS[family].transposed else weight


@contextmanager
def _hooked(model: PreTrainedModel, family: str, hook: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """`hook(layer, z)` gives the z that the output projection sees."""
    handles = [
        output_projection(model, family, layer).register_forward_pre_hook(
            lambda _, args, layer=layer: (hook(layer, args[0]),)
        )
        for layer in range(LAYERS)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Span(NamedTuple):
    """Positions start to stop (exclusive) run on these neurons, one list per layer."""

    start: int
    stop: int
    experts: list[list[int]]


@torch.no_grad()
def run(model: PreTrainedModel, family: str, ids: Tensor, *spans: Span) -> tuple[Tensor, list[Tensor]]:
    """One pass without a cache: logits [S, V], and z [S, D] of each layer, as before masking, in float64."""
    seen: list[Tensor] = []

    def mask(layer: int, z: Tensor) -> Tensor:
        z_SD = z.reshape(ids.shape[1], -1)
        seen.append(z_SD.double())
        mask_SD = torch.ones_like(z_SD)
        for span in spans:
            mask_SD[span.start : span.stop] = 0
            mask_SD[span.start : span.stop, span.experts[layer]] = 1
        return (z_SD * mask_SD).reshape(z.shape)

    with _hooked(model, family, mask):
        logits = model(input_ids=ids, use_cache=False).logits[0]
    return logits, seen


def score(statistic: str, z_SD: Tensor, input_matrices_DH: list[Tensor], output_matrix_HD: Tensor) -> Tensor:
    """[D]: each neuron's score by the formulas."""
    lengths_D = (output_matrix_HD * output_matrix_HD).sum(dim=0).sqrt()
    griffin_D = torch.zeros(z_SD.shape[1], dtype=torch.float64)
    for z_D in z_SD * lengths_D if statistic == "oracle" else z_SD:
        length = math.sqrt(float((z_D * z_D).sum()))
        if length > 0:
            griffin_D += (z_D / length) ** 2
    griffin_D = griffin_D.sqrt()
    if statistic in ("griffin", "oracle"):
        return griffin_D
    if statistic == "impact":
        return griffin_D * lengths_D
    if statistic == "joint":
        return (griffin_D * griffin_D * lengths_D).sqrt()
    if statistic == "wanda":
        return output_matrix_HD.abs().sum(dim=0) * (z_SD * z_SD).sum(dim=0).sqrt()
    if statistic == "magnitude":
        product_D = torch.ones(z_SD.shape[1], dtype=torch.float64)
        for matrix_DH in input_matrices_DH:
            product_D *= (matrix_DH * matrix_DH).sum(dim=1).sqrt()
        return product_D
    raise ValueError(statistic)


def score_layers(model: PreTrainedModel, family: str, statistic: str, z: list[Tensor]) -> list[Tensor]:
    """Each layer's scores [D] from its z [S, D]."""
    return [
        score(statistic, z[layer], input_matrices(model, family, layer), output_matrix(model, family, layer))
        for layer in range(LAYERS)
    ]


def scores(model: PreTrainedModel, family: str, statistic: str, ids: Tensor) -> list[Tensor]:
    """Each layer's scores [D] for a prompt [1, S]."""
    return score_layers(model, family, statistic, run(model, family, ids)[1])


def best(scores_D: Tensor, sparsity: float) -> list[int]:
    """The int(D * (1 - sparsity)) neurons, at least one, of the largest scores, ascending."""
    kept = max(1, int(len(scores_D) * (1 - sparsity)))
    ranked = sorted(range(len(scores_D)), key=lambda neuron: float(scores_D[neuron]), reverse=True)
    return sorted(ranked[:kept])


def experts(model: PreTrainedModel, family: str, statistic: str, ids: Tensor, sparsity: float) -> list[list[int]]:
    """Each layer's experts for a prompt [1, S]."""
    return [best(scores_D, sparsity) for scores_D in scores(model, family, statistic, ids)]


def generate(
    model: PreTrainedModel, family: str, ids: Tensor, chosen: list[list[int]] | None, tokens: int
) -> tuple[list[int], Tensor]:
    """Greedy generation: new tokens, and the logits [tokens, V] that each was chosen from; None: dense."""
    prompt_length = ids.shape[1]
    steps = []
    for _ in range(tokens):
        spans = [] if chosen is None else [Span(prompt_length, ids.shape[1], chosen)]
        logits, _ = run(model, family, ids, *spans)
        steps.append(logits[-1])
        ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
    return ids[0, prompt_length:].tolist(), torch.stack(steps)
