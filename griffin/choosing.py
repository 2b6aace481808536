"""Choosing: from what was recorded of prompts to experts and their corrections.

Dimensions: B = rows of a batch, D = FF width, K = kept neurons.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from griffin.compensation import COMPENSATIONS, Compensation, PrunedLayer
from griffin.engine import Engine
from griffin.experts import Experts
from griffin.method import Method
from griffin.prompt import PromptState
from griffin.selection import select
from griffin.statistics import Evidence, Statistic, TokenChoice, TokenStatistic, aggregate


@torch.no_grad()
def choose(engine: Engine, states: Sequence[PromptState], method: Method, seed: int = 0) -> Experts | None:
    """The experts of a prompt, or the one set that several prompts share, by the paper's aggregation.

    Args:
        engine: the model.
        states: of the prompt or prompts, with what the method wants recorded.
        method: how to choose.
        seed: of random statistics and selections; a prompt draws the same in any batch and order.

    Returns:
        The experts and their corrections; None where nothing is dropped.
    """
    kept = method.kept(engine.widths)
    if kept == engine.widths:
        return None
    if isinstance(method.scorer, TokenStatistic):
        everything = tuple(torch.arange(width, device=engine.device) for width in engine.widths)
        return Experts(everything, ((),) * len(kept), by_token=TokenChoice(method.scorer, tuple(kept)))
    scores = score_neurons(engine, states, method, seed)
    draws = [_draw(engine, layer, states[0], seed).unsqueeze(0) if method.draws else None for layer in range(len(kept))]
    neurons = tuple(
        select(scores_D.unsqueeze(0), K, method.selection, draw_1D)[0]
        for K, scores_D, draw_1D in zip(kept, scores, draws, strict=True)
    )
    experts = Experts(neurons, ((),) * len(kept), tuple(scores))
    compensation = COMPENSATIONS[method.compensation]
    if compensation is None:
        return experts
    corrections, fits = compensation.correct(_pruned_layers(engine, states, neurons, compensation))
    return Experts(neurons, experts.corrected(corrections).corrections, tuple(scores), fits=fits)


def score_neurons(engine: Engine, states: Sequence[PromptState], method: Method, seed: int = 0) -> list[Tensor]:
    """Per layer, the scores [D] float32 of one prompt, or those that several prompts share."""
    statistic = method.scorer
    assert isinstance(statistic, Statistic)
    recorded = [state.continuation if statistic.oracle and state.continuation else state.recorded for state in states]
    found = []
    for layer, block in enumerate(engine.blocks):
        scores = []
        for state, evidence in zip(states, recorded, strict=True):
            total = None if statistic.activations is None else evidence.totals[statistic.activations][layer]
            draw_1D = _draw(engine, layer, state, seed).unsqueeze(0) if statistic.random else None
            scores.append(statistic.score(Evidence(block, total, draw_1D)))
        if len(scores) > 1:
            tokens_B = torch.cat([evidence.tokens_B for evidence in recorded])
            scores = [aggregate(torch.cat(scores), tokens_B.to(scores[0].device))]
        found.append(scores[0][0])
    return found


def _pruned_layers(
    engine: Engine, states: Sequence[PromptState], neurons: Sequence[Tensor], compensation: Compensation
) -> Iterator[PrunedLayer]:
    for layer, neurons_K in enumerate(neurons):
        if len(neurons_K) < engine.widths[layer]:
            totals = [state.recorded.totals[compensation.activations][layer] for state in states]
            total = totals[0] if len(totals) == 1 else compensation.share(totals)
            yield PrunedLayer(layer, total, engine.dense.bring(layer), neurons_K.to(total.device))


def prompt_digest(ids: Sequence[int]) -> int:
    """A checksum of a prompt's tokens, so that it draws the same experts in any batch and order."""
    return zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes())


def _draw(engine: Engine, layer: int, state: PromptState, seed: int) -> Tensor:
    """[D] uniform numbers that follow from the seed, the layer and the prompt."""
    number = zlib.crc32(f"{seed} {layer}".encode(), prompt_digest(state.ids))
    draw_D = torch.rand(engine.widths[layer], generator=torch.Generator().manual_seed(number))
    return draw_D.to(engine.blocks[layer].output.get_parameter("weight").device)
