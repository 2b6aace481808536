"""Generation tasks: continue a prompt, compare the text with a reference by ROUGE."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

import griffin
from pipelines.config import RunConfig
from pipelines.methods import Method, pruner_options
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
    """Generate and score, method by method and one batch of samples at a time.

    A prompt that leaves no room for `max_new_tokens` in the model's context is not run and says so, as in the
    reference implementation.
    """
    for method in methods:
        with nullcontext() if method.dense else griffin.prune(loaded.model, **pruner_options(config, method)):
            for start in range(0, len(prompts), config.batch_size):
                # A batch that was cut off is run as a whole: its rows may share their experts.
                batch = prompts[start : start + config.batch_size]
                if any(prompt.index not in done[method] for prompt in batch):
                    samples = _evaluate_batch(loaded, batch, config)
                    yield method, [sample for sample in samples if sample["index"] not in done[method]]


def _evaluate_batch(loaded: LoadedModel, batch: Sequence[Prompt], config: RunConfig) -> list[Sample]:
    task: GenerationTask = config.task
    room = loaded.context_length - task.max_new_tokens
    encoded = [loaded.encode(prompt.text) for prompt in batch]
    fitting = [(prompt, ids) for prompt, ids in zip(batch, encoded, strict=True) if len(ids) <= room]
    samples = [
        _sample(prompt, len(ids)) | {"skipped": f"longer than {room} tokens"}
        for prompt, ids in zip(batch, encoded, strict=True)
        if len(ids) > room
    ]
    if fitting:
        samples += _generate(loaded, fitting, task, config.seed)
    return sorted(samples, key=lambda sample: sample["index"])


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
    loaded: LoadedModel, batch: list[tuple[Prompt, list[int]]], task: GenerationTask, seed: int
) -> list[Sample]:
    tokenizer, device = loaded.tokenizer, loaded.model.device
    padded = tokenizer.pad({"input_ids": [ids for _, ids in batch]}, return_tensors="pt").to(device)
    width = padded["input_ids"].shape[1]
    if task.decoding == "reference_sampling":
        # One prompt, one seed: the text depends neither on the prompts before it nor on a resumption.
        torch.manual_seed(zlib.crc32(f"{seed} {batch[0][0].index}".encode()))
    stop = _StopText(tokenizer, width, task.stop, len(batch))
    start = time.perf_counter()
    output = loaded.model.generate(
        **padded,
        generation_config=_decoding(task, tokenizer, loaded.model.generation_config.eos_token_id),
        stopping_criteria=StoppingCriteriaList([stop]),
    )
    seconds = (time.perf_counter() - start) / len(batch)
    samples = []
    for (prompt, ids), row, stopped in zip(batch, output[:, width:].tolist(), stop.lengths, strict=True):
        generated = _until_end(row[:stopped], loaded.model.generation_config.eos_token_id)
        text = tokenizer.decode(generated, skip_special_tokens=True).partition(task.stop)[0]
        scores = _scorer.score(target=prompt.reference, prediction=text)
        samples.append(
            _sample(prompt, len(ids))
            | {"generated_tokens": len(generated), "seconds": round(seconds, 4)}
            | {name: 100 * scores[name].fmeasure for name in ROUGE}
            | {"text": text, "reference": prompt.reference}
        )
    return samples


def _decoding(task: GenerationTask, tokenizer: PreTrainedTokenizerBase, eos: int | list[int]) -> GenerationConfig:
    """Greedy, or as the reference implementation's scripts sample: temperature 0.3 over the whole vocabulary."""
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": 0.3, "top_k": 0, "top_p": 1.0}
        if task.decoding == "reference_sampling"
        else {"do_sample": False}
    )
    return GenerationConfig(
        max_new_tokens=task.max_new_tokens, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id, **sampling
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
