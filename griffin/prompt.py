"""Prompts: one dense pass over each, and the experts that methods choose from what it left.

Dimensions: B = rows of a batch, S = positions, T = positions whose logits are kept, V = vocabulary, D = FF width,
K = kept neurons.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from griffin.activations import ActivationStatistic, Recorded
from griffin.compensation import COMPENSATIONS
from griffin.correction import Correction
from griffin.draft_vocabulary import find_likely, output_embedding
from griffin.engine import Engine, refuse_uncroppable
from griffin.executors import Experts
from griffin.feedforward import FeedForwardBlock
from griffin.kv_cache import KVCache
from griffin.method import Method
from griffin.offloading import bring
from griffin.selection import select
from griffin.statistics import RELATIVE, STATISTICS, Evidence, aggregate
from griffin.token_statistics import TOKEN_STATISTICS, TokenChoice

# A prompt goes on from a prefix where it is less than so many times as long. Attention to a chunk and what comes before
# it has no shortcut for its causal mask, and in the end that costs what the prefix saves (measured on a CPU).
WORTH = 8


@dataclass(frozen=True, eq=False)
class PromptState:
    """What one dense pass over one prompt left. Immutable.

    Attributes:
        ids: the prompt's tokens.
        length: how many tokens its KV cache holds.
        cache: its KV cache, one row; whoever continues the prompt copies it. None once it was given away.
        logits_TV: the dense model's logits at the last positions of what was run, at least one.
        recorded: what the wanted activation statistics came to over the prompt, one row.
        continuation: the same over the dense continuation, for statistics that are oracles; None: not known.
        likely: tokens that the prompt makes likely, some more than once, where a draft's vocabulary is made of them.
    """

    ids: tuple[int, ...]
    length: int
    cache: KVCache | None
    logits_TV: Tensor
    recorded: Recorded
    continuation: Recorded | None = None
    likely: Tensor | None = None

    def extended(self, ids: Sequence[int], recorded: Recorded) -> PromptState:
        """The same prompt after some more tokens, of which only what was recorded counts."""
        return replace(self, ids=(*self.ids, *ids), recorded=recorded)

    def without_cache(self) -> PromptState:
        """The same without its KV cache, whose memory can go once it was copied."""
        return replace(self, cache=None)


def wanted(methods: Sequence[Method]) -> list[ActivationStatistic]:
    """What must be recorded of a prompt for these methods to choose from it."""
    found = []
    for method in methods:
        if not method.dense and not method.by_token:
            statistic, compensation = STATISTICS[method.statistic], COMPENSATIONS[method.compensation]
            found += [statistic.activations] if statistic.activations and not statistic.oracle else []
            found += [compensation.activations] if compensation is not None else []
            found += [RELATIVE] if method.refresh == "drift" else []
    return list(dict.fromkeys(found))


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
        prefix: a state of tokens that the prompt begins with: a single prompt goes on from there, where that pays.
        likely_tokens: whether to collect the tokens that prompts make likely, see `griffin.draft_vocabulary`.

    Returns:
        A state for each prompt.

    Raises:
        UnsupportedModelError: the model keeps more than keys and values of a prompt, such as a recurrent state.
        ValueError: the prefix was run without recording what is to be recorded.
    """
    if prefix is not None and not {*record} <= {*prefix.recorded.totals}:
        raise ValueError("the prefix was run without recording what is to be recorded of the prompt")
    if prefix is not None and likely_tokens and prefix.likely is None:
        raise ValueError("the prefix was run without collecting likely tokens")
    refuse_uncroppable(engine.model)
    lengths = [len(ids) for ids in prompts]
    counts = list(prompt_lengths) if prompt_lengths is not None else lengths
    width, device = max(lengths), engine.device
    before = Recorded(torch.zeros(len(prompts), dtype=torch.int64, device=device))
    cache, start = KVCache(len(prompts), width), 0
    before_likely = torch.empty(0, dtype=torch.int64, device=device)
    if (
        prefix is not None
        and prefix.cache is not None
        and len(prompts) == 1
        and len(prefix.ids) <= counts[0]
        and _shared(prompts[0], prefix.ids)
    ):
        start, before = len(prefix.ids), prefix.recorded
        before_likely = before_likely if prefix.likely is None else prefix.likely
        cache.put(0, prefix.cache, start)
        cache.show(1, 0, start)
    counted_BS = None
    if any(count < width for count in counts):
        columns_S = torch.arange(start, width, device=device)
        counted_BS = columns_S < torch.tensor(counts, device=device).unsqueeze(1)
    ids_BS = torch.tensor([[*ids[start:], *[0] * (width - len(ids))] for ids in prompts], device=device)
    kept = min(width - min(length - min(keep_logits, length) for length in lengths), width - start)
    with (
        engine.recording(record, before, len(prompts), width - start, counted_BS) as recorder,
        engine.hidden_states(likely_tokens) as hidden,
    ):
        logits_BTV = engine.dense(ids_BS, cache, logits_to_keep=kept)
    states = []
    likely = None
    for row, (ids, length, count) in enumerate(zip(prompts, lengths, counts, strict=True)):
        last = kept - width + length  # behind this row's last position among the kept ones
        if likely_tokens:
            run = slice(0, count - start)
            found = find_likely(output_embedding(engine.model), hidden[0][row, run])
            likely = torch.cat([before_likely, ids_BS[row, run], found])
        states.append(
            PromptState(
                tuple(ids[:count]),
                count,
                cache.row(row, 0, count),
                logits_BTV[row, max(last - keep_logits, 0) : last],
                recorder.recorded.row(row, count),
                likely=likely,
            )
        )
    return states


