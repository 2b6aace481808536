"""Routing: on which view a forward call of a pruned model runs, and with whose experts.

That follows from its KV cache, never from the length of its input. An empty cache begins a new prompt; inside
`model.generate` the prompt lasts until the cache holds all of its tokens, however it is chunked; outside of it, until
the first call has been made, or for as long as `Pruner.prefill()` lasts. Every cache continues with its own prompt's
experts, in any order of calls.
"""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from griffin.activations import Recorded, Recorder
from griffin.engine import Engine
from griffin.method import Method
from griffin.prompt import PromptState, choose, wanted
from griffin.rows import RowStatistics, Traffic
from griffin.selection import Experts
from griffin.views import logit_positions


class Call(NamedTuple):
    """What `model.generate` knows of a running call and the forward calls do not."""

    prompt_length: int  # positions, padding and earlier turns included
    prompts: int  # rows before beams or several returned sequences multiply them
    padding_mask: Tensor | None  # [prompts, prompt_length], where the caller passed one
    ends: bool  # whether nobody will have the KV cache afterwards


@dataclass(eq=False)
class CachedPrompt:
    """The prompt of a KV cache, and what became of it."""

    rows: int
    rows_per_prompt: int  # beams, or several returned sequences
    recorder: Recorder | None  # None: it is over
    ids: list[list[int]]  # where random numbers follow from them
    positions: int = 0  # that its cache holds
    experts: list[Experts | None] = field(default_factory=list)  # of each prompt, or of all together
    steps: int = 0
    seconds: float = 0.0

    def statistics(self, traffic: Traffic) -> list[RowStatistics]:
        """What each of its texts took so far."""
        dense = self.steps if self.experts and self.experts[0] is None else 0
        read = dense * traffic.dense + (self.steps - dense) * traffic.pruned
        seconds, whole = self.seconds / self.rows, self.steps * traffic.dense
        return [RowStatistics(self.steps + 1, dense, read, whole, seconds)] * self.rows


