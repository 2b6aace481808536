"""Decoding: rows, each a (prompt, method) pair, that go on together, freely or along a given text.

Dimensions: B = rows of a batch, T = tokens of a row in one step, P = columns of the KV cache, N = tokens that a refresh
reads again, V = vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from griffin.activations import ActivationStatistic, PrefillChunk, Recorded, listed
from griffin.compensation import COMPENSATIONS
from griffin.drift import Drift
from griffin.engine import Engine
from griffin.executors import Experts
from griffin.feedforward import FeedForwardBlock
from griffin.offloading import bring
from griffin.prompt import choose, wanted
from griffin.refresh import WEIGHT, call_ends
from griffin.rows import Generation, Row
from griffin.statistics import RELATIVE
from griffin.verification import decode_verified

# Steps that a compiled engine runs before the host reads their tokens; what comes behind a text's end is discarded.
READ_EVERY = 8


class Batch:
    """Rows that run together. They may come and go; where the engine is compiled, they all come first and stay.

    Args:
        engine: the model.
        rows: the most rows at a time.
        longest: tokens of the longest prompt.
        room: the most tokens that a row is continued by.
        waiting: whether more rows will come when some have ended.
    """

    def __init__(self, engine: Engine, rows: int, longest: int, room: int, *, waiting: bool = False) -> None:
        self.rows: list[Row] = []
        self._engine, self._most, self._room = engine, rows, room
        # Where rows wait, as many columns more: the batch is moved back once in so many tokens.
        self._columns = longest + (2 * room if waiting else room)
        self._cache = engine.decoding_cache(rows, self._columns)
        self._begins: list[int] = []  # the first column of each row
        self._begins_B1 = torch.empty(0, 1, dtype=torch.int64, device=engine.device)
        self._whole_mask_BP: Tensor | None = None
        self._end = 0
        self._changed = True

    @property
    def free(self) -> int:
        """How many more rows there is room for."""
        return self._most - len(self.rows)

    def add(self, row: Row) -> None:
        """Take in a row: its prompt's KV cache is copied, and no longer held by the row."""
        length = row.state.length
        if not self.rows:
            self._end = 0  # a row by itself is where it would be without those before it
        longest = max([length, *(self._end - begin for begin in self._begins)])
        if longest > self._end or self._end + self._room > self._columns:
            self._cache.shift(len(self.rows), min(self._begins, default=self._end), self._end, longest)
            self._begins = [begin + longest - self._end for begin in self._begins]
            self._end = longest
        assert row.state.cache is not None
        self._cache.put(len(self.rows), row.state.cache, self._end)
        row.state = row.state.without_cache()
        self.rows.append(row)
        self._begins.append(self._end - length)
        self._changed = True

    def remove(self, row: Row) -> None:
        """Let a row go: the last one takes its place."""
        place, last = self.rows.index(row), len(self.rows) - 1
        if place != last:
            self._cache.move(last, place, self._begins[last], self._end)
        self.rows[place], self._begins[place] = self.rows[last], self._begins[last]
        del self.rows[last], self._begins[last]
        self._changed = True

    @torch.no_grad()
    def step(self, ids_BT: Tensor) -> Tensor:
        """Run the next tokens of every row, [B, T]; returns their logits [B, T, V].

        A row whose refresh is due runs dense, over all tokens since its last one.
        """
        due = {row: place for place, row in enumerate(self.rows) if row.due}
        for row, ids_T in zip(self.rows, ids_BT, strict=True):
            row.ran += len(ids_T)
            row.unread += [ids_T] if row.refreshes else []
        logits: list[Tensor] = []
        if len(due) < len(self.rows):
            self._engine.load([row.experts for row in self.rows])
            drifting = [place for place, row in enumerate(self.rows) if row.refreshes and row.method.refresh == "drift"]
            with self._engine.watching(bool(drifting)) as seen:
                logits = list(self._forward(ids_BT))
            for place in drifting:
                self._see(self.rows[place], [z.view(len(self.rows), -1, z.shape[-1])[place] for z, _ in seen])
        self._end += ids_BT.shape[1]
        if not due:
            return torch.stack(logits) if len(logits) > 1 else logits[0].unsqueeze(0)
        self._changed = True
        dense: dict[Row, Tensor] = {}
        for states in {id(row.states): row.states for row in due}.values():
            sharing = [row for row in self.rows if row.states is states]
            read = {row: self._read_again(row, due[row], ids_BT.shape[1]) for row in sharing if row in due}
            dense |= {row: logits_TV for row, (logits_TV, _) in read.items()}
            experts = _renewed(self._engine, {row: recorded for row, (_, recorded) in read.items()})
            for row in sharing:
                row.experts, row.drift = experts, None
        return torch.stack([dense[row] if row in dense else logits[place] for place, row in enumerate(self.rows)])

    def _see(self, row: Row, layers: Sequence[Tensor]) -> None:
        """Have a row see its activations [T, D] of a pruned step, or [T, K] where the weights are compact."""
        experts = row.experts
        assert experts is not None
        if row.drift is None:
            totals = row.state.recorded.totals[RELATIVE]
            roots = [total[0].sqrt()[kept_K] for total, kept_K in zip(totals, experts.neurons, strict=True)]
            row.drift = Drift(roots, begun=row.refreshed > 0)
        row.drift.see(
            [
                z if z.shape[-1] == len(kept_K) else z.index_select(1, kept_K)
                for z, kept_K in zip(layers, experts.neurons, strict=True)
            ]
        )

    def _forward(self, ids_BT: Tensor) -> Tensor:
        device, columns = ids_BT.device, ids_BT.shape[1]
        begin = 0 if self._cache.whole else min(self._begins)
        # One graph serves a batch of prompts of any lengths, so it always has a mask.
        padded = any(other != begin for other in self._begins) or (self._cache.whole and len(self.rows) > 1)
        if self._changed:
            self._changed = False
            self._cache.show(len(self.rows), begin, self._end)
            self._begins_B1 = torch.tensor(self._begins).unsqueeze(1).to(device)
            self._whole_mask_BP = None
            if padded and self._cache.whole:
                self._whole_mask_BP = (torch.arange(self._cache.columns, device=device) >= self._begins_B1).long()
        mask_BP = self._whole_mask_BP
        if padded and mask_BP is None:
            mask_BP = (torch.arange(begin, self._end + columns, device=device) >= self._begins_B1).long()
        positions_BT = torch.arange(self._end, self._end + columns, device=device) - self._begins_B1
        return self._engine.forward(ids_BT, self._cache, mask_BP=mask_BP, positions_BS=positions_BT)

    def _read_again(self, row: Row, place: int, keep_logits: int) -> tuple[Tensor, Recorded]:
        """Run a row's tokens since its last refresh dense, instead of how they ran.

        Returns:
            The logits [T, V] of the last ones, and what was recorded of all.
        """
        ids_1N = torch.cat(row.unread).unsqueeze(0)
        count, row.unread = ids_1N.shape[1], []
        row.refreshed += 1
        cache = self._cache.row(place, self._begins[place], self._end - count)
        first = self._end - count - self._begins[place]
        positions_1N = torch.arange(first, first + count, device=ids_1N.device).unsqueeze(0)
        learns = row.method.refresh == "compensation"
        statistics = [_fresh] if learns else wanted([row.method])
        engine = self._engine
        with engine.recording(statistics, row.state.recorded, 1, count, None, WEIGHT) as recorder:
            logits_1TV = engine.dense(ids_1N, cache, positions_BS=positions_1N, logits_to_keep=keep_logits)
        if not learns:
            row.state = row.state.extended(row.tokens[row.ran - count : row.ran], recorder.recorded)
        return logits_1TV[0], recorder.recorded


