"""The pruner: a context in which prompts run dense and what follows a prompt runs on the prompt's experts.

It is an adapter: `model.generate`, in many of its ways to decode, and plain forward calls go on working. Which of the
two a forward call is follows from the KV cache, never from the length of its input: an empty cache begins a new prompt;
inside `model.generate` the prompt lasts until the cache holds all of its tokens, however it is chunked; outside of it,
until the first call has been made, or for as long as `Pruner.prefill()` lasts. With `refresh` or
`verification`, `model.generate` runs our own decoding loop.

Dimensions: B = rows of a batch, S = positions of one forward call, D = FF width, K = kept neurons, V = vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import ReferenceType, WeakSet, ref

import torch
from torch import Tensor, nn

from griffin.activations import Recorded, Recorder
from griffin.draft_vocabulary import output_embedding
from griffin.engine import Engine, kept_positions, refuse_uncroppable
from griffin.executors import MODES, Experts
from griffin.feedforward import FeedForwardBlock, UnsupportedModelError
from griffin.generate import generate_on_engine, refuse_decoding
from griffin.method import Method
from griffin.offloading import Offload
from griffin.prompt import choose_from, draws, prompt_digest, score_neurons, wanted
from griffin.rows import Drafting, Row
from griffin.self_generated import prepare
from griffin.statistics import STATISTICS

_pruned_models: WeakSet[nn.Module] = WeakSet()


@dataclass
class _Call:
    """What `model.generate` knows of a running call and the forward calls do not."""

    prompt_length: int  # positions, padding and earlier turns included
    prompts: int  # rows before beams or several returned sequences multiply them
    padding_mask: Tensor | None  # [prompts, prompt_length], where the caller passed one


class Pruner:
    """Prunes the FF blocks of a model per prompt. Use `griffin.prune` to make one, and it as a context manager.

    Attributes:
        blocks: the FF blocks, in layer order.
        kept: how many neurons each layer keeps.
        drafting: with `verification`, what became of the drafts of each prompt of the last `model.generate`.
    """

    def __init__(
        self, model: nn.Module, method: Method, mode: str, *, shared_experts: bool, seed: int, offload_dense: bool
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
        if offload_dense and mode != "compact":
            raise ValueError(
                f"offload_dense=True with mode={mode!r}: expected 'compact', which needs dense weights for prompts only"
            )
        for key, value in (("mode", mode), ("shared_experts", shared_experts), ("offload_dense", offload_dense)):
            if method.verified and value not in ("compact", False):
                raise ValueError(
                    f"{key}={value!r} with verification={method.verification!r}: rows run one by one, drafts compact "
                    f"and checks dense; expected {'compact' if key == 'mode' else False}"
                )
        if method.by_token and mode != "masked":
            raise ValueError(
                f"statistic={method.statistic!r} with mode={mode!r}: each token keeps its own neurons, for which there "
                "are no compact weights; expected 'masked', which is no faster than dense"
            )
        if method.by_token and shared_experts:
            raise ValueError(f"statistic={method.statistic!r} with shared_experts=True: each token has its own experts")
        if not method.by_token and STATISTICS[method.statistic].oracle:
            raise ValueError(f"statistic={method.statistic!r} knows what comes after the prompt: it cannot generate")
        self.model: Any = model
        self._engine = Engine(model, mode=mode)
        self.blocks: list[FeedForwardBlock] = self._engine.blocks
        self.kept = method.kept(self._engine.widths)
        if "past_key_values" not in inspect.signature(model.forward).parameters:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no KV cache: pruning needs it to tell the prompt from what follows"
            )
        # Where nothing is dropped there is nothing to refresh, and decoding stays dense to the bit.
        self._axis: str | None = None  # what has `model.generate` run our own loop
        if self.kept != self._engine.widths and (method.verified or method.refresh != "none"):
            self._axis = "verification" if method.verified else "refresh"
            refuse_uncroppable(model)
        if method.prunes_vocabulary:
            output_embedding(model)
        self.method, self.mode, self.seed = method, mode, seed
        self._shared = (shared_experts or mode == "compact") and not method.verified
        self._shared_experts = shared_experts
        self._offload = Offload(model) if offload_dense else None
        self._signature = inspect.signature(model.forward)
        self._root_hooks: list[Any] = []
        self._recorder = Recorder(self.blocks, wanted([method]))
        self._call: _Call | None = None
        self._in_prefill = False
        self._own_loop = False
        self._running = threading.Lock()  # while a call of the model runs
        self._owner: int | None = None  # the thread that it runs in
        self._in_forward = False  # whether it is a forward call outside of generate
        # The cache after the last call and the positions in it, so that the next call is known to continue it.
        self._cache: ReferenceType[Any] | None = None
        self._positions = 0
        self._phase: Literal["none", "prompt", "generation"]
        self._forget_prompt()

    # -- the context --------------------------------------------------------------------------------------------------

    def __enter__(self) -> Pruner:
        if self.model in _pruned_models:
            raise RuntimeError("this model is being pruned already; leave that context first")
        with contextlib.ExitStack() as entered:
            if self._offload is not None:
                entered.enter_context(self._offload)
            prepare(self._engine, [self.method])
            self._entered = entered.pop_all()
        _pruned_models.add(self.model)
        uncompiled: Any = torch.compiler.disable  # a compiled model runs the hooks as they are
        before, after = uncompiled(self._before_forward), uncompiled(self._after_forward)
        self._root_hooks = [
            self.model.register_forward_pre_hook(before, with_kwargs=True),
            self.model.register_forward_hook(after, always_call=True),  # or a call that fails would end never
            self.model.register_state_dict_pre_hook(_refuse_copy),
        ]
        # What copy.deepcopy, pickle and torch.save ask an object for first.
        vars(self.model).update(__deepcopy__=_refuse_copy, __reduce_ex__=_refuse_copy)
        self._own_generate = vars(self.model).get("generate")
        if hasattr(self.model, "generate"):  # a decoder without its language modelling head has none
            self._dense_generate = self.model.generate
            self.model.generate = self._generate
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.unload()
        self._recorder.detach()
        for hook in self._root_hooks:
            hook.remove()
        for name in ("__deepcopy__", "__reduce_ex__"):
            vars(self.model).pop(name, None)
        vars(self.model).pop("generate", None)  # uncovers the class's own
        if self._own_generate is not None:
            self.model.generate = self._own_generate
        if self._phase == "generation":
            self._phase = "prompt"  # entered again, the next generation call puts the experts back to work
        _pruned_models.discard(self.model)
        self._entered.close()

    @contextlib.contextmanager
    def prefill(self) -> Iterator[None]:
        """Forward calls in this context are chunks of one prompt: for chunked prefill outside `generate`."""
        self._in_prefill = True
        try:
            yield
        finally:
            self._in_prefill = False

    # -- what was chosen ----------------------------------------------------------------------------------------------

    @property
    def scores(self) -> list[Tensor]:
        """Per layer, the scores of the last prompt: [B, D] float32, [1, D] where static or shared.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        self._refuse_by_token()
        self._choose()
        statistic = STATISTICS[self.method.statistic]
        groups = self._groups
        if statistic.activations is None and not statistic.random:
            groups = groups[:1]
        each = [
            score_neurons(
                self._engine, [one for one, _ in group], [digest for _, digest in group], self.method, self.seed
            )
            for group in groups
        ]
        return [torch.cat(layer) for layer in zip(*each, strict=True)]

    @property
    def experts(self) -> list[Tensor]:
        """Per layer, the kept neurons of the last prompt: [B, K] int64, ascending; [1, K] where static or shared.

        Raises:
            RuntimeError: no prompt has run yet.
        """
        self._refuse_by_token()
        self._choose()
        chosen = self._chosen[: len(self._groups)]
        statistic = STATISTICS[self.method.statistic]
        if statistic.activations is None and not draws(self.method):
            chosen = chosen[:1]
        return [
            torch.stack(
                [
                    torch.arange(block.width, device=self.model.device) if one is None else one.neurons[layer]
                    for one in chosen
                ]
            )
            for layer, block in enumerate(self.blocks)
        ]

    def _refuse_by_token(self) -> None:
        if self.method.by_token:
            raise RuntimeError(f"statistic={self.method.statistic!r}: each token has scores and experts of its own")

    # -- phases -------------------------------------------------------------------------------------------------------

    def _take(self) -> bool:
        """Become the one thread whose call runs; False if this thread is already. There is one prompt and one set of
        buffers, so a call from another thread is refused meanwhile."""
        if self._owner == threading.get_ident():
            return False
        if not self._running.acquire(blocking=False):
            raise RuntimeError(
                "another thread is using this pruned model: one call of it runs at a time; wait for it to end, or give "
                "each thread a model of its own"
            )
        self._owner = threading.get_ident()
        return True

    def _give_back(self) -> None:
        self._owner = None
        self._running.release()

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, telling the forward calls how long the prompt is."""
        taken = self._take()
        try:
            return self._generated(*args, **kwargs)
        finally:
            if taken:
                self._give_back()

    def _generated(self, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        refuse_decoding(self.model.generation_config, given, kwargs, self._axis)
        inputs = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        if inputs is None:
            inputs = kwargs.get("inputs_embeds")
        if inputs is None:
            raise ValueError("generate needs a prompt: pass input_ids or inputs_embeds")
        if self._axis is not None:
            if kwargs.get("inputs_embeds") is not None:
                raise ValueError(f"{self._axis} needs input_ids: what was generated is read again")
            if kwargs.get("past_key_values") is not None:
                raise ValueError(
                    f"{self._axis} keeps a KV cache of its own: pass the whole text as input_ids instead of one"
                )
            if not self.method.verified:
                self._refuse_batch(inputs.shape[0])
            elif inputs.shape[0] > 1:
                warnings.warn(f"verification: the {inputs.shape[0]} prompts run one after the other", stacklevel=2)
            self._recorder.detach()  # a prompt by hand may have come before
            self._own_loop = True
            try:
                result, rows = generate_on_engine(
                    self._dense_generate, self._engine, self.method, args, kwargs, seed=self.seed, shared=self._shared
                )
            finally:
                self._own_loop = False
            self._remember(rows)
            return result
        mask = kwargs.get("attention_mask")
        length = inputs.shape[1] if mask is None else mask.shape[1]
        self._call = _Call(length, inputs.shape[0], mask)
        try:
            return self._dense_generate(*args, **kwargs)
        finally:
            self._call = None

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._in_forward = self._take() or self._in_forward
        if self._own_loop:
            return None
        call = self._signature.bind_partial(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        ids = inputs = call.get("input_ids")
        if inputs is None:
            inputs = call.get("inputs_embeds")
        if inputs is None:
            raise ValueError("a pruned model needs input_ids or inputs_embeds")
        cache = call.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        rows, positions = inputs.shape[:2]

        in_prompt = cached == 0 or self._in_prefill
        if self._call is not None:
            in_prompt = cached < self._call.prompt_length
        if in_prompt:
            known = self._cache is None or self._cache() is cache
            if cached == 0 or cached != self._positions or not known:
                self._begin_prompt(rows)  # a cache filled elsewhere begins a new prompt too
            self._continue_prompt(rows, positions, ids, self._valid_positions(call, cached, rows, positions))
        else:
            self._continue_generation(rows)
        self._positions = cached + positions
        if in_prompt and isinstance(kept := kwargs.get("logits_to_keep"), int) and kept:
            return args, {**kwargs, "logits_to_keep": kept_positions(model, kept, inputs)}
        return None

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._owner != threading.get_ident():  # a call that was refused
            return
        if self._in_forward:
            self._in_forward = False
            self._give_back()
        if output is None:  # a call that failed
            return
        cache = getattr(output, "past_key_values", None)
        self._cache = None if cache is None else ref(cache)

    def _forget_prompt(self) -> None:
        self._phase = "none"
        self._rows = 0
        self._rows_per_prompt = 1  # beams, or several returned sequences
        self._ids: list[list[int]] = []
        # Of each prompt, or of all that share their experts together: what was recorded, and its digest.
        self._groups: list[list[tuple[Recorded, int]]] = []
        self._chosen: list[Experts | None] = []
        self.drafting: list[Drafting] = []

    def _refuse_batch(self, prompts: int) -> None:
        if self.mode == "compact" and prompts > 1 and not self._shared_experts:
            raise ValueError(
                f"mode='compact' holds one expert set and the batch has {prompts} prompts: "
                "use mode='masked', or shared_experts=True"
            )

    def _begin_prompt(self, rows: int) -> None:
        prompts = self._call.prompts if self._call is not None else rows
        self._refuse_batch(prompts)
        self._forget_prompt()
        self._rows = rows
        self._rows_per_prompt = rows // prompts
        self._ids = [[] for _ in range(rows)]
        self._recorder.begin(Recorded(torch.zeros(rows, dtype=torch.int64, device=self.model.device)))

    def _continue_prompt(self, rows: int, positions: int, ids: Tensor | None, valid_BS: Tensor | None) -> None:
        if rows != self._rows:
            raise ValueError(f"the prompt has {self._rows} rows and its next chunk {rows}")
        self._engine.use_dense()
        self._recorder.expect(rows, positions, valid_BS)
        self._recorder.attach()
        self._phase = "prompt"
        self._groups, self._chosen = [], []
        if draws(self.method):
            if ids is None:
                raise ValueError("random statistics and selections need input_ids: their seed is the prompt")
            for row, known in enumerate(self._ids):
                known += (ids[row] if valid_BS is None else ids[row][valid_BS[row].to(ids.device)]).tolist()

    def _continue_generation(self, rows: int) -> None:
        if self._phase == "none":
            raise ValueError("the KV cache was filled before pruning began: run the prompt inside the context")
        if self._phase == "generation":
            return
        if self._axis is not None:
            value = getattr(self.method, self._axis)
            raise ValueError(f"{self._axis}={value!r} works within model.generate: it runs a loop of its own")
        self._choose()
        self._recorder.detach()
        if not self._shared and rows != self._rows:
            raise ValueError(f"the prompt has {self._rows} rows and its continuation {rows}")
        if self._shared:
            self._engine.load([self._chosen[0]] * rows)
        else:
            self._engine.load([experts for experts in self._chosen for _ in range(self._rows_per_prompt)])
        self._phase = "generation"

    def _valid_positions(self, call: dict[str, Any], cached: int, rows: int, positions: int) -> Tensor | None:
        """[B, S] bool, False where this call's tokens are padding; None where there is none."""
        mask = call.get("attention_mask")
        if mask is None:
            return None
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            # `generate` has built the masks of a static cache by now; the caller's own tells the padding.
            mask = self._call.padding_mask if self._call is not None else None
            if mask is None:
                raise ValueError("padding is read from a 2-D attention_mask: pass one")
            mask = mask.repeat_interleave(rows // mask.shape[0], dim=0)
        if mask.shape[0] != rows or mask.shape[1] < cached + positions:
            raise ValueError(
                f"attention_mask is {list(mask.shape)}: expected [{rows}, {cached + positions}], cached tokens included"
            )
        return mask[:, cached : cached + positions].bool()

    def _choose(self) -> None:
        """The experts of the prompt, once it is complete."""
        if self._chosen:
            return
        if self._phase == "none":
            raise RuntimeError("no prompt has run yet")
        recorded = self._recorder.recorded
        prompts = [
            (recorded.row(row, recorded.columns), prompt_digest(self._ids[row]))
            for row in range(0, self._rows, self._rows_per_prompt)
        ]
        self._groups = [prompts] if self._shared else [[prompt] for prompt in prompts]
        for group in self._groups:
            found, digests = [one for one, _ in group], [digest for _, digest in group]
            digests = digests if draws(self.method) else []
            self._chosen.append(choose_from(self._engine, found, found, digests, self.method, self.seed))

    def _remember(self, rows: Sequence[Row]) -> None:
        """Have `scores`, `experts` and `drafting` tell what these rows ended with."""
        self._forget_prompt()
        self.drafting = [row.drafting for row in rows]
        self._phase, self._rows = "prompt", len(rows)
        for row in rows:
            if row.place == 0:
                self._groups.append([(state.recorded, prompt_digest(state.ids)) for state in row.states])
                self._chosen.append(row.experts)


def _refuse_copy(*_: object) -> None:
    raise RuntimeError(
        "this model is being pruned: a copy would have its hooks, and perhaps compact weights; leave the griffin.prune "
        "context before you copy or save it"
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
    verification: str = "none",
    draft_tokens: int | str = "auto",
    draft_vocabulary: str = "prompt",
    prompt_lookup: bool = False,
    verification_threshold: float = 0.1,
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
        refresh: what follows the text that is generated, one of `REFRESHES`; not in the paper. It works within
            `model.generate`, one text a prompt, for models whose KV cache can be cropped.
        offload_dense: keep the dense FF weights in host memory, and bring them to the device block by block for prompts
            and their compaction; for `compact` only, and to the bit the same. See `Offload`.
        verification: how the dense model checks what the experts draft, one of `VERIFICATIONS`: with `exact` the text
            is the dense model's, or distributed as its texts. Not in the paper; works where `refresh` does, one prompt
            after the other, and goes best with `compensation="ridge", refresh="compensation"`.
        draft_tokens: how many tokens are drafted before a check, or `auto`.
        draft_vocabulary: of which tokens drafts are made, one of `DRAFT_VOCABULARIES`.
        prompt_lookup: draft what followed the last tokens where they stood before, by the experts where they did not.
        verification_threshold: for `threshold`, the least dense probability of a draft that is kept.

    Returns:
        The context manager; entering it gives itself.

    Raises:
        ValueError: an argument is out of range.
        TypeError: `model` is no model, or `sparsity` or `seed` no number.
        UnsupportedModelError: the model has an FF block that cannot be pruned, or, with `refresh` or `verification`, a
            KV cache that cannot be cropped, or no output embedding that a draft could prune.

    Source:
        Dong, Chen and Chi, "Prompt-prompted Adaptive Structured Pruning for Efficient LLM Generation", COLM 2024,
        arXiv 2404.01365.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r}: expected a transformers model, as from_pretrained loads it")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed={seed!r}: expected a whole number")
    amount: Any = tuple(sparsity) if isinstance(sparsity, list | tuple) else sparsity
    method = Method(
        statistic,
        selection,
        amount,
        compensation,
        budget,
        refresh,
        verification,
        draft_tokens,
        draft_vocabulary,
        prompt_lookup,
        verification_threshold,
    )
    return Pruner(model, method, mode, shared_experts=shared_experts, seed=seed, offload_dense=offload_dense)
