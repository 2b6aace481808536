"""Decoding: rows, each a (prompt, method) pair, that go on together, freely or along a given text.

Dimensions: T = tokens of a row in one step, P = columns of the KV cache, N = tokens that a refresh reads again, C =
tokens of a continuation.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise

import torch
from torch import Tensor

from griffin.engine import Engine
from griffin.kv_cache import copied
from griffin.refresh import PIECE, Seen, call_ends, to_learn
from griffin.rows import Generation, Row
from griffin.selection import Experts
from griffin.verification import decode_verified


class Batch:
    """Rows that run together until all have ended: finished rows still run, and their tokens are discarded. Their KV
    caches are copied. Compiled (`static`) steps want as many columns for every batch."""

    def __init__(self, engine: Engine, rows: Sequence[Row], columns: int, *, static: bool = False) -> None:
        self.rows, self.ended = list(rows), set[Row]()
        self._engine = engine
        self._cache = engine.decoding_cache(len(rows), columns, static=static)
        self._end = max(row.state.length for row in rows)
        self._begins = [self._end - row.state.length for row in rows]  # the first column of each row
        for place, row in enumerate(rows):
            assert row.state.cache is not None
            self._cache.put(place, row.state.cache, self._end)
            row.state = replace(row.state, cache=None)
        self._begins_B1 = torch.tensor(self._begins).unsqueeze(1).to(engine.device)
        self._first = 0 if static else min(self._begins)
        self._cache.set_window(len(rows), self._first, self._end)
        # One graph serves a batch of prompts of any lengths, so it always has a mask.
        self._padded = len({*self._begins}) > 1 or (static and len(rows) > 1)

    def end(self, row: Row) -> None:
        """A row has ended."""
        if row.keep_cache:
            place = self.rows.index(row)
            end = self._begins[place] + row.state.length + len(row.tokens) - 1
            row.state = replace(row.state, cache=copied(self._cache.row(place, self._begins[place], end)))
        self.ended.add(row)

    @torch.no_grad()
    def step(self, ids_BT: Tensor) -> Tensor:
        """The logits [B, T, V] of the next tokens of every row; a row whose refresh is due runs dense."""
        due = {row: place for place, row in enumerate(self.rows) if row.due and row not in self.ended}
        for row, ids_T in zip(self.rows, ids_BT, strict=True):
            row.ran += len(ids_T)
            row.since_refresh += [ids_T] if row.refreshes else []
        logits_BTV = self._forward(ids_BT) if len(due) < len(self.rows) else torch.empty(0)
        self._end += ids_BT.shape[1]
        if not due:
            return logits_BTV
        dense: dict[Row, Tensor] = {}
        for row, place in due.items():
            before = row.experts
            dense[row], after = self._refresh(row, place, ids_BT.shape[1])
            for other in self.rows:
                other.experts = after if other.experts is before else other.experts
        self._cache.set_window(len(self.rows), self._first, self._end)
        return torch.stack([dense[row] if row in dense else logits_BTV[place] for place, row in enumerate(self.rows)])

    def _forward(self, ids_BT: Tensor) -> Tensor:
        device, columns = ids_BT.device, ids_BT.shape[1]
        mask_BP = None
        if self._padded:
            end = self._cache.columns if self._cache.static else self._end + columns
            mask_BP = (torch.arange(self._first, end, device=device) >= self._begins_B1).long()
        positions_BT = torch.arange(self._end, self._end + columns, device=device) - self._begins_B1
        view = self._engine.view([row.experts for row in self.rows])
        return view(ids_BT, self._cache, mask_BP=mask_BP, positions_BS=positions_BT)

    def _refresh(self, row: Row, place: int, keep_logits: int) -> tuple[Tensor, Experts]:
        """Run a row's tokens since its last refresh again, dense, and learn from them."""
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
            experts = corrected(engine, experts, groups, ids_1T.shape[1])
        return torch.cat(logits)[-keep_logits:], experts


def corrected(engine: Engine, experts: Experts, groups: Sequence[Seen], count: int) -> Experts:
    """Experts that have learned from the first tokens that were seen."""
    fits = []
    for fit in experts.fits:
        corrections, fit = fit.learn(*to_learn(fit, groups, count), partial(engine.written, experts))
        experts = experts.corrected(dict(corrections))
        fits.append(fit)
    return replace(experts, fits=tuple(fits))


# Steps that a compiled engine runs before the host reads their tokens; what comes behind a text's end is discarded.
READ_EVERY = 8


