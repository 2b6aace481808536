"""One dense pass over prompts, continued by any number of methods: the engine of teacher-forced evaluation.

Classification, perplexity and fidelity all ask how a *given* text is continued. So the prompts run once, dense,
with every statistic gathered at once, and each method pays for its continuation only.

Rows are padded on the right. To continue rows of different lengths together, their keys and values are copied into a
cache where all prompts end in the same column (`griffin.caches`).

Dimensions: B = batch rows, S = positions of the dense pass, P = the longest prompt, C = the longest continuation,
V = vocabulary, D = FF width, K = kept neurons.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from griffin.at_work import RowsAtWork
from griffin.beginning import SharedBeginning
from griffin.budgets import kept_per_layer
from griffin.caches import roomy, rows, static
from griffin.compaction import Compaction
from griffin.compensation import COMPENSATIONS
from griffin.correction import Correction
from griffin.experts import choose_experts, corrections, prompt_digests
from griffin.feedforward import find_feedforward_blocks
from griffin.gathering import Gatherer
from griffin.masking import Mask
from griffin.modes import Work
from griffin.own_text import gathered_over_own_text
from griffin.refit import Refit
from griffin.refresh import WEIGHT, Reader, call_ends, reading
from griffin.slots import Lockstep, Slots
from griffin.statistics import STATISTICS

# Per layer, experts and what a compensation adds with them.
Chosen = tuple[list[Tensor], list[Correction | None]]


class SharedPrompt:
    """Runs prompts dense and continues them pruned.

        shared = SharedPrompt(model, ["griffin", "magnitude"])
        dense = shared.run(ids, prompt_lengths)
        for statistic in ("griffin", "magnitude"):
            logits = shared.continued(following_ids, following_lengths, shared.experts(statistic, "topk", 0.5))

    The model is left as it was after every call. Experts are masked, so every row has its own.

    Args:
        model: a `transformers` causal language model with dense FF blocks.
        statistics: names in `STATISTICS`, all that `experts` will be asked for. One of hindsight scores what the last
            dense `continued` read.
        compensations: names in `COMPENSATIONS`, all that `corrections` will be asked for.
        compiled: the model's call is going to be compiled; see `prune`.

    Attributes:
        takes_positions: whether the model's forward calls take `position_ids`.
        caches: the KV cache of each prompt.

    Raises:
        UnsupportedModelError: the model has an FF block that cannot be pruned.
        KeyError: an unknown statistic or compensation.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: Sequence[str],
        compensations: Sequence[str] = (),
        *,
        compiled: bool = False,
    ) -> None:
        self._model: Any = model
        self._blocks = find_feedforward_blocks(model) if statistics else []  # dense runs need none
        chosen = [STATISTICS[name] for name in statistics]
        compensating = [one for name in compensations if (one := COMPENSATIONS[name]) is not None]
        self._gatherer = Gatherer(
            self._blocks,
            [one.gathering for one in chosen if not one.hindsight] + [one.gathering for one in compensating],
        )
        self._following = Gatherer(self._blocks, [one.gathering for one in chosen if one.hindsight])
        self._own_text = {
            one.gathering: gathered_over_own_text(model, self._blocks, one.gathering)
            for one in chosen
            if one.own_text and one.gathering is not None
        }
        self._compaction, self._mask = Compaction(self._blocks, compiled=compiled), Mask(self._blocks)
        self._work: dict[str, Work] = {"compact": self._compaction, "masked": self._mask}
        self.caches: list[DynamicCache] = []
        self._beginning = SharedBeginning(self._gatherer, self._pass)
        self._compiled = compiled
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @property
    def device(self) -> torch.device:
        """Of the model's inputs."""
        device: torch.device = self._model.device
        return device

    @property
    def head(self) -> nn.Module | None:
        """The model's output embedding, where it may be called in another way."""
        return None if self._compiled else self._model.get_output_embeddings()

    @torch.no_grad()
    def run(self, ids_BS: Tensor, prompt_lengths_B: Tensor, last: int = 0) -> Tensor:
        """The dense pass. Only each row's first `prompt_lengths_B` tokens count for the statistics.

        Args:
            ids_BS: token ids, padded on the right with any id.
            prompt_lengths_B: tokens of each row's prompt, at most the row's own.
            last: compute the logits of the last so many columns only; 0: of all.

        Returns:
            Logits [B, S, V], or [B, last, V], of the dense model: those of a plain forward call, to the bit.
        """
        batch, positions = ids_BS.shape
        self._prompts_B = prompt_lengths_B
        columns_S = torch.arange(positions, device=ids_BS.device)
        counted_BS = columns_S < prompt_lengths_B.unsqueeze(1)
        self._digests = prompt_digests(ids_BS, counted_BS, [0] * batch)
        # A cache made without the model's config keeps every position, also in layers with a sliding window.
        cache = DynamicCache()
        self._gatherer.reset()
        logits = self._pass(ids_BS, counted_BS, cache, last)
        self.caches = rows(cache, prompt_lengths_B.tolist())
        return logits

    def _pass(self, ids_BS: Tensor, counted_BS: Tensor | None, cache: DynamicCache, last: int) -> Tensor:
        """Run a stretch of the prompts dense, and gather."""
        self._following.reset()
        self._gatherer.expect(ids_BS.shape[0], ids_BS.shape[1], counted_BS, ids_BS.device)
        self._gatherer.attach()
        try:
            logits: Tensor = self._model(ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=last).logits
        finally:
            self._gatherer.detach()
        return logits

    @torch.no_grad()
    def run_each(self, prompts: Sequence[Tensor], beginning: Tensor | None = None) -> Tensor:
        """The dense pass, prompt by prompt: each is to the bit what it is alone, and no time goes into padding.

        A long prompt keeps a device busy by itself; for many short ones `run` is faster.

        Args:
            prompts: the token ids of each, [S].
            beginning: token ids that prompts begin with, [S]. It runs once, for this call and those that follow, and
                prompts that begin with it go on from there, where that is less work.

        Returns:
            Logits [B, V] after each prompt.
        """
        logits, caches, gathered, digests = [], [], [], []
        for ids_S in prompts:
            cache = self._beginning.start(ids_S, beginning)
            rest_1S = ids_S[cache.get_seq_length() :].unsqueeze(0)
            logits.append(self._pass(rest_1S, None, cache, last=1)[:, 0])
            caches.append(cache)
            gathered.append(self._gatherer.whole())
            digests += prompt_digests(ids_S.unsqueeze(0), None, [0])
        self._gatherer.stack(gathered)
        self._digests = digests
        self._prompts_B = torch.tensor([len(ids_S) for ids_S in prompts], device=prompts[0].device)
        self.caches = caches
        return torch.cat(logits)

    def experts(
        self,
        statistic: str,
        selection: str,
        sparsity: float | Sequence[float],
        seed: int = 0,
        budget: str = "uniform",
        *,
        shared_experts: bool = False,
    ) -> list[Tensor]:
        """Per layer, the experts of the prompts: [B, K] int64, [1, K] where static or shared.

        Args:
            statistic: one of those named at construction.
            selection: one of `SELECTIONS`.
            sparsity: share of FF neurons dropped, or one number per layer.
            seed: of random statistics and selections.
            budget: how the layers share what is kept, one of `BUDGETS`.
            shared_experts: one expert set for all prompts, by the paper's aggregation.
        """
        kept = kept_per_layer([block.width for block in self._blocks], sparsity, budget)
        chosen = STATISTICS[statistic]
        _, experts = choose_experts(
            self._blocks,
            self._following if chosen.hindsight else self._gatherer,
            chosen,
            selection,
            kept,
            self._digests,
            seed,
            self._prompts_B if shared_experts else None,
            own_text=self._own_text[chosen.gathering] if chosen.own_text and chosen.gathering is not None else None,
        )
        return experts

    def corrections(
        self, compensation: str, experts: Sequence[Tensor], *, shared_experts: bool = False, fits: bool = False
    ) -> list[Correction | None]:
        """Per layer, what a compensation adds to the block's output for these experts; None: nothing.

        Args:
            compensation: one of those named at construction, or `none`.
            experts: what `experts` returned for these prompts.
            shared_experts: as it was when `experts` returned them.
            fits: keep what is needed to go on learning.
        """
        prompts = len(self._prompts_B) if shared_experts else None
        compensating = COMPENSATIONS[compensation]
        return list(corrections(self._blocks, self._gatherer, compensating, experts, prompts, fits=fits))

    @torch.no_grad()
    def continued(
        self,
        ids_BC: Tensor,
        lengths_B: Tensor,
        experts: Sequence[Tensor] | None,
        corrections: Sequence[Correction | None] | None = None,
        reader: Reader | None = None,
    ) -> Tensor:
        """The prompts' continuation, with these experts in every position of it, or dense.

        Args:
            ids_BC: the continuations' token ids, padded on the right with any id.
            lengths_B: tokens of each continuation, 0 to C.
            experts: per layer [B, K] or [1, K]; None: dense.
            corrections: per layer, what a compensation adds with these experts; None: nothing.
            reader: as in `pruned`. It reads after as many tokens as it would if they were generated.

        Returns:
            Logits [B, C, V] of the tokens after each continuation token; meaningless behind a row's length.
        """
        steps = ids_BC.shape[1]
        steps_C = torch.arange(steps, device=ids_BC.device)
        counted_BC = steps_C < lengths_B.unsqueeze(1)
        columns_P = torch.arange(int(self._prompts_B.max()), device=ids_BC.device)
        prompt_BP = columns_P >= len(columns_P) - self._prompts_B.unsqueeze(1)
        mask_BPC = torch.cat([prompt_BP, counted_BC], dim=1).long()
        positions_BC = self._prompts_B.unsqueeze(1) + steps_C
        if experts is None:
            self._following.reset()
            self._following.expect(len(ids_BC), steps, counted_BC)
            self._following.attach()
        cache, logits = self.fork(steps), []
        try:
            with self.pruned(experts, corrections, "masked", reader):
                for begin, end in pairwise(call_ends(steps) if reader is not None else [0, steps]):
                    positions = {"position_ids": positions_BC[:, begin:end]} if self.takes_positions else {}
                    logits.append(
                        self._model(
                            ids_BC[:, begin:end],
                            attention_mask=mask_BPC[:, : len(columns_P) + end],
                            past_key_values=cache,
                            use_cache=True,
                            **positions,
                        ).logits
                    )
        finally:
            self._following.detach()
        return torch.cat(logits, dim=1)

    @contextlib.contextmanager
    def pruned(
        self,
        experts: Sequence[Tensor] | None,
        corrections: Sequence[Correction | None] | None,
        mode: str,
        reader: Reader | None = None,
    ) -> Iterator[None]:
        """Forward calls of the model in this context use these experts.

        Args:
            experts: per layer, [B, K] for the rows of the calls, or [1, K] for all rows, which `compact` needs; None:
                dense.
            corrections: per layer, what a compensation adds with these experts; None: nothing.
            mode: one of `MODES`. The buffers of `compact` last from prompt to prompt.
            reader: what is to follow the text, from `renewal` or `refit`, for this mode; None: nothing.
        """
        if experts is None:
            yield
            return
        work = self._work[mode]
        try:
            work.attach(experts, corrections)
            with contextlib.nullcontext() if reader is None else reading(self._model, reader):
                yield
        finally:
            work.detach()

    def rows_at_work(self) -> RowsAtWork:
        """For `continue_in_turn`: prompts that come and go, each with its own experts."""
        return RowsAtWork(self._blocks, self._compaction, self._mask)

    def renewal(self, mode: str, choose: Callable[[SharedPrompt], Chosen]) -> Reader:
        """For `pruned`: what is generated joins the prompts, and experts are chosen again.

        Args:
            mode: one of `MODES`.
            choose: gives the experts and corrections of the prompts of what it is called with.
        """
        return _Renewal(self, self._work[mode], choose)

    def refit(
        self,
        mode: str,
        compensation: str,
        experts: Sequence[Tensor],
        corrections: Sequence[Correction | None],
        *,
        shared_experts: bool = False,
    ) -> Reader:
        """For `pruned`: the compensation goes on learning from what is generated.

        Args:
            mode: one of `MODES`.
            compensation: one that can learn.
            experts: those that are put to work.
            corrections: those that are put to work, with their fits.
            shared_experts: as it was when `experts` returned them.
        """
        compensating = COMPENSATIONS[compensation]
        assert compensating is not None
        return Refit(self._blocks, self._work[mode], compensating, experts, corrections, shared=shared_experts)

    def fork(self, room: int) -> DynamicCache:
        """A copy of the prompts' KV cache, with room in place for so many more tokens."""
        return roomy(self.caches, room)

    def slots(self, lengths: Sequence[int], count: int, room: int) -> Slots:
        """For prompts of these lengths: at most `count` at a time, each continued by at most `room` tokens."""
        return Slots(lengths, count, room, self.device)

    def lockstep(self, lengths: Sequence[int], room: int) -> Lockstep:
        """The same for all prompts at once, until the last has ended."""
        return Lockstep(lengths, partial(roomy, room=room), None, self.device)

    def static_lockstep(self, lengths: Sequence[int], positions: int) -> Lockstep:
        """The same for a compiled call: a KV cache of so many positions, prompts included."""
        together = partial(static, config=self._model.config, positions=positions)
        return Lockstep(lengths, together, positions, self.device)

    def part(self, rows: slice) -> SharedPrompt:
        """Some of the prompts by themselves; what is done with them leaves the others alone."""
        part = copy.copy(self)
        part._gatherer = self._gatherer.fork(rows)
        part._digests, part._prompts_B = self._digests[rows], self._prompts_B[rows]
        part.caches = self.caches[rows]
        return part

    def joined(self, parts: Sequence[SharedPrompt]) -> SharedPrompt:
        """Prompts that ran one by one, as if they had run in one `run_each`."""
        joined = copy.copy(self)
        joined._gatherer = self._gatherer.fork()
        joined._gatherer.stack([part._gatherer.whole() for part in parts])
        joined._digests = [digest for part in parts for digest in part._digests]
        joined._prompts_B = torch.cat([part._prompts_B for part in parts])
        joined.caches = [cache for part in parts for cache in part.caches]
        return joined


class _Renewal:
    """Chooses experts again from the prompts and what has been generated. The prompts themselves stay as they are."""

    def __init__(self, shared: SharedPrompt, work: Work, choose: Callable[[SharedPrompt], Chosen]) -> None:
        self._longer = copy.copy(shared)
        self._longer._gatherer = shared._gatherer.fork()
        self._work = work
        self._choose = choose

    def read(self, ids_BN: Tensor, counted_BN: Tensor | None) -> None:
        longer = self._longer
        self._work.detach()
        longer._digests = prompt_digests(ids_BN, counted_BN, longer._digests)
        longer._prompts_B = longer._prompts_B + (ids_BN.shape[1] if counted_BN is None else counted_BN.sum(dim=1))
        rows, positions = ids_BN.shape
        longer._gatherer.expect(rows, positions, counted_BN, ids_BN.device, WEIGHT)
        longer._gatherer.attach()

    def renew(self) -> None:
        self.stop()
        self._work.attach(*self._choose(self._longer))

    def stop(self) -> None:
        self._longer._gatherer.detach()