class Router:
    """Runs forward calls of a model on views of it."""

    def __init__(
        self,
        engine: Engine,
        method: Method,
        shared_experts: bool,
        seed: int,
        given: Experts | None,
        only_prompts: str | None,
    ) -> None:
        self._engine, self._method, self._seed, self._given = engine, method, seed, given
        self._shared_experts, self._only_prompts = shared_experts, only_prompts
        self._shared = shared_experts or engine.mode == "compact"
        self._signature = inspect.signature(engine.model.forward)
        self._prompts: WeakKeyDictionary[Any, CachedPrompt] = WeakKeyDictionary()
        self.call: Call | None = None
        self.in_prefill = False
        self.last: CachedPrompt | None = None

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward call of the model."""
        began = time.perf_counter()
        call = self._signature.bind_partial(*args, **kwargs).arguments
        call |= call.pop("kwargs", {})
        inputs = call.get("input_ids") if call.get("input_ids") is not None else call.get("inputs_embeds")
        if inputs is None:
            raise ValueError("a pruned model needs input_ids or inputs_embeds")
        cache = call.get("past_key_values")
        cached = 0 if cache is None else int(cache.get_seq_length())
        prompt = None if cache is None else self._prompts.get(cache)
        in_prompt = cached < self.call.prompt_length if self.call is not None else cached == 0 or self.in_prefill
        if in_prompt and (prompt is None or cached == 0 or cached != prompt.positions):
            prompt = self._begin(inputs.shape[0])  # a cache filled elsewhere begins a new prompt too
        if prompt is None:
            raise ValueError("the KV cache was filled before pruning began: run the prompt inside the context")
        run = self._run_prompt(prompt, call, cached, inputs) if in_prompt else self._continue(prompt, inputs.shape[0])
        if in_prompt and isinstance(kept := kwargs.get("logits_to_keep"), int) and kept:
            kwargs = {**kwargs, "logits_to_keep": logit_positions(self._engine.model, kept, inputs)}
        try:
            output = run(*args, **kwargs)
        finally:
            self._engine.dense.taps.recorder = None
        prompt.positions = cached + inputs.shape[1]
        prompt.steps += not in_prompt
        prompt.seconds += time.perf_counter() - began
        if (after := getattr(output, "past_key_values", None)) is not None:
            self._prompts[after] = prompt
        self.last = prompt
        return output

    def _begin(self, rows: int) -> CachedPrompt:
        prompts = self.call.prompts if self.call is not None else rows
        refuse_batch(self._engine, prompts, self._shared_experts)
        self.last = None  # its memory goes, unless its KV cache lives
        record = [] if self._given else wanted([self._method])
        recorder = Recorder(self._engine.dense.blocks, record, [Recorded()] * rows)
        return CachedPrompt(rows, rows // prompts, recorder, [[] for _ in range(rows)])

    def _run_prompt(self, prompt: CachedPrompt, call: dict[str, Any], cached: int, inputs: Tensor) -> Any:
        rows, columns = inputs.shape[:2]
        if rows != prompt.rows:
            raise ValueError(f"the prompt has {prompt.rows} rows and its next chunk {rows}")
        if prompt.recorder is None:
            raise ValueError("this prompt is over: its KV cache cannot begin another turn")
        columns_B: list[slice | Tensor] = [slice(None)] * rows
        if (valid_BS := self._valid_positions(call, cached, rows, columns)) is not None and not valid_BS.all():
            # On the host, since layers may be on several devices.
            columns_B = [valid_S.nonzero().squeeze(1) for valid_S in valid_BS.cpu()]
        counts = [columns if isinstance(valid, slice) else len(valid) for valid in columns_B]
        prompt.recorder.expect(columns_B, counts)
        prompt.experts = []
        if self._method.draws:
            ids_BS = call.get("input_ids")
            if ids_BS is None:
                raise ValueError("random statistics and selections need input_ids: their seed is the prompt")
            for ids_S, valid, known in zip(ids_BS, columns_B, prompt.ids, strict=True):
                known += ids_S[valid].tolist()
        self._engine.dense.taps.recorder = prompt.recorder
        return self._engine.dense.module.forward

    def _continue(self, prompt: CachedPrompt, rows: int) -> Any:
        if self._only_prompts is not None:
            raise ValueError(f"{self._only_prompts} works within model.generate: it runs a loop of its own")
        chosen = self.chosen(prompt)
        if not self._shared and rows != prompt.rows:
            raise ValueError(f"the prompt has {prompt.rows} rows and its continuation {rows}")
        repeats = rows if self._shared else prompt.rows_per_prompt
        return self._engine.view([experts for experts in chosen for _ in range(repeats)]).module.forward

    def _valid_positions(self, call: dict[str, Any], cached: int, rows: int, positions: int) -> Tensor | None:
        """[B, S] bool, False where this call's tokens are padding; None where there is none."""
        mask = call.get("attention_mask")
        if mask is None:
            return None
        if not (isinstance(mask, Tensor) and mask.dim() == 2):
            # `generate` has built the masks of a static cache by now; the caller's own tells the padding.
            mask = self.call.padding_mask if self.call is not None else None
            if mask is None:
                raise ValueError("padding is read from a 2-D attention_mask: pass one")
            mask = mask.repeat_interleave(rows // mask.shape[0], dim=0)
        if mask.shape[0] != rows or mask.shape[1] < cached + positions:
            raise ValueError(
                f"attention_mask is {list(mask.shape)}: expected [{rows}, {cached + positions}], cached tokens included"
            )
        return mask[:, cached : cached + positions].bool()

    def chosen(self, prompt: CachedPrompt) -> list[Experts | None]:
        """The experts of a prompt, once it is complete."""
        if not prompt.experts:
            assert prompt.recorder is not None
            rows = zip(prompt.ids, prompt.recorder.recorded_B, strict=True)
            states = [PromptState(tuple(ids), 0, None, torch.empty(0), recorded) for ids, recorded in rows]
            states = states[:: prompt.rows_per_prompt]
            groups = [states] if self._shared else [[state] for state in states]
            prompt.experts = [self._given or choose(self._engine, group, self._method, self._seed) for group in groups]
            if self.call is not None and self.call.ends:
                prompt.recorder = None  # its memory goes: no other turn can come
        return prompt.experts


def refuse_batch(engine: Engine, prompts: int, shared_experts: bool) -> None:
    """Refuse several prompts that would each need compact weights."""
    if engine.mode == "compact" and prompts > 1 and not shared_experts:
        raise ValueError(
            f"mode='compact' holds one expert set and the batch has {prompts} prompts: "
            "use mode='masked', or shared_experts=True"
        )
