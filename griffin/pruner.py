"""The pruner: a context in which prompts run dense and what follows a prompt runs on the prompt's experts.

Which of the two a forward call is follows from the KV cache, never from the length of its input: an empty cache
begins a new prompt; inside `model.generate` the prompt lasts until the cache holds all of its tokens, however it
is chunked; outside of it, until the first call has been made, or for as long as `Pruner.prefill()` lasts.

Dimensions: B = batch rows, S = positions of one forward call, D = FF width, K = kept neurons.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, nn

from griffin.budgets import kept_per_layer
from griffin.compensation import COMPENSATIONS
from griffin.decoding import refuse_decoding
from griffin.experts import choose_experts, corrections, prompt_digests
from griffin.feedforward import FeedForwardBlock, UnsupportedModelError, find_feedforward_blocks
from griffin.gathering import Gatherer
from griffin.modes import MODES, work
from griffin.offloading import Offload
from griffin.own_text import gathered_over_own_text
from griffin.refit import Refit
from griffin.refresh import REFRESHES, WEIGHT, Rereading
from griffin.selection import SELECTIONS
from griffin.statistics import STATISTICS

_pruned_models: WeakSet[nn.Module] = WeakSet()


@dataclass
class _Generation:
    """What `model.generate` knows of a running call and the forward calls do not."""

    prompt_length: int  # positions, padding and earlier turns included
    prompts: int  # rows before beams or several returned sequences multiply them
    padding_mask: Tensor | None  # [prompts, prompt_length], where the caller passed one


class Pruner:
    """Prunes the FF blocks of a model per prompt. Use `griffin.prune` to make one, and it as a context manager."""

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | Sequence[float],
        statistic: str,
        selection: str,
        mode: str,
        shared_experts: bool,
        seed: int,
        compensation: str,
        budget: str,
        refresh: str,
        offload_dense: bool,
        compiled: bool,
    ) -> None:
        for key, value, allowed in (
            ("statistic", statistic, STATISTICS),
            ("selection", selection, SELECTIONS),
            ("mode", mode, MODES),
            ("compensation", compensation, COMPENSATIONS),
            ("refresh", refresh, REFRESHES),
        ):
            if value not in allowed:
                raise ValueError(f"{key}={value!r}: expected one of {', '.join(allowed)}")
        self.model: Any = model
        if offload_dense and mode != "compact":
            raise ValueError(
                f"offload_dense=True with mode={mode!r}: expected 'compact', which needs dense weights for prompts only"
            )
        self.blocks: list[FeedForwardBlock] = find_feedforward_blocks(model)
        self.kept: list[int] = kept_per_layer([block.width for block in self.blocks], sparsity, budget)
        self.statistic = STATISTICS[statistic]
        if self.statistic.hindsight:
            raise ValueError(f"statistic={statistic!r} knows what comes after the prompt: it cannot generate")
        self.compensation = COMPENSATIONS[compensation]
        if refresh == "compensation" and (self.compensation is None or self.compensation.learn is None):
            learning = [name for name, one in COMPENSATIONS.items() if one is not None and one.learn is not None]
            raise ValueError(
                f"refresh={refresh!r} with compensation={compensation!r}, which cannot go on learning: expected "
                f"compensation={', '.join(learning)}"
            )
        self.selection = selection
        self.mode = mode
        self.shared_experts = shared_experts
        self.seed = seed

        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no KV cache: pruning needs it to tell the prompt from what follows"
            )
        self._draws = self.statistic.random or selection != "topk"
        self._gatherer = Gatherer(
            self.blocks, [self.statistic.gathering, self.compensation.gathering if self.compensation else None]
        )
        self._own_text: list[Tensor] | None = None
        self._offload = Offload(model) if offload_dense else None
        self._compiled = compiled
        self._work = work(mode, self.blocks, compiled=compiled)
        # Where nothing is dropped there is nothing to refresh, and decoding stays dense to the bit.
        dropping = any(kept < block.width for kept, block in zip(self.kept, self.blocks, strict=True))
        self._refreshes = refresh != "none" and dropping
        self._learns = refresh == "compensation" and dropping
        self._rereading = Rereading(model, self)
        self._refit: Refit | None = None
        self._signature = inspect.signature(model.forward)
        self._root_hooks: list[Any] = []
        self._generation: _Generation | None = None
        self._in_prefill = False
        # The cache after the last call and the positions in it, so that the next call is known to continue it.
        self._cache: ReferenceType[Any] | None = None
        self._positions = 0
        self._phase: Literal["none", "prompt", "generation"] = "none"
        self._forget_prompt()

    # -- the context ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Pruner:
        if self.model in _pruned_models:
            raise RuntimeError("this model is being pruned already; leave that context first")
        with contextlib.ExitStack() as entered:
            if self._offload is not None:
                entered.enter_context(self._offload)
            if self.statistic.own_text and self.statistic.gathering is not None:
                self._own_text = gathered_over_own_text(self.model, self.blocks, self.statistic.gathering)
            self._entered = entered.pop_all()
        _pruned_models.add(self.model)
        uncompiled: Any = torch.compiler.disable  # a compiled model runs the hooks as they are
        before, after = uncompiled(self._before_forward), uncompiled(self._after_forward)
        self._root_hooks = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after),
        ]
        if self._refreshes:
            self._rereading.attach()
        self._own_generate = vars(self.model).get("generate")
        if hasattr(self.model, "generate"):  # a decoder without its language modelling head has none
            self._dense_generate = self.model.generate
            self.model.generate = self._generate
        return self

    def __exit__(self, *_: object) -> None:
        self._work.detach()
        self._work = work(self.mode, self.blocks, compiled=self._compiled)  # what the old one holds can go
        self._gatherer.detach()
        self._rereading.detach()
        self.stop()
        for hook in self._root_hooks:
            hook.remove()
        vars(self.model).pop("generate", None)  # uncovers the class's own
        if self._own_generate is not None:
            self.model.generate = self._own_generate
        if self._phase == "generation":
            self._phase = "prompt"  # entered again, the next generation call puts the experts back to work
        _pruned_models.discard(self.model)
        self._entered.close()

    @contextlib.contextmanager
    def prefill(self) -> Iterator[None]:
        """Forward calls in this context are stretches of one prompt: for chunked prefill outside `generate`."""
        self._in_prefill = True
        try:
            yield
        finally:
            self._in_prefill = False

    def prepare(self) -> None:
        """Choose the prompt's experts and put them to work now, instead of in the next generation call.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        if self._phase == "none":
            raise RuntimeError("no prompt has run yet")
        self._continue_generation(self._rows)

    # -- what was chosen ------------------------------------------------------------------------------------------

    @property
    def scores(self) -> list[Tensor]:
        """Per layer, the scores of the last prompt: [B, D] float32, [1, D] where static or shared.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        self._choose()
        assert self._scores is not None
        return self._scores

    @property
    def experts(self) -> list[Tensor]:
        """Per layer, the kept neurons of the last prompt: [B, K] int64, ascending; [1, K] where static or shared.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        self._choose()
        assert self._experts is not None
        return self._experts

    # -- phases ---------------------------------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, telling the forward calls how long the prompt is."""
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        refuse_decoding(self.model.generation_config, given, kwargs, one_text=self._refreshes)
        inputs = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            raise ValueError("generate needs a prompt: pass input_ids or inputs_embeds")
        mask = kwargs.get("attention_mask")
        length = inputs.shape[1] if mask is None else mask.shape[1]
        self._generation = _Generation(length, inputs.shape[0], mask)
        try:
            return self._dense_generate(*args, **kwargs)
        finally:
            self._generation = None

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = self._signature.bind_partial(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        inputs = call.get("input_ids")
        ids = inputs
        if inputs is None:
            inputs = call.get("inputs_embeds")
        if inputs is None:
            raise ValueError("a pruned model needs input_ids or inputs_embeds")
        cache = call.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        rows, positions = inputs.shape[:2]

        if self._generation is not None:
            in_prompt = cached < self._generation.prompt_length
        else:
            in_prompt = cached == 0 or self._in_prefill
        if in_prompt:
            self._rereading.end()
            known = self._cache is None or self._cache() is cache
            if cached == 0 or cached != self._positions or not known:
                self._begin_prompt(rows)  # a cache filled elsewhere begins a new prompt too
            self._continue_prompt(rows, positions, ids, self._valid_positions(call, cached, rows, positions))
        else:
            self._continue_generation(rows)
        self._positions = cached + positions

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        cache = getattr(output, "past_key_values", None)
        self._cache = None if cache is None else ref(cache)

    def _forget_prompt(self) -> None:
        self._phase = "none"
        self._rows = 0
        self._rows_per_prompt = 1  # beams, or several returned sequences
        self._refit = None
        self._lengths_B: Tensor | None = None
        self._digests: list[int] = []
        self._gatherer.reset()
        self._scores: list[Tensor] | None = None
        self._experts: list[Tensor] | None = None

    def _begin_prompt(self, rows: int) -> None:
        prompts = self._generation.prompts if self._generation is not None else rows
        if self.mode == "compact" and prompts > 1 and not self.shared_experts:
            raise ValueError(
                f"mode='compact' holds one expert set and the batch has {prompts} prompts: "
                "use mode='masked', or shared_experts=True"
            )
        self._forget_prompt()
        self._rows = rows
        self._rows_per_prompt = rows // prompts
        self._digests = [0] * rows

    def _continue_prompt(
        self, rows: int, positions: int, ids: Tensor | None, valid_BS: Tensor | None, weight: float = 1.0
    ) -> None:
        if rows != self._rows:
            raise ValueError(f"the prompt has {self._rows} rows and its next stretch {rows}")
        self._work.detach()
        self._gatherer.expect(rows, positions, valid_BS, self.model.device, weight)
        self._gatherer.attach()
        self._phase = "prompt"
        self._scores = self._experts = None
        lengths_B = torch.full((rows,), positions) if valid_BS is None else valid_BS.sum(dim=1)
        self._lengths_B = lengths_B if self._lengths_B is None else self._lengths_B + lengths_B.to(self._lengths_B)
        if self._draws:
            if ids is None:
                raise ValueError("random statistics and selections need input_ids: their seed is the prompt")
            self._digests = prompt_digests(ids, valid_BS, self._digests)

    def _continue_generation(self, rows: int) -> None:
        if self._phase == "none":
            raise ValueError("the KV cache was filled before pruning began: run the prompt inside the context")
        if self._phase == "generation":
            return
        self._choose()
        assert self._experts is not None
        self._gatherer.detach()
        shared = self.shared_experts or self.mode == "compact"
        prompts = self._rows // self._rows_per_prompt if shared else None
        added = corrections(self.blocks, self._gatherer, self.compensation, self._experts, prompts, fits=self._learns)
        if not shared and rows != self._rows:
            raise ValueError(f"the prompt has {self._rows} rows and its continuation {rows}")
        if self._learns and self.compensation is not None:
            added = iter(kept := list(added))
            self._refit = Refit(self.blocks, self._work, self.compensation, self._experts, kept, shared=shared)
        self._work.attach(self._experts, added)
        self._phase = "generation"
        if self._refreshes and not self._rereading.active:
            self._rereading.begin()

    def read(self, ids_BN: Tensor, counted_BN: Tensor | None) -> None:
        """For `Rereading`: the coming call is dense, and reads what was generated."""
        if self._refit is not None:
            self._refit.read(ids_BN, counted_BN)
        else:
            self._continue_prompt(ids_BN.shape[0], ids_BN.shape[1], ids_BN, counted_BN, WEIGHT)

    def renew(self) -> None:
        """For `Rereading`: it has been read. New experts are chosen by the next generation call, as after a prompt."""
        if self._refit is not None:
            self._refit.renew()

    def stop(self) -> None:
        """For `Rereading`: read no more."""
        if self._refit is not None:
            self._refit.stop()

    def _valid_positions(self, call: dict[str, Any], cached: int, rows: int, positions: int) -> Tensor | None:
        """[B, S] bool, False where this call's tokens are padding; None where there is none."""
        mask = call.get("attention_mask")
        if mask is None:
            return None
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            # `generate` has built the masks of a static cache by now; the caller's own tells the padding.
            mask = self._generation.padding_mask if self._generation is not None else None
            if mask is None:
                raise ValueError("padding is read from a 2-D attention_mask: pass one")
            mask = mask.repeat_interleave(rows // mask.shape[0], dim=0)
        if mask.shape[0] != rows or mask.shape[1] < cached + positions:
            raise ValueError(
                f"attention_mask is {list(mask.shape)}: expected [{rows}, {cached + positions}], cached tokens included"
            )
        return mask[:, cached : cached + positions].bool()

    # -- the experts at work --------------------------------------------------------------------------------------

    def _choose(self) -> None:
        """Scores and experts of the prompt, once it is complete."""
        if self._experts is not None:
            return
        if self._phase == "none":
            raise RuntimeError("no prompt has run yet")
        assert self._lengths_B is not None
        shared = self.shared_experts or self.mode == "compact"
        self._scores, self._experts = choose_experts(
            self.blocks,
            self._gatherer,
            self.statistic,
            self.selection,
            self.kept,
            self._digests,
            self.seed,
            self._lengths_B[:: self._rows_per_prompt] if shared else None,
            self._own_text,
        )


def prune(
    model: nn.Module,
    sparsity: float | Sequence[float] = 0.5,
    statistic: str = "griffin",
    selection: str = "topk",
    *,
    mode: str = "compact",
    shared_experts: bool = False,
    seed: int = 0,
    compensation: str = "none",
    budget: str = "uniform",
    refresh: str = "none",
    offload_dense: bool = False,
    compiled: bool = False,
) -> Pruner:
    """Prune a causal language model's FF blocks per prompt, for as long as the returned context lasts.

        with griffin.prune(model, sparsity=0.5, statistic="griffin") as pruner:
            model.generate(**inputs)
            pruner.experts[0]  # [B, K], the neurons that layer 0 kept

    Prompts run dense, so the first generated token is the dense model's; the following tokens use the prompt's
    experts. Leaving the context restores the model bit for bit, also after an exception. Sparsity 0 is
    bit-identical to the dense model. Inside the context the modules may hold the compact weights: save, move and
    convert the model outside of it.

    Args:
        model: a `transformers` causal language model with dense FF blocks.
        sparsity: share of FF neurons dropped, 0 <= sparsity < 1, for all layers or one number per layer.
        statistic: what scores the neurons, one of `STATISTICS`.
        selection: how scores become experts, one of `SELECTIONS`.
        mode: `compact` computes with the kept neurons' weights only (fast, one expert set at a time); `masked` sets the
            dropped activations to zero (every sequence of a batch has its own experts; no faster than dense).
        shared_experts: one expert set for the whole batch, by the paper's aggregation.
        seed: of random statistics and selections; a prompt draws the same in any batch.
        compensation: how the kept neurons make up for the dropped ones, one of `COMPENSATIONS`; not in the paper.
        budget: how the layers share what is kept, one of `BUDGETS`; not in the paper.
        refresh: what follows the text that is generated, one of `REFRESHES`; not in the paper.
        offload_dense: keep the dense FF weights in host memory, and bring them to the device block by block for prompts
            and their compaction; for `compact` only, and to the bit the same. See `Offload`.
        compiled: the model's call is going to be compiled, so `compact` always copies the kept neurons' weights into
            buffers of one shape. Otherwise, on a CPU, it reads them where they are, which is faster uncompiled.

    Returns:
        The context manager; entering it gives itself.

    Raises:
        ValueError: an argument is out of range.
        UnsupportedModelError: the model has an FF block that cannot be pruned.

    Source:
        Dong, Chen and Chi, "Prompt-prompted Adaptive Structured Pruning for Efficient LLM Generation", COLM 2024,
        arXiv 2404.01365.
    """
    return Pruner(
        model,
        sparsity,
        statistic,
        selection,
        mode,
        shared_experts,
        seed,
        compensation,
        budget,
        refresh,
        offload_dense,
        compiled,
    )
