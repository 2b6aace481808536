"""Perplexity of what follows a prompt, by the lengths of both: the prompt runs dense, what follows uses its experts.

A window of the text is a prompt and the tokens after it; the generation of every length begins at the same token, so
for one prompt length a single pass over the longest generation gives all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import griffin
from griffin import Method
from pipelines.config import RunConfig
from pipelines.data import read_text
from pipelines.errors import UserError
from pipelines.methods import engine_for
from pipelines.models import LoadedModel
from pipelines.records import Sample, mean_and_stderr
from pipelines.tasks.grouping import begun, groups


@dataclass(frozen=True)
class Window:
    """The number of a stretch of the text; which tokens it holds depends on the model's tokenizer."""

    index: int
    text: str


def read(config: RunConfig) -> list[Window]:
    """`limit` windows of the text after the first `offset`; without a limit, as many as whole ones fit in, at most 100.

    Raises:
        UserError: the text is missing or unreachable.
    """
    text = read_text(config.task)
    if not text.strip():
        place = f"task.data_files={config.task.data_files}" if config.task.data_files else f"task={config.task.name}"
        raise UserError(f"{place}: expected text, found none")
    return [Window(index, text) for index in range(config.offset, config.offset + (config.limit or 100))]


def evaluate(
    loaded: LoadedModel,
    windows: Sequence[Window],
    config: RunConfig,
    methods: Sequence[Method],
    done: dict[Method, set[int]],
) -> Iterator[tuple[Method, list[Sample]]]:
    """Negative log-likelihoods of every window under every method.

    Raises:
        UserError: the text has no whole window, or a window does not fit into the model's context.
    """
    task = config.task
    most, longest = max(task.generation_lengths), max(task.prompt_lengths)
    if longest + most > loaded.context_length:
        raise UserError(
            f"task.prompt_lengths={longest} with task.generation_lengths={most}: "
            f"expected at most {loaded.context_length} tokens together, the context of {config.model.name}"
        )
    ids = loaded.tokenizer(windows[0].text, add_special_tokens=False)["input_ids"]
    bos = [loaded.tokenizer.bos_token_id] if loaded.add_bos_token else []
    width = longest + most
    if len(ids) < width:
        raise UserError(f"task={task.name}: the text has {len(ids)} tokens, expected at least {width} for one window")
    device = loaded.model.device
    engine, record = engine_for(loaded.model, methods, config), griffin.wanted(methods)
    whole = [window for window in windows if window.index < len(ids) // width]
    for (window,), run in groups(whole, methods, config, done, size=1):
        tokens = ids[window.index * width : (window.index + 1) * width]
        following = tokens[longest:]
        nll: dict[Method, dict[str, float]] = {method: {} for method in run}
        seconds = dict.fromkeys(run, 0.0)
        for prompt_length in task.prompt_lengths:
            # All prompt lengths end at the same token, so that they are judged on the same text.
            prompt = [*bos, *tokens[longest - prompt_length + len(bos) : longest]]
            began = time.perf_counter()
            (state,) = griffin.prefill(engine, [prompt], record)
            shared_seconds = (time.perf_counter() - began) / len(run)
            for method, logits, own_seconds in _continued(engine, state, run, following[:-1], config):
                logits_GV = torch.cat([state.logits_TV[-1:], logits]).float()
                target_G = torch.tensor(following, device=device)
                each_G = torch.nn.functional.cross_entropy(logits_GV, target_G, reduction="none")
                for generation_length in task.generation_lengths:
                    nll[method][_cell(prompt_length, generation_length)] = float(each_G[:generation_length].mean())
                seconds[method] += shared_seconds + own_seconds
        for method in run:
            if window.index not in done[method]:
                sample = {"index": window.index, "id": str(window.index), "nll": nll[method]}
                yield method, [sample | {"seconds": round(seconds[method], 4)}]


def _continued(
    engine: griffin.Engine, state: griffin.PromptState, methods: Sequence[Method], ids: list[int], config: RunConfig
) -> Iterator[tuple[Method, Tensor, float]]:
    """The logits [C, V] after each of these tokens under every method, and the seconds that they took."""
    if not ids:
        yield from ((method, state.logits_TV[:0], 0.0) for method in methods)
        return
    for rows, size in begun(engine, [None], methods, config, lambda _: state):
        for row, logits_CV in griffin.score(engine, ((row, ids) for row in rows), size):
            yield row.method, logits_CV, row.seconds


def metrics(samples: Sequence[Sample]) -> dict[str, float]:
    """`perplexity` (over all cells) and `perplexity_pP_gG` per cell, with standard errors, and the window count.

    A standard error of a perplexity is that of the mean negative log-likelihood times the perplexity.
    """
    cells = list(samples[0]["nll"]) if samples else []
    values: dict[str, float] = {}
    for name, keys in {"perplexity": cells, **{f"perplexity_{cell}": [cell] for cell in cells}}.items():
        if not cells:
            continue
        mean, stderr = mean_and_stderr([sum(sample["nll"][key] for key in keys) / len(keys) for sample in samples])
        values[name] = math.inf if mean > 700 else math.exp(mean)  # which overflows
        values[f"{name}_stderr"] = stderr * values[name]
    return values | {"samples": len(samples)}


def _cell(prompt_length: int, generation_length: int) -> str:
    return f"p{prompt_length}_g{generation_length}"
