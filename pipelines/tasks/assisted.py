"""Transformers' assisted generation, as what verified decoding is compared with: drafts that are looked up in the
prompt, or that a smaller model writes. Its drafts, checks and bytes are counted as ours are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

import griffin
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.models import LoadedModel, load
from pipelines.tasks.answers import drafting_part
from pipelines.tasks.grouping import Evaluation
from pipelines.tasks.prompts import P, Texts

# Tokens that are looked up at a time where `draft_tokens=auto`, as in the method's own examples; a model drafts as
# transformers would have it.
LOOKED_UP = 10


def assisted(run: Evaluation, encoded: dict[P, list[int]], ended: Callable[[Sequence[int]], bool]) -> Texts[P]:
    """The texts of prompts, one by one: greedy, until the new tokens are a whole text.

    Raises:
        UserError: the assistant cannot be loaded, or has other tokens.
    """
    (method,) = run.methods
    model: Any = griffin.view_of(run.loaded.model)
    checked, step_bytes = _counted(model), _step_bytes(model)
    assistant = _assistant(run.loaded, run.config) if run.config.assistant else None
    drafted, draft_bytes = (_counted(assistant), _step_bytes(assistant)) if assistant else (list[int](), 0)
    looked_up = LOOKED_UP if run.config.draft_tokens == "auto" else run.config.draft_tokens
    by = {"assistant_model": assistant} if assistant else {"prompt_lookup_num_tokens": looked_up}
    for prompt, ids in encoded.items():
        if not run.lacks(method, prompt):
            continue
        ids_1S = torch.tensor([ids], device=model.device)
        checked.clear()
        drafted.clear()
        began = time.perf_counter()
        sequences_1S = model.generate(
            ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            max_new_tokens=run.config.task.max_new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([_Ended(len(ids), ended)]),
            **by,
        )
        seconds = time.perf_counter() - began
        tokens = sequences_1S[0, len(ids) :].tolist()
        while len(tokens) > 1 and ended(tokens[:-1]):  # the last round may have gone on behind the text's end
            del tokens[-1]
        # The prompt runs with the first drafts: its step is no more a check than that of an unassisted prompt, so
        # the first round counts by its drafts alone, and the first token not at all.
        rounds = [checked[0] - len(ids), *(count - 1 for count in checked[1:])]
        checks, emitted = len(rounds) - (rounds[0] == 0), len(tokens) - 1 + (rounds[0] > 0)
        drafts = griffin.DraftStatistics(
            checks=checks,
            drafted=sum(rounds),
            accepted=emitted - checks,
            emitted=emitted,
            draft_bytes=len(drafted) * draft_bytes,
        )
        yield prompt, method, tokens, seconds, drafting_part([drafts], step_bytes)


class _Ended(StoppingCriteria):
    """The same end of a text for `generate`."""

    def __init__(self, prompt_tokens: int, ended: Callable[[Sequence[int]], bool]) -> None:
        self._prompt_tokens, self._ended, self._asked = prompt_tokens, ended, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[0, self._prompt_tokens :].tolist()
        done = any(self._ended(new[:count]) for count in range(self._asked + 1, len(new) + 1))
        self._asked = len(new)
        return torch.tensor([done], device=input_ids.device)


def _assistant(loaded: LoadedModel, config: RunConfig) -> Any:
    """The small model that drafts."""
    settings = replace(config.model, name="assistant", repo=config.assistant)
    small = load(settings, config.device, config.seed, onednn=config.cpu_onednn)
    if small.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise UserError(f"assistant={config.assistant}: expected a model with the tokens of {config.model.name}")
    if config.draft_tokens != "auto":
        small.model.generation_config.num_assistant_tokens = config.draft_tokens
        small.model.generation_config.assistant_confidence_threshold = 0.0
    return small.model


def _counted(model: nn.Module) -> list[int]:
    """A list that grows by the positions of each forward call of a model."""
    calls: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append(options["input_ids"].shape[1])

    model.register_forward_pre_hook(before, with_kwargs=True)
    return calls


def _step_bytes(model: nn.Module) -> int:
    widths = [block.width for block in griffin.find_feedforward_blocks(model)]
    return griffin.traffic(model, widths).dense
