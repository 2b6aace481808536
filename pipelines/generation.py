"""Generation tasks: continue a prompt, compare the text with a reference by ROUGE."""

from __future__ import annotations

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
from pipelines.methods import Method, pruned, shared_prompt
from pipelines.models import LoadedModel
from pipelines.prompts import Prompt, read_prompts
from pipelines.records import Sample, mean_and_stderr
from pipelines.task_config import GenerationTask

ROUGE = ("rouge1", "rouge2", "rougeL")

# Where every prompt has its own experts, so many batches of prompts are at hand to take the slots of those that end.
_BATCHES = 2

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
    """Generate and score, group by group: one dense pass over a group's prompts, then each method's continuation.

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
    own_experts = config.batch_size > 1 and not config.shared_experts
    size = config.batch_size * (_BATCHES if own_experts else 1)
    for start in range(0, len(fitting), size):
        # What was cut off is run as a whole: its rows may share their experts, or take turns in the batch.
        batch = fitting[start : start + size]
        needed = [method for method in methods if any(prompt.index not in done[method] for prompt in batch)]
        for method, samples in _generate(loaded, shared, batch, encoded, config, positions, needed):
            yield method, [sample for sample in samples if sample["index"] not in done[method]]


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


def _generate(
    loaded: LoadedModel,
    shared: griffin.SharedPrompt,
    batch: Sequence[Prompt],
    encoded: dict[int, list[int]],
    config: RunConfig,
    positions: int,
    methods: Sequence[Method],
) -> Iterator[tuple[Method, list[Sample]]]:
    """The samples of one batch under each method, scored, in the batch's order."""
    if not methods:
        return
    task: GenerationTask = config.task
    rows = [encoded[prompt.index] for prompt in batch]
    start = time.perf_counter()
    # The last token may be another one where an article follows.
    beginning = torch.tensor(loaded.encode(batch[0].beginning)[:-1], device=loaded.model.device)
    prompts = [torch.tensor(ids, device=loaded.model.device) for ids in rows]
    logits_RV = shared.run_each(prompts, beginning if len(beginning) else None)
    shared_seconds = (time.perf_counter() - start) / len(methods)
    for method in methods:
        if task.decoding == "reference_sampling":
            # One prompt, one seed: the text depends neither on the prompts before it nor on a resumption.
            torch.manual_seed(zlib.crc32(f"{config.seed} {batch[0].index}".encode()))
        start = time.perf_counter()
        generated: list[list[int]] = []
        for some in _together(method, config, len(batch)):
            part = shared if some == slice(0, len(batch)) else shared.part(some)
            with pruned(part, method, config):
                generated += _continue(loaded, part, logits_RV[some], method, config, positions)
        seconds = (shared_seconds + time.perf_counter() - start) / len(batch)
        yield (
            method,
            [
                _scored(prompt, len(ids), tokens, seconds, loaded.tokenizer, task)
                for prompt, ids, tokens in zip(batch, rows, generated, strict=True)
            ],
        )


def _refreshes(method: Method) -> bool:
    """Whether the method counts the steps of a generation, so that its prompts must begin together."""
    return method.refresh != "none" and not method.dense


def _together(method: Method, config: RunConfig, prompts: int) -> list[slice]:
    """Which of the prompts are continued together."""
    size = config.batch_size if _refreshes(method) else prompts
    return [slice(start, min(start + size, prompts)) for start in range(0, prompts, size)]


def _continue(
    loaded: LoadedModel,
    shared: griffin.SharedPrompt,
    logits_RV: Tensor,
    method: Method,
    config: RunConfig,
    positions: int,
) -> list[list[int]]:
    """Each prompt's new tokens; an end token counts as one."""
    task, model = config.task, loaded.model
    eos = model.generation_config.eos_token_id
    ends = {*(eos if isinstance(eos, list) else [eos])}

    def ended(tokens: list[int]) -> bool:
        # What follows the stop text would be cut anyway.
        return tokens[-1] in ends or task.stop in loaded.tokenizer.decode(tokens, skip_special_tokens=True)

    if config.compile:
        call: Any = model.get_compiled_call(compiling(model.device))
        slots: Any = shared.static_lockstep(positions)
    elif _refreshes(method):
        call, slots = model, shared.lockstep(task.max_new_tokens)
    else:
        call, slots = model, shared.slots(config.batch_size, task.max_new_tokens)
    choose = _sampled if task.decoding == "reference_sampling" else _greedy
    return griffin.continue_prompts(shared, logits_RV, slots, task.max_new_tokens, choose, ended, call)


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
