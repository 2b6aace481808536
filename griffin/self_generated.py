"""Self-generated text: what a model's neurons do in text that it writes from nothing but its BOS token.

Some statistics weigh a prompt against it. It needs no data, is sampled once per model with a fixed seed, and what was
recorded over it is kept for as long as the model lives.

Dimensions: B = sampled texts, S = tokens of each, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from griffin.activations import ActivationStatistic, Recorded
from griffin.decoding import decode
from griffin.engine import Engine
from griffin.kv_cache import KVCache
from griffin.method import Method
from griffin.prompt import prefill
from griffin.rows import Generation, Row, begin
from griffin.statistics import STATISTICS

TEXTS = 8
TOKENS = 64

_known: WeakKeyDictionary[nn.Module, dict[ActivationStatistic, tuple[Tensor, ...]]] = WeakKeyDictionary()


def prepare(engine: Engine, methods: Sequence[Method]) -> None:
    """Give the engine what these methods need to know of the model's own text; nothing runs where they need none.

    Raises:
        ValueError: the model's configuration names no BOS token.
    """
    known = _known.setdefault(engine.model, {})
    for method in methods:
        if method.dense or method.by_token:
            continue
        statistic = STATISTICS[method.statistic]
        if not statistic.self_generated or statistic.activations is None:
            continue
        if statistic.activations not in known:
            known[statistic.activations] = _recorded(Engine(engine.model), statistic.activations)
        engine.self_generated[statistic.activations] = known[statistic.activations]


def _recorded(engine: Engine, statistic: ActivationStatistic) -> tuple[Tensor, ...]:
    """Per layer [1, ..]: what an activation statistic, a sum over tokens, comes to over all texts."""
    ids_BS = sample(engine)
    rows, columns = ids_BS.shape
    counted_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    counted_BS[:, 0] = False  # the BOS token is no text, and its activations are like no other token's
    nothing = Recorded(torch.zeros(rows, dtype=torch.int64, device=engine.device))
    with engine.recording([statistic], nothing, rows, columns, counted_BS) as recorder:
        engine.dense(ids_BS, KVCache(rows, columns), logits_to_keep=1)
    return tuple(total.sum(dim=0, keepdim=True) for total in recorder.recorded.totals[statistic])


def sample(engine: Engine, seed: int = 0) -> Tensor:
    """[B, 1 + S] token ids: the BOS token and what the model goes on with, sampled from its whole distribution.

    Raises:
        ValueError: the model's configuration names no BOS token.
    """
    bos = engine.model.config.get_text_config(decoder=True).bos_token_id
    if bos is None:
        raise ValueError("the model's configuration names no bos_token_id, from which its own text begins")
    numbers = torch.Generator().manual_seed(seed)

    def pick(rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
        return torch.multinomial(logits_BV.softmax(dim=-1).cpu(), 1, generator=numbers).squeeze(1)

    (state,) = prefill(engine, [[bos]], [])
    rows = [row for _ in range(TEXTS) for row in begin(engine, [state], Method(sparsity=0.0))]
    generation = Generation(TOKENS, pick, lambda row: False)
    texts = list(decode(engine, rows, TEXTS, TEXTS, 1, generation))
    return torch.tensor([[bos, *row.tokens] for row in texts], device=engine.device)
