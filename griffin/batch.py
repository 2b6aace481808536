"""A batch: rows, each a (prompt, method) pair, that run together, with their refreshes.

Dimensions: B = rows of a batch, T = tokens of a row in one step, P = columns of the KV cache, N = tokens that a refresh
reads again, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from griffin.activations import Recorder
from griffin.choosing import choose
from griffin.engine import Engine
from griffin.experts import Experts
from griffin.kv_cache import KVCache, copied
from griffin.prompt import wanted
from griffin.refresh import PIECE, WEIGHT, Seen, learn, to_learn
from griffin.rows import Row


class Batch:
    """Rows that run together. They may come and go; where calls are compiled, they all come first and stay."""

    def __init__(
        self,
        engine: Engine,
        num_rows: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        *,
        waiting: bool = False,
        static: bool = False,
    ) -> None:
        self.rows: list[Row] = []
        self.ended: set[Row] = set()  # rows that still run, whose tokens are discarded
        self._engine, self._num_rows, self._max_new_tokens = engine, num_rows, max_new_tokens
        # Where rows wait, as many columns more: the batch is moved back once in so many tokens.
        self._columns = max_prompt_tokens + (2 * max_new_tokens if waiting else max_new_tokens)
        self._cache = engine.decoding_cache(num_rows, self._columns, static=static)
        self._begins: list[int] = []  # the first column of each row
        self._begins_B1 = torch.empty(0, 1, dtype=torch.int64, device=engine.device)
        self._static_mask_BP: Tensor | None = None
        self._end = 0
        self._changed = True

    @property
    def free(self) -> int:
        """How many more rows there is room for."""
        return self._num_rows - len(self.rows)

    def add(self, row: Row) -> None:
        """Take in a row: its prompt's KV cache is copied, and no longer held by the row."""
        length = row.state.length
        if not self.rows:
            self._end = 0  # a row by itself is where it would be without those before it
        longest = max([length, *(self._end - begin for begin in self._begins)])
        if longest + self._max_new_tokens > self._columns:
            self._grow(longest + 2 * self._max_new_tokens)
        if longest > self._end or self._end + self._max_new_tokens > self._columns:
            self._cache.shift(len(self.rows), min(self._begins, default=self._end), self._end, longest)
            self._begins = [begin + longest - self._end for begin in self._begins]
            self._end = longest
        assert row.state.cache is not None
        self._cache.put(len(self.rows), row.state.cache, self._end)
        row.state = row.state.without_cache()
        self.rows.append(row)
        self._begins.append(self._end - length)
        self._changed = True

    def _grow(self, columns: int) -> None:
        """A prompt has come that is longer than all that were announced."""
        rows = [copied(self._cache.row(place, begin, self._end)) for place, begin in enumerate(self._begins)]
        self._columns = columns
        self._cache = self._engine.decoding_cache(self._num_rows, columns, static=self._cache.static)
        for place, cache in enumerate(rows):
            self._cache.put(place, cache, self._end)

    def end(self, row: Row, *, leave: bool) -> None:
        """A row has ended. It leaves, and the last one takes its place; or it runs on, and its tokens are discarded."""
        if row.keep_cache:
            row.state = replace(row.state, cache=self._cache_of(row))
        if not leave:
            self.ended.add(row)
            return
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            self._cache.move(last, place, self._begins[last], self._end)
        self.rows[place], self._begins[place] = self.rows[last], self._begins[last]
        del self.rows[last], self._begins[last]
        self._changed = True

    def _cache_of(self, row: Row) -> KVCache:
        """A copy of what the cache holds of a row's prompt and its tokens but the last one."""
        begin = self._begins[self.rows.index(row)]
        end = begin + row.state.length + len(row.tokens) - 1
        return copied(self._cache.row(self.rows.index(row), begin, end))

    @torch.no_grad()
    def step(self, ids_BT: Tensor) -> Tensor:
        """Run the next tokens of every row, [B, T]; returns their logits [B, T, V].

        A row whose refresh is due runs dense, over all tokens since its last one.
        """
        due = {row: place for place, row in enumerate(self.rows) if row.due and row not in self.ended}
        for row, ids_T in zip(self.rows, ids_BT, strict=True):
            row.ran += len(ids_T)
            row.since_refresh += [ids_T] if row.refreshes else []
        logits_BTV: Sequence[Tensor] | Tensor = ()
        if len(due) < len(self.rows):
            logits_BTV = self._forward(ids_BT)
        self._end += ids_BT.shape[1]
        if not due:
            assert isinstance(logits_BTV, Tensor)
            return logits_BTV
        self._changed = True
        dense: dict[Row, Tensor] = {}
        for states in {id(row.states): row.states for row in due}.values():
            sharing = [row for row in self.rows if row.states is states]
            for row in sharing:
                if row in due:
                    dense[row], experts = self._refresh(row, due[row], ids_BT.shape[1])
                    for other in sharing:
                        other.experts = experts
            if row.method.refresh == "experts":
                chosen = choose(self._engine, states, row.method, row.seed)
                for row in sharing:
                    row.experts = chosen
        return torch.stack([dense[row] if row in dense else logits_BTV[place] for place, row in enumerate(self.rows)])

    def _forward(self, ids_BT: Tensor) -> Tensor:
        device, columns, static = ids_BT.device, ids_BT.shape[1], self._cache.static
        begin = 0 if static else min(self._begins)
        # One graph serves a batch of prompts of any lengths, so it always has a mask.
        padded = any(other != begin for other in self._begins) or (static and len(self.rows) > 1)
        if self._changed:
            self._changed = False
            self._cache.set_window(len(self.rows), begin, self._end)
            self._begins_B1 = torch.tensor(self._begins).unsqueeze(1).to(device)
            self._static_mask_BP = None
            if padded and static:
                self._static_mask_BP = (torch.arange(self._cache.columns, device=device) >= self._begins_B1).long()
        mask_BP = self._static_mask_BP
        if padded and mask_BP is None:
            mask_BP = (torch.arange(begin, self._end + columns, device=device) >= self._begins_B1).long()
        positions_BT = torch.arange(self._end, self._end + columns, device=device) - self._begins_B1
        view = self._engine.view([row.experts for row in self.rows])
        return view(ids_BT, self._cache, mask_BP=mask_BP, positions_BS=positions_BT)

    def _refresh(self, row: Row, place: int, keep_logits: int) -> tuple[Tensor, Experts]:
        """Run a row's tokens since its last refresh dense, instead of how they ran, and learn from them."""
        engine, experts = self._engine, row.experts
        assert experts is not None
        ids_1N = torch.cat(row.since_refresh).unsqueeze(0)
        count, row.since_refresh = ids_1N.shape[1], []
        row.refreshed += 1
        cache = self._cache.row(place, self._begins[place], self._end - count)
        first = self._end - count - self._begins[place]
        logits: list[Tensor] = []
        for ids_1T in torch.split(ids_1N, PIECE, dim=1):
            positions_1T = torch.arange(first, first + ids_1T.shape[1], device=ids_1N.device).unsqueeze(0)
            first += ids_1T.shape[1]
            logits_1TV, groups = engine.dense.watching(
                ids_1T, cache, positions_BS=positions_1T, logits_to_keep=min(keep_logits, ids_1T.shape[1])
            )
            logits.append(logits_1TV[0])
            if row.method.refresh == "compensation":
                experts = corrected(engine, experts, groups, ids_1T.shape[1])
            else:
                recorder = engine.dense.recorder(wanted([row.method]), row.state.recorded)
                record(recorder, groups, ids_1T.shape[1])
                row.state = replace(row.state, recorded=recorder.recorded)
        return torch.cat(logits)[-keep_logits:], experts


def record(recorder: Recorder, groups: Sequence[Seen], count: int) -> None:
    """Have the first tokens that were seen join what was recorded."""
    recorder.expect(1, count, None, WEIGHT)
    for group in groups:
        group.record(recorder, count)


def corrected(engine: Engine, experts: Experts, groups: Sequence[Seen], count: int) -> Experts:
    """Experts that have learned from the first tokens that were seen."""
    fits = []
    for fit in experts.fits:
        seen = next(group for group in groups if fit.layers[0] in group.by_layer)
        corrections, fit = learn(fit, *to_learn(fit, seen, count), partial(engine.written, experts))
        experts = experts.corrected(corrections)
        fits.append(fit)
    return replace(experts, fits=tuple(fits))