def decode(
    engine: Engine,
    rows: Iterable[Row],
    generation: Generation,
    *,
    batch_size: int = 1,
    max_prompt_tokens: int = 0,
    max_new_tokens: int = 0,
) -> Generator[Row, None, None]:
    """Generate rows to their ends, and yield each as it ends: their `tokens` grow.

    Args:
        rows: asked for when the batch before has ended; those that share their experts must be in one batch.
        batch_size: how many run at a time; those that are verified run one by one.
        max_prompt_tokens: of the longest prompt that will come, so that the KV cache stays; 0: not known.
        max_new_tokens: that the KV cache has room for, where that is more than `generation` asks for.
    """
    coming, room = iter(rows), max(max_new_tokens, generation.max_new_tokens)
    while group := list(islice(coming, batch_size)):
        columns = max([max_prompt_tokens, *(row.state.length for row in group)]) + room
        verified = [row for row in group if row.method.verified and row.experts is not None]
        for row in verified:
            decode_verified(engine, row, generation, columns)
            yield row
        together = [row for row in group if row not in verified]
        for precision in dict.fromkeys(row.method.quantization for row in together):  # a view has one
            alike = [row for row in together if row.method.quantization == precision]
            yield from _decode(engine, alike, columns, generation)


def _decode(engine: Engine, rows: Sequence[Row], columns: int, generation: Generation) -> Iterator[Row]:
    began = time.perf_counter()
    batch = Batch(engine, rows, columns, static=engine.compiled)
    every = READ_EVERY if engine.compiled and generation.process_logits is None else 1
    logits_BV = torch.stack([row.state.logits_TV[-1] for row in rows])
    ahead: list[Tensor] = []  # the newest token of each row [B], of steps that the host has not read
    while True:
        ahead.append(generation.pick(rows, logits_BV.float()))
        latest_B, running = ahead[-1], [row for row in rows if row not in batch.ended]
        longest = max(len(row.tokens) for row in running) + len(ahead)
        if len(ahead) == every or longest == generation.max_new_tokens or any(row.due for row in running):
            steps = on_host(ahead)
            ahead.clear()
            seconds = (time.perf_counter() - began) / len(rows)
            for row, tokens in zip(rows, zip(*steps, strict=True), strict=True):
                if row in batch.ended:
                    continue
                row.seconds += seconds
                for token in tokens:
                    if generation.ends(row, token):
                        batch.end(row)
                        yield row
                        break
            if len(batch.ended) == len(rows):
                return
            began = time.perf_counter()
        logits_BV = batch.step(latest_B.unsqueeze(1))[:, -1]


def on_host(steps: Sequence[Tensor]) -> list[list[int]]:
    """The tokens of some steps, each [B]: nowhere else does the host wait for the device while text is made."""
    tokens: list[list[int]] = torch.stack(list(steps)).tolist()
    return tokens


def score(
    engine: Engine, rows: Iterable[tuple[Row, Sequence[int]]], batch_size: int = 1
) -> Iterator[tuple[Row, Tensor]]:
    """Run rows along given continuations of at least one token (teacher forcing), never compiled. Yields them in order,
    each with its logits [C, V] after each of these tokens."""
    for batch_rows in _batches(rows, batch_size):
        began = time.perf_counter()
        width = max(len(ids) for _, ids in batch_rows)
        # Padding on the right is behind all that is looked at.
        ids_BC = torch.tensor([[*ids, *[0] * (width - len(ids))] for _, ids in batch_rows], device=engine.device)
        batch = Batch(engine, [row for row, _ in batch_rows], max(row.state.length for row, _ in batch_rows) + width)
        for row, ids in batch_rows:
            row.tokens = list(ids)
        ends = call_ends(width) if any(row.refreshes for row, _ in batch_rows) else [0, width]
        logits_BCV = torch.cat([batch.step(ids_BC[:, first:last]) for first, last in pairwise(ends)], dim=1)
        seconds = (time.perf_counter() - began) / len(batch_rows)
        for place, (row, ids) in enumerate(batch_rows):
            row.seconds += seconds
            yield row, logits_BCV[place, : len(ids)]


def _batches(rows: Iterable[tuple[Row, Sequence[int]]], batch_size: int) -> Iterator[list[tuple[Row, Sequence[int]]]]:
    """Rows in order, of one precision; those that are refreshed only beside rows of the same length."""
    batch: list[tuple[Row, Sequence[int]]] = []
    for row, ids in rows:
        refreshed = row.refreshes or any(other.refreshes for other, _ in batch)
        other = batch and row.method.quantization != batch[0][0].method.quantization
        if batch and (len(batch) == batch_size or other or (refreshed and len(ids) != len(batch[0][1]))):
            yield batch
            batch = []
        batch.append((row, ids))
    if batch:
        yield batch