def _fresh_activations(chunk: PrefillChunk, block: FeedForwardBlock) -> Tensor:
    """[B, N, D]: z[b, t, :] / ||z[b, t, :]||, times the root of what a token counts as."""
    scale: float = chunk.positions.weight**0.5
    return scale * chunk.relative_BSD


_fresh = ActivationStatistic(_fresh_activations, join=listed)


def _renewed(engine: Engine, read: dict[Row, Recorded]) -> Experts | None:
    """New experts, or corrections that have learned more, for rows that share them and have just been read again."""
    row, *_ = read
    if row.method.refresh != "compensation":
        return choose(engine, row.states, row.method, row.seed)
    experts, compensation = row.experts, COMPENSATIONS[row.method.compensation]
    assert experts is not None
    assert compensation is not None
    assert compensation.learn is not None
    learned = []
    for layer, (block, neurons_K) in enumerate(zip(engine.blocks, experts.neurons, strict=True)):
        before = experts.corrections[layer]
        if before:
            fresh_ND = torch.cat([recorded.totals[_fresh][layer][0] for recorded in read.values()])
            bring(block)
            before = (*before, compensation.learn(before, fresh_ND, block, neurons_K))
        learned.append(before)
    return Experts(experts.neurons, tuple(learned))


# -- generation -------------------------------------------------------------------------------------------------------


