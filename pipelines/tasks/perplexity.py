"""Perplexity of what follows a prompt, by the lengths of both: the prompt runs dense, what follows uses its experts.

A window of the text is a prompt and the tokens after it; the generation of every length begins at the same token, so
for one prompt length a single pass over the longest generation gives all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

import griffin
from griffin import Method
from pipelines.config import RunConfig
from pipelines.data import read_text
from pipelines.errors import UserError
from pipelines.records import Sample
from pipelines.tasks.answers import means
from pipelines.tasks.prompts import Batches, Evaluation, Prompt, need_context


def read(config: RunConfig) -> list[Prompt]:
    """Windows of the text, by their numbers: which tokens they hold depends on the model's tokenizer. Without a limit,
    as many as whole ones fit in, at most 100."""
    text = read_text(config.task)
    if not text.strip():
        place = f"task.data_files={config.task.data_files}" if config.task.data_files else f"task={config.task.name}"
        raise UserError(f"{place}: expected text, found none")
    return [Prompt(index, str(index), text) for index in range(config.offset, config.offset + (config.limit or 100))]


def evaluate(run: Evaluation, windows: Sequence[Prompt]) -> Batches:
    """Negative log-likelihoods of every window under every method."""
    task, loaded = run.config.task, run.loaded
    most, longest = max(task.generation_lengths), max(task.prompt_lengths)
    need_context(run, prompt_lengths=longest, generation_lengths=most)
    ids = loaded.tokenizer(windows[0].text, add_special_tokens=False)["input_ids"]
    bos = [loaded.tokenizer.bos_token_id] if loaded.add_bos_token else []
    width = longest + most
    if len(ids) < width:
        raise UserError(f"task={task.name}: the text has {len(ids)} tokens, expected at least {width} for one window")
    whole = [window for window in windows if window.index < len(ids) // width]
    for (window,), beside in run.groups(whole, size=1):
        tokens = ids[window.index * width : (window.index + 1) * width]
        following = tokens[longest:]
        target_G = torch.tensor(following, device=loaded.model.device)
        nll: dict[Method, dict[str, float]] = {method: {} for method in beside}
        seconds = dict.fromkeys(beside, 0.0)
        for prompt_length in task.prompt_lengths:
            # All prompt lengths end at the same token, so that they are judged on the same text.
            prompt = [*bos, *tokens[longest - prompt_length + len(bos) : longest]]
            began = time.perf_counter()
            state = run.prefill(prompt)
            shared_seconds = (time.perf_counter() - began) / len(beside)
            for method, logits, own_seconds in _continued(run, state, beside, following[:-1]):
                logits_GV = torch.cat([state.logits_TV[-1:], logits]).float()
                each_G = torch.nn.functional.cross_entropy(logits_GV, target_G, reduction="none")
                for generation_length in task.generation_lengths:
                    nll[method][f"p{prompt_length}_g{generation_length}"] = float(each_G[:generation_length].mean())
                seconds[method] += shared_seconds + own_seconds
        for method in beside:
            if run.lacks(method, window):
                sample = {"index": window.index, "id": window.id, "nll": nll[method]}
                yield method, [sample | {"seconds": round(seconds[method], 4)}]


def _continued(
    run: Evaluation, state: griffin.PromptState, methods: Sequence[Method], ids: list[int]
) -> Iterator[tuple[Method, Tensor, float]]:
    """The logits [C, V] after each of these tokens under every method, and the seconds that they took."""
    if not ids:
        yield from ((method, state.logits_TV[:0], 0.0) for method in methods)
        return
    for rows, size in run.begun([None], methods, lambda _: state):
        for row, logits_CV in griffin.score(run.engine, ((row, ids) for row in rows), size):
            yield row.method, logits_CV, row.seconds


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """`perplexity` (over all cells) and `perplexity_pP_gG` per cell, with standard errors, and the window count.

    A standard error of a perplexity is that of the mean negative log-likelihood times the perplexity.
    """
    cells = list(samples[0]["nll"]) if samples else []
    parts = {"perplexity": cells, **{f"perplexity_{cell}": [cell] for cell in cells}} if cells else {}
    losses = [
        {name: sum(sample["nll"][key] for key in keys) / len(keys) for name, keys in parts.items()}
        for sample in samples
    ]
    values = means(losses, [*parts])
    for name in parts:
        values[name] = math.inf if values[name] > 700 else math.exp(values[name])  # which overflows
        values[f"{name}_stderr"] *= values[name]
    return values | {"samples": len(samples)}