def _shared(ids: Sequence[int], prefix: Sequence[int]) -> bool:
    return len(prefix) < len(ids) < len(prefix) * WORTH and tuple(ids[: len(prefix)]) == tuple(prefix)


# -- choosing ---------------------------------------------------------------------------------------------------------


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
    if method.dense:
        return None
    if method.by_token:
        return choose_from(engine, [], [], [], method, seed)
    oracle = STATISTICS[method.statistic].oracle
    scored = [state.continuation if oracle and state.continuation else state.recorded for state in states]
    digests = [prompt_digest(state.ids) for state in states] if draws(method) else []
    return choose_from(engine, scored, [state.recorded for state in states], digests, method, seed)


@torch.no_grad()
def choose_from(
    engine: Engine,
    scored: Sequence[Recorded],
    compensated: Sequence[Recorded],
    digests: Sequence[int],
    method: Method,
    seed: int,
) -> Experts | None:
    """As `choose`, from what was recorded.

    Args:
        engine: the model.
        scored: of each prompt, what its neurons are scored by.
        compensated: of each prompt, what corrections are made of.
        digests: of each prompt, see `prompt_digest`; empty where the method draws no random numbers.
        method: how to choose.
        seed: of random statistics and selections.
    """
    kept = method.kept(engine.widths)
    if kept == engine.widths:
        return None
    if method.by_token:
        everything = tuple(torch.arange(width, device=engine.device) for width in engine.widths)
        choice = TokenChoice(TOKEN_STATISTICS[method.statistic], tuple(kept))
        return Experts(everything, ((),) * len(kept), choice)
    engine.use_dense()  # the blocks' own weights are read
    scores = score_neurons(engine, scored, digests, method, seed)
    neurons = tuple(
        select(scores_1D, K, method.selection, _draw(block, layer, digests[:1], seed) if digests else None)[0]
        for layer, (block, K, scores_1D) in enumerate(zip(engine.blocks, kept, scores, strict=True))
    )
    return Experts(neurons, tuple(corrections(engine, compensated, method, neurons)))


def draws(method: Method) -> bool:
    """Whether a method needs random numbers."""
    return not method.by_token and (STATISTICS[method.statistic].random or method.selection != "topk")


def score_neurons(
    engine: Engine, recorded: Sequence[Recorded], digests: Sequence[int], method: Method, seed: int
) -> list[Tensor]:
    """Per layer, the scores [1, D] float32 of one prompt, or those that several prompts share."""
    statistic = STATISTICS[method.statistic]
    own = None
    if statistic.self_generated and statistic.activations is not None:
        own = engine.self_generated[statistic.activations]
    scores = []
    for layer, block in enumerate(engine.blocks):
        each = []
        for number, one in enumerate(recorded):
            total = None if statistic.activations is None else one.totals[statistic.activations][layer]
            draw_1D = _draw(block, layer, digests[number : number + 1], seed) if statistic.random else None
            each.append(statistic.score(Evidence(block, total, draw_1D, None if own is None else own[layer])))
        if len(each) > 1:
            tokens_B = torch.cat([one.tokens_B for one in recorded])
            each = [aggregate(torch.cat(each), tokens_B.to(each[0].device))]
        scores.append(each[0])
    return scores


def corrections(
    engine: Engine, recorded: Sequence[Recorded], method: Method, neurons: Sequence[Tensor]
) -> list[tuple[Correction, ...]]:
    """Per layer, what the method's compensation adds to the block's output for these experts."""
    compensation = COMPENSATIONS[method.compensation]
    found: list[tuple[Correction, ...]] = []
    for layer, (block, neurons_K) in enumerate(zip(engine.blocks, neurons, strict=True)):
        if compensation is None or len(neurons_K) == block.width:
            found.append(())
            continue
        totals = [one.totals[compensation.activations][layer] for one in recorded]
        total = totals[0] if len(totals) == 1 else compensation.share(_same_length(totals))
        bring(block)
        found.append((compensation.correct(total, block, neurons_K.to(total.device)),))
    return found


def _same_length(totals: Sequence[Tensor]) -> Tensor:
    """[B, ..]: what is kept for the last tokens of a prompt [1, T, D] gets rows of zeros in front."""
    longest = max(total.shape[1] for total in totals)
    return torch.cat(
        [torch.nn.functional.pad(one, (0, 0, longest - one.shape[1], 0)) if one.dim() == 3 else one for one in totals]
    )


def prompt_digest(ids: Sequence[int]) -> int:
    """A checksum of a prompt's tokens, so that it draws the same experts in any batch and order."""
    return zlib.crc32(np.asarray(ids, dtype=np.int64).tobytes())


def _draw(block: FeedForwardBlock, layer: int, digests: Sequence[int], seed: int) -> Tensor:
    """[B, D] uniform numbers that follow from the seed, the layer and the row's own prompt."""
    rows = [
        torch.rand(block.width, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer}".encode(), digest)))
        for digest in digests
    ]
    return torch.stack(rows).to(block.output.get_parameter("weight").device)
