"""Text that a model writes by itself, from nothing but its BOS token: what its neurons do when no prompt asks.

Some statistics weigh a prompt against it. It needs no data, is sampled once per model with a fixed seed, and what was
gathered over it is kept for as long as the model lives.

Dimensions: B = sampled texts, S = tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from griffin.feedforward import FeedForwardBlock
from griffin.gathering import Gatherer, Gathering

TEXTS = 8
TOKENS = 64

_gathered: WeakKeyDictionary[nn.Module, dict[Gathering, list[Tensor]]] = WeakKeyDictionary()


def gathered_over_own_text(model: nn.Module, blocks: Sequence[FeedForwardBlock], gathering: Gathering) -> list[Tensor]:
    """What a gathering comes to over the model's own text: per layer [1, ..], the sum over all texts.

    Args:
        model: a causal language model that is not being pruned.
        blocks: its FF blocks.
        gathering: one whose parts are sums over tokens.

    Raises:
        ValueError: the model's configuration names no BOS token.
    """
    known = _gathered.setdefault(model, {})
    if gathering not in known:
        gatherer = Gatherer(blocks, [gathering])
        ids_BS = sample(model)
        counted_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        counted_BS[:, 0] = False  # the BOS token is no text, and its activations are like no other token's
        gatherer.expect(len(ids_BS), ids_BS.shape[1], counted_BS)
        gatherer.attach()
        try:
            with torch.no_grad():
                model(ids_BS)
        finally:
            gatherer.detach()
        totals = [gatherer.total(gathering, layer) for layer in range(len(blocks))]
        known[gathering] = [total.sum(dim=0, keepdim=True) for total in totals if total is not None]
    return known[gathering]


@torch.no_grad()
def sample(model: nn.Module, seed: int = 0) -> Tensor:
    """[B, 1 + S] token ids: the BOS token and what the model goes on with, sampled from its whole distribution.

    Raises:
        ValueError: the model's configuration names no BOS token.
    """
    language_model: Any = model
    bos = language_model.config.get_text_config(decoder=True).bos_token_id
    if bos is None:
        raise ValueError("the model's configuration names no bos_token_id, from which its own text begins")
    numbers = torch.Generator().manual_seed(seed)
    ids_BS = torch.full((TEXTS, 1), bos, device=_device(model))
    cache, latest_B1 = None, ids_BS
    for _ in range(TOKENS):
        output = language_model(latest_B1, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        chances_BV = output.logits[:, -1].float().softmax(dim=-1).cpu()
        latest_B1 = torch.multinomial(chances_BV, 1, generator=numbers).to(ids_BS.device)
        ids_BS = torch.cat([ids_BS, latest_B1], dim=1)
    return ids_BS


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
