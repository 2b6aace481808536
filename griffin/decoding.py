"""Decoding: rows, each a (prompt, method) pair, that go on together, freely or along a given text.

Dimensions: B = rows of a batch, C = tokens of a continuation, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise

import torch
from torch import Tensor

from griffin.batch import Batch
from griffin.engine import Engine
from griffin.refresh import call_ends
from griffin.rows import Generation, Row
from griffin.verification import decode_verified

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
) -> Iterator[Row]:
    """Generate rows to their ends: their `tokens` grow. Rows are asked for when there is room for them.

    Args:
        engine: the model.
        rows: what is to be continued; those that share their experts one behind the other, in one batch.
        generation: how tokens are picked, and until when.
        batch_size: how many run at a time. Those that have ended make room for others; where the engine is compiled,
            all end before others come.
        max_prompt_tokens: of the longest prompt that will come, so that the KV cache does not move; 0: not known.
        max_new_tokens: that the KV cache has room for, where that is more than `generation` asks for.

    Yields:
        Each row as it ends.
    """
    room = max(max_new_tokens, generation.max_new_tokens)
    if not engine.compiled:
        waiting = len(rows) > batch_size > 1 if isinstance(rows, Sequence) else batch_size > 1
        num_rows = min(batch_size, len(rows)) if isinstance(rows, Sequence) else batch_size
        known = [row.state.length for row in rows] if isinstance(rows, Sequence) else []
        longest = max([max_prompt_tokens, *known])
        yield from _decode(engine, iter(rows), num_rows, longest, room, generation, waiting=waiting)
        return
    coming = iter(rows)
    while group := list(islice(coming, batch_size)):
        longest = max([max_prompt_tokens, *(row.state.length for row in group)])
        yield from _decode(engine, iter(group), len(group), longest, room, generation)


def _decode(
    engine: Engine,
    coming: Iterator[Row],
    num_rows: int,
    longest: int,
    room: int,
    generation: Generation,
    *,
    waiting: bool = False,
) -> Iterator[Row]:
    batch = Batch(engine, num_rows, longest, room, waiting=waiting, static=engine.compiled)
    every = READ_EVERY if engine.compiled else 1
    ahead: list[Tensor] = []  # the newest token of each row [B], of steps that the host has not read
    began = time.perf_counter()

    def read(running: Sequence[Row]) -> Iterator[Row]:
        steps = on_host(ahead)
        ahead.clear()
        seconds = (time.perf_counter() - began) / len(running)
        for row, tokens in zip(running, zip(*steps, strict=True), strict=True):
            if row in batch.ended:
                continue
            row.seconds += seconds
            for token in tokens:
                row.tokens.append(token)
                if generation.ended(row) or len(row.tokens) == generation.max_new_tokens:
                    batch.end(row, leave=not engine.compiled)
                    yield row
                    break

    while True:
        arrived: list[Row] = []
        while batch.free and (row := next(coming, None)) is not None:
            if row.method.verified and row.experts is not None:
                decode_verified(engine, row, generation, max(longest, row.state.length) + room)
                yield row
            else:
                batch.add(row)
                arrived.append(row)
        if len(batch.ended) == len(batch.rows):  # none is left, or compiled: they all ended together
            return
        if not ahead:
            began = time.perf_counter()
        running = arrived or list(batch.rows)
        if arrived:
            logits_BV = torch.stack([row.state.logits_TV[-1] for row in arrived])
        else:
            latest_B = ahead[-1] if ahead else torch.tensor([row.tokens[-1] for row in running]).to(engine.device)
            logits_BV = batch.step(latest_B.unsqueeze(1))[:, -1]
        ahead.append(generation.pick(running, logits_BV.float()))
        longest_text = max(len(row.tokens) for row in running if row not in batch.ended) + len(ahead)
        due = any(row.due for row in running if row not in batch.ended)
        if len(ahead) == every or longest_text == generation.max_new_tokens or due:
            yield from read(running)


def on_host(steps: Sequence[Tensor]) -> list[list[int]]:
    """The tokens of some steps, each [B]: here the host waits for the device, and nowhere else while text is made."""
    tokens: list[list[int]] = torch.stack(list(steps)).tolist()
    return tokens


# -- along a given text -----------------------------------------------------------------------------------------------


def score(
    engine: Engine, rows: Iterable[tuple[Row, Sequence[int]]], batch_size: int = 1
) -> Iterator[tuple[Row, Tensor]]:
    """Run rows along given continuations (teacher forcing). Nothing of it is compiled.

    Args:
        engine: the model.
        rows: each row with the tokens that follow its prompt, at least one.
        batch_size: how many run at a time.

    Yields:
        Each row with its logits [C, V] after each of these tokens, in the order of the rows.
    """
    for batch_rows in _batches(rows, batch_size):
        began = time.perf_counter()
        width = max(len(ids) for _, ids in batch_rows)
        # Padding on the right is behind all that is looked at.
        ids_BC = torch.tensor([[*ids, *[0] * (width - len(ids))] for _, ids in batch_rows], device=engine.device)
        batch = Batch(engine, len(batch_rows), max(row.state.length for row, _ in batch_rows), width)
        for row, ids in batch_rows:
            row.tokens = list(ids)
            batch.add(row)
        ends = call_ends(width) if any(row.refreshes for row, _ in batch_rows) else [0, width]
        logits_BCV = torch.cat([batch.step(ids_BC[:, first:last]) for first, last in pairwise(ends)], dim=1)
        seconds = (time.perf_counter() - began) / len(batch_rows)
        for place, (row, ids) in enumerate(batch_rows):
            row.seconds += seconds
            yield row, logits_BCV[place, : len(ids)]


def _batches(rows: Iterable[tuple[Row, Sequence[int]]], batch_size: int) -> Iterator[list[tuple[Row, Sequence[int]]]]:
    """Rows in order, so many at a time; those that are refreshed only beside rows of the same length."""
    batch: list[tuple[Row, Sequence[int]]] = []
    for row, ids in rows:
        refreshed = row.refreshes or any(other.refreshes for other, _ in batch)
        if batch and (len(batch) == batch_size or (refreshed and len(ids) != len(batch[0][1]))):
            yield batch
            batch = []
        batch.append((row, ids))
    if batch:
        yield batch
