"""`griffin.prune`: a context in which prompts run dense and what follows a prompt runs on the prompt's experts.

It routes `model.forward` and `model.generate` to views of the model (see `griffin.routing`). With `refresh`,
`verification` or `compiled`, `model.generate` runs our own decoding loop (see `griffin.own_loop`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from griffin.draft_vocabulary import output_embedding
from griffin.engine import MODES, Engine, refuse_uncroppable
from griffin.feedforward import UnsupportedModelError
from griffin.method import Method, as_method
from griffin.offloading import dense_in_host_memory
from griffin.own_loop import DecodingMethod, refuse_decoding
from griffin.prompt import PromptState
from griffin.routing import Call, Router, refuse_batch
from griffin.rows import DraftStatistics, RowStatistics, traffic
from griffin.selection import Experts
from griffin.views import compiler_for

_pruned_models: WeakSet[nn.Module] = WeakSet()


class Pruner:
    """`griffin.prune`: prunes a causal language model's FF blocks per prompt, for as long as the context lasts.

        with griffin.prune(model, "griffin", sparsity=0.5) as pruner:
            model.generate(**inputs)
            pruner.experts[0]  # [B, K], the neurons that layer 0 kept
            pruner.stats  # what each text took

    Prompts run dense, so the first generated token is the dense model's; the following tokens use the prompt's
    experts. Sparsity 0 is bit-identical to the dense model. The model itself is never written to: inside the context
    its `forward` and `generate` run on views of it (`griffin.views`), with the hooks that it had at the first call.
    Copying and saving it give the dense model; move and convert it outside of the context. Calls of other threads wait.

    Args:
        model: a `transformers` causal language model with dense FF blocks; one with LoRA on its attention goes too.
        method: a `griffin.Method`, the name of one (`griffin.METHODS`), or a sparsity.
        mode: `compact` computes with the kept neurons' weights only (fast, one expert set at a time); `masked` sets the
            dropped activations to zero (every sequence of a batch has its own experts; no faster than dense).
        shared_experts: one expert set for the whole batch, by the paper's aggregation.
        seed: of random statistics and selections; a prompt draws the same in any batch.
        offload_dense: keep the dense FF weights in host memory, for `compact` only (`griffin.offloading`).
        compiled: decode by compiled steps (CUDA graphs on a GPU), in greedy and sampled decoding; `auto`: on CUDA.
        experts: for every prompt instead of its own, as `chosen` gives them. They learn nothing.
        options: fields of `griffin.Method` that are to be others than `method` has.

    Attributes:
        method, blocks, kept: how prompts are continued; the FF blocks; how many neurons each layer keeps.
        stats: what each text of the last `model.generate` took.
        drafts: with `verification`, what became of the draft tokens of each of them.

    Raises:
        ValueError: an argument is out of range.
        TypeError: `model` is no model, a field of `options` is unknown, or `sparsity` or `seed` no number.
        UnsupportedModelError: the model has an FF block that cannot be pruned; or, where our own loop decodes, a KV
            cache that cannot be cropped, or no output embedding that a draft could prune.

    Source: Dong, Chen and Chi, COLM 2024, arXiv 2404.01365.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method | str | float | Sequence[float] = "griffin",
        *,
        mode: str = "compact",
        shared_experts: bool = False,
        seed: int = 0,
        offload_dense: bool = False,
        compiled: bool | str = False,
        experts: Experts | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model={model!r}: expected a transformers model, as from_pretrained loads it")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed={seed!r}: expected a whole number")
        self.method = method = as_method(method, **options)
        _check(method, mode, shared_experts=shared_experts, offload_dense=offload_dense)
        self.model: Any = getattr(model, "_orig_mod", model)  # what torch.compile or a LoRA adapter has wrapped
        if hasattr(self.model, "get_base_model"):
            self.model = self.model.get_base_model()
        compiler = compiler_for(compiled, next(self.model.parameters()).device)
        self._engine = Engine(self.model, mode=mode, compiler=compiler, offload_dense=offload_dense)
        self.blocks, self.kept = self._engine.blocks, method.kept(self._engine.widths)
        experts = experts and replace(experts, quantization=method.quantization)
        if experts is not None and [len(neurons_K) for neurons_K in experts.neurons] != self.kept:
            raise ValueError(f"experts: {[*map(len, experts.neurons)]} neurons, by layer; expected {self.kept}")
        if "past_key_values" not in inspect.signature(self.model.forward).parameters:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no KV cache: pruning needs it to tell the prompt from what follows"
            )
        # Why our own loop decodes, if it does. Where nothing is dropped, decoding stays dense to the bit.
        dense = self.kept == self._engine.widths and method.quantization == "none"
        axes = [
            axis for axis in ("verification", "refresh") if not dense and method.settings.get(axis, "none") != "none"
        ]
        self._reason = axes[0] if axes else None if compiler is None else "compiled"
        if self._reason is not None:
            refuse_uncroppable(self.model)
        if method.prunes_vocabulary:
            output_embedding(self.model)
        only = f"{axes[0]}={getattr(method, axes[0])!r}" if axes else None
        self._router = Router(self._engine, method, shared_experts, seed, experts, only)
        self._shared_experts, self._seed, self._given = shared_experts, seed, experts
        self._offload, self._auto = offload_dense, compiled == "auto"
        self._turns: WeakKeyDictionary[Any, list[PromptState]] = WeakKeyDictionary()
        self._chosen: list[Experts | None] = []
        self.stats: list[RowStatistics] = []
        self.drafts: list[DraftStatistics] = []

    def __enter__(self) -> Pruner:
        if self.model in _pruned_models:
            raise RuntimeError("this model is being pruned already; leave that context first")
        self._entered = contextlib.ExitStack()
        if self._offload:
            self._entered.enter_context(dense_in_host_memory(self.model))
        _pruned_models.add(self.model)

        @functools.wraps(self.model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._engine.lock:
                return self._router.forward(args, kwargs)

        attributes, uncompiled = vars(self.model), torch.compiler.disable  # a compiled model is routed as it is
        routed: dict[str, Any] = {"forward": uncompiled(forward), "__reduce_ex__": self._reduce}  # type: ignore[no-untyped-call]
        if hasattr(self.model, "generate"):  # a decoder without its language modelling head has none
            self._dense_generate, routed["generate"] = self.model.generate, self._generate
        self._before = {name: attributes[name] for name in routed if name in attributes}
        self._routed = routed.keys()
        attributes.update(routed)
        return self

    def __exit__(self, *_: object) -> None:
        for name in self._routed:
            vars(self.model).pop(name)  # uncovers the class's own
        vars(self.model).update(self._before)
        self._engine.unload()
        _pruned_models.discard(self.model)
        self._entered.close()

    def _reduce(self, protocol: Any) -> Any:
        """What copy.deepcopy, pickle and torch.save ask for: the dense model, as it is outside of the context."""
        reduced: Any = object.__reduce_ex__(self.model, protocol)
        function, arguments, state, *rest = reduced
        state = {name: value for name, value in state.items() if name not in self._routed} | self._before
        return (function, arguments, state, *rest)

    @contextlib.contextmanager
    def prefill(self) -> Iterator[None]:
        """Forward calls in this context are chunks of one prompt: for chunked prefill outside `generate`."""
        self._router.in_prefill = True
        try:
            yield
        finally:
            self._router.in_prefill = False

    @property
    def chosen(self) -> list[Experts | None]:
        """The experts of each of the last prompts, or of all together; None: dense. RuntimeError: none has run yet."""
        chosen = self._router.chosen(self._router.last) if self._router.last is not None else self._chosen
        if not chosen:
            raise RuntimeError("no prompt has run yet")
        return chosen

    @property
    def scores(self) -> list[Tensor]:
        """Per layer, the scores of the last prompts: [B, D] float32; [1, D] where they share their experts.
        RuntimeError: they have none, or none has run yet."""
        scores = [experts.scores for experts in self.chosen if experts is not None and experts.scores]
        if not scores:
            raise RuntimeError(f"{self.method.label}: it has no scores of the prompt")
        return [torch.stack(layer) for layer in zip(*scores, strict=True)]

    @property
    def experts(self) -> list[Tensor]:
        """Per layer, the kept neurons of the last prompts: [B, K] int64, ascending; [1, K] where they share them.
        RuntimeError: none has run yet, or each token has experts of its own."""
        if self.method.by_token:
            raise RuntimeError(f"{self.method.label}: each token has experts of its own")
        everything = [torch.arange(block.width, device=self.model.device) for block in self.blocks]
        neurons = [everything if experts is None else experts.neurons for experts in self.chosen]
        return [torch.stack(layer) for layer in zip(*neurons, strict=True)]

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, telling forward calls how long the prompt is, or on our own loop."""
        with self._engine.lock:
            given = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
            reason = self._reason
            try:
                refuse_decoding(self.model.generation_config, given, kwargs, reason)
            except ValueError:
                if reason != "compiled" or not self._auto:
                    raise
                reason = None
                refuse_decoding(self.model.generation_config, given, kwargs)
            inputs = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
            inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
            if inputs is None or not inputs.shape[1]:
                raise ValueError("generate needs a prompt of at least one token: pass input_ids or inputs_embeds")
            self._forget()
            if reason is not None:
                return self._loop(inputs.shape[0], args, kwargs)
            mask = kwargs.get("attention_mask")
            length = inputs.shape[1] if mask is None else mask.shape[1]
            returned = kwargs.get("return_dict_in_generate", getattr(given, "return_dict_in_generate", None))
            ends = not returned and kwargs.get("past_key_values") is None
            self._router.call = Call(length, inputs.shape[0], mask, ends)
            try:
                return self._dense_generate(*args, **kwargs)
            finally:
                self._router.call = None
                if (last := self._router.last) is not None:
                    self.stats = last.statistics(self._traffic)

    def _loop(self, prompts: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_batch(self._engine, prompts, self._shared_experts or self.method.verified)
        streamer = kwargs.get("streamer", args[7] if len(args) > 7 else None)
        loop = DecodingMethod(
            self.method,
            self._seed,
            self._shared_experts,
            experts=self._given,
            streamer=streamer,
            engine=self._engine,
            turns=self._turns,
        )
        result = loop.run(self._dense_generate, args, kwargs)
        self._chosen, self.stats, self.drafts = loop.chosen, loop.stats, loop.drafts
        return result

    @functools.cached_property
    def _traffic(self) -> Any:
        return traffic(self.model, self.kept, self.method.scorer, self.method.quantization)

    def _forget(self) -> None:
        """The last prompts, whose memory goes unless their KV caches live."""
        self._router.last, self._chosen, self.stats, self.drafts = None, [], [], []


def _check(method: Method, mode: str, *, shared_experts: bool, offload_dense: bool) -> None:
    """Refuse what a method cannot be used with."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: expected one of {', '.join(MODES)}")
    if method.oracle:
        raise ValueError(f"statistic={method.scorer.name!r} knows what comes after the prompt: it cannot generate")
    verified, by_token = f"verification={method.verification!r}", f"statistic={method.scorer.name!r}"
    each = f"{by_token}, by which each token chooses for itself"
    for applies, what, key, value, only in (
        (offload_dense, "offload_dense=True", "mode", mode, "compact"),
        (method.verified, f"{verified}, whose drafts run compact", "mode", mode, "compact"),
        (method.verified, f"{verified}, which runs rows one by one", "shared_experts", shared_experts, False),
        (method.verified, f"{verified}, whose checks run dense", "offload_dense", offload_dense, False),
        (method.by_token, each, "mode", mode, "masked"),
        (method.by_token, each, "shared_experts", shared_experts, False),
    ):
        if applies and value != only:
            raise ValueError(f"{key}={value!r} with {what}: expected {only!r}")


prune = Pruner  # what it is called by, since it reads as what it does
