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
from transformers import Cache, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

import griffin
from pipelines.compiling import compiling
from pipelines.config import RunConfig
from pipelines.methods import Method, pruned, shared_prompt
from pipelines.models import LoadedModel
from pipelines.prompts import Prompt, read_prompts
from pipelines.records import Sample, mean_and_stderr
from pipelines.task_config import GenerationTask

ROUGE = ("rouge1", "rouge2", "rougeL")

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
    """Generate and score, batch by batch: one dense pass over a batch's prompts, then each method's continuation.

    Batches hold prompts of like length, the longest first, so that little of them is padding and what does not fit
    into memory fails at once. A prompt that leaves no room for `max_new_tokens` in the model's context is not run
    and says so, as in the reference implementation.
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
    shared = shared_prompt(loaded.model, methods)
    decoding = _decoding(config, loaded.tokenizer, loaded.model.generation_config.eos_token_id, loaded.model.device)
    # One compiled graph serves all prompts: its cache has the room that the longest needs.
    positions = max((len(encoded[prompt.index]) for prompt in fitting), default=0) + config.task.max_new_tokens
    for start in range(0, len(fitting), config.batch_size):
        # A batch that was cut off is run as a whole: its rows may share their experts.
        batch = fitting[start : start + config.batch_size]
        needed = [method for method in methods if any(prompt.index not in done[method] for prompt in batch)]
        for method, samples in _generate(loaded, shared, batch, encoded, config, decoding, positions, needed):
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
    decoding: GenerationConfig,
    positions: int,
    methods: Sequence[Method],
) -> Iterator[tuple[Method, list[Sample]]]:
    """The samples of one batch under each method, scored, in the batch's order."""
    if not methods:
        return
    task: GenerationTask = config.task
    rows = [encoded[prompt.index] for prompt in batch]
    start = time.perf_counter()
    logits_BV = shared.run_each([torch.tensor(ids, device=loaded.model.device) for ids in rows]).float()
    shared_seconds = (time.perf_counter() - start) / len(methods)
    for method in methods:
        if task.decoding == "reference_sampling":
            # One prompt, one seed: the text depends neither on the prompts before it nor on a resumption.
            torch.manual_seed(zlib.crc32(f"{config.seed} {batch[0].index}".encode()))
        start = time.perf_counter()
        with pruned(shared, method, config):
            cache = shared.fork_static(positions) if config.compile else shared.fork(task.max_new_tokens)
            generated = _continue(loaded, cache, rows, logits_BV, task, decoding)
        seconds = (shared_seconds + time.perf_counter() - start) / len(batch)
        yield (
            method,
            [
                _scored(prompt, len(ids), tokens, seconds, loaded.tokenizer, task)
                for prompt, ids, tokens in zip(batch, rows, generated, strict=True)
            ],
        )


def _continue(
    loaded: LoadedModel,
    cache: Cache,
    rows: Sequence[list[int]],
    logits_BV: Tensor,
    task: GenerationTask,
    decoding: GenerationConfig,
) -> list[list[int]]:
    """Each row's new tokens: the first from the dense prompt's logits [B, V], the others from the model as it is."""
    tokenizer, device, eos = loaded.tokenizer, loaded.model.device, loaded.model.generation_config.eos_token_id
    padded = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt").to(device)
    width = padded["input_ids"].shape[1]
    first_B1 = (
        (logits_BV / decoding.temperature).softmax(dim=-1).multinomial(1)
        if decoding.do_sample
        else logits_BV.argmax(dim=-1, keepdim=True)
    )
    output = torch.cat([padded["input_ids"], first_B1], dim=1)
    stop = _StopText(tokenizer, width, task.stop, len(rows))
    stopped_B = stop(output, None)
    if task.max_new_tokens > 1 and not (stopped_B | torch.isin(first_B1[:, 0], torch.tensor(eos, device=device))).all():
        output = loaded.model.generate(
            output,
            attention_mask=torch.cat([padded["attention_mask"], torch.ones_like(first_B1)], dim=1),
            past_key_values=cache,
            generation_config=decoding,
            stopping_criteria=StoppingCriteriaList([stop]),
        )
    return [
        _until_end(row[:stopped], eos) for row, stopped in zip(output[:, width:].tolist(), stop.lengths, strict=True)
    ]


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


def _decoding(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, eos: int | list[int], device: torch.device
) -> GenerationConfig:
    """How all tokens but the first are decoded: greedily, or sampled as in the reference implementation's scripts, at
    temperature 0.3 from the whole vocabulary."""
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": 0.3, "top_k": 0, "top_p": 1.0}
        if config.task.decoding == "reference_sampling"
        else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=max(config.task.max_new_tokens - 1, 1),
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        compile_config=compiling(device) if config.compile else None,
        disable_compile=not config.compile,
        **sampling,
    )


def _until_end(row: list[int], eos: int | list[int]) -> list[int]:
    """A row's generated tokens without the padding behind them; an end token counts as generated."""
    ends = {*(eos if isinstance(eos, list) else [eos])}
    length = next((place for place, token in enumerate(row, start=1) if token in ends), len(row))
    return row[:length]


class _StopText(StoppingCriteria):
    """Ends a row once its generated text holds the stop text: what follows would be cut anyway.

    Attributes:
        lengths: per row, how many tokens it took; None while the stop text has not come. Padding behind a row may be
            the end token itself, so the row alone does not tell.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, stop: str, rows: int) -> None:
        self.tokenizer, self.width, self.stop = tokenizer, width, stop
        self.lengths: list[int | None] = [None] * rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        for row, text in enumerate(texts):
            if self.lengths[row] is None and self.stop in text:
                self.lengths[row] = input_ids.shape[1] - self.width
        return torch.tensor([length is not None for length in self.lengths], device=input_ids.device)
