"""GRIFFIN written down from its formulas, without the library: no KV cache, no batches, no padding, float64 scores.

Generation with pruned neurons is one full pass over prompt and continuation in which z is masked at the positions
of the continuation: the same by causality, since no position sees a later one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


def output_projection(model: PreTrainedModel, family: str, layer: int) -> nn.Module:
    """The projection whose input is z."""
    return model.get_submodule(f"{PATHS[family].module.format(layer)}.{PATHS[family].output}")


def input_matrices(model: PreTrainedModel, family: str, layer: int) -> list[Tensor]:
    """Wg and Wu, or W1: [D, H] each, float64."""
    paths = PATHS[family]
    modules = [model.get_submodule(f"{paths.module.format(layer)}.{name}") for name in paths.inputs]
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


# Which neurons each token keeps [S, D], of layer, z [S, D], and what the first input projection gave [S, D].
ByToken = Callable[[int, Tensor, Tensor], Tensor]


class Span(NamedTuple):
    """Positions start to stop (exclusive) run on these neurons, one list per layer."""

    start: int
    stop: int
    experts: list[list[int]] | ByToken


@torch.no_grad()
def run(model: PreTrainedModel, family: str, ids: Tensor, *spans: Span) -> tuple[Tensor, list[Tensor]]:
    """One pass without a cache: logits [S, V], and z [S, D] of each layer, as before masking, in float64."""
    seen: list[Tensor] = []
    projected: dict[int, Tensor] = {}

    def see(layer: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        projected[layer] = output.reshape(ids.shape[1], -1)

    def mask(layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z_SD = args[0].reshape(ids.shape[1], -1)
        seen.append(z_SD.double())
        mask_SD = torch.ones_like(z_SD)
        for span in spans:
            here = slice(span.start, span.stop)
            if callable(span.experts):
                mask_SD[here] = span.experts(layer, z_SD[here], projected[layer][here, : z_SD.shape[1]]).float()
            else:
                mask_SD[here] = 0
                mask_SD[here, span.experts[layer]] = 1
        return ((z_SD * mask_SD).reshape(args[0].shape),)

    handles = []
    for layer in range(LAYERS):
        first = model.get_submodule(f"{PATHS[family].module.format(layer)}.{PATHS[family].inputs[0]}")
        handles.append(first.register_forward_hook(partial(see, layer)))
        output = output_projection(model, family, layer)
        handles.append(output.register_forward_pre_hook(partial(mask, layer)))
    logits = model(input_ids=ids, use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return logits, seen


def score(statistic: str, z_SD: Tensor, input_matrices_DH: list[Tensor], output_matrix_HD: Tensor) -> Tensor:
    """[D]: each neuron's score by the formulas."""
    lengths_D = output_matrix_HD.norm(dim=0)
    z_SD = z_SD * lengths_D if statistic == "oracle" else z_SD
    rows = [z_D / z_D.norm() for z_D in z_SD if z_D.any()]
    griffin_D = torch.stack(rows).square().sum(dim=0).sqrt()
    return {
        "griffin": griffin_D,
        "oracle": griffin_D,
        "impact": griffin_D * lengths_D,
        "joint": (griffin_D * griffin_D * lengths_D).sqrt(),
        "wanda": output_matrix_HD.abs().sum(dim=0) * z_SD.norm(dim=0),
        "magnitude": torch.stack([matrix_DH.norm(dim=1) for matrix_DH in input_matrices_DH]).prod(dim=0),
    }[statistic]


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


def generate(
    model: PreTrainedModel, family: str, ids: Tensor, chosen: list[list[int]] | ByToken, tokens: int, *before: Span
) -> tuple[list[int], Tensor]:
    """Greedy generation: new tokens, and the logits [tokens, V] that each was chosen from, behind spans before."""
    prompt_length = ids.shape[1]
    steps = []
    for _ in range(tokens):
        logits, _ = run(model, family, ids, *before, Span(prompt_length, ids.shape[1], chosen))
        steps.append(logits[-1])
        ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
    return ids[0, prompt_length:].tolist(), torch.stack(steps)
