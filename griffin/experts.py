"""From what was gathered of the prompts to their experts and the corrections that go with them, layer by layer.

Dimensions: B = batch rows, S = positions, D = FF width, K = kept neurons.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from griffin.compensation import Compensation
from griffin.correction import Correction
from griffin.feedforward import FeedForwardBlock
from griffin.gathering import Gatherer
from griffin.offloading import bring
from griffin.selection import select
from griffin.statistics import Evidence, Statistic, aggregate


@torch.no_grad()
def choose_experts(
    blocks: Sequence[FeedForwardBlock],
    gatherer: Gatherer,
    statistic: Statistic,
    selection: str,
    kept: Sequence[int],
    digests: Sequence[int],
    seed: int,
    shared_lengths_B: Tensor | None = None,
    own_text: Sequence[Tensor] | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Scores and experts of the prompts that were gathered.

    Args:
        blocks: the FF blocks, in layer order.
        gatherer: what it gathered must include this statistic.
        statistic: what scores the neurons.
        selection: how scores become experts.
        kept: K of each layer.
        digests: per row, a number that stands for its prompt (see `prompt_digests`); unused without randomness.
        seed: of random statistics and selections.
        shared_lengths_B: where the prompts share one expert set, the length of each; fewer than the rows where
            several rows (beams) continue one prompt.
        own_text: per layer, what the statistic gathered over the model's own text, where it needs that.

    Returns:
        Per layer, scores [B, D] float32 and experts [B, K] int64; one row where static or shared.
    """
    scores, experts = [], []
    for layer, block in enumerate(blocks):
        draw_BD = _draw(block, layer, digests, seed) if statistic.random or selection != "topk" else None
        total, own = gatherer.total(statistic.gathering, layer), None if own_text is None else own_text[layer]
        scores_BD = statistic.score(Evidence(block, total, draw_BD, own))
        if shared_lengths_B is not None:
            scores_BD = scores_BD[:: max(1, len(scores_BD) // len(shared_lengths_B))]
            scores_BD = aggregate(scores_BD, shared_lengths_B) if len(scores_BD) > 1 else scores_BD
            draw_BD = None if draw_BD is None else draw_BD[:1]
        scores.append(scores_BD)
        experts.append(select(scores_BD, kept[layer], selection, draw_BD))
    return scores, experts


@torch.no_grad()
def corrections(
    blocks: Sequence[FeedForwardBlock],
    gatherer: Gatherer,
    compensation: Compensation | None,
    experts: Sequence[Tensor],
    prompts: int | None = None,
    *,
    fits: bool = False,
) -> Iterator[Correction | None]:
    """What a compensation adds to each block for these experts; one by one, since they may be large.

    Args:
        blocks: the FF blocks, in layer order.
        gatherer: what it gathered must include this compensation.
        compensation: None: nothing is added.
        experts: per layer [B, K], or [1, K] where static or shared.
        prompts: where the prompts share one expert set, and so one correction, their number; fewer than the rows
            where several rows (beams) continue one prompt.
        fits: keep what is needed to go on learning.

    Yields:
        Per layer, the correction for each row, or the one of all; None where nothing is added or dropped.
    """
    for layer, (block, experts_BK) in enumerate(zip(blocks, experts, strict=True)):
        total = None if compensation is None else gatherer.total(compensation.gathering, layer)
        if compensation is None or total is None or experts_BK.shape[1] == block.width:
            yield None
            continue
        if prompts is not None:
            total = compensation.share(total[:: max(1, len(total) // prompts)])
        bring(block)
        correction = compensation.correct(total, block, experts_BK.to(total.device).expand(len(total), -1))
        yield correction if fits else replace(correction, fits=())


def prompt_digests(ids_BS: Tensor, counted_BS: Tensor | None, before: Sequence[int]) -> list[int]:
    """A running checksum of each row's tokens, so that a prompt draws the same experts in any batch and order.

    Args:
        ids_BS: token ids.
        counted_BS: which of them belong to the prompt; None: all.
        before: the rows' checksums of earlier stretches, 0 at the beginning.

    Returns:
        B numbers.
    """
    rows = []
    for row, digest in enumerate(before):
        ids_S = ids_BS[row] if counted_BS is None else ids_BS[row][counted_BS[row].to(ids_BS.device)]
        rows.append(zlib.crc32(ids_S.to("cpu", torch.int64).numpy().tobytes(), digest))
    return rows


def _draw(block: FeedForwardBlock, layer: int, digests: Sequence[int], seed: int) -> Tensor:
    """[B, D] uniform numbers that follow from the seed, the layer and the row's own prompt."""
    rows = [
        torch.rand(block.width, generator=torch.Generator().manual_seed(zlib.crc32(f"{seed} {layer}".encode(), digest)))
        for digest in digests
    ]
    return torch.stack(rows).to(block.output.get_parameter("weight").device)
