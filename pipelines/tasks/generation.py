"""Generation tasks: continue a prompt, compare the text with a reference by ROUGE."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import griffin
from pipelines.compiling import compiling
from pipelines.config import RunConfig
from pipelines.methods import Method, chooser, pruned, shared_prompt
from pipelines.models import LoadedModel
from pipelines.records import Sample, mean_and_stderr
from pipelines.task_config import GenerationTask
from pipelines.tasks.prompts import Prompt, read_prompts

ROUGE = ("rouge1", "rouge2", "rougeL")

# Where prompts take turns, one that ends makes room for the next, among so many batches of them. Such a group is run
# again when a run was cut off, so that its texts are what they would have been.
_BATCHES = 4

# rouge-score with its defaults, no stemming: F-scores, printed times 100 as the field does.
_scorer = RougeScorer(ROUGE, tokenizer=DefaultTokenizer(use_stemmer=False))


def read(config: RunConfig) -> list[Prompt]:
    """The task's prompts, built from its data.

    Raises:
        UserError: the data is missing, malformed or unreachable.
    """
    return read_prompts(config.task, config.limit, config.offset)


def evaluate(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Generate and score, group by group: every prompt runs dense once, for the continuations of all methods.

    A group is a batch, or several of which the prompts take turns. It holds prompts of like length, the longest first,
    so that little of it is padding and what does not fit into memory fails at once. A prompt that leaves no room for
    `max_new_tokens` in the model's context is not run and says so, as in the reference implementation.
    """
    room = loaded.context_length - config.task.max_new_tokens
    encoded = {prompt.index: loaded.encode(prompt.text) for prompt in prompts}
    fitting = [prompt for prompt in prompts if len(encoded[prompt.index]) <= room]
    if config.batch_size > 1:
        fitting.sort(key=lambda prompt: (-len(encoded[prompt.index]), prompt.index))
    for prompt in prompts:
        ids = encoded[prompt.index]
        if len(ids) > room:
            for method in methods:
                if prompt.index not in done[method]:
                    yield method, [_sample(prompt, len(ids)) | {"skipped": f"longer than {room} tokens"}]
    shared = shared_prompt(loaded.model, methods, compiled=config.compile)
    # One compiled graph serves all prompts: its cache has the room that the longest needs.
    positions = max((len(encoded[prompt.index]) for prompt in fitting), default=0) + config.task.max_new_tokens
    size = config.batch_size * (_BATCHES if _own_experts(config) else 1)
    for start in range(0, len(fitting), size):
        # What was cut off is run as a whole: its rows may share their experts, or take turns in the batch.
        group = fitting[start : start + size]
        needed = [method for method in methods if any(prompt.index not in done[method] for prompt in group)]
        begun = _Begun(loaded, shared, group, [encoded[prompt.index] for prompt in group], len(needed))
        for method in needed:
            # One group, one seed: its texts depend neither on what ran before them nor on a resumption.
            torch.manual_seed(zlib.crc32(f"{config.seed} {group[0].index}".encode()))
            for row, tokens, seconds in _timed(begun, _continued(loaded, begun, method, config, positions)):
                if group[row].index not in done[method]:
                    sample = _scored(group[row], len(begun.ids[row]), tokens, seconds, loaded.tokenizer, config.task)
                    yield method, [sample]


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """ROUGE F-scores x 100 with standard errors, and counts, over all samples of a run."""
    scored = [sample for sample in samples if "skipped" not in sample]
    values: dict[str, float] = {}
    for name in ROUGE if scored else ():
        values[name], values[f"{name}_stderr"] = mean_and_stderr([sample[name] for sample in scored])
    return values | {
        "samples": len(scored),
        "skipped_prompts": len(samples) - len(scored),
        "prompt_tokens": sum(sample["prompt_tokens"] for sample in scored),
        "generated_tokens": sum(sample["generated_tokens"] for sample in scored),
    }


def _sample(prompt: Prompt, prompt_tokens: int) -> Sample:
    return {"index": prompt.index, "id": prompt.id, "prompt_tokens": prompt_tokens}


