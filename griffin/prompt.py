"""Prompts: one dense pass over each, what it leaves, and the experts that methods choose from that."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from griffin.activations import ActivationStatistic, Recorded, Recorder
from griffin.draft_vocabulary import find_likely, output_embedding
from griffin.engine import Engine, refuse_uncroppable
from griffin.kv_cache import KVCache
from griffin.method import Method
from griffin.ridge import COMPENSATIONS, fit_prompt
from griffin.selection import Experts, select
from griffin.statistics import Evidence, Statistic, TokenChoice, TokenStatistic, aggregate


@dataclass(frozen=True, eq=False)
class PromptState:
    """What one dense pass over one prompt left. Immutable."""

    ids: tuple[int, ...]
    length: int  # how many tokens its KV cache holds
    cache: KVCache | None  # of one row; whoever continues the prompt copies it. None once it was given away
    logits_TV: Tensor  # the dense model's, at the last positions of what was run, at least one
    recorded: Recorded  # what the wanted activation statistics came to over the prompt
    continuation: Recorded | None = None  # the same over the dense continuation, for oracles; None: not known
    likely: Tensor | None = None  # tokens that the prompt makes likely, some more than once, for a draft's vocabulary


def wanted(methods: Sequence[Method]) -> list[ActivationStatistic]:
    """What must be recorded of a prompt for these methods to choose from it."""
    statistics: list[ActivationStatistic | None] = []
    for method in methods:
        scorer = method.scorer
        if method.prunes and isinstance(scorer, Statistic):
            statistics += [None if scorer.oracle else scorer.activations, COMPENSATIONS[method.compensation]]
    return list(dict.fromkeys(statistic for statistic in statistics if statistic is not None))


@torch.no_grad()
def prefill(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    record: Sequence[ActivationStatistic],
    *,
    prompt_lengths: Sequence[int] | None = None,
    keep_logits: int = 1,
    prefix: PromptState | None = None,
    likely_tokens: bool = False,
) -> list[PromptState]:
    """The dense pass over prompts, in one call of the model: rows are padded on the right.

    Args:
        prompts: token ids of each, which may go on after the prompt's end.
        record: what to record, see `wanted`.
        prompt_lengths: how many tokens of each are the prompt: only these are recorded and cached. None: all.
        keep_logits: at how many of the last positions of each row logits are kept, at most.
        prefix: a state of tokens that the one prompt begins with, which are not run again.
        likely_tokens: whether to collect the tokens that prompts make likely, see `griffin.draft_vocabulary`.

    Raises:
        UnsupportedModelError: the model keeps more than keys and values of a prompt, such as a recurrent state.
        ValueError: a prompt is empty, or the prefix was run without recording what is to be recorded.
    """
    refuse_uncroppable(engine.model)
    lengths = [len(ids) for ids in prompts]
    counts = list(prompt_lengths) if prompt_lengths is not None else lengths
    if not all(lengths):
        raise ValueError(f"prompt {lengths.index(0)} is empty: expected at least one token")
    width, device = max(lengths), engine.device
    cache, start, before = KVCache(len(prompts), width), 0, [Recorded()] * len(prompts)
    before_likely = torch.empty(0, dtype=torch.int64, device=device)
    if prefix is not None and prefix.cache is not None:
        if not {*record} <= {*prefix.recorded.totals} or (likely_tokens and prefix.likely is None):
            raise ValueError("the prefix was run without recording what is to be recorded of the prompt")
        start, before = prefix.length, [prefix.recorded]
        before_likely = before_likely if prefix.likely is None else prefix.likely
        cache.put(0, prefix.cache, start)
        cache.set_window(1, 0, start)
    ids_BS = torch.tensor([[*ids[start:], *[0] * (width - len(ids))] for ids in prompts], device=device)
    kept = min(width - min(length - min(keep_logits, length) for length in lengths), width - start)
    recorder = Recorder(engine.dense.blocks, record, before)
    recorder.expect([slice(count - start) for count in counts], [count - start for count in counts])
    logits_BTV, hidden_BSH = engine.dense.recording(ids_BS, cache, recorder, hidden=likely_tokens, logits_to_keep=kept)
    states = []
    for row, (ids, count, recorded) in enumerate(zip(prompts, counts, recorder.recorded_B, strict=True)):
        last, likely = kept - width + len(ids), None  # behind this row's last position among the kept ones
        if hidden_BSH is not None:
            run = slice(count - start)
            best = find_likely(output_embedding(engine.dense.module), hidden_BSH[row, run])
            likely = torch.cat([before_likely, ids_BS[row, run], best.to(device)])
        logits_TV = logits_BTV[row, max(last - keep_logits, 0) : last].clone()
        states.append(
            PromptState(tuple(ids[:count]), count, cache.row(row, 0, count), logits_TV, recorded, likely=likely)
        )
    return states


@torch.no_grad()
def choose(engine: Engine, states: Sequence[PromptState], method: Method, seed: int = 0) -> Experts | None:
    """The experts of a prompt, or the one set that several share, by the paper's aggregation; None: nothing is dropped.

    The states have recorded what is `wanted`. A prompt draws the same random numbers in any batch and order.
    """
    kept = method.kept(engine.widths)
    whole = kept == engine.widths
    if whole and method.quantization == "none":
        return None
    if whole or isinstance(method.scorer, TokenStatistic):
        everything = tuple(torch.arange(width, device=engine.device) for width in engine.widths)
        choice = TokenChoice(method.scorer, tuple(kept)) if isinstance(method.scorer, TokenStatistic) else None
        return Experts(everything, ((),) * len(kept), by_token=choice, quantization=method.quantization)
    scores = score_neurons(engine, states, method, seed)
    draws = [_draw(engine, layer, states[0], seed) if method.draws else None for layer in range(len(kept))]
    neurons = tuple(
        select(scores_D, K, method.selection, draw_D) for K, scores_D, draw_D in zip(kept, scores, draws, strict=True)
    )
    experts = Experts(neurons, ((),) * len(kept), tuple(scores), quantization=method.quantization)
    activations = COMPENSATIONS[method.compensation]
    if activations is None:
        return experts
    dropping = [layer for layer, K in enumerate(kept) if engine.widths[layer] > K]
    rows = (torch.cat([state.recorded.totals[activations][layer] for state in states]) for layer in dropping)
    layers = []
    for layer, rows_TX in zip(dropping, rows, strict=True):
        neurons_K, width = neurons[layer].to(rows_TX.device), engine.widths[layer]
        layers.append((layer, neurons_K, rows_TX.index_select(1, neurons_K), rows_TX[:, width:].clone()))
    corrections, fits = fit_prompt(layers, partial(engine.written, experts))
    return replace(experts.corrected(corrections), fits=fits)


def score_neurons(engine: Engine, states: Sequence[PromptState], method: Method, seed: int = 0) -> list[Tensor]:
    """Per layer, the scores [D] float32 of one prompt, or those that several prompts share."""
    statistic = method.scorer
    assert isinstance(statistic, Statistic)
    recorded = [state.continuation if statistic.oracle and state.continuation else state.recorded for state in states]
    layers = []
    for layer, block in enumerate(engine.blocks):
        scores = []
        for state, evidence in zip(states, recorded, strict=True):
            total = None if statistic.activations is None else evidence.totals[statistic.activations][layer]
            draw_D = _draw(engine, layer, state, seed) if statistic.random else None
            scores.append(statistic.score(Evidence(block, total, draw_D)))
            if scores[-1].shape != (block.width,):
                shape = [*scores[-1].shape]
                raise ValueError(f"statistic={statistic.name!r}: scores of shape {shape}; expected [{block.width}]")
        layers.append(scores[0] if len(scores) == 1 else aggregate(scores, [evidence.tokens for evidence in recorded]))
    return layers


def _draw(engine: Engine, layer: int, state: PromptState, seed: int) -> Tensor:
    """Uniform numbers that follow from the seed, the layer and the prompt."""
    number = zlib.crc32(f"{seed} {layer}".encode(), zlib.crc32(np.asarray(state.ids, dtype=np.int64).tobytes()))
    draw_D = torch.rand(engine.widths[layer], generator=torch.Generator().manual_seed(number))
    return draw_D.to(engine.blocks[layer].output.get_parameter("weight").device)
