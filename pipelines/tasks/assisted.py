"""Transformers' assisted generation, as what verified decoding is compared with: drafts that are looked up in the
prompt, or that a smaller model writes. Its drafts, checks and bytes are counted as ours are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria, StoppingCriteriaList

import griffin
from pipelines.config import RunConfig
from pipelines.errors import UserError
from pipelines.models import LoadedModel, load

# Tokens that are looked up at a time where `draft_tokens=auto`, as in the method's own examples; a model drafts as
# transformers would have it.
LOOKED_UP = 10


@dataclass(frozen=True)
class Text:
    """A text, the time that it took with its prompt, and what became of the drafts."""

    tokens: list[int]
    seconds: float
    drafts: griffin.DraftStatistics


class Assisted:
    """A model with what assists it.

    Args:
        loaded: the model.
        config: of the run; it has `assistance`.

    Attributes:
        step_bytes: of weights that one step of the model reads.

    Raises:
        UserError: the assistant cannot be loaded, or has other tokens.
    """

    def __init__(self, loaded: LoadedModel, config: RunConfig) -> None:
        self._model: Any = griffin.view_of(loaded.model)
        self._checked, self._drafted = _counted(self._model), list[int]()
        self._config = config
        self._options: dict[str, Any] = {}
        self._assistant_bytes = 0
        if config.assistant is None:
            number = LOOKED_UP if config.draft_tokens == "auto" else config.draft_tokens
            self._options["prompt_lookup_num_tokens"] = number
        else:
            model = replace(config.model, name="assistant", repo=config.assistant)
            small = load(model, config.device, config.seed, onednn=config.cpu_onednn)
            if small.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
                raise UserError(
                    f"assistant={config.assistant}: expected a model with the tokens of {config.model.name}"
                )
            self._options["assistant_model"] = small.model
            self._drafted, self._assistant_bytes = _counted(small.model), _step_bytes(small.model)
            if config.draft_tokens != "auto":
                small.model.generation_config.num_assistant_tokens = config.draft_tokens
                small.model.generation_config.assistant_confidence_threshold = 0.0
        self.step_bytes = _step_bytes(loaded.model)

    def generate(self, ids: Sequence[int], ended: Callable[[Sequence[int]], bool]) -> Text:
        """Continue a prompt greedily.

        Args:
            ids: of the prompt.
            ended: whether new tokens are a whole text.
        """
        ids_1S = torch.tensor([list(ids)], device=self._model.device)
        self._checked.clear()
        self._drafted.clear()
        began = time.perf_counter()
        sequences_1S = self._model.generate(
            ids_1S,
            attention_mask=torch.ones_like(ids_1S),
            max_new_tokens=self._config.task.max_new_tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([_Ended(len(ids), ended)]),
            **self._options,
        )
        seconds = time.perf_counter() - began
        tokens = sequences_1S[0, len(ids) :].tolist()
        while len(tokens) > 1 and ended(tokens[:-1]):  # the last round may have gone on behind the text's end
            del tokens[-1]
        # The prompt runs with the first drafts: its step is no more a check than that of an unassisted prompt, so
        # the first round counts by its drafts alone, and the first token not at all.
        rounds = [self._checked[0] - len(ids), *(count - 1 for count in self._checked[1:])]
        checks, emitted = len(rounds) - (rounds[0] == 0), len(tokens) - 1 + (rounds[0] > 0)
        drafts = griffin.DraftStatistics(
            checks=checks,
            drafted=sum(rounds),
            accepted=emitted - checks,
            emitted=emitted,
            draft_bytes=len(self._drafted) * self._assistant_bytes,
        )
        return Text(tokens, seconds, drafts)


class _Ended(StoppingCriteria):
    """The same end of a text for `generate`."""

    def __init__(self, prompt_tokens: int, ended: Callable[[Sequence[int]], bool]) -> None:
        self._prompt_tokens, self._ended, self._asked = prompt_tokens, ended, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[0, self._prompt_tokens :].tolist()
        done = any(self._ended(new[:count]) for count in range(self._asked + 1, len(new) + 1))
        self._asked = len(new)
        return torch.tensor([done], device=input_ids.device)


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