def decode(
    engine: Engine,
    rows: Iterable[Row],
    count: int,
    most: int,
    longest: int,
    generation: Generation,
    *,
    room: int | None = None,
) -> Iterator[Row]:
    """Generate: every row's `tokens` grow until it has ended. The one loop behind all generated text.

    Verified rows run by themselves, each from its beginning to its end when its turn comes.

    Args:
        engine: the model.
        rows: the rows, taken one by one when there is room for them, so that their prompts run no sooner.
        count: how many they are.
        most: how many run at a time. Those that have ended make room for others, unless the engine is compiled.
        longest: tokens of the longest prompt.
        generation: how tokens are picked, and until when.
        room: new tokens that the KV cache has room for; None: as many as may come.

    Yields:
        Each row as it ends.

    Raises:
        ValueError: more rows than can run at a time, and the engine is compiled.
    """
    if engine.compiled is not None and count > most:
        raise ValueError(f"{count} rows, {most} at a time, of a compiled engine: its rows all come first and stay")
    coming = iter(rows)
    batch = Batch(engine, min(most, count), longest, room or generation.limit, waiting=count > most > 1)
    every = 1 if engine.compiled is None else READ_EVERY
    ahead: list[Tensor] = []  # the newest token of each row [B], of steps that the host has not read
    ended: set[Row] = set()  # rows of a compiled batch whose tokens are discarded

    def read(rows: Sequence[Row], began: float) -> Iterator[Row]:
        steps = on_host(ahead)
        ahead.clear()
        seconds = (time.perf_counter() - began) / len(rows)
        for row, tokens in zip(rows, zip(*steps, strict=True), strict=True):
            if row in ended:
                continue
            row.seconds += seconds
            for token in tokens:
                row.tokens.append(token)
                if generation.ended(row) or len(row.tokens) == generation.limit:
                    if engine.compiled is None:
                        batch.remove(row)
                    else:
                        ended.add(row)
                    yield row
                    break

    try:
        while True:
            arrived = []
            while batch.free and (row := next(coming, None)) is not None:
                if row.method.verified and row.experts is not None:
                    decode_verified(engine, row, generation, longest + (room or generation.limit))
                    yield row
                    continue
                batch.add(row)
                arrived.append(row)
            if len(ended) == len(batch.rows):  # none is left, or compiled: they all ended together
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
            longest_text = max(len(row.tokens) for row in running if row not in ended) + len(ahead)
            if len(ahead) == every or longest_text == generation.limit or any(row.due for row in running):
                yield from read(running, began)
    finally:
        engine.use_dense()


def on_host(steps: Sequence[Tensor]) -> list[list[int]]:
    """The tokens of some steps, each [B]: here the host waits for the device, and nowhere else while text is made."""
    tokens: list[list[int]] = torch.stack(list(steps)).tolist()
    return tokens


# -- along a given text -----------------------------------------------------------------------------------------------


def score(engine: Engine, rows: Iterable[tuple[Row, Sequence[int]]], most: int) -> Iterator[tuple[Row, Tensor]]:
    """Run rows along given continuations (teacher forcing).

    Args:
        engine: the model.
        rows: each row with the tokens that follow its prompt, at least one.
        most: how many run at a time.

    Yields:
        Each row with its logits [C, V] after each of these tokens, in the order of the rows.
    """
    try:
        for batch_rows in _batches(rows, most):
            began = time.perf_counter()
            width = max(len(ids) for _, ids in batch_rows)
            # Padding on the right is behind all that is looked at.
            ids_BC = torch.tensor([[*ids, *[0] * (width - len(ids))] for _, ids in batch_rows], device=engine.device)
            batch = Batch(engine, len(batch_rows), max(row.state.length for row, _ in batch_rows), width)
            for row, ids in batch_rows:
                row.tokens = list(ids)
                batch.add(row)
            ends = call_ends(width) if any(row.refreshes for row, _ in batch_rows) else [0, width]
            if any(row.method.refresh == "drift" for row, _ in batch_rows):
                ends = list(range(width + 1))  # when it is due follows from the tokens before
            logits_BCV = torch.cat([batch.step(ids_BC[:, first:last]) for first, last in pairwise(ends)], dim=1)
            seconds = (time.perf_counter() - began) / len(batch_rows)
            for place, (row, ids) in enumerate(batch_rows):
                row.seconds += seconds
                yield row, logits_BCV[place, : len(ids)]
    finally:
        engine.use_dense()


def _batches(rows: Iterable[tuple[Row, Sequence[int]]], most: int) -> Iterator[list[tuple[Row, Sequence[int]]]]:
    """Rows in order, `most` at a time; those that are refreshed only beside rows of the same length."""
    batch: list[tuple[Row, Sequence[int]]] = []
    for row, ids in rows:
        refreshed = row.refreshes or any(other.refreshes for other, _ in batch)
        if batch and (len(batch) == most or (refreshed and len(ids) != len(batch[0][1]))):
            yield batch
            batch = []
        batch.append((row, ids))
    if batch:
        yield batch