class _Begun:
    """The prompts of a group. Each runs dense once, when it is wanted, for all methods.

    Args:
        loaded: the model.
        shared: runs them.
        group: the prompts.
        ids: their token ids.
        methods: how many methods will want each of them: for one, nothing is kept.

    Attributes:
        ids: their token ids.
        lengths: tokens of each.
        seconds: what running each took, for each of the methods.
        spent: seconds that all of them took, so far.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        shared: griffin.SharedPrompt,
        group: Sequence[Prompt],
        ids: Sequence[list[int]],
        methods: int,
    ) -> None:
        self.shared, self.ids, self.lengths = shared, ids, [len(one) for one in ids]
        self.seconds = [0.0] * len(ids)
        self.spent = 0.0
        self._methods = methods
        self._device = loaded.model.device
        # The last token may be another one where an article follows.
        beginning = torch.tensor(loaded.encode(group[0].beginning)[:-1], device=self._device)
        self._beginning = beginning if len(beginning) else None
        self._kept: dict[int, tuple[Tensor, griffin.SharedPrompt]] = {}

    def run(self, row: int) -> tuple[Tensor, griffin.SharedPrompt]:
        """The logits [1, V] after a prompt, and the prompt by itself."""
        if row in self._kept:
            return self._kept[row]
        start = time.perf_counter()
        ids_S = torch.tensor(self.ids[row], device=self._device)
        begun = self.shared.run_each([ids_S], self._beginning), self.shared.part(slice(0, 1))
        if self._methods > 1:
            self._kept[row] = begun
        seconds = time.perf_counter() - start
        self.seconds[row] = seconds / self._methods
        self.spent += seconds
        return begun


def _timed(begun: _Begun, texts: Iterator[tuple[int, list[int]]]) -> Iterator[tuple[int, list[int], float]]:
    """Texts as they come, and the seconds of each: since the one before, and this method's part of its prompt."""
    with contextlib.closing(texts):
        start, spent = time.perf_counter(), begun.spent
        for row, tokens in texts:
            own = time.perf_counter() - start - (begun.spent - spent)
            yield row, tokens, own + begun.seconds[row]
            start, spent = time.perf_counter(), begun.spent


def _own_experts(config: RunConfig) -> bool:
    """Whether several prompts are at work at a time, each with its own experts; never in a compiled call."""
    return config.batch_size > 1 and not config.shared_experts


def _continued(
    loaded: LoadedModel, begun: _Begun, method: Method, config: RunConfig, positions: int
) -> Iterator[tuple[int, list[int]]]:
    """Prompts of a group, by their row in it, and their new tokens under one method, as they come."""
    count, most = len(begun.ids), config.task.max_new_tokens
    shared, decoding = begun.shared, _decoding(loaded, config)
    # A method that counts the steps of a generation wants its prompts to begin together.
    counts = method.refresh != "none" and not method.dense
    if _own_experts(config) and not counts:
        slots: Any = shared.slots(begun.lengths, config.batch_size, most)
        yield from griffin.continue_in_turn(shared, begun.run, chooser(method, config.seed), slots, decoding)
        return
    for start in range(0, count, config.batch_size):
        rows = range(start, min(start + config.batch_size, count))
        lengths = [begun.lengths[row] for row in rows]
        logits, parts = zip(*(begun.run(row) for row in rows), strict=True)
        together = shared.joined(parts)
        if config.compile:
            slots = together.static_lockstep(lengths, positions)
        elif counts:
            slots = together.lockstep(lengths, most)
        else:
            slots = together.slots(lengths, config.batch_size, most)
        with pruned(together, method, config):
            texts = griffin.continue_together(together, torch.cat(logits), slots, decoding)
        yield from zip(rows, texts, strict=True)


def _decoding(loaded: LoadedModel, config: RunConfig) -> griffin.Decoding:
    """The task's way to choose tokens. An end token counts as one."""
    task, model = config.task, loaded.model
    eos = model.generation_config.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos])}

    def ended(tokens: list[int]) -> bool:
        # What follows the stop text would be cut anyway.
        return tokens[-1] in ends or task.stop in loaded.tokenizer.decode(tokens, skip_special_tokens=True)

    choose = _sampled if task.decoding == "reference_sampling" else _greedy
    call: Any = model.get_compiled_call(compiling(model.device)) if config.compile else model
    return griffin.Decoding(task.max_new_tokens, choose, ended, call)


def _greedy(logits_BV: Tensor) -> Tensor:
    return logits_BV.argmax(dim=-1)


def _sampled(logits_BV: Tensor) -> Tensor:
    """At temperature 0.3 from the whole vocabulary, as in the reference implementation's scripts."""
    return (logits_BV / 0.3).softmax(dim=-1).multinomial(1).squeeze(1)


def _scored(
    prompt: Prompt,
    prompt_tokens: int,
    generated: list[int],
    seconds: float,
    tokenizer: PreTrainedTokenizerBase,
    task: GenerationTask,
) -> Sample:
    text = tokenizer.decode(generated, skip_special_tokens=True).partition(task.stop)[0]
    scores = _scorer.score(target=prompt.reference, prediction=text)
    return (
        _sample(prompt, prompt_tokens)
        | {"generated_tokens": len(generated), "seconds": round(seconds, 4)}
        | {name: 100 * scores[name].fmeasure for name in ROUGE}
        | {"text": text, "reference": prompt.reference}
    )
