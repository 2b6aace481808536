"""Prompts: one dense pass over each, and what it leaves for methods to choose from.

Dimensions: B = rows of a batch, S = positions, T = positions whose logits are kept, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from griffin.activations import ActivationStatistic, Recorded
from griffin.compensation import COMPENSATIONS
from griffin.draft_vocabulary import find_likely, output_embedding
from griffin.engine import Engine, refuse_uncroppable
from griffin.kv_cache import KVCache
from griffin.method import Method
from griffin.statistics import Statistic


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

    def without_cache(self) -> PromptState:
        """The same without its KV cache, whose memory can go once it was copied."""
        return replace(self, cache=None)

    def without_recorded(self) -> PromptState:
        """The same without what was recorded, whose memory can go once experts are chosen for good."""
        return replace(self, recorded=replace(self.recorded, totals={}), continuation=None, likely=None)


def wanted(methods: Sequence[Method]) -> list[ActivationStatistic]:
    """What must be recorded of a prompt for these methods to choose from it."""
    statistics: list[ActivationStatistic] = []
    for method in methods:
        scorer, compensation = method.scorer, COMPENSATIONS[method.compensation]
        if not method.dense and isinstance(scorer, Statistic):
            statistics += [scorer.activations] if scorer.activations and not scorer.oracle else []
            statistics += [compensation.activations] if compensation is not None else []
    return list(dict.fromkeys(statistics))


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

    One prompt at a time is to the bit what it is alone, and keeps a device busy where it is long; for many short ones a
    batch is faster.

    Args:
        engine: the model.
        prompts: token ids of each, which may go on after the prompt's end.
        record: what to record, see `wanted`.
        prompt_lengths: how many tokens of each are the prompt: only these are recorded and cached. None: all.
        keep_logits: at how many of the last positions of each row logits are kept, at most.
        prefix: a state of tokens that the one prompt begins with, which are not run again.
        likely_tokens: whether to collect the tokens that prompts make likely, see `griffin.draft_vocabulary`.

    Returns:
        A state for each prompt.

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
    before = Recorded(torch.zeros(len(prompts), dtype=torch.int64, device=device))
    cache, start = KVCache(len(prompts), width), 0
    before_likely = torch.empty(0, dtype=torch.int64, device=device)
    if prefix is not None and prefix.cache is not None:
        if not {*record} <= {*prefix.recorded.totals} or (likely_tokens and prefix.likely is None):
            raise ValueError("the prefix was run without recording what is to be recorded of the prompt")
        start, before = prefix.length, prefix.recorded
        before_likely = before_likely if prefix.likely is None else prefix.likely
        cache.put(0, prefix.cache, start)
        cache.set_window(1, 0, start)
    counted_BS = None
    if any(count < width for count in counts):
        columns_S = torch.arange(start, width, device=device)
        counted_BS = columns_S < torch.tensor(counts, device=device).unsqueeze(1)
    ids_BS = torch.tensor([[*ids[start:], *[0] * (width - len(ids))] for ids in prompts], device=device)
    kept = min(width - min(length - min(keep_logits, length) for length in lengths), width - start)
    recorder = engine.dense.recorder(record, before)
    recorder.expect(len(prompts), width - start, counted_BS)
    logits_BTV, hidden_BSH = engine.dense.recording(ids_BS, cache, recorder, hidden=likely_tokens, logits_to_keep=kept)
    states = []
    likely = None
    for row, (ids, length, count) in enumerate(zip(prompts, lengths, counts, strict=True)):
        last = kept - width + length  # behind this row's last position among the kept ones
        if hidden_BSH is not None:
            run = slice(0, count - start)
            best = find_likely(output_embedding(engine.dense.module), hidden_BSH[row, run])
            likely = torch.cat([before_likely, ids_BS[row, run], best.to(device)])
        states.append(
            PromptState(
                tuple(ids[:count]),
                count,
                cache.row(row, 0, count),
                logits_BTV[row, max(last - keep_logits, 0) : last].clone(),
                recorder.recorded.row(row, count),
                likely=likely,
            )
        )
    return states
